"""Images: a folder, a list of paths or tar shards, opened as one dataset of encoded images.

    images = open_images("photos/")                    # len(), [i] -> bytes, .name(i), .labels
    python -m data.images pack photos/ shards/ --shard-size 1G          # into tar files (shards.py)
    python -m data.images pack photos/ shards/ --shrink 512             # the large ones shrunk

No labels are read in training: `labels`, the numbers of the top folders, serve to measure
afterwards.
"""
import argparse
import functools
import glob
import os
import re
import stat
import sys
from array import array
from typing import Iterator

import numpy
import torch

from data.cache import Shrunk
from data.shards import SUFFIXES, is_picture, open_shards, pack

MAX_BYTES = 2 ** 30                  # of a file; larger ones are no images
NOT_WAITING = getattr(os, "O_NONBLOCK", 0)


def open_images(spec: str | os.PathLike):
    """A folder of any depth; a text file of paths, one a line; or tar files, "shards/*.tar" or
    "shards/{000000..000999}.tar" -> dataset: len(), [i] -> bytes, .name(i), .labels, .classes.

    Paths of a list are relative to its folder. Raises ValueError where there is no such thing, or
    no image in it.
    """
    spec = os.fspath(spec)
    if os.path.isdir(spec):
        return Files(spec, walk(spec), f"no images in {spec}: looked at all depths for "
                                       f"{', '.join(SUFFIXES)}")
    if spec.endswith(".tar") or not os.path.exists(spec) and (glob.has_magic(spec) or "{" in spec):
        return open_shards(spec)
    if os.path.isfile(spec):
        return Files(os.path.dirname(spec), read_list(spec), f"no paths in {spec}")
    raise ValueError(f"no such folder, list or shards of images: {spec}")


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
    """The images below a folder, by their relative names, in a fixed order."""
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
    """Images that are files, by their names, absolute or below a folder.

    names: as bytes; they are kept in one tensor, which forked and spawned worker processes share,
    so 10 million names are no Python objects.  empty: the error where there are none.
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

    def identity(self, i: int) -> tuple[str, int, int, int]:
        """What changes where an image does, found without reading it (data/cache.py)."""
        path = os.path.abspath(os.path.join(self.root, self.name(i)))
        status = os.stat(path)
        return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns

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
        """Of each image; empty where one lies directly in the root."""
        tops = [self.name(i).partition(os.sep) for i in range(len(self))]
        return [top for top, _, _ in tops] if all(below for *_, below in tops) else []

    @property
    def classes(self) -> list[str]:
        """Names of the top folders, sorted; none where images lie directly in the root."""
        return sorted(set(self._top_folders))

    @property
    def labels(self) -> numpy.ndarray | None:
        """The number of each image's class, or None."""
        number = {name: i for i, name in enumerate(self.classes)}
        return numpy.array([number[top] for top in self._top_folders]) if number else None


def parse_size(text: str) -> int:
    """"1G", "500M", "64k" or a number -> bytes, in powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", text)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size, as in 500M or 1G")
    return int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " "))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m data.images",
                                     description="Pack images into tar files.")
    parser.add_argument("what", choices=["pack"])
    parser.add_argument("source", help="folder, list of paths, or shards")
    parser.add_argument("out", help="folder for 000000.tar, 000001.tar, ...")
    parser.add_argument("--shard-size", type=parse_size, default="1G", help="bytes, as in 500M; 1G")
    parser.add_argument("--shrink", type=int, metavar="PIXELS", help="images whose shorter side "
                        "has more pixels are shrunk to it and stored as JPEG; none: all as they "
                        "are")
    args = parser.parse_args(argv)
    try:
        images = open_images(args.source)
        if args.shrink is not None:
            images = Shrunk(images, args.shrink)
        paths = pack(images, args.out, args.shard_size)
    except (ValueError, OSError) as error:
        print(f"data.images: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"--data '{args.out}/{{000000..{len(paths) - 1:06d}}}.tar'")


if __name__ == "__main__":
    main()
