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
    python evaluate.py retrieve runs/mine --data photos/ --attack   # or CopyDays, Oxford
    python evaluate.py duplicates runs/mine --data photos/ --out duplicates.csv
    python evaluate.py compare runs/compare --data flowers/ --seeds 0,1,2    # train.py's methods
    python evaluate.py scaling runs/scaling --data 'photos/*.tar' --sets flowers/,leaves/

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
retrieve: images found by their features, of published benchmarks or, attacked, of one's own.
duplicates: groups of images that are nearly the same, and a list of those to keep.
compare: the methods of train.py, trained with several seeds each and measured (docs/methods.md).
scaling: SwAV on parts of a set, with several trunks, measured on other sets (docs/scaling.md).
Of both CHECKPOINT is a new folder for all that, and a table comes in place of the JSON object.

Each protocol is a file of evaluation/.
"""
import os

if __name__ == "__main__":
    # Threads that spin while they wait starve the workers beside them (as in train.py).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import sys
from pathlib import Path

from data.demo import DemoImages
from data.images import open_images
from distributed.hardware import pick_device
from distributed.ranks import PATIENCE, init_process_group, is_main, leave_together
from evaluation import (
    compare,
    detect,
    duplicates,
    export,
    finetune,
    knn,
    linear,
    lowshot,
    retrieve,
    scaling,
)
from evaluation.command_line import add_options, refuse_others
from evaluation.task import EvalTask, open_task
from recipes.command_line import configure, hyphens, rule_for
from recipes.config import complete, with_length
from weights.atomic import refuse_existing
from weights.terminal import one_sentence, reason

PROTOCOLS = {"knn": knn.run, "linear": linear.run, "lowshot": lowshot.run, "finetune": finetune.run,
             "classify": finetune.run_classify, "features": export.run_features,
             "clusters": export.run_clusters, "detect": detect.run, "retrieve": retrieve.run,
             "duplicates": duplicates.run}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "evaluate.py", usage="evaluate.py WHAT CHECKPOINT [--data DIR] [more: see --help]",
        description="Measure what a trunk has learned.", allow_abbrev=False)
    parser.add_argument("what", choices=[*PROTOCOLS, *OF_RUNS])
    add_options(parser)
    options = parser.parse_args(hyphens(sys.argv[1:] if argv is None else argv))
    refuse_others(parser, options)
    return options


def run_compare(options: argparse.Namespace) -> bool:
    """With SwAV's recipe for the set, whose trunk and length all methods have."""
    given = {"data": os.path.join(options.data, "train")} if options.data else {"recipe": "demo"}
    given |= {name: getattr(options, name) for name in ("arch", "steps", "images", "device")
              if getattr(options, name)}
    images = open_images(given["data"]) if options.data else DemoImages("train")
    return compare.run(options, with_length(configure(given, 1, images), len(images)))


def run_scaling(options: argparse.Namespace) -> bool:
    """With the recipe for the whole set."""
    if not options.data:
        raise ValueError("scaling needs --data: images to pretrain on, as train.py takes them")
    given = {name: getattr(options, name) for name in ("data", "steps", "images", "device")
             if getattr(options, name)}
    images = open_images(options.data)
    name, rule = rule_for(given, 1, images)
    recipe = with_length(complete(given, 1, name, rule), len(images))
    return scaling.run(options, images, recipe, [*rule])


OF_RUNS = {"compare": run_compare, "scaling": run_scaling}


def check_files(options: argparse.Namespace) -> None:
    """Raises ValueError where a file of the user's would be replaced."""
    tables = ("clusters", "duplicates")
    written = {".png": options.sheet,
               ".csv": (options.out or os.path.join(options.html, f"{options.what}.csv"))
               if options.what in tables else ""}
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
    if options.what == "duplicates":
        refuse_existing(duplicates.keep_file(Path(written[".csv"])), options.force, [options.data])


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
        if options.what not in PROTOCOLS:
            if "RANK" in os.environ:
                raise ValueError(f"{options.what} starts its runs itself: leave out torchrun")
            sys.exit(not OF_RUNS[options.what](options))
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
