"""Pictures of every kind from Debian's packages, as they are, without labels: to pretrain on.

    python tests/real_sets.py sets/               # first: what the evaluation sets hold is left out
    python tests/uncurated.py uncurated/ sets/    # needs apt-get and dpkg (Debian 12); minutes
    python train.py --data 'uncurated/*.tar'

uncurated/*.tar: the shards. sources.tsv: the package and path of each picture. licences.txt: each
package, its version, the licences that its copyright file names, and its number of pictures;
licences/PACKAGE.txt are those files.

In are the images of the packages, loose or in zip files (.pk3, .wz), with their transparency, from
16 pixels on; equal ones once. Their bytes are as they are, but for what is longer than 512 pixels,
which is shrunk to that, and formats that are not in data/images.py, which become PNG. An image of
1,024 x 1,024 pixels or more gives nine views besides, a grid of 3 x 3, each shrunk to 256. Glyphs
are drawn from fonts. Of a package at most 6,000 files are read, at even steps.

Out is each file that an evaluation set holds, by its path and by its bytes; what looks like an
image of one (of 8 x 8 pixels, fewer than 4 grey values apart); and, as wholes, the
packages of their icons and emoji, and of GNOME's icons, which MATE's come from.
"""
import functools
import hashlib
import io
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))      # as a program: the project's folder

from data.images import open_images  # noqa: E402
from data.shards import SUFFIXES, pack  # noqa: E402

Image.MAX_IMAGE_PIXELS = None

PACKAGES = {
    "drawings": ("openclipart-png",),
    "icons": ("moka-icon-theme", "obsidian-icon-theme"),
    "sprites": ("wesnoth-1.16-data", "freeorion-data", "lincity-ng-data"),
    "textures": ("ufoai-textures", "warzone2100-data", "openarena-081-textures",
                 "colobot-common-textures"),
    "education": ("marble-data", "kgeography-data", "kstars-data", "tuxpaint-data", "scratch"),
    "wallpapers": ("mate-backgrounds",),
    "glyphs": ("fonts-freefont-ttf",),
}
OTHERS = (".tga", ".pcx", ".xpm", ".ico", ".dds")        # read, and written as PNG
ZIPS = (".zip", ".pk3", ".wz", ".jar")
FONTS = (".ttf", ".otf")
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
APART = re.compile(r"basemap|bluemarble|/earth[^/]*$")  # Blue Marble: the set `satellite`
LEAST, LONG, VIEW, LARGE, GRID = 16, 512, 256, 1024, 3  # pixels; views a side
FILES, GLYPHS, GLYPH = 6000, 120, 64                    # a package, a font; pixels
MAX_PIXELS, MAX_BYTES = 60e6, 50e6
ALIKE = 4                                               # of 255, root mean square


def fetch(work: Path, packages: list[str]) -> None:
    """Download and unpack those packages that are not in the folder yet."""
    work.mkdir(parents=True, exist_ok=True)
    missing = [name for name in packages if not (work / name).exists()]
    if missing:
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=work, check=True)
    for name in missing:
        package = next(work.glob(f"{name}_*.deb"))
        subprocess.run(["dpkg", "-x", package.name, name], cwd=work, check=True)
        package.unlink()


def members(package: Path) -> list[tuple[str, str]]:
    """(path below the package, name inside where that is a zip file) of each image and font,
    sorted; links are not followed."""
    found = []
    for path in package.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        name, suffix = path.relative_to(package).as_posix(), path.suffix.lower()
        if suffix in SUFFIXES + OTHERS + FONTS:
            found.append((name, ""))
        elif suffix in ZIPS and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found += [(name, entry.filename) for entry in archive.infolist()
                          if entry.filename.lower().endswith(SUFFIXES + OTHERS)
                          and entry.file_size <= MAX_BYTES]
    return sorted(found)


def even(found: list, at_most: int) -> list:
    """At most so many, at even steps."""
    return [found[i * len(found) // at_most] for i in range(at_most)] \
        if len(found) > at_most else found


def read(package: Path, name: str, inside: str) -> bytes:
    if not inside:
        return (package / name).read_bytes()
    return opened(package / name).read(inside)


@functools.lru_cache(4)                 # one that holds thousands is not opened for each
def opened(path: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def encode(image: Image.Image) -> tuple[bytes, str]:
    """As JPEG, or with transparency as PNG -> the bytes and the suffix."""
    opaque = image.mode == "RGB" or image.getextrema()[3][0] == 255
    file = io.BytesIO()
    if opaque:
        image.convert("RGB").save(file, "JPEG", quality=90)
    else:
        image.save(file, "PNG", compress_level=1)
    return file.getvalue(), ".jpg" if opaque else ".png"


def shrunk(image: Image.Image, longest: int) -> Image.Image:
    image = image.copy()
    image.thumbnail((longest, longest), Image.Resampling.LANCZOS, reducing_gap=2)
    return image


def signature(image: Image.Image) -> numpy.ndarray:
    """On white, at 8 x 8 pixels: float32 (192,)."""
    image = image.convert("RGBA").resize((8, 8), Image.Resampling.BOX, reducing_gap=2)
    white = Image.new("RGBA", image.size, "white")
    return numpy.asarray(Image.alpha_composite(white, image).convert("RGB"), numpy.float32).ravel()


def pictures(data: bytes) -> list[tuple[bytes, str, str, numpy.ndarray]]:
    """Of a file: (bytes, suffix, SHA-256 of the pixels, signature) of each picture that it gives;
    none where it cannot be read, or is too small or too large."""
    try:
        image = Image.open(io.BytesIO(data))
        if min(image.size) < LEAST or image.width * image.height > MAX_PIXELS:
            return []
        suffix = KEPT.get(image.format)
        mode = "RGBA" if image.has_transparency_data else "RGB"
        image = image.convert(mode)
    except Exception:                   # PIL raises nearly anything for a damaged file
        return []
    whole = shrunk(image, LONG) if max(image.size) > LONG else image
    if min(whole.size) < LEAST:
        return []
    if whole is image and suffix:
        out = [(whole, data, suffix)]
    elif whole is image:
        file = io.BytesIO()
        image.save(file, "PNG")
        out = [(image, file.getvalue(), ".png")]
    else:
        out = [(whole, *encode(whole))]
    if min(image.size) >= LARGE:
        for i in range(GRID * GRID):
            row, column = divmod(i, GRID)
            view = shrunk(image.crop((column * image.width // GRID, row * image.height // GRID,
                                      (column + 1) * image.width // GRID,
                                      (row + 1) * image.height // GRID)), VIEW)
            out.append((view, *encode(view)))
    return [(data, suffix, hashlib.sha256(f"{image.size}".encode() + image.convert(
        "RGBA").tobytes()).hexdigest(), signature(image)) for image, data, suffix in out]


def glyphs(path: Path) -> list[tuple[bytes, str, str, numpy.ndarray]]:
    """As `pictures`, of a font: its characters of the Basic Multilingual Plane, at even steps."""
    try:
        font = ImageFont.truetype(str(path), GLYPH * 3 // 4,
                                  layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        return []
    absent, drawn = bytes(font.getmask("\uFFFF")), []
    for code in (*range(0x21, 0x250), *range(0x370, 0x2000), *range(0x2190, 0x2800)):
        mask = font.getmask(chr(code))
        if min(mask.size) > 2 and bytes(mask) != absent:
            drawn.append(chr(code))
    out = []
    for letter in even(drawn, GLYPHS):
        image = Image.new("RGB", (GLYPH, GLYPH), "white")
        ImageDraw.Draw(image).text((GLYPH // 2, GLYPH // 2), letter, "black", font, "mm")
        file = io.BytesIO()
        image.save(file, "PNG")
        out += pictures(file.getvalue())
    return out


def held(sets: Path) -> tuple[set[str], set[str], numpy.ndarray]:
    """What the evaluation sets hold: PACKAGE/PATH of their sources, SHA-256 of those files, and
    the signatures of their images (N, 192). Raises ValueError where there is no set."""
    lists = sorted(sets.glob("*/sources.txt"))
    images = sorted(path for path in sets.glob("*/*/*/*.*") if path.parts[-3] in ("train", "val"))
    if not images:
        raise ValueError(f"no sets in {sets}: python tests/real_sets.py {sets}")
    names = {line for path in lists for line in path.read_text().splitlines()}
    digests = {hashlib.sha256((sets / "packages" / name).read_bytes()).hexdigest()
               for name in sorted(names)}
    return names, digests, numpy.stack([signature(Image.open(path)) for path in images])


def alike(signatures: numpy.ndarray, others: numpy.ndarray) -> numpy.ndarray:
    """Which of the signatures (N, 192) has one of the others (M, 192) nearby: bool (N,)."""
    found = numpy.zeros(len(signatures), bool)
    squares = (others ** 2).sum(1)
    for i in range(0, len(signatures), 1024):
        part = signatures[i:i + 1024]
        apart = (part ** 2).sum(1)[:, None] + squares - 2 * part @ others.T
        found[i:i + 1024] = apart.min(1) < ALIKE ** 2 * part.shape[1]
    return found


def gather(package: Path, out: Path, seen: set[str], sets, threads: int) -> list[tuple[str, str]]:
    """Write the package's pictures into a folder -> (name, path in the package) of each.

    seen: SHA-256 of the pixels of all pictures so far; new ones are added.  sets: as of `held`.
    """
    names, digests, images = sets
    found = even([(name, inside) for name, inside in members(package) if not APART.search(name)
                  and f"{package.name}/{name}" not in names], FILES)

    def one(place):
        if place[0].lower().endswith(FONTS):
            return glyphs(package / place[0])
        data = read(package, *place)
        return [] if hashlib.sha256(data).hexdigest() in digests else pictures(data)

    kept, signatures, out = [], [], out / package.name
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPool(threads) as pool:
        for place, several in zip(found, pool.imap(one, found)):
            for data, suffix, pixels, mark in several:
                if pixels not in seen:
                    seen.add(pixels)
                    name = f"{len(kept):05d}{suffix}"
                    (out / name).write_bytes(data)
                    kept.append((name, "/".join(filter(None, place))))
                    signatures.append(mark)
    near = alike(numpy.stack(signatures), images) if kept else []
    for (name, _), out_of_it in zip(kept, near):
        if out_of_it:
            (out / name).unlink()
    print(f"{package.name}: {len(found)} files, {len(kept) - sum(near)} pictures, {sum(near)} like "
          "an evaluation set's left out", flush=True)
    return [pair for pair, out_of_it in zip(kept, near) if not out_of_it]


def licences(package: Path) -> tuple[str, list[str]]:
    """Its copyright file, and the licences that this names on its machine-readable lines."""
    texts = [path.read_text(errors="replace")
             for path in sorted(package.glob("usr/share/doc/*/copyright"))]
    named = {" ".join(line.split()) for text in texts
             for line in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)}
    return "\n".join(texts), sorted(named) or ["see its copyright file"]


def main(out: Path, sets: Path, threads: int = 2) -> None:
    start = time.time()
    fetch(out / "packages", [name for names in PACKAGES.values() for name in names])
    print(f"packages: {time.time() - start:.0f} s", flush=True)
    known, seen, counts = held(sets), set(), Counter()
    (out / "licences").mkdir(exist_ok=True)
    with open(out / "sources.tsv", "w") as sources, open(out / "licences.txt", "w") as table:
        for kind, packages in PACKAGES.items():
            for name in packages:
                package = out / "packages" / name
                kept = gather(package, out / "pictures" / kind, seen, known, threads)
                counts[kind] += len(kept)
                for picture, path in kept:
                    sources.write(f"{kind}/{name}/{picture}\t{path}\n")
                text, named = licences(package)
                (out / "licences" / f"{name}.txt").write_text(text)
                table.write(f"{name}: {len(kept)} pictures; {', '.join(named)}\n")
    paths = pack(open_images(out / "pictures"), out, 200 * 10 ** 6)
    for path in paths:
        print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    print(f"{counts.total()} pictures: {dict(counts)}; "
          f"{sum(path.stat().st_size for path in paths) / 1e6:.0f} MB; "
          f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: python {sys.argv[0]} FOLDER SETS [THREADS]")
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
