"""Cache: large images shrunk to what the crops need, made once and kept on the disk.

    images = Shrunk(open_images("photos/"), needed_side(config.crops), cache_folder() / "images")
    images[7]                       # the first time decoded, shrunk, stored; then read

`images[i]` is the shrunk image whether it was stored before or not, so what a run sees does not
depend on the cache. Several processes may fill one cache at once; it can be deleted at any time.

An entry is named by a hash of the shorter side, max_pixels, and what its source says of itself
without being read (`images.identity(i)`): a file's absolute path, size, and times of the last
change of content and of status. So a file that was changed, or replaced by one with the same size
and date, has another entry; one that was moved is shrunk again. Hashing the content instead would
read each original in each epoch, which on slow disks is what the cache is to save.

An entry is the JPEG and a CRC-32 of it; one that is damaged is made again. Its name has no suffix,
so that a folder of images with a cache inside holds no more images than before. Where nothing can
be stored (a full disk), the run goes on without.
"""
import hashlib
import io
import math
import os
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Sequence

from PIL import Image

from multicrop import MAX_PIXELS, BadImage, CropSpec, load, read_header

VERSION = 1                          # of how images are shrunk and stored
QUALITY = 95                         # of the JPEGs, without subsampling of colours
CHECK = 4                            # bytes of the CRC-32


def cache_folder() -> Path:
    """Where this project keeps what it can make again: below ~/.cache, or XDG_CACHE_HOME. Raises
    RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "seer-in-the-open")


def needed_side(specs: Sequence[CropSpec]) -> int:
    """Pixels of an image's shorter side, so that no crop is enlarged: the smallest crop, of the
    lowest share of the area and with sides of 3 to 4 (multicrop.random_box), still has `size`
    pixels on its shorter side. 2x224+4x96: 692; 2x64@0.25-1+4x32@0.08-0.25: 148."""
    return max(math.ceil(spec.size / math.sqrt(0.75 * spec.scale[0])) for spec in specs)


class Shrunk:
    """Images whose shorter side has more than `side` pixels, shrunk to it: upright RGB, as JPEG.
    Smaller ones are given as they are, and so is what cannot be decoded.

    images: len(), [i] -> bytes, .name(i), .labels, .classes; to be stored, also .identity(i).
    folder: of the cache; None: nothing is stored.  max_pixels: larger ones are not decoded. Raises
    ValueError for a side below 1.
    """

    def __init__(self, images, side: int, folder: Path | None = None,
                 max_pixels: int = MAX_PIXELS):
        if side < 1:
            raise ValueError(f"--shrink {side}: needs at least 1")
        self.images, self.side, self.max_pixels = images, side, max_pixels
        self.folder = folder if hasattr(images, "identity") else None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, i: int) -> str:
        return self.images.name(i)

    @property
    def fingerprint(self) -> str:
        return self.images.fingerprint

    @property
    def sizes(self) -> str:
        return self.images.sizes

    @property
    def labels(self):
        return self.images.labels

    @property
    def classes(self):
        return self.images.classes

    def __getitem__(self, i: int) -> bytes:
        entry = self.entry(i)
        found = read(entry) if entry else None
        if found is None:
            original = self.images[i]
            found = self.shrink(original)
            if entry and found is not original:
                self.store(entry, found)
        return found

    def shrink(self, data: bytes) -> bytes:
        """Encoded image -> encoded image."""
        try:
            image = read_header(data, self.max_pixels)
            if min(image.size) <= self.side:
                return data
            by = self.side / min(image.size)
            # a JPEG is decoded at a half, a quarter or an eighth where that is enough
            image.draft(None, (math.ceil(image.width * by), math.ceil(image.height * by)))
            image = load(image)
        except BadImage:                        # who decodes it will say so
            return data
        by = self.side / min(image.size)
        size = (round(image.width * by), round(image.height * by))
        buffer = io.BytesIO()
        image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=QUALITY,
                                                          subsampling=0)
        return buffer.getvalue()

    def entry(self, i: int) -> Path | None:
        """Where an image is stored; None where that is not known."""
        try:
            key = self.folder and (VERSION, self.side, self.max_pixels, *self.images.identity(i))
        except OSError:                         # vanished: to read it will say so
            return None
        if key is None:
            return None
        name = hashlib.sha256(repr(key).encode(errors="surrogateescape")).hexdigest()[:40]
        return self.folder / name[:2] / name[2:]

    def store(self, entry: Path, data: bytes) -> None:
        """All or nothing. After an error nothing more is stored by this process."""
        aside = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(".tmp", dir=entry.parent)
            with open(handle, "wb") as file:
                file.write(data + check(data))
            os.replace(aside, entry)
        except OSError as error:
            print(f"warning: {self.folder} cannot be written ({error.strerror}): shrunk images are "
                  "not stored", file=sys.stderr)
            self.folder = None
            if aside:
                Path(aside).unlink(missing_ok=True)


def read(entry: Path) -> bytes | None:
    """What was stored; None where it is not there, or damaged."""
    try:
        stored = entry.read_bytes()
    except OSError:
        return None
    data = stored[:-CHECK]
    return data if data and check(data) == stored[-CHECK:] else None


def check(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(CHECK, "little")
