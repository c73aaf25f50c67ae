"""Stream: which image comes at which position, and what replaces one that cannot be read.

    stream = Stream(images, MultiCrop(parse_crops("2x64+4x32")), seed=0)
    crops, params, faults = stream[10_000_000]         # of the image at that position
    DataLoader(stream, batch_sampler=Positions(0, 500, 128), collate_fn=collate)

The input of a run is a pure function: the image at position p of the endless stream, and what is
cut from it, depend on (seed, p) alone, not on workers, ranks, or what came before. Positions e*N to
(e+1)*N are epoch e, a permutation of all N images that is computed where it is needed (a keyed
Feistel network with cycle-walking; Black & Rogaway 2002). So nothing of length N is ever shuffled,
and to resume a run one number is enough. An image that cannot be read is replaced by another one,
which follows from (seed, p) too, and is reported.

Shapes: B images of a micro-batch, s pixels of a crop, P parameters of an augmentation.
"""
from typing import Callable, Iterator, NamedTuple

import torch
from torch.utils.data import Dataset, Sampler

MAX_TRIES = 64                       # images tried for one position before giving up


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


class Fault(NamedTuple):
    """An image that had to be replaced. cause: a few words, to be counted. position: in the stream;
    -1: in none."""
    name: str
    cause: str
    detail: str
    position: int = -1

    def __str__(self) -> str:
        return f"{self.name}: {self.cause}: {self.detail}"


def fault_of(error: Exception, name: str) -> Fault:
    """cause: what the error itself calls it, else what the operating system said."""
    cause, detail = getattr(error, "cause", None), str(error)
    if cause:
        detail = detail.removeprefix(f"{cause}: ")
    else:
        cause = ("vanished" if isinstance(error, FileNotFoundError) else
                 "unreadable" if isinstance(error, OSError) else "damaged")
        detail = getattr(error, "strerror", None) or f"{type(error).__name__}: {detail}"
    return Fault(*(text.encode(errors="backslashreplace").decode()          # printable
                   for text in (name, cause, detail)))


class NoReadableImage(ValueError):
    """MAX_TRIES images in a row could not be read."""


class Stream(Dataset):
    """Position in the endless stream -> an image, transformed; unreadable ones are replaced.

    images: len() and [i] -> bytes, .name(i).
    transform(bytes, seed, position) -> (crops, params), as a MultiCrop does.
    first: position at which the images came in place of others, where an epoch begins.
    stream[position] -> (crops, params, faults), a Fault for each image replaced.
    Raises NoReadableImage when MAX_TRIES images in a row cannot be read.
    """

    def __init__(self, images, transform: Callable, seed: int, first: int = 0):
        self.images, self.transform, self.seed, self.first = images, transform, seed, first

    def index(self, position: int, attempt: int = 0) -> int:
        """Which image stands at a position; attempt > 0: which replaces it."""
        n = len(self.images)
        epoch, offset = divmod(position - self.first, n)
        if attempt:
            return mix(self.seed, position, attempt) % n
        return permute(offset, n, mix(self.seed, epoch + self.first))

    def __getitem__(self, position: int):
        faults = []
        for attempt in range(MAX_TRIES):
            index = self.index(position, attempt)
            try:
                seed = mix(self.seed, position, attempt, 1)
                return *self.transform(self.images[index], seed, position), faults
            except Exception as error:       # decoders raise nearly anything on damaged files
                fault = fault_of(error, self.images.name(index))
                faults.append(fault._replace(position=position))
        raise NoReadableImage(f"no readable image: {MAX_TRIES} in a row failed, the last one "
                                f"{faults[-1].name}: {faults[-1].detail}")


class Positions(Sampler):
    """The stream's positions of one rank, a micro-batch at a time: steps start to stop of the run.

    Of the `batch_size` positions of a step, rank r takes the r-th of `world` equal shares, in
    micro-batches of `micro_batch`, which divides a share; 0: in a single one.
    """

    def __init__(self, start: int, stop: int, batch_size: int, rank: int = 0, world: int = 1,
                 micro_batch: int = 0):
        self.steps, self.batch_size = range(start, stop), batch_size
        self.share = batch_size // world
        self.first, self.micro_batch = rank * self.share, micro_batch or self.share

    def __len__(self) -> int:
        return len(self.steps) * (self.share // self.micro_batch)

    def __iter__(self) -> Iterator[range]:
        for step in self.steps:
            first = step * self.batch_size + self.first
            for start in range(first, first + self.share, self.micro_batch):
                yield range(start, start + self.micro_batch)


def collate(samples: list) -> tuple[list[torch.Tensor], list[torch.Tensor], list[Fault]]:
    """Samples of B images -> per crop size (count*B, ...), crop-major; and all faults."""
    crops, params, faults = zip(*samples)

    def join(parts):
        return [torch.stack(same_size, 1).flatten(0, 1) for same_size in zip(*parts)]

    return join(crops), join(params), [fault for some in faults for fault in some]
