"""Comparison: what several methods reach, with error bars, by matplotlib, which is optional.

    comparison("compare.png", "emoji", {"kNN": {"swav": [60.3, 63.8], "byol": [58.0, 57.1],
                                                "untrained": [53.0, 54.3]}}, "untrained")

A panel for each measure; in it a row for each method: each seed's number, their mean, and an error
bar of one deviation of the sample. A dashed line is the mean of the method named last, which has no
row.
"""
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

ASK = "pip install matplotlib to have the comparison drawn"


def comparison(path: str | Path, title: str, panels: Mapping[str, Mapping[str, Sequence[float]]],
               line: str) -> None:
    """panels: measure -> method, the best first -> per cent, one a seed.  line: the method that is
    drawn as a line. Raises ImportError where there is no matplotlib."""
    try:        # not pyplot, which opens windows and keeps global state
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(ASK) from None
    names = [name for name in next(iter(panels.values())) if name != line]
    figure = Figure(figsize=(9, 2 + 0.4 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (measure, methods) in zip(axes, panels.items()):
        for row, name in enumerate(names):
            values = methods[name]
            axis.plot(values, [row] * len(values), ".", color="C0", alpha=0.4)
            axis.errorbar(statistics.fmean(values), row, fmt="o", color="C0", capsize=4,
                          xerr=statistics.stdev(values) if len(values) > 1 else None)
        if line in methods:
            level = statistics.fmean(methods[line])
            axis.axvline(level, color="gray", linestyle="--", linewidth=1)
            axis.annotate(line, (level, 1), ha="center", va="bottom", color="gray",
                          xycoords=("data", "axes fraction"))
        axis.set(xlabel=f"{measure}, top-1 in per cent")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.5, -0.5))
    seeds = max((len(values) for values in panels[measure].values()), default=0)
    figure.suptitle(f"{title}\nmean, deviation and each of {seeds} seeds", fontsize="medium")
    figure.savefig(path, dpi=120)
