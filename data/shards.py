"""Shards: images in tar files (WebDataset's layout), read in place and at random.

    images = open_shards("shards/{000000..000999}.tar")         # or "shards/*.tar"
    images[123_456_789]                                         # the bytes of that image
    pack(open_images("photos/"), "shards/", shard_size=10 ** 9)

A tar file has no table of contents, so one is made, once: where each image begins, and how long
it is, 12 bytes an image. It lies beside the shards (where that cannot be written, in the user's
cache folder), is checked against the size and time of each shard, and is memory-mapped: a billion
images cost no memory, and the worker processes share one map. Of a shard that has changed the
entries are made anew. Members that are no images are passed over; nothing is ever unpacked, and
names inside, whatever they say, are only names.

Index file: rows of three uint32 (blocks of 512 bytes before the image's header; from there to its
first byte; its length in bytes), then JSON: [shard's name, size, time in ns, images] for each
shard; then 8 bytes, the JSON's length, and MAGIC.
"""
import contextlib
import glob
import hashlib
import io
import json
import mmap
import os
import re
import sys
import tarfile
from pathlib import Path

import numpy
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.cache import cache_folder
from weights.terminal import reason

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
            ".pgm", ".jp2", ".avif")
MAX_SHARDS = 10_000_000
BLOCK = tarfile.BLOCKSIZE
MAGIC = b"shards 1"


def is_picture(name: str) -> bool:
    """By its name. macOS keeps notes in files whose names begin with ._"""
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith("._")


class Truncated(ValueError):
    """A member whose end is missing."""
    cause = "truncated"


class Changed(ValueError):
    """A shard that is not what it was when the index was made."""
    cause = "changed"


class Shards:
    """Pictures in tar files: len(), [i] -> bytes, .name(i); labels are None.

    paths: of the tar files.  index: the index file.  Raises ValueError where it is not one.
    """
    labels, classes = None, ()

    def __init__(self, paths: list[str], index: Path):
        self.paths, self.index = paths, index
        self.shards = read_footer(index)
        self.ends = numpy.cumsum([pictures for *_, pictures in self.shards], dtype=numpy.int64)
        with open(index, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):        # or each look-up would read what lies around it
            mapped.madvise(mmap.MADV_RANDOM)
        self.rows = numpy.frombuffer(mapped, numpy.uint32, 3 * len(self)).reshape(-1, 3)

    def __len__(self) -> int:
        return int(self.ends[-1])

    sizes = ""                           # the fingerprint has them

    @property
    def fingerprint(self) -> str:
        """Of the shards' names, sizes and numbers of images."""
        text = json.dumps([[name, size, images] for name, size, _, images in self.shards])
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]

    def __reduce__(self):                # to a worker process: it makes the same map
        return Shards, (self.paths, self.index)

    def place(self, i: int) -> tuple[int, int, int, int]:
        """Number of the shard, and in it the first bytes of the header and of the image, and its
        length."""
        if not 0 <= i < len(self):
            raise IndexError(f"image {i} of {len(self)}")
        before, header, size = map(int, self.rows[i])
        shard = int(numpy.searchsorted(self.ends, i, "right"))
        return shard, before * BLOCK, (before + header) * BLOCK, size

    def name(self, i: int) -> str:
        shard, header, start, _ = self.place(i)
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(header)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    return f"{self.paths[shard]}/{tar.next().name}"
        except Exception:                # gone, overwritten, or something odd in its header
            return f"{self.paths[shard]}/at byte {start}"

    def identity(self, i: int) -> tuple:
        """As that of images.Files. Raises Changed."""
        shard, _, start, size = self.place(i)
        path = os.path.abspath(self.paths[shard])
        status = os.stat(path)
        self.compare(shard, status)
        return path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, start, size

    def compare(self, shard: int, status: os.stat_result) -> None:
        if [status.st_size, status.st_mtime_ns] != self.shards[shard][1:3]:
            raise Changed("changed: the shard is not the one that was indexed")

    def __getitem__(self, i: int) -> bytes:
        shard, _, start, size = self.place(i)
        with open(self.paths[shard], "rb") as file:
            self.compare(shard, os.fstat(file.fileno()))
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise Truncated(f"truncated: {len(data)} of {size} bytes are there")
        return data


def open_shards(spec: str) -> Shards:
    """"shards/{000000..000999}.tar", a glob, or one tar file -> its images.

    The first time, the index is made, in parallel, with a progress bar. Raises ValueError where
    there is no such file, or no image in any.
    """
    paths = expand(spec)
    folder = os.path.dirname(os.path.abspath(paths[0]))
    wanted = []                                         # name, size, time
    for path in paths:
        try:
            status = os.stat(path)
        except OSError as error:
            raise ValueError(f"shard {path} of {spec}: {error.strerror}") from None
        wanted.append([os.path.relpath(path, folder), status.st_size, status.st_mtime_ns])
    names = hashlib.sha256("\n".join(name for name, *_ in wanted).encode(errors="surrogateescape"))
    beside = Path(folder, f".shards-{names.hexdigest()[:16]}.index")
    faults = []
    for place in (lambda: beside, lambda: cached(beside)):
        try:
            index = place()
            if not up_to_date(index, wanted):
                index.parent.mkdir(parents=True, exist_ok=True)
                with one_at_a_time(index):
                    if not up_to_date(index, wanted):       # else another process has made it
                        make_index(index, paths, wanted)
            shards = Shards(paths, index) if any(n for *_, n in read_footer(index)) else None
            break
        except (OSError, RuntimeError) as error:        # RuntimeError: a user without a home
            faults.append(reason(error))
    else:
        raise ValueError(f"the index of {spec} cannot be written: {'; '.join(faults)}")
    if shards is None:
        raise ValueError(f"no images in {spec}: looked in {len(paths)} tar files for "
                         f"{', '.join(SUFFIXES)}")
    return shards


def cached(beside: Path) -> Path:
    """Where an index is kept whose own place cannot be written."""
    name = hashlib.sha256(os.fsencode(beside)).hexdigest()[:32]
    return cache_folder() / f"{name}.index"


def expand(spec: str) -> list[str]:
    """Braces {first..last} become numbers of as many digits, then *, ? and [] files, sorted."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if braces:
        first, last = braces.groups()
        if not int(first) <= int(last) < int(first) + MAX_SHARDS:
            raise ValueError(f"{braces[0]} in {spec}: needs FIRST..LAST, at most {MAX_SHARDS:,}")
        return [path for number in range(int(first), int(last) + 1) for path in expand(
            spec[:braces.start()] + str(number).zfill(len(first)) + spec[braces.end():])]
    if not glob.has_magic(spec) or os.path.exists(spec):
        return [spec]
    paths = sorted(glob.glob(spec))
    if not paths:
        raise ValueError(f"no shards match {spec}")
    return paths


# ------------------------------------------------------------------------------------ the index
def read_footer(index: Path) -> list[list]:
    """[shard's name, size, time, images] of an index. Raises ValueError for anything else."""
    try:
        with open(index, "rb") as file:
            end = file.seek(-len(MAGIC) - 8, os.SEEK_END)
            length, magic = int.from_bytes(file.read(8), "little"), file.read()
            if magic != MAGIC:
                raise ValueError
            start = file.seek(end - length)
            shards = json.loads(file.read(length))
        if start != 12 * sum(pictures for *_, pictures in shards):
            raise ValueError
        return shards
    except (OSError, ValueError, TypeError):
        raise ValueError(f"{index} is damaged, or not an index of shards") from None


def up_to_date(index: Path, wanted: list[list]) -> bool:
    try:
        return [shard[:3] for shard in read_footer(index)] == wanted
    except ValueError:
        return False


@contextlib.contextmanager
def one_at_a_time(index: Path):
    """Of several processes that would make the same index, all but one wait."""
    with open(f"{index}.lock", "w") as file:
        if fcntl:
            with contextlib.suppress(OSError):          # some network file systems know no locks
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)     # not inherited by workers
                except BlockingIOError:
                    print(f"waiting for another process that makes {index}", file=sys.stderr)
                    fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def make_index(index: Path, paths: list[str], wanted: list[list]) -> None:
    """Scan the shards that no present index of the folder knows as they are."""
    known = {}
    for path in [*index.parent.glob(".shards-*.index")] if index.name.startswith(".") else [index]:
        with contextlib.suppress(ValueError):
            old = Shards([], path)
            for (*shard, pictures), end in zip(old.shards, old.ends):
                known[tuple(shard)] = old.rows[end - pictures:end]
    new = [path for path, shard in zip(paths, wanted) if tuple(shard) not in known]
    scanned = iter(DataLoader(Scans(new), batch_size=None, collate_fn=as_it_is,
                              num_workers=min(32, (os.cpu_count() or 1) - 1, len(new) // 2)))
    aside, shards = Path(f"{index}.tmp"), []
    with open(aside, "wb") as file:
        bar = tqdm(zip(paths, wanted), total=len(paths), unit="shard", desc="index of shards",
                   mininterval=0.1 if sys.stderr.isatty() else 60)
        for path, shard in bar:
            rows, fault = (known[tuple(shard)], "") if tuple(shard) in known else next(scanned)
            if fault:
                bar.write(f"{path}: {fault}; {len(rows)} images of it are used", file=sys.stderr)
            file.write(rows.tobytes())
            shards.append([*shard, len(rows)])
        footer = json.dumps(shards).encode()
        file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, index)


class Scans(Dataset):
    """Tar file i -> its rows and faults. As a dataset: a DataLoader's workers keep the order, and
    do not outlive a process that is killed."""

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int):
        return scan(self.paths[i])


def as_it_is(x):
    return x


def scan(path: str) -> tuple[numpy.ndarray, str]:
    """A tar file, or several in a row -> the index's rows of its images, and what is wrong with
    it, if anything. What cannot be a header is passed over, up to the next one."""
    rows, faults, end, others = [], [], 0, 0
    try:
        with tarfile.open(path, "r:") as tar:
            tar.ignore_zeros = True                     # go on behind the end, and behind damage
            while True:
                try:
                    member = tar.next()
                except tarfile.ReadError as error:
                    if "end of data" not in str(error):
                        raise
                    member = None
                begin = member.offset if member else os.path.getsize(path)
                if begin > end and (fault := damage(tar.fileobj, end)):
                    faults.append(fault)
                if member is None:
                    break
                tar.members.clear()                     # it would keep them all
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK * member.isreg()
                if end > os.path.getsize(path) and "cut short" not in faults:
                    faults.append("cut short")
                if not is_picture(member.name) or member.isdir():
                    continue
                row = (member.offset // BLOCK, (member.offset_data - member.offset) // BLOCK,
                       member.size)
                if member.isreg() and not member.issparse() and 0 <= min(row) <= max(row) < 2 ** 32:
                    rows.append(row)
                else:
                    others += 1
        if others:
            faults.append(f"{others} links, sparse or too large files are passed over")
    except tarfile.ReadError:
        faults.append("not a tar file, or a compressed one, which cannot be read at random")
    except Exception as error:                          # tarfile raises nearly anything
        faults.append(f"{type(error).__name__}: {reason(error)}")
    return numpy.array(rows, numpy.uint32).reshape(-1, 3), "; ".join(faults)


def damage(file, start: int) -> str:
    """What is wrong with a place where a header, or zeros after the last one, should be."""
    where = file.tell()
    file.seek(start)
    block = file.read(BLOCK)
    file.seek(where)
    if not any(block):
        return ""
    return "cut short" if len(block) < BLOCK else f"damaged at byte {start}"


# -------------------------------------------------------------------------------------- packing
def pack(images, out: str | os.PathLike, shard_size: int = 10 ** 9) -> list[Path]:
    """Write images as they are into OUT/000000.tar, 000001.tar, ... of about shard_size bytes.

    images: len(), [i] -> bytes, .name(i).  What cannot be read, or is not named like an image, is
    told and left out. The same images give the same bytes. Raises ValueError where OUT holds tar
    files already, and where there is nothing to write.
    """
    out, paths = Path(out), []
    if list(out.glob("*.tar")):
        raise ValueError(f"{out} holds tar files already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    waiting = iter(tqdm(range(len(images)), unit="image", desc=f"to {out}",
                        mininterval=0.1 if sys.stderr.isatty() else 60))
    member = next_member(images, waiting)
    if member is None:
        raise ValueError("no image could be read: nothing is written")
    while member:
        path = out / f"{len(paths):06d}.tar"
        with tarfile.open(f"{path}.tmp", "w", format=tarfile.PAX_FORMAT) as tar:
            while member and (not tar.members or tar.offset + member[0].size < shard_size):
                tar.addfile(*member)
                member = next_member(images, waiting)
        os.replace(f"{path}.tmp", path)
        paths.append(path)
    return paths


def next_member(images, waiting) -> tuple[tarfile.TarInfo, io.BytesIO] | None:
    for i in waiting:
        name = images.name(i).replace(os.sep, "/")
        try:
            if not is_picture(name):
                raise ValueError(f"its name does not end like an image's ({', '.join(SUFFIXES)})")
            data = images[i]
        except (OSError, ValueError) as error:
            tqdm.write(f"left out {name}: {reason(error)}", file=sys.stderr)
            continue
        info = tarfile.TarInfo("/".join(p for p in name.split("/") if p not in ("", ".", "..")))
        info.size = len(data)
        return info, io.BytesIO(data)
    return None
