"""Where pictures come from, in which order, and what happens to bad ones.

    images = open_images("photos/")                    # len(), [i] -> bytes, .name(i), .labels
    stream = Stream(images, MultiCrop(parse_crops("2x64+4x32")), seed=0)
    crops, params, bad = stream[10_000_000]            # whatever stands at that position

    python images.py pack photos/ shards/ --shard-size 1G          # into tar files, see shards.py

The input of a run is a pure function: the picture at position p of the endless stream, and what is
cut from it, depend on (seed, p) alone, not on workers, ranks, or what came before. Positions e*N to
(e+1)*N are epoch e, a permutation of all N pictures computed on the spot (a keyed Feistel network
with cycle-walking; Black & Rogaway 2002), so nothing of length N is ever shuffled, and resuming a
run is a number. A picture that cannot be read is replaced by another one, also a pure function,
and reported. No labels are read in training: `labels` serve to measure afterwards.
"""
import argparse
import functools
import glob
import os
import re
import stat
import sys
from array import array
from typing import Callable, Iterator, NamedTuple

import numpy
import torch
from torch.utils.data import Dataset, Sampler

from shards import SUFFIXES, is_picture, open_shards, pack

MAX_BYTES = 2 ** 30                  # of a file; larger ones are no pictures
NOT_WAITING = getattr(os, "O_NONBLOCK", 0)
MAX_TRIES = 64                       # pictures tried for one position before giving up


def open_images(spec: str | os.PathLike):
    """A folder of any depth; a text file of paths, one a line; or tar files, "shards/*.tar" or
    "shards/{000000..000999}.tar" -> dataset: len(), [i] -> bytes, .name(i), .labels, .classes.

    Paths of a list are relative to its folder. Raises ValueError where there is no such thing, or
    no picture in it.
    """
    spec = os.fspath(spec)
    if os.path.isdir(spec):
        return Files(spec, walk(spec), f"no pictures in {spec}: looked at all depths for "
                                       f"{', '.join(SUFFIXES)}")
    if spec.endswith(".tar") or not os.path.exists(spec) and (glob.has_magic(spec) or "{" in spec):
        return open_shards(spec)
    if os.path.isfile(spec):
        return Files(os.path.dirname(spec), read_list(spec), f"no paths in {spec}")
    raise ValueError(f"no such folder, list or shards of pictures: {spec}")


def read_list(path: str) -> Iterator[bytes]:
    """The lines of a text file, as they are; without a byte order mark, and empty ones."""
    with open(path, "rb") as file:
        if b"\0" in file.read(4096):
            raise ValueError(f"{path} is no list of paths, one a line, in UTF-8")
        file.seek(0)
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            yield from filter(None, [line.strip(b"\r\n")])


def walk(root: str) -> Iterator[bytes]:
    """The pictures below a folder, by their relative names, in a fixed order."""
    seen = set()                     # real folders, so that links cannot lead in circles
    for folder, subfolders, files in os.walk(os.fsencode(root), followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders.sort()
        files.sort()
        below = os.path.relpath(folder, os.fsencode(root))
        yield from (os.path.normpath(os.path.join(below, name)) for name in files
                    if is_picture(os.fsdecode(name)))


class Files:
    """Pictures that are files, by their names, absolute or below a folder.

    names: as bytes; they are kept as one tensor, which worker processes share, forked or spawned:
    10 million cost no Python objects.  empty: what is said where there are none.
    """

    def __init__(self, root: str, names: Iterator[bytes], empty: str):
        self.root, joined, ends = root, bytearray(), array("q")
        for name in names:
            joined += name
            ends.append(len(joined))
        if not ends:
            raise ValueError(empty)
        self._names = torch.frombuffer(joined, dtype=torch.uint8)
        self._ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(self._names[start:int(self._ends[i])].numpy().tobytes())

    def __getitem__(self, i: int) -> bytes:
        # a pipe must not be waited for
        with open(os.path.join(self.root, self.name(i)), "rb",
                  opener=lambda path, flags: os.open(path, flags | NOT_WAITING)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("no regular file")
            if status.st_size > MAX_BYTES:
                raise OSError(f"{status.st_size:,} bytes, more than {MAX_BYTES:,}")
            return file.read()

    @functools.cached_property
    def _top_folders(self) -> list[str]:
        """Of each picture; empty where one lies directly in the root."""
        tops = [self.name(i).partition(os.sep) for i in range(len(self))]
        return [top for top, _, _ in tops] if all(below for *_, below in tops) else []

    @property
    def classes(self) -> list[str]:
        """Names of the top folders, sorted; none where pictures lie directly in the root."""
        return sorted(set(self._top_folders))

    @property
    def labels(self) -> numpy.ndarray | None:
        """The number of each picture's class, or None."""
        number = {name: i for i, name in enumerate(self.classes)}
        return numpy.array([number[top] for top in self._top_folders]) if number else None


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


class Fault(NamedTuple):
    """A picture that had to be replaced. cause: a few words, to be counted."""
    name: str
    cause: str
    detail: str


def fault_of(error: Exception, name: str) -> Fault:
    """cause: what the error itself calls it, else what the operating system said."""
    cause, detail = getattr(error, "cause", None), str(error)
    if cause:
        detail = detail.removeprefix(f"{cause}: ")
    else:
        cause = ("vanished" if isinstance(error, FileNotFoundError) else
                 "unreadable" if isinstance(error, OSError) else "damaged")
        detail = f"{type(error).__name__}: {detail}"
    return Fault(*(text.encode(errors="backslashreplace").decode()          # printable
                   for text in (name, cause, detail)))


class NoReadablePicture(ValueError):
    """MAX_TRIES pictures in a row could not be read."""


class Stream(Dataset):
    """Position in the endless stream -> a picture, transformed; bad pictures replaced.

    images: len() and [i] -> bytes, .name(i).
    transform(bytes, seed, position) -> (crops, params), as a MultiCrop does.
    stream[position] -> (crops, params, bad), bad a Fault for each picture replaced.
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
                bad.append(fault_of(error, self.images.name(index)))
        raise NoReadablePicture(f"no readable picture: {MAX_TRIES} in a row failed, the last one "
                                f"{bad[-1].name}: {bad[-1].detail}")


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


def collate(samples: list) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Fault]]:
    """Samples of B pictures -> per crop size (count*B, ...), crop-major; and all that was bad."""
    crops, params, bad = zip(*samples)

    def join(pictures):
        return [torch.stack(same_size, 1).flatten(0, 1) for same_size in zip(*pictures)]

    return join(crops), join(params), [fault for faults in bad for fault in faults]


def parse_size(text: str) -> int:
    """"1G", "500M", "64k" or a number -> bytes, in powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, as in 500M or 1G")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Pack pictures into tar files.")
    parser.add_argument("what", choices=["pack"])
    parser.add_argument("source", help="folder, list of paths, or shards")
    parser.add_argument("out", help="folder for 000000.tar, 000001.tar, ...")
    parser.add_argument("--shard-size", type=parse_size, default="1G", help="bytes, as in 500M; 1G")
    args = parser.parse_args(argv)
    try:
        paths = pack(open_images(args.source), args.out, args.shard_size)
    except (ValueError, OSError) as error:
        print(f"images.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"--data '{args.out}/{{000000..{len(paths) - 1:06d}}}.tar'")


if __name__ == "__main__":
    main()
