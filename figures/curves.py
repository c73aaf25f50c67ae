"""Curves: loss / ln K of one or more runs over their steps, with matplotlib, which is optional.

    curves("loss.png", ["runs/demo-regnety_100mf"])         # python train.py --plot RUN [RUN ...]

Each run's loss is divided by ln K of its own K, the number of its prototypes: so runs with other
numbers compare, and 1 is the loss of predictions that know nothing. So is it with other methods,
where they have such a loss; that of BYOL and Barlow Twins is drawn as it is, beside others on an
axis of its own.

It reads config.json and log.jsonl of a run's folder; an entry is what a line of log.jsonl holds.
"""
import json
import math
from pathlib import Path
from typing import NamedTuple, Sequence

from PIL import Image

from weights.atomic import read_lines

ASK = "pip install matplotlib to have the loss drawn"
LABEL = "loss / ln K, each run's over its own K"
RELATIVE = ("loss_over_ln_k", "loss_over_ln_candidates", "loss_over_ln_keys")   # 1: knows nothing
USED = ("prototypes_used", "outputs_used", "clusters_used")
PROBES = ("knn", "retrieved")           # what --probe measures, per cent


class Curve(NamedTuple):
    name: str
    log: list[dict]                     # entries of the steps that were not skipped
    columns: list[list[float]]          # their steps, and losses, over that of chance if relative
    relative: bool
    used: tuple[list, list]             # steps, shares of the prototypes or clusters in use


def read_log(run: Path) -> list[dict]:
    """The lines of log.jsonl, but for one that was cut off. Raises OSError, ValueError."""
    return read_lines(run / "log.jsonl")


def read_curve(run: Path) -> Curve:
    """Raises ValueError for a folder that is not a run's."""
    try:
        config = json.loads((run / "config.json").read_text())["config"]
        method = config.get("method", "swav")
        log = [entry for entry in read_log(run) if "loss" in entry]
        relative = next((name for name in RELATIVE if log and name in log[0]), "loss")
        loss = [entry[relative] for entry in log]
        if method == "swav":
            ln_k = math.log(config["prototypes"]) or math.log(2)    # of 1: as in swav.py
            loss = [entry["loss"] / ln_k for entry in log]
        columns = [[entry["step"] for entry in log], loss]
        used = [(entry["step"], entry[name]) for entry in log for name in USED if name in entry]
        what = (f"K = {config['prototypes']:,}" if method == "swav" else
                method + ", loss itself" * (relative == "loss"))
        return Curve(f"{run.name}, {what}", log, columns, method == "swav" or relative != "loss",
                     tuple(zip(*used)) or ((), ()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{run} is not the folder of a run: {error}") from None


def curves(path: Path, runs: Sequence[str | Path]) -> None:
    """Loss / ln K over steps, with a line at 1; under it the prototypes in use, and what --probe
    found.

    path: of the picture.  runs: folders of runs.
    Raises ValueError for a folder that is not a run's, and for a file that is there outside of it
    and does not show the same runs; ImportError where there is no matplotlib.
    """
    path, title = Path(path), f"Training loss: {', '.join(str(run) for run in runs)}"
    if path.exists() and path.parent != Path(runs[0]) and title_of(path) != title:
        raise ValueError(f"{path} is there already, and does not show these runs: move it")
    try:        # not pyplot, which opens windows and keeps global state
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(ASK) from None
    read = [read_curve(run) for run in map(Path, runs)]
    probed = any(probe in entry for curve in read for entry in curve.log for probe in PROBES)
    figure = Figure(figsize=(7, 6 + 1.5 * probed), layout="constrained")
    top, *below = figure.subplots(2 + probed, 1, sharex=True, height_ratios=(3, 1, 1)[:2 + probed])
    relative = any(curve.relative for curve in read)
    own = top if all(curve.relative for curve in read) or not relative else top.twinx()
    lines = []
    for i, curve in enumerate(read):
        color, axis = f"C{i % 10}", top if curve.relative else own
        lines += axis.plot(*curve.columns, label=curve.name, color=color)
        below[0].plot(*curve.used, color=color)
        for probe in PROBES:
            points = [(entry["step"], entry[probe]) for entry in curve.log if probe in entry]
            if points:
                below[1].plot(*zip(*points), ".-", color=color)
    if relative:
        top.axhline(1, color="gray", linestyle="--", linewidth=1)
        top.annotate("1: knows nothing, every prototype gets 1/K", (0.99, 1), ha="right",
                     color="gray", xycoords=("axes fraction", "data"), xytext=(0, 3),
                     textcoords="offset points")
    own.set_ylabel("loss itself")
    top.set(title="Training loss", ylabel=LABEL if relative else "loss")
    top.legend(handles=lines, frameon=False)
    below[0].set(ylabel="prototypes in use", ylim=(0, 1.05))
    if probed:
        below[1].set(ylabel="probe, per cent")
    below[-1].set(xlabel="step")
    figure.savefig(path, dpi=120, metadata={"Title": title})


def title_of(path: Path) -> str | None:
    """What is written in a PNG about itself."""
    try:
        with Image.open(path) as image:
            return image.text.get("Title")
    except (OSError, ValueError, AttributeError):       # no image, or not a PNG
        return None
