"""The built-in scenes: several of the demo's things in each image, with boxes and masks.

    scenes = DemoScenes("train")                     # len(), [i] -> image, target; .classes
    image, target = scenes[7]                        # uint8 (3, 160, 160); target["boxes"], ...
    python -m data.scenes OUT.png                    # a sheet, with the boxes

A scene shows things of the twelve kinds of `data.demo`, over the same clutter and in the same
colours. They differ in size eightfold, hide one another in part, and are cut by the border. Every
thing that is drawn is in the target, and 40 % of its area or more is visible.

Image i is a pure function of (seed, split, i): the same in any order, process and count.

Shapes: n objects of an image, s pixels of its side.
"""
import sys

import numpy
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from data.demo import OUTLINES, PAINT, THING, background
from weights.atomic import refuse_existing
from weights.terminal import one_sentence

SPLITS = {"train": 2000, "val": 300}       # images by default
SIZE, UNIT = 160, 64                       # pixels; of a demo image, which gives the clutter's size
TRIES = (2, 11)                            # things that are tried: from, and below
RADIUS = (1 / 32, 1 / 4)                   # of a thing, in sides of the image; uniform in its log
VISIBLE = 0.4                              # least share of a thing's area


def arrange(rng: numpy.random.Generator, size: int) -> tuple[numpy.ndarray, list[int]]:
    """Things at random -> which one each pixel shows, uint8 (2s, 2s), 0 for none and k + 1 for
    thing k; and the kind of each thing, a number from 0.

    A thing of which too little would be visible is not placed, nor one that would hide too much of
    another.
    """
    side, outlines = 2 * size, list(OUTLINES.values())
    shown, kinds, areas = Image.new("L", (side, side)), [], numpy.zeros(0)
    for _ in range(rng.integers(*TRIES)):
        kind = int(rng.integers(len(outlines)))
        place = rng.random(2) @ [1, 1j] * side
        radius = side * numpy.exp(rng.uniform(*numpy.log(RADIUS)))
        points = place + radius * numpy.exp(2j * numpy.pi * rng.random()) * outlines[kind]
        trial, tried = shown.copy(), numpy.append(areas, PAINT * radius ** 2)
        polygon = numpy.stack([points.real, points.imag], 1).ravel().tolist()
        ImageDraw.Draw(trial).polygon(polygon, fill=len(tried))
        visible = numpy.array(trial.histogram()[1:len(tried) + 1])
        if (visible >= VISIBLE * tried).all():
            shown, areas = trial, tried
            kinds.append(kind)
    return numpy.asarray(shown), kinds


def draw(rng: numpy.random.Generator, size: int) -> tuple[Tensor, dict]:
    """Image, uint8 (3, s, s); and target: boxes float32 (n, 4) as x1, y1, x2, y2, labels from 1
    and iscrowd int64 (n,), masks uint8 (n, s, s), area float32 (n,), of the masks."""
    shown, kinds = arrange(rng, size)
    colours = rng.integers(*THING, (len(kinds) + 1, 3), dtype=numpy.uint8)
    image = numpy.array(background(rng, 2 * size, 2 * UNIT))
    image[shown > 0] = colours[shown[shown > 0]]
    image = numpy.array(Image.fromarray(image).reduce(2))       # smooth edges

    # a pixel is of the thing that fills half of its four quarters: the upper median of them
    quarters = shown.reshape(size, 2, size, 2).transpose(1, 3, 0, 2).reshape(4, size, size)
    masks = numpy.sort(quarters, 0)[2] == numpy.arange(1, len(kinds) + 1)[:, None, None]
    boxes = numpy.zeros((len(kinds), 4), numpy.float32)
    for box, mask in zip(boxes, masks):
        rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return torch.from_numpy(image).permute(2, 0, 1).contiguous(), {
        "boxes": torch.from_numpy(boxes),
        "labels": torch.tensor(kinds, dtype=torch.int64) + 1,
        "masks": torch.from_numpy(masks.astype(numpy.uint8)),
        "iscrowd": torch.zeros(len(kinds), dtype=torch.int64),
        "area": torch.from_numpy(masks.sum((1, 2), dtype=numpy.float32))}


class DemoScenes:
    """A source of `data.detection.Scenes`. Raises ValueError for an unknown split."""

    has_masks = True

    def __init__(self, split: str = "train", count: int | None = None, seed: int = 0,
                 size: int = SIZE):
        if split not in SPLITS:
            raise ValueError(f"no split {split!r} of the demo scenes, only {', '.join(SPLITS)}")
        self.split, self.seed, self.side = split, seed, size
        self.count = SPLITS[split] if count is None else count
        self.classes, self.left_out = list(OUTLINES), []
        self.category_ids = list(range(1, len(OUTLINES) + 1))
        # COCO's objects are small below 32 pixels and large from 96 on, in images of 640 x 480
        self.area_limits = (32 * size / 480) ** 2, (96 * size / 480) ** 2

    def __len__(self) -> int:
        return self.count

    def name(self, i: int) -> str:
        return f"{self.split}-{i:06d}.png"

    def size(self, i: int) -> tuple[int, int]:
        return self.side, self.side

    def target(self, i: int, masks: bool = True) -> dict:
        return self.scene(i, masks)[1]

    def scene(self, i: int, masks: bool = True) -> tuple[Tensor, dict]:
        """masks: whether the target has any."""
        image, target = self[i]
        if not masks:
            del target["masks"]
        return image, target

    def __getitem__(self, i: int) -> tuple[Tensor, dict]:
        rng = numpy.random.default_rng([self.seed, list(SPLITS).index(self.split), i, 1])
        image, target = draw(rng, self.side)
        return image, target | {"image_id": i + 1}


def sheet(path: str, rows: int = 4, columns: int = 6) -> None:
    """Write a sheet of the first scenes, with their boxes."""
    scenes, gap = DemoScenes(), 2
    step = scenes.side + gap
    page = Image.new("RGB", (columns * step - gap, rows * step - gap), "white")
    for i in range(rows * columns):
        image, target = scenes[i]
        tile = Image.fromarray(image.permute(1, 2, 0).numpy())
        for x1, y1, x2, y2 in target["boxes"].tolist():
            ImageDraw.Draw(tile).rectangle((x1, y1, x2 - 1, y2 - 1), outline="white")
        page.paste(tile, (i % columns * step, i // columns * step))
    page.save(path)


def main(argv: list[str]) -> None:
    with one_sentence("python -m data.scenes"):
        if len(argv) != 1:
            raise ValueError("needs one argument, as in python -m data.scenes OUT.png")
        refuse_existing(argv[0])
        sheet(argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
