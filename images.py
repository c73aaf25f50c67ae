"""Where pictures come from, in which order, and what happens to bad ones.

    images = open_images("photos/")                    # len(), [i] -> bytes, .name(i), .labels
    stream = Stream(images, MultiCrop(parse_crops("2x64+4x32")), seed=0)
    crops, params, bad = stream[10_000_000]            # whatever stands at that position

The input of a run is a pure function: the picture at position p of the endless stream, and what is
cut from it, depend on (seed, p) alone, not on workers, ranks, or what came before. Positions e*N to
(e+1)*N are epoch e, a permutation of all N pictures computed on the spot (a keyed Feistel network
with cycle-walking; Black & Rogaway 2002), so nothing of length N is ever shuffled, and resuming a
run is a number. A picture that cannot be read is replaced by another one, also a pure function,
and reported. No labels are read in training: `labels` serve to measure afterwards.
"""
import os
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset, Sampler

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
            ".pgm", ".jp2", ".avif")
MAX_TRIES = 64                       # pictures tried for one position before giving up


def open_images(spec: str | os.PathLike) -> "Files":
    """A folder of any depth -> dataset: len(), [i] -> bytes, .name(i), .labels, .classes.

    Raises ValueError where there is no such folder, or no file in it with a picture's suffix.
    """
    root = Path(spec)
    if not root.is_dir():
        raise ValueError(f"no such folder of pictures: {spec}")
    names = []
    seen = set()                     # real folders, so that links cannot lead in circles
    for folder, subfolders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            subfolders.clear()
            continue
        seen.add(os.path.realpath(folder))
        subfolders.sort()
        names += [os.path.relpath(os.path.join(folder, name), root) for name in sorted(files)
                  if name.lower().endswith(SUFFIXES) and not name.startswith("._")]   # macOS's
    if not names:
        raise ValueError(f"no pictures in {spec}: looked at all depths for {', '.join(SUFFIXES)}")
    return Files(root, names)


class Files:
    """Pictures that are files below a folder, by their relative names.

    labels: the number of each picture's top folder among the sorted .classes; None where pictures
    lie directly in the root. Names are kept as one byte string: 10 million cost no Python objects,
    and worker processes share them.
    """

    def __init__(self, root: Path, names: list[str]):
        self.root = os.fspath(root)
        encoded = [os.fsencode(name) for name in names]
        self._ends = numpy.cumsum([len(name) for name in encoded])
        self._bytes = numpy.frombuffer(b"".join(encoded), numpy.uint8)
        tops = [name.split(os.sep, 1)[0] if os.sep in name else None for name in names]
        self.classes, self.labels = [], None
        if None not in tops:
            self.classes = sorted(set(tops))
            number = {name: i for i, name in enumerate(self.classes)}
            self.labels = numpy.array([number[top] for top in tops])

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        start = self._ends[i - 1] if i else 0
        return os.fsdecode(self._bytes[start:self._ends[i]].tobytes())

    def __getitem__(self, i: int) -> bytes:
        with open(os.path.join(self.root, self.name(i)), "rb") as file:
            return file.read()


def mix(*values: int) -> int:
    """Whole numbers -> one of 64 bits that looks random (the finaliser of SplitMix64)."""
    h = 0
    for value in values:
        h = (h ^ value) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        h = (h ^ h >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        h ^= h >> 31
    return h


def permute(position: int, n: int, key: int) -> int:
    """Position in 0..n-1 -> index in 0..n-1, one to one, another permutation for each key."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(4):
            left, right = right, left ^ mix(key, turn, right) & mask
        position = left << half | right
        if position < n:             # else walk on along the cycle until back inside
            return position


class Survey(NamedTuple):
    """What a set of pictures is like, from a sample of them."""
    count: int                           # pictures in the set
    short_side: int                      # median, pixels
    gray: float                          # share of pictures without colour
    mean: tuple[float, float, float]     # of each channel, 0 to 1
    std: tuple[float, float, float]


def survey(images, decode: Callable, sample: int = 128) -> Survey:
    """Look at a sample, the same at each call. decode(bytes) -> RGB picture, or raises.

    Raises NoReadablePicture where none of the sample can be read.
    """
    sides, gray, moments, fault = [], [], [], None
    for i in range(min(sample, len(images))):
        try:
            picture = decode(images[permute(i, len(images), 0)])
        except Exception as error:       # decoders raise nearly anything on damaged files
            fault = f"{images.name(permute(i, len(images), 0))}: {error}"
            continue
        sides.append(min(picture.size))
        pixels = numpy.asarray(picture.resize((64, 64)), numpy.float64) / 255        # (64, 64, 3)
        gray.append(numpy.ptp(pixels, axis=2).mean() < 0.01)
        moments.append((pixels.mean((0, 1)), numpy.square(pixels).mean((0, 1))))
    if not moments:
        raise NoReadablePicture(f"no readable picture among {min(sample, len(images))}; {fault}")
    mean, square = numpy.mean(moments, axis=0)                                       # each (3,)
    std = numpy.sqrt((square - mean ** 2).clip(0.05 ** 2))       # pictures of one shade: not 0
    return Survey(len(images), int(numpy.median(sides)), float(numpy.mean(gray)),
                  tuple(mean.tolist()), tuple(std.tolist()))


class NoReadablePicture(ValueError):
    """MAX_TRIES pictures in a row could not be read."""


class Stream(Dataset):
    """Position in the endless stream -> a picture, transformed; bad pictures replaced.

    images: len() and [i] -> bytes, .name(i).
    transform(bytes, seed, position) -> (crops, params), as a MultiCrop does.
    stream[position] -> (crops, params, bad), bad the names and faults of the pictures replaced.
    Raises NoReadablePicture when MAX_TRIES pictures in a row cannot be read.
    """

    def __init__(self, images, transform: Callable, seed: int):
        self.images, self.transform, self.seed = images, transform, seed

    def index(self, position: int, attempt: int = 0) -> int:
        """Which picture stands at a position; attempt > 0: which replaces it."""
        n = len(self.images)
        epoch, offset = divmod(position, n)
        if attempt:
            return mix(self.seed, position, attempt) % n
        return permute(offset, n, mix(self.seed, epoch))

    def __getitem__(self, position: int):
        bad = []
        for attempt in range(MAX_TRIES):
            index = self.index(position, attempt)
            try:
                seed = mix(self.seed, position, attempt, 1)
                return *self.transform(self.images[index], seed, position), bad
            except Exception as error:       # decoders raise nearly anything on damaged files
                fault = f"{self.images.name(index)}: {type(error).__name__}: {error}"
                bad.append(fault.encode(errors="backslashreplace").decode())    # printable
        raise NoReadablePicture(f"no readable picture: {MAX_TRIES} in a row failed, the last one "
                                f"{bad[-1]}")


class Positions(Sampler):
    """The stream's positions of one rank, a micro-batch at a time: steps start to stop of the run.

    Of the `batch_size` positions of a step, rank r takes the r-th of `world` equal runs, in pieces
    of `micro_batch`, which divides such a run; 0: in one piece.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
                 micro_batch: int = 0):
        self.steps, self.batch_size = range(start, stop), batch_size
        self.share = batch_size // world
        self.first, self.piece = rank * self.share, micro_batch or self.share

    def __len__(self) -> int:
        return len(self.steps) * (self.share // self.piece)

    def __iter__(self) -> Iterator[range]:
        for step in self.steps:
            first = step * self.batch_size + self.first
            for start in range(first, first + self.share, self.piece):
                yield range(start, start + self.piece)


def collate(samples: list) -> tuple[list[torch.Tensor], list[torch.Tensor], list[str]]:
    """Samples of B pictures -> per crop size (count*B, ...), crop-major; and all that was bad."""
    crops, params, bad = zip(*samples)

    def join(pictures):
        return [torch.stack(same_size, 1).flatten(0, 1) for same_size in zip(*pictures)]

    return join(crops), join(params), [fault for faults in bad for fault in faults]
