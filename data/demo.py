"""The built-in images: generated, deterministic, labelled for measuring only.

Every image scatters things of one kind (rings, stars, spirals, ...) over clutter. Things differ
in place, size, turn and colour within an image as much as between images; only the kind is
shared by all crops of an image. So it is what SwAV (arXiv 2006.09882) can find without labels,
while pixels and untrained features see mostly the rest.

    images = DemoImages("train")                     # len(), [i] -> PNG bytes, .name(i), .labels
    Image.open(io.BytesIO(images[7])).show()         # an image of images.classes[7]
    held_out = DemoImages("val", count=1024, seed=0)

Picture i is a pure function of (seed, split, i): the same in any order, process and count. One
takes a millisecond or two to make; the latest 8,192 are kept, 5 kB each. `python -m data.demo
OUT.png` draws a sheet, a row a kind.
"""
import functools
import io
import sys

import numpy
from PIL import Image, ImageDraw

from weights.atomic import refuse_existing
from weights.terminal import one_sentence

SPLITS = {"train": 4096, "val": 1024}      # images by default
GRID = 3                                   # an image shows about GRID x GRID things
KEEP = 0.85                                # share of them that is drawn
CLUTTER = 4                                # stray lines behind them
BACKGROUND, THING = (0, 64), (160, 256)    # ranges of each colour channel
PAINT = 1.4                                # area of a thing of radius 1: the same for all kinds, so
                                           # that brightness does not give the kind away


def _arc(start: float, stop: float, points: int) -> numpy.ndarray:
    """Points of the unit circle in the complex plane; a full turn is 1."""
    return numpy.exp(2j * numpy.pi * numpy.linspace(start, stop, points))


def _hollow(*loops: numpy.ndarray) -> numpy.ndarray:
    """Closed loops -> one outline; where an even number of them overlap is a hole."""
    return numpy.concatenate(loops + tuple(loop[:1] for loop in loops[-2::-1]))


def _band(path: numpy.ndarray, width: float) -> numpy.ndarray:
    """The outline of a stroke along a path."""
    side = numpy.gradient(path) * 1j
    side *= width / 2 / numpy.abs(side)
    return numpy.concatenate([path + side, (path - side)[::-1]])


def _outlines() -> dict[str, numpy.ndarray]:
    """Kind -> its outline: complex points around 0, scaled to the same area."""
    circle = _arc(0, 1, 25)
    square = 2 ** .5 * _arc(1 / 8, 9 / 8, 5)
    zig = numpy.array([-1.5, -.75 + .8j, 0, .75 + .8j, 1.5]) - .4j
    arm = numpy.array([.3 + 1j, -.3 + 1j, -.3 + .3j])
    t = numpy.linspace(0, 1, 33)
    outlines = {
        "disc": circle,
        "ring": _hollow(circle, .72 * circle[::-1]),
        "triangle": _arc(0, 1, 4),
        "cross": numpy.concatenate([arm * 1j ** turn for turn in range(4)]),
        "star": _arc(0, 1, 11)[:10] * numpy.tile([1, .4], 5),
        "crescent": numpy.concatenate([_arc(.17, .83, 19), .45 + .86 * _arc(.71, .29, 15)]),
        "zigzag": numpy.concatenate([zig + .3j, (zig - .3j)[::-1]]),
        "spiral": _band((.1 + .9 * t) * numpy.exp(3.2j * numpy.pi * t), .25),
        "sun": _arc(0, 1, 25)[:24] * numpy.tile([1, .45], 12),
        "target": _hollow(circle, .74 * circle[::-1], .46 * circle),
        "window": _hollow(square, *(.33 * square[::-1] + (.52 + .52j) * 1j ** k for k in range(4))),
        "dots": _hollow(*(.3 * circle[::2] + .75 * z for z in (0, 1, 1j, -1, -1j))),
    }
    for kind, z in outlines.items():
        paint = abs(numpy.sum(z.conj() * numpy.roll(z, -1)).imag) / 2          # shoelace formula
        outlines[kind] = z * (PAINT / paint) ** 0.5
    return outlines


OUTLINES = _outlines()


def background(rng: numpy.random.Generator, side: int, unit: int) -> Image.Image:
    """A coloured cloud and stray lines, an RGB image. unit: side of the square that they fit: a
    larger image has more of them, not larger ones."""
    cells, lines = round(4 * side / unit) + 1, round(CLUTTER * (side / unit) ** 2)
    cloud = rng.integers(*BACKGROUND, (cells, cells, 3), dtype=numpy.uint8)
    image = Image.fromarray(cloud).resize((side, side), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    start = rng.random((lines, 2)) * side
    ends = numpy.concatenate([start, start + rng.normal(0, unit / 6, start.shape)], 1)
    for line, colour in zip(ends.tolist(), rng.integers(0, 256, (lines, 3)).tolist()):
        draw.line(line, fill=tuple(colour), width=unit // 40)
    return image


def picture(outline: numpy.ndarray, rng: numpy.random.Generator, size: int) -> Image.Image:
    """Things of one outline, scattered over a cluttered background -> an RGB image."""
    side = 2 * size                        # drawn at twice the size, then halved: smooth edges
    image = background(rng, side, side)
    draw = ImageDraw.Draw(image)

    # a grid that overhangs the image, shifted as a whole, each thing moved, sized and turned
    cell, count = side / GRID, (GRID + 1) ** 2
    rows, columns = numpy.divmod(numpy.arange(count), GRID + 1)
    place = columns + 1j * rows + (rng.uniform(-0.5, 0.5, 2) @ [1j, 1])
    place = place + rng.uniform(-0.25, 0.25, (count, 2)) @ [1, 1j]
    pose = cell / 2 * rng.uniform(0.75, 1.15, count) * numpy.exp(2j * numpy.pi * rng.random(count))
    points = place[:, None] * cell + pose[:, None] * outline             # (things, points)
    polygons = numpy.stack([points.real, points.imag], 2).reshape(count, -1)
    colours, keep = rng.integers(*THING, (count, 3)), rng.random(count) < KEEP
    for polygon, colour in zip(polygons[keep].tolist(), colours[keep].tolist()):
        draw.polygon(polygon, fill=tuple(colour))
    return image.reduce(2)


@functools.lru_cache(8192)
def png(kind: str, seed: int, split: str, i: int, size: int) -> bytes:
    """Picture i of a split, of a kind, as PNG of size x size pixels."""
    rng, file = numpy.random.default_rng([seed, list(SPLITS).index(split), i]), io.BytesIO()
    picture(OUTLINES[kind], rng, size).save(file, "png", compress_level=1)
    return file.getvalue()


class DemoImages:
    """len(), [i] -> PNG bytes, .name(i), .labels, .classes: what `data.images.open_images` gives.

    Raises ValueError for an unknown split.
    """

    def __init__(self, split: str = "train", count: int | None = None, seed: int = 0,
                 size: int = 64):
        if split not in SPLITS:
            raise ValueError(f"no split {split!r} of the demo images, only {', '.join(SPLITS)}")
        self.split, self.seed, self.size = split, seed, size
        self.classes = list(OUTLINES)
        self.labels = numpy.arange(SPLITS[split] if count is None else count) % len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    sizes = ""                              # fixed

    @property
    def fingerprint(self) -> str:
        return f"demo {self.split} {self.seed} {self.size} {len(self)}"

    def name(self, i: int) -> str:
        return f"{self.classes[self.labels[i]]}/{self.split}-{i:06d}.png"

    def __getitem__(self, i: int) -> bytes:
        return png(self.classes[self.labels[i]], self.seed, self.split, int(i), self.size)


def sheet(path: str, columns: int = 12, size: int = 64) -> None:
    """Write a sheet of the images, a row a kind."""
    pictures, gap = DemoImages(size=size), 2
    rows = len(pictures.classes)
    page = Image.new("RGB", (columns * (size + gap), rows * (size + gap)), "white")
    for i in range(rows * columns):
        tile = Image.open(io.BytesIO(pictures[i]))
        page.paste(tile, (i // rows * (size + gap), i % rows * (size + gap)))
    page.save(path)


def main(argv: list[str]) -> None:
    with one_sentence("python -m data.demo"):
        if len(argv) != 1:
            raise ValueError("needs one argument, as in python -m data.demo OUT.png")
        refuse_existing(argv[0])
        sheet(argv[0])


if __name__ == "__main__":
    main(sys.argv[1:])
