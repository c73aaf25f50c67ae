"""Near-duplicates: groups of images that are nearly the same, and a list of those to keep.

    python evaluate.py duplicates runs/mine --data photos/ --out duplicates.csv --sheet groups.png
    python train.py --data duplicates.keep.txt

    import torch
    from torch.nn import functional as F
    from evaluation.duplicates import choose_threshold, groups, nearest_similarities
    x = F.normalize(torch.randn(1000, 64), dim=1)
    similarity = nearest_similarities(x)                        # (1000,), of the nearest other
    groups(x, similarity, choose_threshold(similarity))         # numbers of images, in lists

An image's features are pooled (pooling.py), whitened on the images themselves and scaled to unit
norm. Two images whose similarity is at least the threshold are near-duplicates, and so are those
that a chain of such pairs joins. The rule for the threshold: of the logarithm of an image's
distance to its nearest other, 1 - similarity, the median less SPREADS times the distance from the
median to the upper quartile; but at least LEAST and at most MOST. Duplicates are in the lower half
and move neither much, as long as they are a minority; where they are not, the threshold is too
high, and finds exact copies alone. Of a group those images are left out that are near one that is
kept: of a chain, in which the first and the last are not alike, more than one is kept.

Shapes: N images, C features, K components.
"""
import csv
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.nn import functional as F

from data.images import Files
from distributed.ranks import gather_lists, is_main, my_share
from evaluation.features import extract
from evaluation.pooling import Descriptors, whitening
from evaluation.search import nearest, similarities
from evaluation.task import EvalTask
from figures.sheets import Row, Tile, sheet

SPREADS = 3.0                            # of a normal distribution this is two deviations
LEAST = 0.9                              # where all images are far apart, none is a duplicate
MOST = 1 - 1e-4                          # exact copies, to rounding
ROUNDING = 1e-6                          # of a similarity, below the threshold
PER_COMPONENT = 8                        # images, at least, for each component of the whitening
FEWEST = 256                             # images; of fewer the whitening would lose too much


def whiten(x: Tensor, components: int) -> Tensor:
    """(N, C) -> of unit norm, (N, K): PCA whitened, with at most `components`, and at most one for
    PER_COMPONENT images; (N, C), not whitened, of fewer than FEWEST images, and where all rows are
    the same. Memory: one more (N, C)."""
    if len(x) < FEWEST:
        return F.normalize(x, dim=1)
    total, products = 0.0, 0.0
    for part in map(Tensor.double, x.split(4096)):
        total, products = total + part.sum(0), products + part.t() @ part
    squares = products.trace() / len(x)
    if squares - (total / len(x)).square().sum() < 1e-10 * squares:     # rounding alone
        return F.normalize(x, dim=1)
    transform = whitening(len(x), total, products, min(components, len(x) // PER_COMPONENT))
    white = x.new_empty(len(x), transform.projection.shape[1])
    for part, out in zip(x.split(4096), white.split(4096)):
        out.copy_(F.normalize(transform(part), dim=1))
    return white


def nearest_similarities(x: Tensor, use_faiss: bool = False) -> Tensor:
    """(N, C) of unit norm -> the similarity of each to the nearest other, (N,), on the CPU. Under
    torchrun each rank searches for a share."""
    share = my_share(len(x))
    similarity, _ = nearest(x, x[share.start:share.stop], 2, use_faiss=use_faiss)
    # the largest is an image's own, or that of one just like it
    return torch.cat(gather_lists([similarity[:, 1].cpu()]))


def choose_threshold(similarity: Tensor) -> float:
    """Of the nearest others, (N,) -> the similarity from which on two images are near-duplicates;
    the rule is above."""
    distance = (1 - similarity.double()).clamp(min=1e-7).log().numpy()
    median, upper = numpy.quantile(distance, [0.5, 0.75])
    return min(MOST, max(LEAST, float(1 - numpy.exp(median - SPREADS * (upper - median)))))


def groups(x: Tensor, similarity: Tensor, threshold: float) -> list[list[int]]:
    """Connected components of the pairs whose similarity is at least the threshold: of two or more
    images each, the largest first. Memory as of search.similarities, and a byte for each number of
    a block.

    x: (N, C) of unit norm.  similarity: to the nearest other, (N,): no other image is in a pair.
    """
    chosen = (similarity >= threshold - ROUNDING).nonzero()[:, 0]
    parent = numpy.arange(len(chosen))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    x = x[chosen.to(x.device)]
    for start, block in similarities(x, x):
        near = (block >= threshold - ROUNDING).cpu().numpy()             # (Q, n)
        for row in near.any(1).nonzero()[0]:
            first = start + row
            for j in numpy.unique(parent[near[row].nonzero()[0]]):       # a few, mostly
                parent[max(root(first), root(j))] = min(root(first), root(j))
    members = {}
    for i, image in enumerate(chosen.tolist()):
        members.setdefault(root(i), []).append(image)
    found = [group for group in members.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group[0]))


def from_first(x: Tensor, size: Callable[[int], int],
               group: list[int]) -> tuple[list[int], list[float]]:
    """The group in order, and similarities to its first, the image of the most bytes; the others
    follow, the nearest first.  size: number of an image -> its bytes."""
    first = max(group, key=size)
    others = torch.tensor([i for i in group if i != first])
    similarity, order = (x[others.to(x.device)] @ x[first]).cpu().sort(descending=True, stable=True)
    return [first, *others[order].tolist()], [1.0, *similarity.tolist()]


def kept_of(x: Tensor, threshold: float) -> list[bool]:
    """A group's images in order (n, C) -> whether each is kept: no image kept before is near it."""
    x, kept = x.cpu(), []               # on a GPU each image would wait for the one before
    near = torch.zeros(len(x), dtype=torch.bool)
    for i, image in enumerate(x):
        kept.append(not near[i])
        if kept[-1]:
            near |= x @ image >= threshold - ROUNDING
    return kept


class Group(NamedTuple):
    """Images joined by near-duplicates, the largest file first, then the nearest to it."""
    images: list[int]                    # their numbers
    similarity: list[float]              # of each to the first
    kept: list[bool]


def run(task: EvalTask) -> dict:
    """A CSV of group, name, similarity to the group's first and whether it is kept; the list of
    images to keep; how many there are."""
    options, images = task.options, task.images()
    if len(options.depths) > 1:
        raise ValueError("duplicates takes one depth")
    crops = task.preprocessing.center_crops(images)
    (x,), ok = extract(Descriptors(task.trunk, options.depths, options.pool), crops,
                       **task.extract_options())
    readable = ok.nonzero()[:, 0]
    if len(readable) < 4:
        raise ValueError("duplicates needs four images that can be read")
    x = x[ok]
    x = whiten(x, options.components).to(task.device)
    similarity = nearest_similarities(x, options.faiss)
    threshold = options.threshold or choose_threshold(similarity)
    out, numbers = Path(options.out or "duplicates.csv"), readable.tolist()
    result = {"out": str(out), "images": len(numbers), "left_out": len(ok) - len(numbers),
              "components": x.shape[1], "pool": options.pool, "threshold": round(threshold, 6)}
    if not is_main():
        return result

    def size(i: int) -> int:             # of a row of x
        return len(images[numbers[i]])

    found = []
    for members in groups(x, similarity, threshold):
        order, cosines = from_first(x, size, members)
        found.append(Group([numbers[i] for i in order], cosines, kept_of(x[order], threshold)))
    dropped = {i for group in found for i, kept in zip(group.images, group.kept) if not kept}
    write(out, images, found)
    kept = write_kept(keep_file(out), images, [i for i in numbers if i not in dropped])
    result |= {"groups": len(found), "duplicates": len(dropped), "keep": kept and str(kept)}
    if options.sheet and found:
        draw(task, images, found, result)
    elif options.sheet:
        print("no near-duplicates were found: no sheet", file=sys.stderr)
    return result


def write(out: Path, images, found: list[Group]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["group", "name", "similarity", "kept"])
        table.writerows((number, images.name(i), f"{cosine:.6f}", int(kept))
                        for number, group in enumerate(found, 1)
                        for i, cosine, kept in zip(*group))


def keep_file(out: Path) -> Path:
    """The list beside the CSV."""
    return out.with_name(f"{out.stem}.keep.txt")


def write_kept(path: Path, images, kept: list[int]) -> Path | None:
    """Absolute paths, one a line, as train.py --data takes them; None, a sentence, and no file, for
    images that are no files, or have a line's end in their name."""
    path.unlink(missing_ok=True)        # an older one would be taken for this one
    names = [os.path.abspath(os.path.join(images.root, images.name(i)))
             for i in kept if isinstance(images, Files)]
    if not names or any("\n" in name or "\r" in name for name in names):
        print("no list of images to keep: that needs files, without line breaks in their names",
              file=sys.stderr)
        return None
    path.write_bytes(b"".join(os.fsencode(name) + b"\n" for name in names))
    return path


def draw(task: EvalTask, images, found: list[Group], result: dict) -> None:
    """--sheet: a row a group, the most doubtful first: its first image, then the least similar."""
    options = task.options
    order = sorted(range(len(found)), key=lambda g: min(found[g].similarity))[:options.rows]
    rows = []
    for g in order:
        (first, *others) = zip(*found[g])
        rows.append(Row(f"group {g + 1}\n{1 + len(others):,} images", [
            Tile(task.tile(images, i), [images.name(i), f"{cosine:.4f}" + ", kept" * kept])
            for i, cosine, kept in [first, *others[::-1]][:options.columns]]))
    sheet(options.sheet, caption(result, len(rows)), rows)


def caption(result: dict, shown: int) -> str:
    """Of the sheet."""
    return (f"Near-duplicates: {result['groups']:,} groups among {result['images']:,} images, "
            f"joined by pairs with a similarity of at least {result['threshold']:.4f}; "
            f"{result['duplicates']:,} images are left out of the list.\nA row each for {shown:,} "
            "of them, the most doubtful first: the largest file, then the others with their "
            "similarity to it, the least similar first.")
