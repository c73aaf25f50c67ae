"""Cells of a comparison, as a method and a seed: kept as lines of a file, and shown as a table.

    write_cell(out, {"method": "swav", "seed": 0, "knn": 60.3, "linear": 62.9, ...})
    rows = rows_of(read_cells(out))                 # a row a method
    print(table(rows))                              # Markdown: mean ± deviation

    cost(Path("runs/emoji/swav-0"))                 # minutes, memory, images seen, of a run

Of the lines of a cell the last one counts. One with "failed", a sentence, is of a run that ended
before it was measured.
"""
import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from figures.curves import read_log
from weights.atomic import write_whole

UNTRAINED, YARDSTICK = "untrained", "supervised"        # are in the table, and not ranked
DRAWS = 5                                               # of a part of the labels
FROZEN = {"knn": "kNN", "linear": "linear", "linear_1": "linear, 1 %", "linear_10": "linear, 10 %"}
FINETUNED = {"finetuned_1": "fine-tuned, 1 %", "finetuned_10": "fine-tuned, 10 %",
             "finetuned_100": "fine-tuned, all"}


def keep_settings(path: Path, settings: dict) -> None:
    """A JSON file, OUT/compare.json. Raises ValueError where it holds other ones, and where it is
    not there, but OUT holds something else."""
    out = path.parent
    if path.exists():
        before = json.loads(path.read_text())
        changed = [f"{name} was {before.get(name)}, not {settings.get(name)}"
                   for name in {**before, **settings} if before.get(name) != settings.get(name)]
        if changed:
            raise ValueError(f"{path} has other settings ({'; '.join(changed)}); choose another "
                             "folder")
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} holds files, and no {path.name}: choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n")


def read_cells(out: Path, names: Sequence[str] = ("method", "seed")) -> dict[tuple, dict]:
    """(method, seed) -> the last line of it in results.jsonl; a line that was cut off is none, and
    a failure without numbers does not replace some. names: that make the key."""
    cells, path, bare = {}, out / "results.jsonl", {*names, "failed"}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            cell = json.loads(line)
            key = tuple(cell[name] for name in names)
            if cell.keys() - bare or not cells.get(key, {}).keys() - bare:
                cells[key] = cell
    return cells


def write_cell(out: Path, cell: dict) -> None:
    path = out / "results.jsonl"
    before = path.read_text() if path.exists() else ""
    with open(path, "a") as file:       # a line of its own, also after one that was cut off
        file.write("\n" * (before != "" and before[-1] != "\n") + json.dumps(cell) + "\n")


def is_finished(cell: dict | None, columns: Sequence[str]) -> bool:
    return bool(cell) and "failed" not in cell and {*columns} <= cell.keys()


def spent(run: Path) -> list[tuple[int, float]]:
    """Images, and seconds of training, of each line of a run's log.jsonl."""
    pairs, seen = [], 0
    for line in read_log(run):
        pairs.append((line["images"] - seen, (line["images"] - seen) / line["images_per_second"]))
        seen = line["images"]
    return pairs


def cost(run: Path) -> dict:
    """Minutes of training, without start and end; images seen; peak memory of the main process."""
    images, seconds = map(sum, zip(*spent(run)))
    return {"minutes": round(seconds / 60, 3), "images": images,
            "memory_gb": round(max(line["memory_gb"] for line in read_log(run)), 3)}


def images_in(minutes: float, run: Path) -> int:
    """How many images a method sees in that time, by a short run, whose first line does not count:
    the first steps take longer."""
    images, seconds = map(sum, zip(*spent(run)[1:]))
    return max(1, int(60 * minutes * images / seconds))


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Deviation of the sample (n - 1); None for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def in_words(values: Sequence[float]) -> str:
    """"62.0 ± 2.8"; of a single value "62.0"."""
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.1f}" + ("" if deviation is None else f" ± {deviation:.1f}")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(words)} |" for words in (head, ["---"] * len(head), *rows))


def rows_of(cells: dict[tuple[str, int], dict]) -> list[dict]:
    """A row a method, the best linear probe first: column -> its values, one a seed."""
    rows = {}
    for (method, _), cell in sorted(cells.items()):
        if is_finished(cell, FROZEN):
            row = rows.setdefault(method, {"method": method, "n": 0})
            row["n"] += 1
            for name, value in cell.items():
                if name not in ("method", "seed", "jobs", "checkpoint"):
                    row.setdefault(name, []).append(value)
    return sorted(rows.values(), key=lambda row: -statistics.fmean(row["linear"]))


def best_of(rows: list[dict], column: str) -> set[str]:
    """Methods whose mean is the highest, or within its deviation of it."""
    means = {row["method"]: mean_and_deviation(row[column]) for row in rows
             if column in row and row["method"] not in (UNTRAINED, YARDSTICK)}
    top, deviation = max(means.values(), key=lambda pair: pair[0], default=(0.0, None))
    return {method for method, (mean, _) in means.items() if mean >= top - (deviation or 0.0)}


def table(rows: list[dict]) -> str:
    """Markdown."""
    columns = {name: title for name, title in (FROZEN | FINETUNED).items()
               if any(name in row for row in rows)}
    best = {name: best_of(rows, name) for name in columns}
    head, lines = ["method", *columns.values(), "minutes", "GB", "images seen", "n"], []
    for row in rows:
        words = [row["method"]]
        for name in columns:
            text = in_words(row[name]) if name in row else "-"
            words.append(f"**{text}**" if row["method"] in best[name] else text)
        for name, digits in (("minutes", ".1f"), ("memory_gb", ".2f"), ("images", ",.0f")):
            words.append(f"{statistics.fmean(row[name]):{digits}}" if name in row else "-")
        lines.append([*words, str(row["n"])])
    return markdown(head, lines)


def caption(settings: dict, cells: dict[tuple[str, int], dict]) -> str:
    """Of the table: what was held equal, and what the numbers are; and which cells have failed."""
    equal = (f"each method trained for about {settings['minutes']:g} minutes" if settings["minutes"]
             else f"each method saw {settings['images']:,} images")
    beside = max((cell.get("jobs", 1) for cell in cells.values()), default=1)
    data = Path(settings["data"]).name
    about = (f"{data}, {settings['arch']}, {settings['size']} pixels; {equal}, by its own recipe. "
             "Top-1 in per cent: mean ± deviation of the sample, over n seeds. Bold: the highest "
             "mean, and those within one deviation of it, among all but untrained and supervised. "
             "1 % and 10 %: of the labels of each class, at least one image, and for the linear "
             f"probe about ten in all; that is the mean of {DRAWS} draws. Minutes are those of "
             "training alone; GB is the peak memory of a run's main process.")
    if any("finetuned_1" in cell for cell in cells.values()):
        about += (" The untrained trunk, fine-tuned, is supervised training from scratch with that "
                  "share of the labels.")
        if settings.get("epochs"):
            about += f" Fine-tuning with all labels is for {settings['epochs']:g} epochs."
        if settings.get("lr"):
            about += f" The learning rate is {settings['lr']:g} per 256 images of batch."
    if given := {method: cell["checkpoint"] for (method, _), cell in cells.items()
                 if "checkpoint" in cell}:
        about += (f" Given trunks: {', '.join(f'{name}, {path}' for name, path in given.items())}; "
                  "where it is one trunk for all seeds, only fine-tuning deviates.")
    if beside > 1:
        about += f" Up to {beside} runs shared the machine, which the minutes show."
    failed = [f"{method}, seed {seed}, failed: {cell['failed']}"
              for (method, seed), cell in sorted(cells.items()) if "failed" in cell]
    return "\n\n".join([about, *failed])
