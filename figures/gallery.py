"""A gallery: a folder with a page that opens from disk, to look at the clusters of a set of images.

    import torch
    from figures.gallery import Images, write
    names, prototypes = [f"{i}.png" for i in range(9)], torch.arange(9) % 3
    near = (torch.arange(9)[:, None] + torch.arange(1, 3)) % 9       # of each image two others
    images = Images(names, prototypes, torch.rand(9), torch.rand(9), torch.randn(9, 8), near,
                    torch.rand(9, 2))
    write("gallery", images, torch.zeros(9, 3, 64, 64, dtype=torch.uint8), "Clusters", "Of nothing")

The folder holds index.html, which is gallery.html with the data put in as JSON, and thumbnails,
many in a JPEG (sprites). The page needs no server and loads nothing from a network. Names come from
outside: `to_json` leaves no tag in them, and the page writes them as text.

Shapes: N images, C features, k neighbours.
"""
import json
import os
from pathlib import Path
from typing import Iterable, NamedTuple, Sequence

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from weights.atomic import write_whole

TEMPLATE = Path(__file__).with_name("gallery.html")
# pixels of a thumbnail, and how many are side by side in a square; of a multiple of 16 pixels, so
# that no block of a JPEG covers two
SPRITES = {"thumbs": (96, 8), "map": (32, 64)}
LEADING = 8                             # images of a cluster that are shown in the list of clusters


class Images(NamedTuple):
    """The images of a gallery, in the order of `arrange`."""
    names: Sequence[str]
    prototype: Tensor                   # of each image the nearest one (N,)
    cosine: Tensor                      # to it (N,)
    confidence: Tensor                  # (N,)
    features: Tensor                    # (N, C)
    near: Tensor                        # numbers of the nearest other images (N, k)
    similarity: Tensor                  # to these (N, k)
    labels: Tensor | None = None        # numbers of classes (N,)
    classes: Sequence[str] = ()


def arrange(prototype: Tensor, cosine: Tensor) -> Tensor:
    """The order of images whose thumbnails are looked at together (N,): first those in the list of
    clusters, then all others; the largest cluster first, in it the image nearest to the prototype.
    """
    order = cosine.argsort(descending=True, stable=True)
    order = order[prototype[order].argsort(stable=True)]
    sizes = prototype.bincount()[prototype[order]]
    order = order[sizes.argsort(descending=True, stable=True)]
    _, counts = prototype[order].unique_consecutive(return_counts=True)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    rank = torch.arange(len(order)) - starts                             # in its cluster
    return order[(rank >= LEADING).to(torch.uint8).argsort(stable=True)]


def clusters_of(images: Images) -> list[dict]:
    """Of each cluster, the largest first: its number, how many images, tightness (their mean cosine
    similarity to the prototype), and where there are labels the most frequent class and purity, its
    share."""
    found = []
    for number in images.prototype.unique().tolist():
        members = images.prototype == number
        cluster = {"number": number, "count": int(members.sum()),
                   "tightness": images.cosine[members].mean().item()}
        if images.labels is not None:
            counts = images.labels[members].bincount()
            cluster |= {"purity": (counts.max() / counts.sum()).item(),
                        "class": int(counts.argmax())}
        found.append(cluster)
    return sorted(found, key=lambda cluster: -cluster["count"])


def principal_axes(features: Tensor) -> tuple[Tensor, list[float]]:
    """Unit features (N, C) on the two axes of their largest variance (N, 2), and the share of the
    variance that each holds. An axis points to where its largest loading is positive."""
    x = F.normalize(features.float(), dim=1)
    x = x - x.mean(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)            # of its random start
        _, scales, axes = torch.pca_lowrank(x, min(8, *x.shape), center=False, niter=16)
    axes, shares = axes[:, :2], scales[:2].square() / x.square().sum().clamp(min=1e-12)
    axes = axes * axes.gather(0, axes.abs().argmax(0)[None]).sign()
    missing = 2 - axes.shape[1]         # of one image, or of one feature
    return F.pad(x @ axes, (0, missing)), shares.tolist() + [0.0] * missing


def write_sprites(folder: Path, tiles: Iterable[Tensor], count: int) -> None:
    """Thumbnails, uint8 (3, s, s), as folder/thumbs/0.jpg, ... and folder/map/0.jpg, ...; those of
    an older gallery are removed."""
    sheets = {}
    for name in SPRITES:
        for old in (folder / name).glob("*.jpg"):
            if old.stem.isdigit():      # the user's own stay
                old.unlink()
    for i, tile in enumerate(tiles):
        image = Image.fromarray(tile.permute(1, 2, 0).numpy())
        for name, (side, across) in SPRITES.items():
            number, place = divmod(i, across ** 2)
            if place == 0:
                sheets[name] = Image.new("RGB", (side * across, side * across))
            sheets[name].paste(image.resize((side, side)),
                               (place % across * side, place // across * side))
            if place == across ** 2 - 1 or i == count - 1:
                (folder / name).mkdir(parents=True, exist_ok=True)
                sheets[name].save(folder / name / f"{number}.jpg", quality=85)


def to_json(data: dict) -> str:
    """As it may stand in a <script>: without "<", so that nothing in it can end the script."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def readable(name: str) -> str:
    """Without the surrogates that stand for bytes which are not UTF-8."""
    return os.fsencode(name).decode(errors="replace")


def write(folder: str | os.PathLike, images: Images, tiles: Iterable[Tensor], title: str,
          about: str, originals: str = "") -> None:
    """The gallery, into a folder; its page last.

    tiles: a square image each, uint8 (3, s, s), in the images' order.  originals: address of the
    folder that the names are relative to, seen from the page; none: they are not linked.
    """
    folder = Path(folder)
    points, shares = principal_axes(images.features)
    points = points - (points.amax(0) + points.amin(0)) / 2     # between -1 and 1
    points = points / points.abs().max().clamp(min=1e-12)

    def rounded(numbers: Tensor, digits: int = 3) -> list:
        return [[round(x, digits) for x in row] if isinstance(row, list) else round(row, digits)
                for row in numbers.tolist()]

    data = {"title": title, "about": about, "originals": originals, "sprites": SPRITES,
            "leading": LEADING, "names": [readable(name) for name in images.names],
            "cluster": images.prototype.tolist(), "cosine": rounded(images.cosine),
            "confidence": rounded(images.confidence), "near": images.near.tolist(),
            "similarity": rounded(images.similarity), "points": rounded(points, 4),
            "shares": shares, "clusters": clusters_of(images),
            "labels": None if images.labels is None else images.labels.tolist(),
            "classes": [readable(name) for name in images.classes]}
    write_sprites(folder, tiles, len(images.names))
    page = TEMPLATE.read_text(encoding="utf-8")
    write_whole(folder / "index.html", page.replace("DATA_AS_JSON", to_json(data)))
