"""Detections: boxes and translucent masks over images, beside the ground truth, to look at.

    import torch
    from data.detection import open_detection
    from figures.detections import Shown, draw, sheet
    val = open_detection("")[1]
    image, truth = val[0]
    found = truth | {"scores": torch.rand(len(truth["labels"]))}     # a detector's, in eval mode
    draw(image, found, val.classes)                                  # uint8 (3, H, W)
    sheet("detections.png", [Shown(val.name(0), image, truth, found)], val.classes)

Shapes: n objects of an image, H and W its pixels.
"""
import functools
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

from figures.sheets import Row, Tile, plain
from figures.sheets import sheet as rows_of_tiles

# of the labels 1, 2, ..., in turn: Okabe and Ito's, which colour-blind people tell apart
COLOURS = [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178),
           (213, 94, 0), (204, 121, 167)]
SIDE = 384                              # pixels: the longer side of an image in a sheet
TEXT, TALL = 11, 13                     # pixels: the font's size, a name's height
OPACITY = 0.5                           # of a mask
LEAST = 0.5                             # score from which on a detection is drawn


class Shown(NamedTuple):
    """A row of a sheet."""
    name: str
    image: Tensor                       # uint8 (3, H, W)
    truth: dict                         # as of data.detection.Scenes
    found: dict                         # as of torchvision's detectors


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(TEXT)


def draw(image: Tensor, detections: dict, classes: Sequence[str], least: float = LEAST,
         side: int = 0) -> Tensor:
    """Boxes with class and score, and masks where there are some; the smallest on top.

    image: uint8 (3, H, W).  detections: boxes (n, 4), labels (n,) from 1, and where there are some
    scores (n,), iscrowd (n,), masks of 0 and 1, (n, H, W) or (n, 1, H, W).  least: of the scores
    drawn.  side: pixels, to which the longer side is resized; 0: as it is.
    """
    height, width = image.shape[1:]
    scale = side / max(height, width) if side else 1
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    boxes = detections["boxes"].cpu()
    order = (boxes[:, 2:] - boxes[:, :2]).prod(1).argsort(descending=True, stable=True)
    if "scores" in detections:
        order = order[detections["scores"].cpu()[order] >= least]
    image, boxes = TF.resize(image.cpu(), size), boxes[order] * scale
    labels = detections["labels"].cpu()[order].tolist()
    colours = [COLOURS[(label - 1) % len(COLOURS)] for label in labels]
    if not labels:
        return image
    if "masks" in detections:
        masks = detections["masks"].reshape(-1, 1, height, width)
        masks = torch.cat([TF.resize(masks[k].cpu().float(), size) >= 0.5 for k in order])
        image = draw_segmentation_masks(image, masks, OPACITY, colours)
    image = draw_bounding_boxes(image, boxes, colors=colours, width=2)
    page = Image.fromarray(image.permute(1, 2, 0).numpy())
    for k, box, label, colour in zip(order.tolist(), boxes.tolist(), labels, colours):
        text = plain(classes[label - 1])
        if "scores" in detections:
            text += f" {float(detections['scores'][k]):.2f}"
        elif "iscrowd" in detections and detections["iscrowd"][k]:
            text += " (crowd)"
        _name(page, box, text, colour)
    return TF.pil_to_tensor(page)


def _name(page: Image.Image, box: list[float], text: str, colour: tuple[int, int, int]) -> None:
    """Over the box, or in it where there is no room; all of it on the page where that is wide
    enough."""
    pen, width = ImageDraw.Draw(page), round(_font().getlength(text)) + 3
    x = max(0, min(round(box[0]), page.width - width))
    y = round(box[1]) - TALL if box[1] >= TALL else round(box[1])
    pen.rectangle((x, y, x + width - 1, y + TALL - 1), colour)
    pen.text((x + 2, y), text, "black", _font())


def sheet(path: str | Path, shown: Sequence[Shown], classes: Sequence[str], least: float = LEAST,
          columns: int = 1) -> None:
    """A row an image: the ground truth, and beside it what was found. columns: of rows."""
    def tile(image: Tensor, objects: dict) -> Tile:
        drawn = draw(image, objects, classes, least, SIDE)
        height, width = drawn.shape[1:]
        return Tile(F.pad(drawn, (0, SIDE - width, 0, SIDE - height), value=255))

    rows = [Row(row.name, [tile(row.image, row.truth), tile(row.image, row.found)])
            for row in shown]
    rows_of_tiles(path, f"Objects of {len(rows):,} images: left those of the ground truth, right "
                  f"those found with a score of {least:g} or more. A colour is a class; with "
                  f"more than {len(COLOURS)} classes several share one.", rows,
                  ["ground truth", "found"], columns)
