"""Sheets: many pictures on one page, for a person to look at.

    views("views.png", crops, specs, mean, std)             # a batch as the network sees it
    sheet("knn.png", [[(image, None), (image, True)]])      # rows; a frame says right or wrong
    prototypes("prototypes.png", scores, images)            # what each prototype has come to mean

Shapes: N images, B of a batch, V crops of an image, K prototypes.
"""
import math
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image

FRAME = 2                               # pixels around a picture of a sheet


def views(path: Path, crops: list[Tensor], specs, mean: Sequence[float],
          std: Sequence[float]) -> None:
    """The first 8 images of a batch as the network sees them: a row an image, a column a crop.

    crops: augmented and normalised, one (count * B, 3, s, s) per size.  specs: their
    multicrop.CropSpecs.  mean, std: the channels' normalisation, which is undone.
    """
    rows = min(8, len(crops[0]) // specs[0].count)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    tiles, largest = [], max(spec.size for spec in specs)
    for spec, images in zip(specs, crops):
        shown = images.float().cpu().unflatten(0, (spec.count, -1))[:, :rows] * std + mean
        side = largest - spec.size
        pad = (side // 2, side - side // 2) * 2
        tiles.append(F.pad(shown, pad, value=1.0))
    tiles = torch.cat(tiles).transpose(0, 1).flatten(0, 1)               # (rows * V, 3, s, s)
    save_image(tiles, path, nrow=sum(spec.count for spec in specs), pad_value=1.0)


def sheet(path: Path, rows: Sequence[Sequence[tuple[Tensor, bool | None]]],
          columns: int = 1) -> None:
    """Rows of framed images. A frame is green for the mark True (right), red for False (wrong),
    white for None.

    rows: of (uint8 (3, s, s), mark); a shorter row ends in white.  columns: the rows run down the
    first of so many columns, then down the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = {None: (255, 255, 255), True: (0, 170, 0), False: (220, 0, 0)}
    longest, size = max(map(len, rows)), rows[0][0][0].shape[1]
    side, gap = size + 2 * FRAME, 2 * FRAME
    height = math.ceil(len(rows) / columns)
    page = torch.full((3, gap + height * (side + gap), gap + columns * (longest * side + gap)), 255,
                      dtype=torch.uint8)
    for r, row in enumerate(rows):
        top, left = gap + r % height * (side + gap), gap + r // height * (longest * side + gap)
        for c, (image, mark) in enumerate(row):
            place = page[:, top:top + side, left + c * side:left + (c + 1) * side]
            place[:] = torch.tensor(frames[mark], dtype=torch.uint8).view(3, 1, 1)
            place[:, FRAME:-FRAME, FRAME:-FRAME] = image
    save_image(page.float() / 255, path)


def prototypes(path: Path, scores: Tensor, images: Tensor, nearest: int = 8, most: int = 64,
               columns: int = 4) -> None:
    """The images nearest to each prototype: a row a prototype, the nearest image first.

    scores: (N, K).  images: uint8 (N, 3, s, s).  Of more than `most` prototypes, those that are
    the nearest one to most images.
    """
    members = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    chosen = members.argsort(descending=True, stable=True)[:most]
    best = scores[:, chosen].topk(min(nearest, len(scores)), dim=0).indices.t()      # (most, n)
    rows = [[(image, None) for image in images[indices]] for indices in best]
    sheet(path, rows, min(columns, len(rows)))
