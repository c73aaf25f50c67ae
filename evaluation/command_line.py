"""The command line of evaluate.py: its options, and which protocols they are of.

    parser = argparse.ArgumentParser()
    parser.add_argument("what")
    add_options(parser)
    options = parser.parse_args(["knn", "runs/mine", "--k", "10,20"])
    refuse_others(parser, options)                      # --shots is not of knn
"""
import argparse
import os
import re
from collections.abc import Callable

from distributed.hardware import PRECISIONS
from evaluation.duplicates import PER_COMPONENT
from evaluation.lowshot import SHOTS
from evaluation.pooling import COMPONENTS, POOLS
from evaluation.supervised import RECIPES
from methods.build import METHODS
from multicrop import MAX_SIZE
from weights.terminal import Text, number_in

_TRAINING = "linear finetune detect"
_LOOKING = "knn clusters detect retrieve duplicates"
_CUT = ("knn linear lowshot finetune classify features clusters compare scaling retrieve "
        "duplicates")
# options of some protocols; the others refuse them
PROTOCOLS_OF = {
    "k": "knn", "temperature": "knn", "depths": "linear lowshot retrieve duplicates",
    "shots": "lowshot", "draws": "lowshot", "sgd": "linear", "classes": "classify",
    "labels": "finetune detect",
    "recipe": "linear finetune classify", "area": "linear finetune",
    "epochs": f"{_TRAINING} compare", "batch_size": _TRAINING,
    "lr": f"{_TRAINING} compare", "shard": "finetune",
    "crop_ratio": _CUT, "bicubic": _CUT,
    "out": "linear finetune detect features clusters duplicates",
    "sheet": _LOOKING, "force": _LOOKING, "rows": _LOOKING,
    "columns": "knn clusters retrieve duplicates", "html": "clusters",
    "pool": "retrieve duplicates", "components": "retrieve duplicates", "threshold": "duplicates",
    "faiss": "duplicates",
    **dict.fromkeys(("attack", "queries", "whiten", "distractors"), "retrieve"),
    **dict.fromkeys(("train", "val", "annotations", "boxes_only", "checkpoint_activations", "show"),
                    "detect"),
    "steps": "detect compare scaling",
    "seed": "knn linear lowshot finetune classify features clusters detect retrieve duplicates",
    **dict.fromkeys(("seeds", "images", "jobs"), "compare scaling"),
    **dict.fromkeys(("methods", "minutes", "finetune", "trunks"), "compare"),
    **dict.fromkeys(("sets", "pictures", "archs"), "scaling")}


def several(kind: Callable) -> Callable:
    """"1,2,4" -> a list, for argparse."""
    return lambda given: [kind(word) for word in given.split(",")]


def add_options(parser: argparse.ArgumentParser) -> None:
    """All but the first, the protocol."""
    parser.add_argument("checkpoint", action=Text, help="run folder, checkpoint.pt, trunk.pt, a "
                        "file of another library, an official name (python -m weights), or random; "
                        "of compare and scaling their own folder")
    parser.add_argument("--data", action=Text, default="", help="folder with train/ and val/, "
                        "class folders or lists train.txt, val.txt, or one of class folders, of "
                        "which a fifth is val; of classify one folder of classes; of detect COCO's "
                        "layout or Pascal VOC's; of retrieve CopyDays', or revisited Oxford's or "
                        "Paris'; of features, clusters, duplicates, scaling, --attack and --show "
                        "any images, as train.py takes them; none: the demo's")
    parser.add_argument("--arch", action=Text, default="", help="of the network called random")
    parser.add_argument("--seed", type=number_in(int, 0, 2 ** 63 - 1), default=0, help="of the "
                        "network called random, of draws and of training")
    parser.add_argument("--out", action=Text, default="", help="file of features (.npy), "
                        "clusters and duplicates (.csv), folder of finetune, linear --sgd and "
                        "detect")
    shown = parser.add_argument_group("preprocessing")
    shown.add_argument("--size", type=number_in(int, 8, MAX_SIZE), default=0,
                       help="pixels; none: the size of the run's first crops, else 224; of detect "
                       "the short side, none: by its recipe")
    shown.add_argument("--crop-ratio", type=number_in(float, 0.1, 1, or_else=0), help="central "
                       "square over short side; 0: the whole image as a square; none: 0.875, demo "
                       "1, a fine-tuned network's own")
    shown.add_argument("--bicubic", action=argparse.BooleanOptionalAction)
    add_options_of_protocols(parser)
    add_options_of_search(parser)
    add_options_of_many_runs(parser)
    parser.add_argument("--device", action=Text, default="",
                        help="cuda, mps or cpu; none: the best one here")
    parser.add_argument("--workers", type=number_in(int, 0, 256),
                        default=min(8, os.cpu_count() or 1))


def refuse_others(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with a message where an option of another protocol is given, or two that exclude each
    other."""
    for name, protocols in PROTOCOLS_OF.items():
        if (options.what not in protocols.split()
                and getattr(options, name) != parser.get_default(name)):
            parser.error(f"--{name.replace('_', '-')} is of {', '.join(protocols.split())}, not "
                         f"of {options.what}")
    if options.what == "detect" and options.steps and options.epochs:
        parser.error("--steps or --epochs, not both")
    if sum(map(bool, (options.steps, options.images, options.minutes))) > 1:
        parser.error("one of --steps, --images and --minutes")


def add_options_of_protocols(parser: argparse.ArgumentParser) -> None:
    count, share = number_in(int, 1, 1_000_000), number_in(float, 0.001, 1)
    group = parser.add_argument_group("knn")
    group.add_argument("--k", type=several(count), default=[20], help="neighbours, one or several: "
                       "10,20,200 (SEER: 200; 20)")
    group.add_argument("--temperature", type=several(number_in(float, 0.001, 1000)), default=[0.1],
                       help="of the votes, one or several (SEER: 0.1, 10B 0.07)")
    group = parser.add_argument_group("linear, lowshot, retrieve and duplicates")
    group.add_argument("--depths", type=several(str), default=["avgpool"],
                       help="one or several of res2 to res5 and avgpool: res4,res5,avgpool; of "
                       "duplicates one")
    group.add_argument("--shots", type=several(count), default=list(SHOTS),
                       help="of lowshot: images a class")
    group.add_argument("--draws", type=number_in(int, 1, 1000), default=5,
                       help="of lowshot, for each number of shots")
    group.add_argument("--sgd", action="store_true", help="linear: VISSL's recipe")
    group = parser.add_argument_group("finetune, and linear --sgd")
    group.add_argument("--labels", action=Text, default="", help="a share of each class' labels, "
                       "as 0.01, or a list of file names; of detect a share of the images; none: "
                       "all")
    group.add_argument("--recipe", choices=list(RECIPES), help="none: small for a trunk "
                       "that has learned and fewer than 5,000 images with one label each, else "
                       "few where --labels is given, else finetune")
    group.add_argument("--epochs", type=number_in(float, 0.001, 100_000),
                       help="of compare those of its --finetune with all labels; none: by the "
                       "recipe")
    group.add_argument("--batch-size", type=number_in(int, 2, 8192))
    group.add_argument("--lr", type=number_in(float, 0, 1000), help="per 256 images of batch; "
                       "detect: per 16; of compare that of its --finetune")
    group.add_argument("--area", type=share, help="least share of an image's area in a crop")
    group.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS), help="bf16: "
                       "of features too, with half the memory; else these are fp32")
    group.add_argument("--shard", action="store_true", help="finetune by torchrun: each rank keeps "
                       "a part of the weights, as for 10 billion; with activation checkpointing")
    group = parser.add_argument_group("detect, and --labels to --precision but --recipe and --area")
    group.add_argument("--train", action=Text, default="", help="COCO's folder of images, VOC's "
                       "list; none: train2017, or train")
    group.add_argument("--val", action=Text, default="", help="none: val2017, or val")
    group.add_argument("--annotations", action=Text, help="COCO's files: {split} for the folder's "
                       "name, or TRAIN.json,VAL.json", default="annotations/instances_{split}.json")
    group.add_argument("--boxes-only", action="store_true", help="no masks: Faster R-CNN")
    group.add_argument("--steps", type=number_in(int, 1, 10_000_000), help="in place of --epochs")
    group.add_argument("--checkpoint-activations", action="store_true", help="of each block: less "
                       "memory, a third more time")
    group.add_argument("--show", action=Text, default="", help="draw what a trained detector finds "
                       "in the images of --data, into this folder, with detections.json")
    parser.add_argument("--classes", action=Text, default="",
                        help="classify: file of all class names, in order")
    group = parser.add_argument_group("pictures to look at")
    group.add_argument("--sheet", action=Text, default="", help="knn: queries with their "
                       "neighbours, right and wrong ones framed; clusters: images nearest to the "
                       "largest ones; detect: the ground truth and what was found; retrieve: "
                       "what was not found; duplicates: groups; a PNG")
    group.add_argument("--html", action=Text, default="", help="clusters: folder for a page to "
                       "look at them, index.html, which a browser opens from disk; the CSV too, "
                       "without --out")
    group.add_argument("--force", action="store_true", help="replace the files of --sheet, of "
                       "--out, of --html and of --show, where they are there")
    group.add_argument("--rows", type=number_in(int, 1, 100), default=16)
    group.add_argument("--columns", type=number_in(int, 1, 100), default=10)


def add_options_of_search(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("retrieve and duplicates")
    group.add_argument("--pool", choices=POOLS, default="rmac",
                       help="of a stage's map (SEER: rmac)")
    group.add_argument("--components", type=number_in(int, 1, 100_000), default=COMPONENTS,
                       help=f"of the whitening, at most (SEER: {COMPONENTS}); duplicates: at most "
                       f"one for {PER_COMPONENT} images")
    group.add_argument("--whiten", action=Text, default="", help="retrieve: images, as train.py "
                       "takes them, on which PCA whitening is learned; none: no whitening")
    group.add_argument("--distractors", action=Text, default="", help="retrieve: more images of "
                       "the database, as train.py takes them")
    group.add_argument("--attack", action="store_true", help="retrieve: images of --data under "
                       "attacks are the queries, and all its images the database")
    group.add_argument("--queries", type=number_in(int, 1, 1_000_000), default=200,
                       help="of --attack: images that are attacked, drawn at random")
    group.add_argument("--threshold", type=number_in(float, 0.001, 1), help="duplicates: "
                       "similarity from which on two images are nearly the same; none: by a rule")
    group.add_argument("--faiss", action="store_true", help="duplicates: search with that library")


def add_options_of_many_runs(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compare and scaling, with --steps, of SwAV's batch")
    group.add_argument("--seeds", type=several(number_in(int, 0, 2 ** 63 - 1)), default=[0, 1, 2])
    group.add_argument("--images", type=number_in(int, 1, 10 ** 12), default=0,
                       help="that each run sees; none, nor --steps: as SwAV's recipe says")
    group.add_argument("--jobs", type=number_in(int, 1, 256), default=1,
                       help="runs side by side, each with its share of the processors")
    group = parser.add_argument_group("compare")
    group.add_argument("--methods", type=several(str), default=list(METHODS),
                       help=f"some of {','.join(METHODS)}; none: all")
    group.add_argument("--minutes", type=number_in(float, 0.01, 1_000_000), default=0.0,
                       help="that each run trains, instead of as many images")
    group.add_argument("--finetune", action="store_true",
                       help="fine-tune too, with 1 %%, 10 %% and all of the labels; all take "
                       "about as long as a run of SwAV")
    group.add_argument("--trunks", type=lambda text: dict(several(named)(text)), default={},
                       metavar="NAME=CHECKPOINT,...", help="more rows: trunks that are there, each "
                       "a CHECKPOINT as of other protocols; {seed} in it stands for the seed")
    group = parser.add_argument_group("scaling")
    group.add_argument("--sets", type=several(str), default=[], help="labelled sets to measure on, "
                       "each as --data of other protocols: sets/emoji,sets/drawings")
    group.add_argument("--pictures", type=several(count_or_all), metavar="N,...,all",
                       default=[1000, 4000, 16_000, "all"],
                       help="of --data, to pretrain on: the first N of a fixed permutation, or all "
                       "(1000,4000,16000,all)")
    group.add_argument("--archs", type=several(str),
                       default=["regnety_100mf", "regnety_200mf", "regnety_400mf"],
                       help="trunks (regnety_100mf,regnety_200mf,regnety_400mf)")


def named(text: str) -> tuple[str, str]:
    """"NAME=CHECKPOINT", for argparse. The name is part of a folder's."""
    name, _, checkpoint = text.partition("=")
    if not re.fullmatch(r"\w[\w.+-]*", name) or not checkpoint:
        raise argparse.ArgumentTypeError(f"{text!r}: needs NAME=CHECKPOINT, the name of letters, "
                                         "digits, -, + and .")
    return name, checkpoint


def count_or_all(text: str) -> int | str:
    return text if text == "all" else number_in(int, 8, 10 ** 12)(text)
