"""The tour's pictures: each function draws on a matplotlib Figure what it is given.

    from matplotlib.figure import Figure
    from regnet import ARCHS
    figure = Figure(figsize=(7, 4), layout="constrained")
    line(figure, {"RegNetY-400MF": ARCHS["regnety_400mf"]})
    figure.savefig("line.png")

`tour.py` draws each twice, with LIGHT and DARK as matplotlib's settings.

Shapes: B images, V crops, L length of the queue, K prototypes, s side of an image.
"""
import random
from typing import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from figures.curves import Curve
from multicrop import CropSpec, MultiCrop, random_box
from regnet import RegNetParams, complexity
from sinkhorn import sinkhorn

MUTED = "#828c96"                       # readable on white and on black


def settings(paper: str, ink: str, colours: Sequence[str]) -> dict:
    from matplotlib import cycler
    return {"figure.facecolor": paper, "axes.facecolor": paper, "savefig.facecolor": paper,
            "text.color": ink, "axes.labelcolor": ink, "xtick.color": MUTED, "ytick.color": MUTED,
            "axes.edgecolor": MUTED, "axes.spines.top": False, "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=colours), "axes.titlesize": 11, "font.size": 10.5,
            "axes.linewidth": 0.8, "legend.frameon": False, "axes.titlelocation": "left",
            "figure.dpi": 100, "savefig.dpi": 160}


def light() -> dict:
    """Colours that colour-blind people tell apart (Okabe and Ito)."""
    return settings("#ffffff", "#1c2024", ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"])


def dark() -> dict:
    return settings("#171a1f", "#e4e7eb", ["#56b4e9", "#e8853d", "#2fc48f", "#dd95bd", "#f0e442"])


def shades():
    """From the paper's colour to the first of the cycle."""
    from matplotlib import rcParams
    from matplotlib.colors import LinearSegmentedColormap
    first = rcParams["axes.prop_cycle"].by_key()["color"][0]
    return LinearSegmentedColormap.from_list("shades", [rcParams["axes.facecolor"], first])


def line(figure, networks: Mapping[str, RegNetParams]) -> None:
    """The line of widths, the powers of w_m that it is snapped to, and the stages."""
    for axis, (name, params) in zip(figure.subplots(1, len(networks), squeeze=False)[0],
                                    networks.items()):
        start, blocks = 0, params.blocks()
        for i, stage in enumerate(params.stages()):
            axis.bar(range(start, start + stage.depth), stage.width, 0.92, color=f"C{i}", alpha=0.4)
            last = i > 0 and stage.depth < 3            # its label would not fit to the right
            axis.text(start + (stage.depth - 0.5 if last else -0.5), stage.width,
                      f"{stage.depth} × {stage.width}", ha="right" if last else "left",
                      va="bottom", color=f"C{i}", weight="bold", fontsize=9.5, zorder=4,
                      bbox=dict(facecolor=axis.get_facecolor(), edgecolor="none", pad=0.6,
                                alpha=0.65))
            start += stage.depth
        axis.plot([u for u, _, _ in blocks], "-", color=MUTED, linewidth=1)
        axis.plot([u for u, _, _ in blocks], "o", color=MUTED, markersize=3.5)
        for k in sorted({round(s) for _, s, _ in blocks}):
            axis.axhline(params.w_0 * params.w_m ** k, color=MUTED, linewidth=0.6, linestyle=":")
        axis.set(title=name, xlabel="block j", xlim=(-1.2, params.depth + 0.2))
        axis.margins(y=0.08)
    figure.axes[0].set_ylabel("width: channels")


def space(figure, drawn: Sequence[RegNetParams], published: Sequence[RegNetParams],
          flops: Sequence[int], seconds: Sequence[float]) -> None:
    """flops: multiply-adds of some networks at some resolution.  seconds: of their passes."""
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    costs = [complexity(params) for params in drawn]
    dots = left.scatter([cost.flops / 1e9 for cost in costs], [params.depth for params in drawn],
                        c=[cost.activations / 1e6 for cost in costs], s=16, cmap="viridis")
    figure.colorbar(dots, ax=left, label="activations, millions", location="bottom", aspect=40)
    left.plot([complexity(params).flops / 1e9 for params in published],
              [params.depth for params in published], "*", color="C1", markersize=11,
              label="published RegNetY")
    left.set(xscale="log", xlabel="GF: 10⁹ multiply-adds", ylabel="depth: blocks",
             title="Random networks of the space")
    left.set_xticks([0.2, 0.4, 0.8, 1.6, 3.2], ["0.2", "0.4", "0.8", "1.6", "3.2"])
    left.minorticks_off()
    left.legend(loc="upper left", bbox_to_anchor=(-0.02, 1.02), handletextpad=0.1)
    left.set_ylim(10.5, 33)
    right.plot([x / 1e6 for x in flops], [1e3 * x for x in seconds], "o", color="C0", markersize=5)
    rate = sum(seconds) / sum(flops)
    right.plot([0, max(flops) / 1e6], [0, 1e3 * rate * max(flops)], "--", color=MUTED, linewidth=1)
    right.set(xlabel="counted: millions of multiply-adds", ylabel="measured: ms an image",
              title="Count and clock", xlim=(0, None), ylim=(0, None))


def boxes_of(size: tuple[int, int], specs: Sequence[CropSpec], seed: int) -> list[list[tuple]]:
    """The boxes that MultiCrop cuts for this seed, per size of crops: the same draws in the same
    order. size: the image's width and height."""
    rng, crop, boxes = random.Random(seed), MultiCrop(specs), []
    for count, _, scale in specs:
        boxes.append([random_box(*size, scale, rng) for _ in range(count)])
        for _ in range(count):
            crop.draw(rng)
    return boxes


def show(axis, image: Tensor, title: str = "", colour: str | None = None) -> None:
    """An image (3, s, s), uint8 or float of 0 to 1, without axes. colour: of a frame."""
    axis.imshow(image.permute(1, 2, 0).numpy())
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9.5, loc="center", pad=3)
    for spine in axis.spines.values():
        spine.set(visible=colour is not None, color=colour, linewidth=2.5)


def crops(figure, image: Tensor, specs: Sequence[CropSpec], cut: Sequence[Tensor], seed: int,
          augmented: Mapping[str, Tensor]) -> None:
    """An image with the boxes of its crops, the crops, and one of them augmented.

    cut: uint8, per size.  augmented: what was done -> the crop after it."""
    from matplotlib.patches import Rectangle
    above, below = figure.subfigures(2, 1, height_ratios=(2.2, 2.1))
    axes = above.subplot_mosaic("iiaabb;iiaabb;iicdef", gridspec_kw={"height_ratios": (1, 1, 1.1)})
    show(axes["i"], image, "the image, and the boxes")
    boxes = sum(boxes_of(tuple(image.shape[:0:-1]), specs, seed), [])
    for i, (box, crop) in enumerate(zip(boxes, (crop for part in cut for crop in part))):
        left, upper, right, lower = box
        colour = f"C{min(i, 2)}"
        axes["i"].add_patch(Rectangle((left, upper), right - left - 1, lower - upper - 1,
                                      fill=False, color=colour, linewidth=2.2))
        size = f", {crop.shape[-1]} pixels" if i < 2 else ""
        show(axes["abcdef"[i]], crop, f"crop {i + 1}{size}" if i < 2 else f"{i + 1}", colour)
    for axis, (name, crop) in zip(below.subplots(2, 5).flat, augmented.items()):
        show(axis, crop, name)


def plan(axis, codes: Tensor, title: str) -> None:
    """codes (B, K), as shades by their square roots; rows are images, columns prototypes."""
    axis.imshow(codes.sqrt().numpy(), aspect="auto", cmap=shades(), vmin=0, vmax=1,
                interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.set_title(title, fontsize=9.5, loc="center", pad=4)
    axis.spines[:].set(visible=True, linewidth=0.5)


def scores(figure, cosines: Tensor, total: int) -> None:
    """cosines (B, K), and of how many images each prototype is the nearest.  total: of all
    prototypes, K or more."""
    count = cosines.shape[1]
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2.6))
    members = torch.bincount(cosines.argmax(1), minlength=count)
    above.bar(range(count), members.tolist(), color="C1")
    above.set(ylabel="images", title="Of how many images is it the nearest prototype?")
    above.locator_params("y", integer=True)
    drawn = below.imshow(cosines.numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    named = f"prototypes, K = {total:,}" + f", the first {count}" * (count < total)
    below.set(xlabel=named, ylabel=f"images, B = {len(cosines)}", xticks=[],
              yticks=[], title="Scores: the cosine of each image with each prototype")
    figure.colorbar(drawn, ax=below, location="bottom", aspect=50, pad=0.02)


def iterations(figure, cosines: Tensor, epsilon: float,
               counts: Sequence[int] = (0, 1, 2, 3, 10)) -> None:
    """The plan after so many iterations, and above it the prototypes' shares of the batch."""
    axes = figure.subplots(2, len(counts), sharey="row", height_ratios=(1, 2))
    for above, below, n in zip(*axes, counts):
        codes = sinkhorn(cosines, epsilon, n) if n else (cosines / epsilon).softmax(1)
        shares = codes.mean(0) * codes.shape[1]             # 1: an equal share
        above.bar(range(len(shares)), shares.tolist(), width=1, color="C1")
        above.axhline(1, color=MUTED, linewidth=1, linestyle="--")
        above.set(xticks=[], xlim=(-0.5, len(shares) - 0.5))
        above.set_title(f"largest {shares.max():.2f}", fontsize=9.5, loc="center", pad=4)
        plan(below, codes, "")
        below.set_xlabel(f"{n} iteration{'s' * (n != 1)}" if n else "none: softmax")
    axes[0, 0].set_ylabel("share × K")
    axes[1, 0].set_ylabel("images")


def epsilons(figure, cosines: Tensor, values: Sequence[float] = (0.01, 0.03, 0.05, 0.1, 0.5)
             ) -> None:
    """The plan of each epsilon; under it, by how many prototypes an image is shared."""
    axes = figure.subplots(1, len(values), sharey=True)
    for axis, epsilon in zip(axes, values):
        codes = sinkhorn(cosines, epsilon, iterations=10)
        plan(axis, codes, f"ε = {epsilon:g}")
        axis.set_xlabel(f"{shared(codes):.1f}")
    axes[0].set_ylabel("images")
    figure.supxlabel("exp of a code's mean entropy: by so many prototypes an image is shared",
                     fontsize=10)


def shared(codes: Tensor) -> float:
    """exp of the mean entropy of codes (B, K): 1 where they are one-hot, K where they are equal."""
    return torch.xlogy(codes, codes).sum(1).neg().mean().exp().item()


def swapped(figure, rows: Sequence[tuple[str, Tensor, Tensor]], most: int = 24) -> None:
    """rows: of each moment a title, an image's code (K,), and a prediction of it (K,)."""
    axes = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (title, code, prediction) in zip(axes, rows):
        chosen = (code + prediction).topk(min(most, len(code))).indices.sort().values
        places = range(len(chosen))
        axis.bar(places, code[chosen].tolist(), width=0.85, color="C0", alpha=0.55,
                 label="q: code of crop 1")
        axis.plot(places, prediction[chosen], "o", color="C1", markersize=4.5,
                  label="p: predicted from another crop")
        axis.axhline(1 / len(code), color=MUTED, linewidth=1, linestyle="--", label="1/K")
        axis.set(title=title, xticks=[], xlim=(-0.8, len(chosen) - 0.2))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    axes[-1].set_xlabel("prototypes")


def queue(figure, kept: Tensor, agreement: Mapping[int, float], batch: int) -> None:
    """kept (pushes, L): at which push each place of the queue was filled, 0 for none.  agreement:
    by length of the queue."""
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    left.imshow(kept.where(kept > 0, torch.nan).numpy(), aspect="auto", cmap="viridis",
                interpolation="nearest")
    left.set(title=f"A queue of {kept.shape[1]}, batches of {batch}", xlabel="newest to oldest",
             ylabel="after batch", xticks=[], yticks=range(len(kept)),
             yticklabels=range(1, len(kept) + 1))
    left.spines[:].set(visible=True)
    right.plot(range(len(agreement)), agreement.values(), "o-", color="C0")
    right.set_xticks(range(len(agreement)), [f"{length:,}" for length in agreement])
    right.set(title="Codes as in one large batch", xlabel="length of the queue",
              ylabel="overlap of the codes", ylim=(None, 1.005))


def curves(figure, curve: Curve, moments: Sequence[int]) -> None:
    """Loss over ln K, and prototypes in use, with lines at the moments."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    above.plot(*curve.columns, color="C0")
    above.axhline(1, color=MUTED, linestyle="--", linewidth=1)
    above.annotate("1: every prototype is predicted with 1/K", (1, 1), ha="right", color=MUTED,
                   xycoords=("axes fraction", "data"), xytext=(0, 4), textcoords="offset points")
    above.set(ylabel="loss / ln K", title=curve.name)
    below.plot(*curve.used, color="C2")
    below.set(ylabel="share", ylim=(0, 1.05), xlabel="step", title="Prototypes in use")
    for axis in (above, below):
        for step in moments:
            axis.axvline(step, color="C1", linewidth=1, alpha=0.8)


def moments(figure, images: Tensor, nearest: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """images: uint8 (N, 3, s, s).  nearest: of each moment's title, the images (rows, n) that are
    nearest to some prototypes, whose names are given."""
    gap, side = 4, images.shape[-1] + 4
    for axis, (title, rows) in zip(figure.subplots(1, len(nearest), squeeze=False)[0],
                                   nearest.items()):
        tiles = F.pad(torch.cat([images, torch.full_like(images[:, :1], 255)], 1), (0, gap, 0, gap))
        page = tiles[rows].permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)      # (., ., RGBA)
        axis.imshow(page.numpy())
        axis.set(xticks=[])
        axis.set_title(title, loc="center")
        axis.set_yticks([side * (i + 0.5) - gap / 2 for i in range(len(names))], names)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.label_outer()
