"""Compare: several methods on one trunk, each with several seeds, trained, measured, in one table.

    python evaluate.py compare runs/emoji --data sets/emoji --seeds 0,1,2
    python evaluate.py compare runs/emoji --data sets/emoji --seeds 0,1,2,3         # one more
    python evaluate.py compare runs/hour --methods swav,byol --minutes 60 --jobs 2

A cell is a method and a seed. Its run is a process, `train.py --method METHOD --seed SEED`, in
OUT/METHOD-SEED; what it prints is in OUT/METHOD-SEED.txt. Then its frozen features are measured,
and the cell is a line of OUT/results.jsonl (cells.py). The same command goes on where it was ended,
and does only what is not there. The untrained trunks of the same seeds are a row too. OUT also
holds compare.json (the settings, which all cells share), table.md and compare.png.

All methods see as many images; or, with --minutes, each as many as it sees in that time by a short
run before, OUT/timing-METHOD.

Shapes: N training images, M queries, C features.
"""
import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.labelled import Labelled, find_splits, open_splits
from distributed.hardware import pick_device, processors
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
from evaluation.task import EvalTask, choose_preprocessing, open_task
from figures.comparison import comparison
from figures.curves import read_log
from methods.build import METHODS
from weights.atomic import write_whole
from weights.terminal import reason

TRAIN = Path(__file__).parents[1] / "train.py"
INTERRUPTED = 75            # exit status of a program that a signal has ended, as train.py's
SHARES = {"1": 0.01, "10": 0.1}                         # per cent of the labels
# Ctrl-C reaches the runs from here alone: a second signal would end them before they have saved
APART = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
TIMED = ("--steps", "15", "--log-every", "5")           # of --minutes; the log has three lines


# -------------------------------------------------------------------------------------- the runs
def command(options: argparse.Namespace, arch: str, out: Path, method: str, seed: int,
            *length: str) -> list[str]:
    """A run. With several side by side each has its share of the processors."""
    data = ["--data", str(Path(options.data, "train"))] if options.data else ["--recipe", "demo"]
    given = [*data, "--method", method, "--seed", seed, "--arch", arch, "--out", out, *length]
    if options.device:
        given += ["--device", options.device]
    if options.precision != "auto":
        given += ["--precision", options.precision]
    if options.jobs > 1:
        cpu = pick_device(options.device).type == "cpu"
        given += ["--threads", share(options.jobs), "--workers", 0 if cpu else share(options.jobs)]
    return [sys.executable, str(TRAIN), *map(str, given)]


def share(jobs: int) -> int:
    return max(1, processors() // jobs)


def side_by_side(commands: dict[object, tuple[list[str], Path]],
                 jobs: int) -> Iterator[tuple[object, int]]:
    """Runs them, `jobs` at once: the key of each that has ended, with its exit status. When the
    caller leaves, those at work are told to save and end, and waited for.

    commands: key -> the command, and the file to which its output is added.
    """
    waiting, running = deque(commands.items()), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                key, (words, log) = waiting.popleft()
                with open(log, "a") as file:
                    running[key] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file,
                                                    stderr=subprocess.STDOUT, **APART)
            ended = [key for key, process in running.items() if process.poll() is not None]
            for key in ended:
                yield key, running.pop(key).returncode
            if not ended:
                time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def fault(log: Path, status: int) -> str:
    """Why a run has ended: the last line of its output."""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}: {last.removeprefix('train.py: ').removeprefix('error: ')}"


def lengths(options: argparse.Namespace, recipe, out: Path,
            methods: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Images that each method sees; and why others have none. With --minutes a short run says how
    many that are."""
    if not options.minutes:
        return dict.fromkeys(methods, recipe.steps * recipe.batch_size), {}
    logs = {method: out / f"timing-{method}.txt" for method in methods}
    commands = {method: (command(options, recipe.arch, log.with_suffix(""), method, 0, *TIMED), log)
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
def few_labels(features: Tensor, labelled: Labelled, queries: Tensor, truth: Tensor,
               part: float) -> float:
    """Top-1 of the linear probe (N, C), (M, C) with a part of each class' labels, at least one, and
    ten in all: the mean of DRAWS draws, which are the same for all networks."""
    top1, part = [], max(part, 10 / len(features))
    for draw in range(DRAWS):
        chosen = torch.tensor(share_of_classes(labelled.targets, part, draw))
        predicted, _ = linear_probe(features[chosen], labelled.labels[chosen], queries)
        top1.append(per_cent(predicted, truth))
    return round(statistics.mean(top1), 2)


def task_of(options: argparse.Namespace, recipe, checkpoint: Path | str, seed: int,
            **more) -> EvalTask:
    """A trunk, with the preprocessing of all: the size of the recipe's first crops, or --size."""
    task = open_task(argparse.Namespace(**vars(options) | {
        "checkpoint": str(checkpoint), "arch": recipe.arch, "seed": seed,
        "size": options.size or recipe.crops[0].size} | more))
    if not task.loaded:                                 # untrained: has no means of its own
        task.preprocessing = choose_preprocessing(recipe.as_dict(), None, task.options)
    return task


def measure(options: argparse.Namespace, recipe, run: Path, method: str, seed: int) -> dict:
    """The columns of a cell. run: folder of its run, where it has one."""
    source = "random" if method == UNTRAINED else run / "trunk.pt"
    task = task_of(options, recipe, source, seed, what="linear")
    train, val = task.extract_splits(["avgpool"])
    (features,), (queries,) = train.outputs, val.outputs
    labels, truth = train.labelled.labels, val.labelled.labels
    predicted, _ = linear_probe(features, labels, queries)
    cell = {"knn": knn_top1(features, labels, queries, truth), "linear": per_cent(predicted, truth)}
    for name, part in SHARES.items():
        cell[f"linear_{name}"] = few_labels(features, train.labelled, queries, truth, part)
    for name, part in SHARES.items() if options.finetune else ():
        tuned = finetune.run(task_of(options, recipe, source, seed, what="finetune",
                                     labels=str(part), out=str(run) + f"-finetuned-{name}"))
        cell[f"finetuned_{name}"] = tuned["top1"]
    return cell


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
    todo = [(method, seed) for seed in options.seeds for method in (UNTRAINED, *options.methods)
            if not is_finished(cells.get((method, seed)), columns)]
    methods = [method for method in options.methods if method in {method for method, _ in todo}]
    images, faults = lengths(options, recipe, out, methods)
    runs = {(method, seed): out / f"{method}-{seed}" for method, seed in todo}
    commands = {(method, seed): (
        command(options, recipe.arch, runs[method, seed], method, seed, "--images",
                str(images[method])), Path(f"{runs[method, seed]}.txt"))
        for method, seed in todo if method in images}

    def finish(method: str, seed: int, failed: str = "") -> None:
        cell = {"method": method, "seed": seed}
        try:
            cell |= {"failed": failed} if failed else measure(options, recipe, runs[method, seed],
                                                              method, seed)
            if not failed and method != UNTRAINED:
                cell |= cost(runs[method, seed]) | {"jobs": options.jobs}
        except (ValueError, OSError, RuntimeError) as error:
            cell = {"method": method, "seed": seed, "failed": reason(error)}
        write_cell(out, cell)
        write_table(out, settings)
        numbers = [f"{name} {cell[name]}" for name in (*columns, "failed") if name in cell]
        print(f"{method}, seed {seed}:", ", ".join(numbers), file=sys.stderr, flush=True)

    for method, seed in todo:
        if method not in images:
            finish(method, seed, faults.get(method, ""))
    with contextlib.closing(side_by_side(commands, options.jobs)) as ended:
        for (method, seed), status in ended:
            finish(method, seed, fault(commands[method, seed][1], status) if status else "")


def run(options: argparse.Namespace, recipe) -> bool:
    """All cells, then the table and the plot. Returns whether all were measured.

    options: of evaluate.py.  recipe: SwAV's configuration on the same set, a recipes.config.Config,
    whose length, trunk, size of crops and channel means are those of all. Raises ValueError for
    what cannot be compared.
    """
    out, methods = Path(options.checkpoint), options.methods
    if unknown := sorted({*methods} - METHODS.keys()):
        raise ValueError(f"unknown method {unknown[0]!r}; there is {', '.join(METHODS)}")
    if options.data and not (len(find_splits(options.data)) == 2 and all(
            Path(options.data, part).is_dir() for part in ("train", "val"))):
        raise ValueError(f"compare needs {options.data}/train and {options.data}/val, each with a "
                         "folder for each class")
    open_splits(options.data)
    length = {"images": None if options.minutes else recipe.steps * recipe.batch_size,
              "minutes": options.minutes}
    settings = {"data": os.path.abspath(options.data) if options.data else "the demo images",
                "arch": recipe.arch, "size": options.size or recipe.crops[0].size,
                "crop_ratio": options.crop_ratio, "bicubic": options.bicubic,
                "precision": options.precision, **length}
    keep_settings(out, settings)
    for name in ("SIGTERM", "SIGHUP"):                  # as Ctrl-C; under nohup, SIGHUP is ignored
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    if options.jobs > 1:
        torch.set_num_threads(share(options.jobs))
    try:
        fill(options, recipe, out, settings)
    except KeyboardInterrupt:
        print("evaluate.py: interrupted: runs are saved, and the same command goes on",
              file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(write_table(out, settings))
    try:
        draw(out, settings)
    except ImportError as error:
        print(error, file=sys.stderr)
    return not any("failed" in cell for cell in read_cells(out).values())
