"""Pictures in tar files (WebDataset's layout), read in place, each at random.

    images = open_shards("shards/{000000..000999}.tar")         # or "shards/*.tar"
    images[123_456_789]                                         # the bytes of that picture
    pack(open_images("photos/"), "shards/", shard_size=10 ** 9)

A tar file has no table of contents, so one is made, once: where each picture begins, and how long
it is, 12 bytes a picture. It lies beside the shards (where that cannot be written, in the user's
cache folder), is checked against the size and time of each shard, and is memory-mapped: a billion
pictures cost no memory, and the worker processes share one map. Of a shard that has changed the
entries are made anew. Members that are no pictures are passed over; nothing is ever unpacked, and
names inside, whatever they say, are only names.

Index file: rows of three uint32 (blocks of 512 bytes before the picture's header; from there to its
first byte; its length in bytes), then JSON: [shard's name, size, time in ns, pictures] for each
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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
            ".pgm", ".jp2", ".avif")
BLOCK = tarfile.BLOCKSIZE
MAGIC = b"shards 1"


def is_picture(name: str) -> bool:
    """By its name. macOS keeps notes in files whose names begin with ._"""
    return name.lower().endswith(SUFFIXES) and not os.path.basename(name).startswith("._")


class Truncated(ValueError):
    """A member whose end is missing."""
    cause = "truncated"


class Shards:
    """Pictures in tar files: len(), [i] -> bytes, .name(i); labels are None.

    paths: of the tar files.  index: the index file.  Raises ValueError where it is not one.
    """
    labels, classes = None, ()

    def __init__(self, paths: list[str], index: Path):
        self.paths, self.index = paths, index
        shards = read_footer(index)
        self.ends = numpy.cumsum([pictures for *_, pictures in shards], dtype=numpy.int64)
        with open(index, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if hasattr(mmap, "MADV_RANDOM"):        # or each look-up would read what lies around it
            mapped.madvise(mmap.MADV_RANDOM)
        self.rows = numpy.frombuffer(mapped, numpy.uint32, 3 * len(self)).reshape(-1, 3)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __reduce__(self):                # to a worker process: it makes the same map
        return Shards, (self.paths, self.index)

    def place(self, i: int) -> tuple[str, int, int, int]:
        """Shard, and in it the first bytes of the header and of the picture, and its length."""
        if not 0 <= i < len(self):
            raise IndexError(f"picture {i} of {len(self)}")
        before, header, size = map(int, self.rows[i])
        path = self.paths[int(numpy.searchsorted(self.ends, i, "right"))]
        return path, before * BLOCK, (before + header) * BLOCK, size

    def name(self, i: int) -> str:
        path, header, start, _ = self.place(i)
        try:
            with open(path, "rb") as file:
                file.seek(header)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    return f"{path}/{tar.next().name}"
        except (OSError, tarfile.TarError, AttributeError):      # gone, or overwritten
            return f"{path}/at byte {start}"

    def __getitem__(self, i: int) -> bytes:
        path, _, start, size = self.place(i)
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(size)
        if len(data) < size:
            raise Truncated(f"truncated: {len(data)} of {size} bytes are there")
        return data


def open_shards(spec: str) -> Shards:
    """"shards/{000000..000999}.tar", a glob, or one tar file -> its pictures.

    The first time, the index is made, in parallel, with a progress bar. Raises ValueError where
    there is no such file, or no picture in any.
    """
    paths = expand(spec)
    stats = []
    for path in paths:
        try:
            stats.append(os.stat(path))
        except OSError as error:
            raise ValueError(f"shard {path} of {spec}: {error.strerror}") from None
    wanted = [[os.path.basename(p), s.st_size, s.st_mtime_ns] for p, s in zip(paths, stats)]
    names = hashlib.sha256("\n".join(os.path.basename(path) for path in paths).encode()).hexdigest()
    beside = Path(paths[0]).parent / f".shards-{names[:16]}.index"
    place = hashlib.sha256(os.path.abspath(beside).encode()).hexdigest()
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "seer-in-the-open",
                  f"{place[:32]}.index")
    for index in (beside, cached):
        if up_to_date(index, wanted):
            break
        try:
            index.parent.mkdir(parents=True, exist_ok=True)
            with one_at_a_time(index):
                if not up_to_date(index, wanted):       # else another process has made it
                    make_index(index, paths, wanted)
            break
        except OSError as error:
            fault = error
    else:
        raise ValueError(f"the index of {spec} can be written neither to {beside} nor to {cached} "
                         f"({fault.strerror})")
    shards = Shards(paths, index) if any(pictures for *_, pictures in read_footer(index)) else None
    if shards is None:
        raise ValueError(f"no pictures in {spec}: looked in {len(paths)} tar files for "
                         f"{', '.join(SUFFIXES)}")
    return shards


def expand(spec: str) -> list[str]:
    """Braces {first..last} become numbers of as many digits, then *, ? and [] files, sorted."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if braces:
        first, last = braces.groups()
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
    """[shard's name, size, time, pictures] of an index. Raises ValueError for anything else."""
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
                fcntl.flock(file, fcntl.LOCK_EX)
        yield
    with contextlib.suppress(OSError):
        os.unlink(f"{index}.lock")


def make_index(index: Path, paths: list[str], wanted: list[list]) -> None:
    """Scan the shards that the present index, if there is one, does not know as they are."""
    known = {}
    with contextlib.suppress(ValueError):
        old = Shards([], index)
        for (*shard, pictures), end in zip(read_footer(index), old.ends):
            known[tuple(shard)] = old.rows[end - pictures:end]
    aside, shards = Path(f"{index}.{os.getpid()}.tmp"), []
    new = [path for path, shard in zip(paths, wanted) if tuple(shard) not in known]
    try:
        with open(aside, "wb") as file, ProcessPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            scanned = pool.map(scan, new, chunksize=max(1, len(new) // 1024))
            bar = tqdm(zip(paths, wanted), total=len(paths), unit="shard", desc="index of shards",
                       mininterval=0.1 if sys.stderr.isatty() else 60)
            for path, shard in bar:
                rows, fault = (known[tuple(shard)], "") if tuple(shard) in known else next(scanned)
                if fault:
                    bar.write(f"{path}: {fault}; {len(rows)} pictures of it are used",
                              file=sys.stderr)
                file.write(rows.tobytes())
                shards.append([*shard, len(rows)])
            footer = json.dumps(shards).encode()
            file.write(footer + len(footer).to_bytes(8, "little") + MAGIC)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, index)
    finally:
        aside.unlink(missing_ok=True)


def scan(path: str) -> tuple[numpy.ndarray, str]:
    """A tar file -> the index's rows of its pictures, and what is wrong with it, if anything."""
    rows, fault = [], ""
    try:
        with tarfile.open(path, "r:") as tar:
            while member := tar.next():
                tar.members.clear()                     # it would keep them all
                picture = member.isreg() and not member.issparse() and is_picture(member.name)
                if picture and member.size < 2 ** 32:
                    rows.append((member.offset // BLOCK,
                                 (member.offset_data - member.offset) // BLOCK, member.size))
            tar.fileobj.seek(tar.offset)                # tarfile takes a bad header for the end
            rest = tar.fileobj.read(BLOCK)
            if any(rest):
                fault = "cut short" if len(rest) < BLOCK else f"damaged at byte {tar.offset}"
    except tarfile.ReadError as error:
        fault = ("cut short" if "end of data" in str(error) else
                 "not a tar file, or a compressed one, which cannot be read at random")
    except OSError as error:
        fault = str(error)
    return numpy.array(rows, numpy.uint32).reshape(-1, 3), fault


# -------------------------------------------------------------------------------------- packing
def pack(images, out: str | os.PathLike, shard_size: int = 10 ** 9) -> list[Path]:
    """Write pictures as they are into OUT/000000.tar, 000001.tar, ... of about shard_size bytes.

    images: len(), [i] -> bytes, .name(i).  What cannot be read is named and left out. The same
    pictures give the same bytes. Raises ValueError where OUT holds tar files already.
    """
    out, paths = Path(out), []
    if list(out.glob("*.tar")):
        raise ValueError(f"{out} holds tar files already; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    waiting = iter(tqdm(range(len(images)), unit="picture", desc=f"to {out}",
                        mininterval=0.1 if sys.stderr.isatty() else 60))
    member = next_member(images, waiting)
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
        try:
            data = images[i]
        except (OSError, ValueError) as error:
            tqdm.write(f"left out {images.name(i)}: {error}", file=sys.stderr)
            continue
        info = tarfile.TarInfo(images.name(i).replace(os.sep, "/").lstrip("/"))
        info.size = len(data)
        return info, io.BytesIO(data)
    return None
