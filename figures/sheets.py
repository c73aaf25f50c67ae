"""Sheets: many images on one page, with a caption and names, for a person to look at.

    import torch
    from figures.sheets import Row, Tile, prototypes, sheet
    images = torch.randint(0, 256, (100, 3, 64, 64), dtype=torch.uint8)
    prototypes("prototypes.png", torch.randn(100, 20), images)      # of scores; a row a prototype
    tiles = [Tile(images[0], ["rose", "0.93"], True), Tile(images[1], ["tulip", "0.88"], False)]
    sheet("sheet.png", "What the rows show.", [Row("query 1", tiles)])

`layout` says where everything lies. The font is PIL's own, which has ASCII alone.

Shapes: N images, B of a batch, V crops of an image, K prototypes.
"""
import functools
import math
import unicodedata
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.functional import resize

from swav import ASSIGNED

TEXT, LINE = 14, 18                     # pixels: the font's size, a line's height
MARGIN, GAP, GROUP = 12, 4, 32          # around the page; between images; between groups of rows
FRAME, DASH = 3, 6                      # a frame's width; the length of its dashes
LEAST = 600                             # width of a page, for its caption's sake
LARGEST = 96                            # side of an image in the sheet of prototypes
COLOURS = {True: (0, 130, 95), False: (213, 94, 0)}     # colour-blind people tell them apart, too


class Tile(NamedTuple):
    """An image, and what is said about it."""
    image: Tensor                       # uint8 (3, s, s); all of a sheet have the same s
    text: Sequence[str] = ()            # lines under it
    right: bool | None = None           # True: a solid frame and a tick; False: dashed and a cross


class Row(NamedTuple):
    name: str                           # of one or more lines, left of the tiles
    tiles: Sequence[Tile | None]        # None: an empty place


class Layout(NamedTuple):
    """Where everything lies: pixels from the left and from above, of upper left corners."""
    size: tuple[int, int]               # of the page
    caption: list[str]                  # its lines, at MARGIN
    heads: list[list[tuple[int, int]]]  # over the columns, of each group of rows
    names: list[tuple[int, int]]        # of each row
    images: list[list[tuple[int, int]]]     # of each row
    cell: int                           # width of an image's place, and of its text


def layout(caption: str, rows: Sequence[Row], heads: Sequence[str] = (),
           columns: int = 1) -> Layout:
    """Arguments as of `sheet`."""
    tiles = [tile for row in rows for tile in row.tiles if tile]
    side = tiles[0].image.shape[-1]
    edge = FRAME * any(tile.right is not None for tile in tiles)
    name = max(width_of(row.name) + 3 * GAP * bool(row.name) for row in rows)
    high = [LINE * len(row.name.splitlines()) for row in rows]
    said = max(width_of("\n".join(tile.text)) for tile in tiles) + TEXT * bool(edge)
    cell = max(side + 2 * edge, min(said, 3 * side // 2),       # longer text is cut off
               *(width_of(head) + GAP for head in heads))
    tall = max(side + 2 * FRAME + LINE * max(len(tile.text) for tile in tiles), *high) + 2 * GAP
    group = name + max(len(row.tiles) for row in rows) * (cell + GAP) - GAP + GROUP
    down = math.ceil(len(rows) / columns)
    lefts = [MARGIN + name + i * group for i in range(math.ceil(len(rows) / down))]
    width = max(LEAST, len(lefts) * group - GROUP + 2 * MARGIN)
    lines = wrap(caption, width - 2 * MARGIN)
    over = MARGIN + LINE * len(lines) + 2 * GAP
    top = over + LINE * max(len(head.splitlines()) for head in ("", *heads))
    corners = [(lefts[r // down], top + r % down * tall) for r in range(len(rows))]
    return Layout(
        (width, top + down * tall - 2 * GAP + MARGIN), lines,
        [[(x + c * (cell + GAP) + edge, over) for c in range(len(heads))] for x in lefts],
        [(x - name, y + max(0, side + 2 * FRAME - h) // 2) for (x, y), h in zip(corners, high)],
        [[(x + c * (cell + GAP) + edge, y + FRAME) for c in range(len(row.tiles))]
         for (x, y), row in zip(corners, rows)], cell)


def sheet(path: str | Path, caption: str, rows: Sequence[Row], heads: Sequence[str] = (),
          columns: int = 1) -> None:
    """Draw rows of images with what is said about them.

    heads: names of the columns of images.  columns: the rows run down the first of so many groups,
    then down the next.
    """
    place = layout(caption, rows, heads, columns)
    page = Image.new("RGB", place.size, "white")
    pen = ImageDraw.Draw(page)
    write(pen, (MARGIN, MARGIN), place.caption)
    for corners in place.heads:
        for corner, head in zip(corners, heads):
            write(pen, corner, head.splitlines())
    for row, corner, corners in zip(rows, place.names, place.images):
        write(pen, corner, row.name.splitlines())
        for tile, corner in zip(row.tiles, corners):
            if tile:
                draw_tile(page, pen, tile, corner, place.cell)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    page.save(path)


def draw_tile(page: Image.Image, pen: ImageDraw.ImageDraw, tile: Tile, corner: tuple[int, int],
              cell: int) -> None:
    """The frame, the image, its mark, its text. corner: the image's upper left."""
    (x, y), side, indent = corner, tile.image.shape[-1], 0
    if tile.right is not None:
        colour, indent = COLOURS[tile.right], TEXT
        left, top, right, bottom = x - FRAME, y - FRAME, x + side + FRAME - 1, y + side + FRAME - 1
        pen.rectangle((left, top, right, bottom), colour)
        for at in range(DASH, side, 2 * DASH) if not tile.right else ():         # the gaps
            pen.rectangle((left + at, top, left + at + DASH - 1, bottom), "white")
            pen.rectangle((left, top + at, right, top + at + DASH - 1), "white")
        under = bottom + 1 + LINE // 2
        strokes = [((0, 0), (3, 4), (9, -5))] if tile.right else [
            ((0, -4), (8, 4)), ((0, 4), (8, -4))]
        for points in strokes:
            pen.line([(x + dx, under + dy) for dx, dy in points], colour, 3)
    page.paste(Image.fromarray(tile.image.permute(1, 2, 0).numpy()), (x, y))
    for i, line in enumerate(tile.text):
        shift = indent * (i == 0)
        write(pen, (x + shift, y + side + FRAME + LINE * i), [fit(line, cell - shift)])


def write(pen: ImageDraw.ImageDraw, corner: tuple[int, int], lines: Sequence[str]) -> None:
    for i, line in enumerate(lines):
        pen.text((corner[0], corner[1] + LINE * i), plain(line), "black", font())


@functools.cache
def font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT)


def plain(text: str) -> str:
    """One line of ASCII: accents go, other letters become their codes, as \\u4e2d."""
    letters = unicodedata.normalize("NFKD", " ".join(text.split()))
    kept = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return kept.encode("ascii", "backslashreplace").decode()


def width_of(text: str) -> int:
    """Pixels of its longest line."""
    return math.ceil(max((font().getlength(plain(line)) for line in text.splitlines()), default=0))


def fit(text: str, width: int) -> str:
    """Cut in front, for names differ at the end, so that it takes no more than so many pixels."""
    text = plain(text)
    if width_of(text) <= width:
        return text
    while text and width_of("..." + text) > width:
        text = text[1:]
    return "..." + text


def wrap(text: str, width: int) -> list[str]:
    """Lines of whole words."""
    lines = []
    for paragraph in text.splitlines():
        lines.append("")
        for word in paragraph.split():
            longer = f"{lines[-1]} {word}".strip()
            if width_of(longer) > width and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
    return lines


def views(path: str | Path, crops: list[Tensor], specs, mean: Sequence[float],
          std: Sequence[float], assigned: int = ASSIGNED) -> None:
    """The first 8 images of a batch as the network sees them: a row an image, a column a crop.

    crops: augmented and normalised, one (count * B, 3, s, s) per size.  specs: their
    multicrop.CropSpecs.  mean, std: the channels' normalisation, which is undone.  assigned: crops
    of an image that get codes; 0 where the method is not SwAV.
    """
    rows = min(8, len(crops[0]) // specs[0].count)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    tiles, largest = [], max(spec.size for spec in specs)
    for spec, images in zip(specs, crops):
        shown = images.float().cpu().unflatten(0, (spec.count, -1))[:, :rows] * std + mean
        side = largest - spec.size
        tiles.append(F.pad(shown, (0, side, side // 2, side - side // 2), value=1.0))
    tiles = torch.cat(tiles).mul(255).round().clamp(0, 255).to(torch.uint8)     # (V, rows, 3, s, s)
    shown = [Row(f"image {i + 1}", list(map(Tile, tiles[:, i]))) for i in range(rows)]
    sheet(path, views_caption(rows, assigned), shown, crop_names(specs, assigned))


def views_caption(rows: int, assigned: int = ASSIGNED) -> str:
    codes = ("\nAssigned crops get codes by Sinkhorn-Knopp; the network learns to predict "
             "the code of an assigned crop from each of the image's other crops.")
    return (f"The first {rows} images of the first batch: augmented crops, as the network sees "
            "them." + codes * bool(assigned))


def crop_names(specs, assigned: int = ASSIGNED) -> list[str]:
    """Over each column of the views: number, size, and whether it is assigned or small."""
    sizes = [spec.size for spec in specs for _ in range(spec.count)]
    kinds = ["assigned" if i < assigned else "small" * (size < max(sizes))
             for i, size in enumerate(sizes)]
    return [f"crop {i + 1}\n{size} px\n{kind}" for i, (size, kind) in enumerate(zip(sizes, kinds))]


def prototypes(path: str | Path, scores: Tensor, images: Tensor, nearest: int = 8, most: int = 64,
               columns: int = 3) -> None:
    """The images nearest to each prototype: a row a prototype, the nearest image first.

    scores: (N, K).  images: uint8 (N, 3, s, s).  Of more than `most` prototypes, those that are
    the nearest one to most images.
    """
    members = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    chosen = members.argsort(descending=True, stable=True)[:most]
    best = scores[:, chosen].topk(min(nearest, len(scores)), dim=0).indices.t()      # (most, n)
    side = min(LARGEST, images.shape[-1])
    rows = [Row(prototype_name(k, members[k]),
                [Tile(image) for image in resize(images[indices], [side, side])])
            for k, indices in zip(chosen.tolist(), best)]
    sheet(path, prototypes_caption(len(scores), scores.shape[1], len(rows), best.shape[1]), rows,
          columns=columns)


def neighbours(path: str | Path, features: Tensor, images: Tensor, queries: int = 36,
               nearest: int = 8, columns: int = 3) -> None:
    """Some images, each with those nearest to it by the cosine of their features: a row each.

    features: (N, C).  images: uint8 (N, 3, s, s), the first of which are the queries.
    """
    unit = F.normalize(features, dim=1)
    similarity = unit[:queries] @ unit.t()                               # (queries, N)
    best = similarity.topk(min(1 + nearest, len(unit)), dim=1).indices   # itself first
    side = min(LARGEST, images.shape[-1])
    rows = [Row(f"image {i}", [Tile(image) for image in resize(images[indices], [side, side])])
            for i, indices in enumerate(best)]
    caption = (f"{len(rows)} images, and beside each the {best.shape[1] - 1} nearest of "
               f"{len(images):,}, by the cosine of the trunk's features.")
    sheet(path, caption, rows, columns=columns)


def prototype_name(number: int, count: int) -> str:
    """Of a row.  count: of the images that have no nearer prototype."""
    return f"prototype {number}\n{count:,} image{'s' * (count != 1)}"


def prototypes_caption(images: int, count: int, shown: int, nearest: int) -> str:
    """images: among which were looked for those shown.  count: K."""
    which = f"The {count:,} prototypes" if shown == count else (
        f"Of {count:,} prototypes the {shown:,} with most images")
    return (f"{which}: a row each, with the {nearest} images nearest to it among {images:,}, the "
            "nearest first.\nThe count is of the images to which this prototype is the nearest "
            "one. Most images come first: down the left column, then down the next.")
