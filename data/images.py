"""Images: a folder, a list of paths or tar shards, opened as one dataset of encoded images.

    images = open_images("photos/")                    # len(), [i] -> bytes, .name(i), .labels
    images.fingerprint, images.sizes                    # change with the set
    python -m data.images pack photos/ shards/ --shard-size 1G          # into tar files (shards.py)
    python -m data.images pack photos/ shards/ --shrink 512             # the large ones shrunk

`labels` are the numbers of the top folders. They serve to measure afterwards; no method but
supervised reads them in training.
"""
import argparse
import functools
import glob
import hashlib
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
from weights.terminal import Text, number_in, one_sentence

MAX_BYTES = 2 ** 30                  # of a file; larger ones are no images
MAX_SIZES = 1000                     # of files, evenly spaced, that are compared
MAX_SHARD = 10 ** 12                 # bytes: an index holds places below 2.2e12 (shards.py)
NOT_WAITING = getattr(os, "O_NONBLOCK", 0)


def open_images(spec: str | os.PathLike):
    """A folder of any depth; a text file of paths, one a line; or tar files, "shards/*.tar" or
    "shards/{000000..000999}.tar" -> dataset: len(), [i] -> bytes, .name(i), .labels, .classes.

    Paths of a list are relative to its folder. Raises ValueError where there is no such thing, or
    no image in it.
    """
    spec = os.fspath(spec)
    if scheme := re.match(r"(\w{2,})://", spec):
        tool = {"s3": "mount-s3", "gs": "gcsfuse", "hdfs": "hadoop-fuse-dfs"}
        raise ValueError(f"{spec} is no path: mount it as a folder "
                         f"({tool.get(scheme[1], 'rclone mount')}), or copy it here")
    if os.path.isdir(spec):
        try:
            return Files(spec, walk(spec), f"no images in {spec}: looked at all depths for "
                                           f"{', '.join(SUFFIXES)}")
        except ValueError:
            for folder, _, files in os.walk(spec):
                if any(name.endswith(".tar") for name in files):
                    raise ValueError(f"no images in {spec}, but tar files: name them, as in "
                                     f"--data '{os.path.join(folder, '*.tar')}'") from None
            raise
    if spec.endswith(".tar") or not os.path.exists(spec) and (glob.has_magic(spec) or "{" in spec):
        return open_shards(spec)
    if os.path.isfile(spec):
        return Files(os.path.dirname(spec), read_list(spec), f"no paths in {spec}")
    raise ValueError(f"no such folder, list or shards of images: {spec}")


def read_list(path: str) -> Iterator[bytes]:
    """The lines of a text file; without a byte order mark, spaces at their ends, empty ones and
    comments, which begin with #. Raises ValueError where it cannot be read, or is no text."""
    try:
        with open(path, "rb") as file:
            if b"\0" in file.read(4096):
                raise ValueError(f"{path} is no list of paths, one a line, in UTF-8")
            file.seek(0)
            for number, line in enumerate(file):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
                if (line := line.rstrip()) and not line.lstrip().startswith(b"#"):
                    yield line
    except OSError as error:
        raise ValueError(f"{path} is unreadable: {error.strerror}") from None


def walk(root: str) -> Iterator[bytes]:
    """The images below a folder, by their relative names, in a fixed order."""
    seen = set()                     # real folders, so that links cannot lead in circles
    unreadable = []
    for folder, subfolders, files in os.walk(os.fsencode(root), followlinks=True,
                                             onerror=unreadable.append):
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
    if unreadable and int(os.environ.get("RANK", 0)) == 0:
        names = ", ".join(os.fsdecode(error.filename) for error in unreadable[:3])
        print(f"warning: {len(unreadable)} folder{'s' * (len(unreadable) > 1)} in {root} cannot be "
              f"read, and what lies in them is left out: {names}"
              + ", ..." * (len(unreadable) > 3), file=sys.stderr)


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
    def fingerprint(self) -> str:
        """Of all names: the same for the same images, wherever their folder is."""
        digest = hashlib.sha256(self._names.numpy())
        digest.update(self._ends.numpy())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def sizes(self) -> str:
        """Of some files' sizes: tells sets apart that have the same names."""
        digest = hashlib.sha256()
        for i in range(0, len(self), -(-len(self) // MAX_SIZES)):
            path = os.path.join(self.root, self.name(i))
            digest.update(b"%d " % (os.stat(path).st_size if os.path.exists(path) else -1))
        return digest.hexdigest()[:16]

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


def parse_size(given: str) -> int:
    """"1G", "500M", "64k" or a number -> bytes, in powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kMGT]?)B?", given)
    size = int(float(match[1]) * 1000 ** " kMGT".index(match[2] or " ")) if match else 0
    if not 0 < size <= MAX_SHARD:
        raise argparse.ArgumentTypeError(f"{given!r} is not a size of 1 byte to 1T, as 500M or 1G")
    return size


def main(argv: list[str] | None = None) -> None:
    with one_sentence("python -m data.images"):
        parser = argparse.ArgumentParser(
            "python -m data.images", usage="python -m data.images pack SOURCE OUT [--shard-size "
            "SIZE] [--shrink PIXELS]", description="Pack images into tar files.",
            allow_abbrev=False)
        parser.add_argument("what", choices=["pack"])
        parser.add_argument("source", action=Text, help="folder, list of paths, or shards")
        parser.add_argument("out", action=Text, help="folder for 000000.tar, 000001.tar, ...")
        parser.add_argument("--shard-size", type=parse_size, default="1G",
                            help="bytes, as in 500M; 1G")
        parser.add_argument("--shrink", type=number_in(int, 1, 65_535), metavar="PIXELS",
                            help="images whose shorter side has more pixels are shrunk to it and "
                                 "stored as JPEG; none: all as they are")
        args = parser.parse_args(argv)
        images = open_images(args.source)
        if args.shrink:
            images = Shrunk(images, args.shrink)
        paths = pack(images, args.out, args.shard_size)
        print(f"--data '{args.out}/{{000000..{len(paths) - 1:06d}}}.tar'")


if __name__ == "__main__":
    main()
