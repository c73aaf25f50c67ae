"""Compare: several methods on one trunk, each with several seeds, trained, measured, in one table.

    python evaluate.py compare runs/emoji --data sets/emoji --seeds 0,1,2
    python evaluate.py compare runs/emoji --data sets/emoji --seeds 0,1,2,3         # one more
    python evaluate.py compare runs/hour --methods swav,byol --minutes 60 --jobs 2
    python evaluate.py compare runs/emoji --data sets/emoji --finetune --trunks mine=runs/mine

A cell is a method and a seed. Its run is a process, `train.py --method METHOD --seed SEED`, in
OUT/METHOD-SEED; what it prints is in OUT/METHOD-SEED.txt. Then its frozen features are measured,
and the cell is a line of OUT/results.jsonl (cells.py). The same command goes on where it was ended,
and does only what is not there. Two rows need no run: the untrained trunks of the same seeds, and
the trunks of --trunks, of any arch. OUT also holds compare.json (the settings, which all cells
share), table.md and compare.png.

All methods see as many images; or, with --minutes, each as many as it sees in that time by a short
run before, OUT/timing-METHOD.

Shapes: N training images, M queries, C features.
"""
import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from data.labelled import digest_of, find_splits, open_splits
from evaluation import finetune
from evaluation.cells import (
    DRAWS,
    FINETUNED,
    FROZEN,
    UNTRAINED,
    caption,
    cost,
    images_in,
    is_finished,
    keep_settings,
    read_cells,
    rows_of,
    table,
    write_cell,
)
from evaluation.finetune import share_of_classes
from evaluation.knn import knn_top1
from evaluation.linear import linear_probe
from evaluation.metrics import per_cent
from evaluation.runs import command, fault, measured, side_by_side, until_interrupted
from evaluation.task import EvalTask, Extracted, choose_preprocessing, open_task
from figures.comparison import comparison
from figures.curves import read_log
from methods.build import METHODS
from weights.atomic import lock, write_whole

SHARES = {"1": 0.01, "10": 0.1}                         # per cent of the labels
TIMED = {"steps": 15, "log_every": 5}                   # of --minutes; the log has three lines


# -------------------------------------------------------------------------------------- the runs
def command_of(options: argparse.Namespace, arch: str, out: Path, method: str, seed: int,
               **length: int) -> list[str]:
    data = {"data": Path(options.data, "train")} if options.data else {"recipe": "demo"}
    return command(options, **data, method=method, seed=seed, arch=arch, out=out, **length)


def lengths(options: argparse.Namespace, recipe, out: Path,
            methods: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Images that each method sees; and why others have none. With --minutes a short run says how
    many that are."""
    if not options.minutes:
        return dict.fromkeys(methods, recipe.steps * recipe.batch_size), {}
    logs = {method: out / f"timing-{method}.txt" for method in methods}
    commands = {
        method: (command_of(options, recipe.arch, log.with_suffix(""), method, 0, **TIMED), log)
        for method, log in logs.items() if not was_timed(log.with_suffix(""))}
    faults = {}
    with contextlib.closing(side_by_side(commands, options.jobs)) as runs:
        for method, status in runs:
            if status:
                faults[method] = fault(logs[method], status)
    return {method: images_in(options.minutes, log.with_suffix(""))
            for method, log in logs.items() if method not in faults}, faults


def was_timed(run: Path) -> bool:
    return (run / "log.jsonl").exists() and len(read_log(run)) >= 3


# --------------------------------------------------------------------------------- what is measured
def task_of(options: argparse.Namespace, recipe, checkpoint: Path | str, **more) -> EvalTask:
    """A trunk, with the preprocessing of all: the size of the recipe's first crops, or --size.
    more: options of evaluate.py in place of the given ones."""
    task = open_task(argparse.Namespace(**vars(options) | {
        "checkpoint": str(checkpoint), "size": options.size or recipe.crops[0].size} | more))
    if not task.loaded:                                 # untrained: has no means of its own
        task.preprocessing = choose_preprocessing(recipe.as_dict(), None, task.options)
    return task


def frozen(train: Extracted, val: Extracted) -> dict[str, float]:
    """Top-1 of kNN and of the linear probe."""
    (features,), (queries,) = train.outputs, val.outputs
    labels, truth = train.labelled.labels, val.labelled.labels
    predicted, _ = linear_probe(features, labels, queries)
    return {"knn": knn_top1(features, labels, queries, truth), "linear": per_cent(predicted, truth)}


def few_labels(train: Extracted, val: Extracted, part: float) -> float:
    """Top-1 of the linear probe with a part of each class' labels, at least one, and about ten in
    all: the mean of DRAWS draws, which are the same for all networks."""
    (features,), (queries,), labelled = train.outputs, val.outputs, train.labelled
    top1, part = [], max(part, 10 / len(features))
    for draw in range(DRAWS):
        chosen = torch.tensor(share_of_classes(labelled.targets, part, draw))
        predicted, _ = linear_probe(features[chosen], labelled.labels[chosen], queries)
        top1.append(per_cent(predicted, val.labelled.labels))
    return round(statistics.mean(top1), 2)


def measure(options: argparse.Namespace, recipe, run: Path, method: str, seed: int) -> dict:
    """The columns of a cell. run: folder of its run, where it has one, and the beginning of the
    names of those that fine-tuning writes."""
    given = given_trunk(options, method, seed)
    source = given or ("random" if method == UNTRAINED else run / "trunk.pt")
    network = {"arch": "" if given else recipe.arch, "seed": seed}
    train, val = task_of(options, recipe, source, what="linear",
                         **network).extract_splits(["avgpool"])
    cell = frozen(train, val) | ({"checkpoint": given} if given else {})
    for name, part in SHARES.items():
        cell[f"linear_{name}"] = few_labels(train, val, part)
    for name, part in (SHARES | {"100": ""}).items() if options.finetune else ():
        task = task_of(options, recipe, source, what="finetune", labels=str(part),
                       epochs=options.epochs if name == "100" else None,
                       out=f"{run}-finetuned-{name}", **network)
        cell[f"finetuned_{name}"] = finetune.run(task)["top1"]
    return cell


def given_trunk(options: argparse.Namespace, method: str, seed: int) -> str:
    """The checkpoint of a row of --trunks; "" of other rows."""
    source = options.trunks.get(method, "").replace("{seed}", str(seed))
    return os.path.abspath(source) if os.path.exists(source) else source


# ------------------------------------------------------------------------------------- the protocol
def write_table(out: Path, settings: dict) -> str:
    cells = read_cells(out)
    text = f"{table(rows_of(cells))}\n\n{caption(settings, cells)}\n"
    write_whole(out / "table.md", text)
    return text


def draw(out: Path, settings: dict) -> None:
    rows = rows_of(read_cells(out))
    equal = (f"{settings['minutes']:g} minutes each" if settings["minutes"]
             else f"{settings['images']:,} images seen by each")
    title = f"{Path(settings['data']).name}, {settings['arch']}, {equal}"
    panels = {FROZEN[name]: {row["method"]: row[name] for row in rows}
              for name in ("knn", "linear")}
    if rows:
        comparison(out / "compare.png", title, panels, UNTRAINED)


def fill(options: argparse.Namespace, recipe, out: Path, settings: dict) -> None:
    """The cells that are asked for and not there. The table is written after each."""
    cells, columns = read_cells(out), [*FROZEN, *(FINETUNED if options.finetune else ())]
    todo = [(method, seed) for seed in options.seeds
            for method in (UNTRAINED, *options.trunks, *options.methods)
            if not is_finished(cells.get((method, seed)), columns)]
    methods = [method for method in options.methods if method in {method for method, _ in todo}]
    images, faults = lengths(options, recipe, out, methods)
    runs = {(method, seed): out / f"{method}-{seed}" for method, seed in todo}
    commands = {(method, seed): (
        command_of(options, recipe.arch, runs[method, seed], method, seed, images=images[method]),
        Path(f"{runs[method, seed]}.txt")) for method, seed in todo if method in images}

    def measure_one(method: str, seed: int) -> dict:
        cell = measure(options, recipe, runs[method, seed], method, seed)
        if (method, seed) in commands:
            cell |= cost(runs[method, seed]) | {"jobs": options.jobs}
        return cell

    with contextlib.closing(measured(
            todo, commands, {key: faults.get(key[0], "") for key in todo}, measure_one,
            options.jobs)) as found:
        for (method, seed), cell in found:
            write_cell(out, {"method": method, "seed": seed} | cell)
            write_table(out, settings)
            numbers = [f"{name} {cell[name]}" for name in (*columns, "failed") if name in cell]
            print(f"{method}, seed {seed}:", ", ".join(numbers), file=sys.stderr, flush=True)


def check_rows(options: argparse.Namespace, out: Path) -> None:
    """Raises ValueError for an unknown method, and a trunk whose name another row has."""
    if unknown := sorted({*options.methods} - METHODS.keys()):
        raise ValueError(f"unknown method {unknown[0]!r}; there is {', '.join(METHODS)}")
    if taken := sorted({*options.trunks} & {UNTRAINED, *METHODS}):
        raise ValueError(f"--trunks {taken[0]}=...: {taken[0]} is another row; choose another name")
    for (method, seed), cell in read_cells(out).items():
        given = given_trunk(options, method, seed)
        if given and given != cell.get("checkpoint", given):
            raise ValueError(f"{method}, seed {seed}, was {cell['checkpoint']}, not {given}; "
                             "choose another name")


def run(options: argparse.Namespace, recipe) -> bool:
    """All cells, then the table and the plot. Returns whether all were measured.

    options: of evaluate.py.  recipe: SwAV's configuration on the same set, a recipes.config.Config,
    whose length, trunk, size of crops and channel means are those of all. Raises ValueError for
    what cannot be compared.
    """
    out = Path(options.checkpoint)
    check_rows(options, out)
    if options.data and not (len(find_splits(options.data)) == 2 and all(
            Path(options.data, part).is_dir() for part in ("train", "val"))):
        raise ValueError(f"compare needs {options.data}/train and {options.data}/val, each with a "
                         "folder for each class")
    digest = digest_of(open_splits(options.data))
    length = {"images": None if options.minutes else recipe.steps * recipe.batch_size,
              "minutes": options.minutes}
    settings = {"data": os.path.abspath(options.data) if options.data else "the demo images",
                "set": digest, "arch": recipe.arch, "size": options.size or recipe.crops[0].size,
                "crop_ratio": options.crop_ratio, "bicubic": options.bicubic,
                "precision": options.precision, "epochs": options.epochs, "lr": options.lr,
                **length}
    keep_settings(out / "compare.json", settings)
    with contextlib.closing(lock(out)):
        until_interrupted(lambda: fill(options, recipe, out, settings), options.jobs)
    print(write_table(out, settings))
    try:
        draw(out, settings)
    except ImportError as error:
        print(error, file=sys.stderr)
    return not any("failed" in cell for cell in read_cells(out).values())
