"""Scaling: SEER's figure: how good a trunk is, by its size and the pictures that it learns from.

    python evaluate.py scaling runs/all --data 'uncurated/*.tar' --sets sets/emoji,sets/drawings
    python evaluate.py scaling runs/all --data 'uncurated/*.tar' --sets sets/emoji,sets/drawings \\
        --pictures 1000,4000 --archs regnety_100mf --seeds 0    # a part of it alone

A cell is a number of pictures, a trunk and a seed. Its run is a process, `train.py`, in
OUT/PICTURES-ARCH-SEED; what it prints is in OUT/PICTURES-ARCH-SEED.txt. Then the frozen trunk is
measured on each set, and the cell is a line of OUT/results.jsonl. The same command goes on where it
was ended; a set that is added or has changed is measured without training anew. The untrained
trunks are cells of 0 pictures. OUT also holds scaling.json (the settings, which all cells share),
table.md and scaling.png.

The pictures of a cell are the first ones of a fixed permutation of --data: the same for all trunks
and seeds, and larger parts hold the smaller ones. A part is packed once, as it is, into
OUT/pictures-N/000000.tar.

All runs see as many pictures, and have the same settings but for the learning rate, which the
recipe chooses by the trunk: those of the recipe for the whole of --data, prototypes, queue, channel
means and all, written out on each command line. The rule of recipe `small` would give fewer
prototypes to fewer pictures; then two things would change at once, and a cell would depend on which
others are asked for. No run shrinks its images (--cache off): that would follow from measured
speed, and changes the pixels.
"""
import argparse
import contextlib
import itertools
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

from data.labelled import NamedSubset, digest_of, open_splits
from data.shards import pack
from data.stream import permute
from evaluation.cells import (
    UNTRAINED,
    cost,
    in_words,
    keep_settings,
    markdown,
    read_cells,
    write_cell,
)
from evaluation.compare import frozen, task_of
from evaluation.runs import command, measured, until_interrupted
from figures.scaling import scaling
from methods.build import TRUNKS
from weights.atomic import lock, write_whole
from weights.terminal import reason

KEY = ("pictures", "arch", "seed")
MEASURES = {"linear": "linear", "knn": "kNN"}
ONE_SHARD = 10 ** 12                    # bytes, at most


def part_of(images, count: int, data: str, out: Path) -> str:
    """--data of a run on the first `count` images of the permutation; data: of all of them."""
    if count == len(images):
        return data
    folder = out / f"pictures-{count}"
    if not folder.exists():
        aside = Path(f"{folder}.tmp")                   # one that was cut off is made anew
        shutil.rmtree(aside, ignore_errors=True)
        chosen = sorted(permute(i, len(images), key=0) for i in range(count))
        pack(NamedSubset(images, chosen), aside, ONE_SHARD)
        os.replace(aside, folder)
    return str(folder / "000000.tar")


def missing(cell: dict, digests: Mapping[str, str]) -> list[str]:
    """Names of the sets on which it was not measured, as they are now."""
    found = cell.get("sets", {})
    return [name for name, digest in digests.items() if found.get(name, {}).get("set") != digest]


def fill(options: argparse.Namespace, images, recipe, rule: dict, out: Path,
         digests: Mapping[str, str], settings: dict) -> None:
    """The cells that are asked for and not there, and their sets. The table is written after
    each."""
    cells, todo = read_cells(out, KEY), wanted(options, len(images))
    todo = [key for key in todo if missing(cells.get(key, {}), digests)]
    places = {Path(one).name: os.path.abspath(one) for one in options.sets}
    runs = {key: out / "-".join(map(str, key)) for key in todo}
    commands = {}
    for count, arch, seed in todo:
        if count and "sets" not in cells.get((count, arch, seed), {}):
            run = runs[count, arch, seed]
            commands[count, arch, seed] = command(
                options, data=part_of(images, count, options.data, out), **rule, arch=arch,
                seed=seed, cache="off", images=settings["images"], out=run), Path(f"{run}.txt")

    def measure(count: int, arch: str, seed: int) -> dict:
        run, before = runs[count, arch, seed], cells.get((count, arch, seed), {})
        found, faults = dict(before.get("sets", {})), []
        for name in missing(before, digests):
            try:
                task = task_of(options, recipe, run / "trunk.pt" if count else "random",
                               what="linear", data=places[name], arch=arch, seed=seed)
                found[name] = frozen(*task.extract_splits(["avgpool"])) | {"set": digests[name]}
            except (ValueError, OSError, RuntimeError) as error:        # the others are measured
                faults.append(f"{name}: {reason(error)}")
        trained = cost(run) | {"jobs": before.get("jobs", options.jobs)} if count else {}
        return {"sets": found} | trained | ({"failed": "; ".join(faults)} if faults else {})

    with contextlib.closing(measured(todo, commands, {}, measure, options.jobs)) as ended:
        for key, cell in ended:
            write_cell(out, dict(zip(KEY, key)) | cell)
            write_table(out, digests, settings)
            numbers = cell.get("failed") or ", ".join(
                f"{name} {' '.join(f'{column} {found[column]}' for column in MEASURES)}"
                for name, found in cell["sets"].items() if name in digests)
            print(f"{name_of(key)}: {numbers}", file=sys.stderr, flush=True)


def wanted(options: argparse.Namespace, total: int) -> list[tuple[int, str, int]]:
    """(pictures, arch, seed) of the cells that are asked for; 0 pictures: untrained."""
    counts = [0, *(total if count == "all" else count for count in options.pictures)]
    return [(count, arch, seed) for seed, count, arch in itertools.product(
        options.seeds, counts, options.archs)]


def name_of(key: tuple[int, str, int]) -> str:
    count, arch, seed = key
    return f"{arch}, {f'{count:,} pictures' if count else UNTRAINED}, seed {seed}"


# ---------------------------------------------------------------------------------- what is shown
def rows_of(cells: dict[tuple, dict],
            digests: Mapping[str, str]) -> dict[tuple[str, int], list[dict]]:
    """(arch, pictures) -> its cells that have these sets as they are, one a seed; by size of the
    trunk, then by number of pictures."""
    rows = {}
    for (count, arch, _), cell in sorted(
            cells.items(), key=lambda pair: (TRUNKS.index(pair[0][1]), pair[0])):
        if not missing(cell, digests):
            rows.setdefault((arch, count), []).append(cell)
    return rows


def means(row: Sequence[dict], sets: Sequence[str], measure: str) -> list[float]:
    """Of each seed, the mean over the sets."""
    return [statistics.fmean(cell["sets"][one][measure] for one in sets) for cell in row]


def table(rows: dict[tuple[str, int], list[dict]], sets: Sequence[str]) -> str:
    """Markdown: the means over the sets, then each set."""
    columns = [("mean", sets), *((name, [name]) for name in sets)]
    head = ["trunk", "pictures", *(f"{name}, {title}" for name, _ in columns
                                   for title in MEASURES.values()), "minutes", "n"]
    lines = []
    for (arch, count), row in rows.items():
        minutes = [cell["minutes"] for cell in row if "minutes" in cell]
        lines.append([arch, f"{count:,}" if count else UNTRAINED,
                      *(in_words(means(row, over, measure)) for _, over in columns
                        for measure in MEASURES),
                      f"{statistics.fmean(minutes):.1f}" if minutes else "-", str(len(row))])
    return markdown(head, lines)


def caption(settings: dict, cells: dict[tuple, dict]) -> str:
    """Of the table: what was held equal, what the numbers are, and which cells have failed."""
    ratio = settings["crop_ratio"]
    about = (f"SwAV on parts of {settings['data']}, {settings['total']:,} pictures; each run saw "
             f"{settings['images']:,}, with recipe {settings['recipe']}'s settings for the whole "
             f"set. Frozen trunks at {settings['size']} pixels, crop ratio "
             f"{0.875 if ratio is None else ratio:g}; top-1 in per cent; mean: over the sets. ±: "
             "deviation of the sample, over n seeds, which share the parts. Minutes are those of "
             f"training alone. Measured up to {date.today()}.")
    beside = max((cell.get("jobs", 1) for cell in cells.values()), default=1)
    if beside > 1:
        about += f" Up to {beside} runs shared the machine, which the minutes show."
    failed = [f"{name_of(key)}, failed: {cell['failed']}" for key, cell in sorted(cells.items())
              if "failed" in cell]
    return "\n\n".join([about, *failed])


def write_table(out: Path, digests: Mapping[str, str], settings: dict) -> str:
    cells = read_cells(out, KEY)
    text = f"{table(rows_of(cells, digests), [*digests])}\n\n{caption(settings, cells)}\n"
    write_whole(out / "table.md", text)
    return text


def draw(out: Path, digests: Mapping[str, str], settings: dict) -> None:
    panels, rows = {}, rows_of(read_cells(out, KEY), digests)
    for measure, title in MEASURES.items():
        lines = panels.setdefault(title, {})
        for (arch, count), row in rows.items():
            lines.setdefault(arch, {})[count] = means(row, [*digests], measure)
    title = (f"frozen trunks, mean of {len(digests)} sets; {settings['images']:,} pictures seen by "
             "each run")
    if rows:
        scaling(out / "scaling.png", title, panels)


# ------------------------------------------------------------------------------------ the protocol
def check(options: argparse.Namespace, images, batch: int) -> dict[str, str]:
    """Names of the sets, with their digests. Raises ValueError for what cannot be measured or
    trained."""
    if options.arch:
        raise ValueError("scaling takes --archs, not --arch")
    if unknown := sorted({*options.archs} - {*TRUNKS}):
        raise ValueError(f"unknown arch {unknown[0]!r}; there is {', '.join(sorted(TRUNKS))}")
    for count in options.pictures:
        if count != "all" and not batch <= count <= len(images):
            raise ValueError(f"--pictures {count}: needs all, or from {batch:,}, which is a batch, "
                             f"to {len(images):,}, which {options.data} has")
    names = [Path(one).name for one in options.sets]
    if not names or len({*names}) < len(names):
        raise ValueError("scaling needs --sets: labelled sets, of different names")
    digests = {}
    for name, one in zip(names, options.sets):
        parts = open_splits(one)
        if any(part.multilabel for part in parts):
            raise ValueError(f"scaling needs images with one label each, and {one} has others")
        digests[name] = digest_of(parts)
    return digests


def run(options: argparse.Namespace, images, recipe, names: Sequence[str]) -> bool:
    """All cells, then the table and the plot. Returns whether all were measured.

    options: of evaluate.py.  images: of --data.  recipe: the configuration for all of them, a
    recipes.config.Config.  names: of the options that its recipe decides. Raises ValueError for
    what cannot be measured or trained.
    """
    out, values = Path(options.checkpoint), recipe.as_dict()
    digests = check(options, images, recipe.batch_size)
    own = ("arch", "lr", "steps", "epochs", "images")       # the rate follows the trunk
    rule = {"recipe": recipe.recipe} | {name: values[name] for name in names if name not in own}
    settings = rule | {
        "data": os.path.abspath(options.data), "fingerprint": images.fingerprint,
        "sizes": images.sizes, "total": len(images), "lr": recipe.lr,
        "images": recipe.steps * recipe.batch_size,
        "size": options.size or recipe.crops[0].size, "crop_ratio": options.crop_ratio,
        "bicubic": options.bicubic, "precision": options.precision}
    keep_settings(out / "scaling.json", settings)
    with contextlib.closing(lock(out)):
        until_interrupted(lambda: fill(options, images, recipe, rule, out, digests, settings),
                          options.jobs)
    print(write_table(out, digests, settings))
    try:
        draw(out, digests, settings)
    except ImportError as error:
        print(error, file=sys.stderr)
    cells = read_cells(out, KEY)
    return not any(missing(cells.get(key, {}), digests) for key in wanted(options, len(images)))
