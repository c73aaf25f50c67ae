"""Measure what a trunk has learned, as SEER did.

    python evaluate.py knn runs/demo-regnety_100mf                       # on the demo images
    python evaluate.py linear runs/mine/checkpoint.pt --data flowers/    # flowers/train/CLASS/*.jpg
    python evaluate.py lowshot seer_regnety_32gf --data flowers/         # flowers/val/CLASS/*.jpg
    torchrun --nproc_per_node 8 evaluate.py finetune runs/mine --data flowers/ --labels 0.1
    python evaluate.py classify runs/finetuned --data flowers/val
    python evaluate.py detect runs/mine --data coco/                     # or Pascal VOC's layout
    python evaluate.py features runs/mine --data photos/ --out features.npy
    python evaluate.py clusters runs/mine --data photos/ --out clusters.csv --sheet sheet.png
    python evaluate.py clusters runs/mine --data photos/ --html gallery/    # open index.html
    python evaluate.py compare runs/compare --data flowers/ --seeds 0,1,2    # train.py's methods

CHECKPOINT is a run's folder, its checkpoint.pt or trunk.pt, any other file or official name that
weights.files reads, or `random` for an untrained network. The last line on stdout is one JSON
object, which is also appended to results.jsonl beside the checkpoint; progress goes to stderr.

knn: votes of the nearest training images, for each of several k and temperatures.
linear: logistic regression on frozen features at each of several depths, or with --sgd VISSL's
recipe.  lowshot: linear SVMs on k images a class, drawn several times.
finetune: the whole network, on all labels or some.  classify: what that gave, or an official one.
detect: Mask R-CNN on the trunk, trained and measured; a trained one is measured, or with --show
draws what it finds.
features: of every image, to a memory-mapped file.  clusters: each image's nearest prototype; --html
makes a page to look at them.
compare: the methods of train.py, trained with several seeds each and measured. CHECKPOINT is a new
folder for all that, and a table comes in place of the JSON object (docs/methods.md).

Each protocol is a file of evaluation/.
"""
import os

if __name__ == "__main__":
    # Threads that spin while they wait starve the workers beside them (as in train.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from data.demo import DemoImages
from data.images import open_images
from distributed.hardware import PRECISIONS, pick_device
from distributed.ranks import PATIENCE, init_process_group, is_main, leave_together
from evaluation import compare, detect, export, finetune, knn, linear, lowshot
from evaluation.lowshot import SHOTS
from evaluation.supervised import RECIPES
from evaluation.task import EvalTask, open_task
from methods.build import METHODS
from multicrop import MAX_SIZE
from recipes.command_line import configure, hyphens
from recipes.config import Config, with_length
from weights.atomic import refuse_existing
from weights.terminal import Text, number_in, one_sentence, reason

PROTOCOLS = {"knn": knn.run, "linear": linear.run, "lowshot": lowshot.run, "finetune": finetune.run,
             "classify": finetune.run_classify, "features": export.run_features,
             "clusters": export.run_clusters, "detect": detect.run}     # and compare
_TRAINING = "linear finetune detect"
# options of some protocols; the others refuse them
PROTOCOLS_OF = {
    "k": "knn", "temperature": "knn", "depths": "linear lowshot", "shots": "lowshot",
    "draws": "lowshot", "sgd": "linear", "classes": "classify", "labels": "finetune detect",
    "recipe": "linear finetune classify", "area": "linear finetune", "epochs": _TRAINING,
    "batch_size": _TRAINING, "lr": _TRAINING, "shard": "finetune",
    "crop_ratio": "knn linear lowshot finetune classify features clusters compare",
    "bicubic": "knn linear lowshot finetune classify features clusters compare",
    "out": "linear finetune detect features clusters", "sheet": "knn clusters detect",
    "html": "clusters", "force": "knn clusters detect", "rows": "knn clusters detect",
    "columns": "knn clusters",
    **dict.fromkeys(("train", "val", "annotations", "boxes_only", "checkpoint_activations", "show"),
                    "detect"),
    "steps": "detect compare", "seed": " ".join(PROTOCOLS),
    **dict.fromkeys(("methods", "seeds", "images", "minutes", "jobs", "finetune"), "compare")}


def several(kind: Callable) -> Callable:
    """"1,2,4" -> a list, for argparse."""
    return lambda given: [kind(word) for word in given.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "evaluate.py", usage="evaluate.py WHAT CHECKPOINT [--data DIR] [more: see --help]",
        description="Measure what a trunk has learned.", allow_abbrev=False)
    parser.add_argument("what", choices=[*PROTOCOLS, "compare"])
    parser.add_argument("checkpoint", action=Text, help="run folder, checkpoint.pt, trunk.pt, a "
                        "file of another library, an official name (python -m weights), or random; "
                        "of compare its own folder")
    parser.add_argument("--data", action=Text, default="", help="folder with train/ and val/, "
                        "class folders or lists train.txt, val.txt, or one of class folders, of "
                        "which a fifth is val; of classify one folder of classes; of detect COCO's "
                        "layout or Pascal VOC's; of features, clusters and --show any images, as "
                        "train.py takes them; none: the demo's")
    parser.add_argument("--arch", action=Text, default="", help="of the network called random")
    parser.add_argument("--seed", type=number_in(int, 0, 2 ** 63 - 1), default=0, help="of the "
                        "network called random, of draws and of training")
    parser.add_argument("--out", action=Text, default="", help="file of features (.npy) and "
                        "clusters (.csv), folder of finetune, linear --sgd and detect")
    shown = parser.add_argument_group("preprocessing")
    shown.add_argument("--size", type=number_in(int, 8, MAX_SIZE), default=0,
                       help="pixels; none: the size of the run's first crops, else 224; of detect "
                       "the short side, none: by its recipe")
    shown.add_argument("--crop-ratio", type=number_in(float, 0.1, 1, or_else=0), help="central "
                       "square over short side; 0: the whole image as a square; none: 0.875, demo "
                       "1, a fine-tuned network's own")
    shown.add_argument("--bicubic", action=argparse.BooleanOptionalAction)
    add_options_of_protocols(parser)
    add_options_of_compare(parser)
    parser.add_argument("--device", action=Text, default="",
                        help="cuda, mps or cpu; none: the best one here")
    parser.add_argument("--workers", type=number_in(int, 0, 256),
                        default=min(8, os.cpu_count() or 1))
    options = parser.parse_args(hyphens(sys.argv[1:] if argv is None else argv))
    for name, protocols in PROTOCOLS_OF.items():
        if (options.what not in protocols.split()
                and getattr(options, name) != parser.get_default(name)):
            parser.error(f"--{name.replace('_', '-')} is of {', '.join(protocols.split())}, not "
                         f"of {options.what}")
    if options.steps and options.epochs:
        parser.error("--steps or --epochs, not both")
    if sum(map(bool, (options.steps, options.images, options.minutes))) > 1:
        parser.error("one of --steps, --images and --minutes")
    return options


def add_options_of_protocols(parser: argparse.ArgumentParser) -> None:
    count, share = number_in(int, 1, 1_000_000), number_in(float, 0.001, 1)
    group = parser.add_argument_group("knn")
    group.add_argument("--k", type=several(count), default=[20], help="neighbours, one or several: "
                       "10,20,200 (SEER: 200; 20)")
    group.add_argument("--temperature", type=several(number_in(float, 0.001, 1000)), default=[0.1],
                       help="of the votes, one or several (SEER: 0.1, 10B 0.07)")
    group = parser.add_argument_group("linear and lowshot")
    group.add_argument("--depths", type=several(str), default=["avgpool"],
                       help="one or several of res2 to res5 and avgpool: res4,res5,avgpool")
    group.add_argument("--shots", type=several(count), default=list(SHOTS),
                       help="of lowshot: images a class")
    group.add_argument("--draws", type=number_in(int, 1, 1000), default=5,
                       help="of lowshot, for each number of shots")
    group.add_argument("--sgd", action="store_true", help="linear: VISSL's recipe")
    group = parser.add_argument_group("finetune, and linear --sgd")
    group.add_argument("--labels", action=Text, default="", help="a share of each class' labels, "
                       "as 0.01, or a list of file names; of detect a share of the images; none: "
                       "all")
    group.add_argument("--recipe", choices=list(RECIPES), help="none: finetune, or few where "
                       "--labels is given")
    group.add_argument("--epochs", type=number_in(float, 0.001, 100_000))
    group.add_argument("--batch-size", type=number_in(int, 2, 8192))
    group.add_argument("--lr", type=number_in(float, 0, 1000), help="per 256 images of batch; "
                       "detect: per 16")
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
                       "largest ones; detect: the ground truth and what was found; a PNG")
    group.add_argument("--html", action=Text, default="", help="clusters: folder for a page to "
                       "look at them, index.html, which a browser opens from disk; the CSV too, "
                       "without --out")
    group.add_argument("--force", action="store_true", help="replace the files of --sheet, of "
                       "clusters --out and --html and of --show, where they are there")
    group.add_argument("--rows", type=number_in(int, 1, 100), default=16)
    group.add_argument("--columns", type=number_in(int, 1, 100), default=10)


def add_options_of_compare(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("compare, with --steps, of SwAV's batch")
    group.add_argument("--methods", type=several(str), default=list(METHODS),
                       help=f"some of {','.join(METHODS)}; none: all")
    group.add_argument("--seeds", type=several(number_in(int, 0, 2 ** 63 - 1)), default=[0, 1, 2])
    group.add_argument("--images", type=number_in(int, 1, 10 ** 12), default=0,
                       help="that each run sees; none, nor --steps: as SwAV's recipe says")
    group.add_argument("--minutes", type=number_in(float, 0.01, 1_000_000), default=0.0,
                       help="that each run trains, instead of as many images")
    group.add_argument("--jobs", type=number_in(int, 1, 256), default=1,
                       help="runs side by side, each with its share of the processors")
    group.add_argument("--finetune", action="store_true",
                       help="fine-tune too, with 1 %% and 10 %% of the labels")


def recipe_of_swav(options: argparse.Namespace) -> Config:
    """Of the set of a comparison, whose trunk and length all methods have."""
    given = {"data": os.path.join(options.data, "train")} if options.data else {"recipe": "demo"}
    given |= {name: getattr(options, name) for name in ("arch", "steps", "images", "device")
              if getattr(options, name)}
    images = open_images(given["data"]) if options.data else DemoImages("train")
    return with_length(configure(given, 1, images), len(images))


def check_files(options: argparse.Namespace) -> None:
    """Raises ValueError where a file of the user's would be replaced."""
    written = {".png": options.sheet,
               ".csv": (options.out or os.path.join(options.html, "clusters.csv"))
               if options.what == "clusters" else ""}
    for suffix, path in written.items():
        if path and not path.endswith(suffix):
            raise ValueError(f"{path} needs a name that ends in {suffix}")
        if path:
            refuse_existing(path, options.force, [options.data])
    if options.html:
        if options.out:
            raise ValueError("--html writes its CSV itself, into its folder: leave out --out")
        refuse_existing(options.html, options.force, [options.data])
        if options.data and Path(options.data).resolve().is_relative_to(
                Path(options.html).resolve()):
            raise ValueError(f"{options.html} holds the images themselves: choose another name")


def report(task: EvalTask, result: dict) -> None:
    """The line in results.jsonl beside the checkpoint, and then on stdout, which may be closed."""
    options = task.options
    line = json.dumps({
        "protocol": options.what, "checkpoint": options.checkpoint, "sha256": task.digest(),
        "data": options.data or "demo", **task.preprocessing.geometry, "seed": options.seed,
        "arch": options.arch or task.config.get("arch", ""),
        **({} if options.precision == "auto" else {"precision": options.precision}), **result})
    if task.loaded:
        results = task.loaded.path.parent / "results.jsonl"
        try:
            with open(results, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            print(f"could not be written: {reason(error)}", file=sys.stderr)
    print(line)


def main(argv: list[str] | None = None) -> None:
    with one_sentence("evaluate.py"):
        options = parse(argv)
        check_files(options)
        if options.what == "compare":
            if "RANK" in os.environ:
                raise ValueError("compare starts its runs itself: leave out torchrun")
            sys.exit(not compare.run(options, recipe_of_swav(options)))
        with leave_together():
            if "RANK" in os.environ:
                init_process_group(pick_device(options.device, int(os.environ["LOCAL_RANK"])),
                                   2 * PATIENCE)
            task = open_task(options)
            result = PROTOCOLS[options.what](task)
            if is_main():
                report(task, result)


if __name__ == "__main__":
    main()
