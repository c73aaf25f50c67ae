"""Scaling: accuracy over the number of pictures, a line a trunk, by matplotlib, which is optional.

    line = {0: [41.0], 1000: [55.2, 54.1], 4000: [57.9, 58.3]}      # pictures -> one a seed
    scaling("scaling.png", "mean of six sets", {"linear": {"regnety_100mf": line}})

A panel for each measure. The bars are one deviation of the sample over the n seeds; a single seed
has none. The dotted level of a line's colour, 0 pictures, is the untrained trunk.
"""
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ASK = "pip install matplotlib to have the scaling drawn"


def scaling(path: str | Path, title: str,
            panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]]) -> None:
    """panels: measure -> trunk -> pictures -> per cent, one a seed. Raises ImportError where there
    is no matplotlib."""
    try:        # not pyplot, which opens windows and keeps global state
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(ASK) from None
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (measure, trunks) in zip(axes, panels.items()):
        for number, (trunk, values) in enumerate(trunks.items()):
            color, counts = f"C{number}", sorted(count for count in values if count)
            deviations = [statistics.stdev(values[count]) if len(values[count]) > 1 else 0
                          for count in counts]
            axis.errorbar(counts, [statistics.fmean(values[count]) for count in counts],
                          yerr=deviations if any(deviations) else None, fmt="o-", color=color,
                          capsize=4, label=f"{trunk}, n = {seeds(values.values())}")
            if 0 in values:
                axis.axhline(statistics.fmean(values[0]), color=color, linestyle=":")
        ticks = sorted({count for values in trunks.values() for count in values if count})
        axis.set(xscale="log", xlabel="pictures to pretrain on; dotted: untrained",
                 ylabel=f"{measure}, top-1 in per cent")
        axis.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=120)


def seeds(values: Iterable[Sequence[float]]) -> str:
    """How many there are: "3", or "1 to 3"."""
    counts = [*map(len, values)]
    return " to ".join(map(str, sorted({min(counts), max(counts)})))
