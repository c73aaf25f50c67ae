"""Pictures of every kind from Debian's packages, as they are, without labels: to pretrain on.

    python tests/real_sets.py sets/               # first: what the evaluation sets hold is left out
    python tests/uncurated.py uncurated/ sets/    # needs apt-get and dpkg (Debian 12); minutes
    python train.py --data 'uncurated/*.tar'

uncurated/*.tar: the shards. sources.tsv: the package and path of each picture. licences.txt: each
package, its version, its number of pictures, and the licences that its copyright file names;
licences/PACKAGE.txt are those files.

In are the images of the packages, loose or in zip files (.pk3, .wz), with their transparency, from
16 pixels on; equal ones once. JPEG, PNG, WebP, GIF and BMP files up to 512 pixels long keep their
bytes; other formats become PNG. What is longer is shrunk to 512, and becomes JPEG at quality 90 if
it is opaque, else PNG. An image of 1,024 x 1,024 pixels or more gives nine views besides, a grid of
3 x 3, each shrunk to 256. Glyphs are drawn from the fonts of the packages of kind `glyphs`. Of a
package at most 6,000 files are read, at even steps.

Out is each file that an evaluation set holds, by its path and by its bytes, and in a package that a
set is from, and one akin to it, by its name too; each file of which a picture looks like one that a
set holds, or, for sets of tiles, like a file that they were cut from or one of its 3 x 3 views
(`signature`, `alike`); and, as wholes, the packages of the sets' icons and emoji, and of those that
these come from.
"""
import functools
import gzip
import hashlib
import io
import re
import shutil
import sys
import time
import zipfile
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy
from PIL import Image, ImageChops, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))      # as a program: the project's folder

from data.images import open_images  # noqa: E402
from data.shards import SUFFIXES, is_picture, pack  # noqa: E402
from tests.real_sets import SETS, TILED, even, fetch, on_white  # noqa: E402
from weights.terminal import one_sentence  # noqa: E402

Image.MAX_IMAGE_PIXELS = None

PACKAGES = {
    "drawings": ("openclipart-png",),
    "icons": ("moka-icon-theme",),
    "sprites": ("wesnoth-1.16-data", "unknown-horizons", "freeorion-data", "lincity-ng-data"),
    "textures": ("ufoai-textures", "warzone2100-data", "openarena-081-textures",
                 "colobot-common-textures"),
    "education": ("kgeography-data", "stellarium-data", "kstars-data", "tuxpaint-data",
                  "scratch"),
    "examples": ("opencv-doc", "libjxl-testdata", "palapeli-data"),
    "glyphs": ("fonts-freefont-ttf",),
}
OTHERS = (".tga", ".pcx", ".xpm", ".ico", ".dds")        # read, and written as PNG
ZIPS = (".zip", ".pk3", ".wz", ".jar")
FONTS = (".ttf", ".otf")
KEPT = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}
APART = re.compile(r"basemap|bluemarble|earth[^/]*$|stellarium.*/world.png$"    # Blue Marble
                   r"|kgeography/flags/"                # Openclipart's and the emoji's are the same
                   r"|opencv4/html/.*/(class|struct)[^/]*$")    # 1,300 diagrams of classes
AKIN = {"moka-icon-theme": "faenza-icon-theme"}         # many of its icons are Faenza's, redrawn
LEAST, LONG, VIEW, LARGE, GRID = 16, 512, 256, 1024, 3  # pixels; views a side
FILES, GLYPHS, GLYPH = 6000, 120, 64                    # a package, a font; pixels
MAX_PIXELS, MAX_BYTES = 60e6, 50e6
MARGIN, ALIKE, SHARE = 16, 4, 0.35                      # of 255, below white; `alike`


def members(package: Path, fonts: bool = False) -> list[tuple[str, str]]:
    """(path below the package, name inside where that is a zip file) of each image, or each font,
    sorted; links are not followed."""
    found = []
    for path in package.rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        name, suffix = path.relative_to(package).as_posix(), path.suffix.lower()
        if suffix in (FONTS if fonts else SUFFIXES + OTHERS):
            found.append((name, ""))
        elif not fonts and suffix in ZIPS and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found += [(name, entry.filename) for entry in archive.infolist()
                          if entry.filename.lower().endswith(SUFFIXES + OTHERS)
                          and entry.file_size <= MAX_BYTES]
    return sorted(found)


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
    """On white, of 160 pixels as the sets' are, without the margin, at 8 x 8: float32 (192,)."""
    image = image.convert("RGBA")
    image.thumbnail((160, 160), Image.Resampling.LANCZOS)
    image = on_white(image)
    apart = ImageChops.difference(image, Image.new("RGB", image.size, "white"))
    box = apart.convert("L").point(lambda value: 255 * (value >= MARGIN)).getbbox()
    image = image.resize((8, 8), Image.Resampling.BOX, box)
    return numpy.asarray(image, numpy.float32).ravel()


def views(image: Image.Image) -> list[Image.Image]:
    """A grid of 3 x 3 of a large image; none of a small one."""
    columns, rows = ([k * side // GRID for k in range(GRID + 1)] for side in image.size)
    return [shrunk(image.crop((columns[i], rows[j], columns[i + 1], rows[j + 1])), VIEW)
            for j in range(GRID) for i in range(GRID)] if min(image.size) >= LARGE else []


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
    out += [(view, *encode(view)) for view in views(image)]
    return [(data, suffix, hashlib.sha256(f"{image.size}".encode() + image.convert(
        "RGBA").tobytes()).hexdigest(), signature(image)) for image, data, suffix in out]


def glyphs(path: Path) -> list[list[tuple[bytes, str, str, numpy.ndarray]]]:
    """`pictures` of each of a font's characters of the Basic Multilingual Plane, at even steps."""
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
        out.append(pictures(file.getvalue()))
    return out


def held(sets: Path) -> tuple[set[str], set[str], numpy.ndarray]:
    """What the evaluation sets hold: PACKAGE/PATH of their sources, SHA-256 of those files, and
    signatures (N, 192): of their images, and of the sources of tiles, whole and in views.

    Raises ValueError where a set, or a file that its sources.txt names, is missing.
    """
    names, marks = set(), []
    for make in SETS:
        folder = sets / make.__name__
        if not (folder / "sources.txt").exists():
            raise ValueError(f"no whole set {folder}: python tests/real_sets.py {sets}")
        sources = (folder / "sources.txt").read_text().splitlines()
        if missing := [name for name in sources if not (sets / "packages" / name).exists()]:
            raise ValueError(f"no {sets / 'packages' / missing[0]}: python tests/real_sets.py "
                             f"{sets}")
        names.update(sources)
        marks += [signature(Image.open(path)) for split in ("train", "val")
                  for path in sorted((folder / split).glob("*/*")) if is_picture(path.name)]
        if make in TILED:
            for name in sources:
                image = Image.open(sets / "packages" / name).convert("RGBA")
                marks += [signature(part) for part in (image, *views(image))]
    digests = {hashlib.sha256((sets / "packages" / name).read_bytes()).hexdigest()
               for name in sorted(names)}
    return names, digests, numpy.stack(marks)


def alike(signatures: numpy.ndarray, others: numpy.ndarray) -> numpy.ndarray:
    """Which of the signatures (N, 192) has one of the others (M, 192) nearby, by the root mean
    square difference: below 4, or 0.35 of its own contrast (the deviation of its 8 x 8 values, mean
    over the channels) -> bool (N,)."""
    found = numpy.zeros(len(signatures), bool)
    squares = (others ** 2).sum(1)
    for i in range(0, len(signatures), 1024):
        part = signatures[i:i + 1024]
        apart = (part ** 2).sum(1)[:, None] + squares - 2 * part @ others.T
        contrast = part.reshape(len(part), -1, 3).std(1).mean(1)
        found[i:i + 1024] = apart.min(1) < numpy.maximum(ALIKE, SHARE * contrast) ** 2 * 192
    return found


def gather(package: Path, out: Path, seen: set[str], sets, threads: int,
           fonts: bool = False) -> list[tuple[str, str]]:
    """Write the package's pictures into a folder -> (name, path in the package) of each.

    seen: SHA-256 of the pixels of all pictures so far; new ones are added.  sets: as of `held`.
    fonts: its fonts' glyphs in place of its images.
    """
    names, digests, images = sets
    akin = f"{AKIN.get(package.name, package.name)}/"
    own = {Path(name).name for name in names if name.startswith(akin)}
    found = even([(name, inside) for name, inside in members(package, fonts)
                  if not APART.search(f"{name}/{inside}".rstrip("/")) and Path(name).name not in own
                  and f"{package.name}/{name}" not in names], FILES)

    def one(place):                     # what it gives: wholes with their views, or glyphs
        if fonts:
            return glyphs(package / place[0])
        data = read(package, *place)
        return [[] if hashlib.sha256(data).hexdigest() in digests else pictures(data)]

    kept, left_out, out = [], 0, out / package.name
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPool(threads) as pool:
        for i in range(0, len(found), 512):
            files = [(place, several) for place, groups in zip(
                found[i:], pool.map(one, found[i:i + 512])) for several in groups if several]
            marks = [mark for _, several in files for *_, mark in several]
            near = iter(alike(numpy.stack(marks), images) if marks else [])
            for place, several in files:
                if any([next(near) for _ in several]):
                    left_out += 1
                    continue
                for data, suffix, pixels, _ in several:
                    if pixels not in seen:
                        seen.add(pixels)
                        name = f"{len(kept):05d}{suffix}"
                        (out / name).write_bytes(data)
                        kept.append((name, "/".join(filter(None, place))))
    print(f"{package.name}: {len(found)} files, {left_out} like an evaluation set's left out, "
          f"{len(kept)} pictures", flush=True)
    return kept


def licences(package: Path) -> tuple[str, list[str]]:
    """Its copyright file, and the licences that this names on its machine-readable lines."""
    texts = [path.read_text(errors="replace")
             for path in sorted(package.glob("usr/share/doc/*/copyright"))]
    named = {" ".join(line.split()) for text in texts
             for line in re.findall(r"^License:[ \t]*(\S.*)$", text, re.MULTILINE)}
    return "\n".join(texts), sorted(named) or ["see its copyright file"]


def version(package: Path) -> str:
    """Of the first line of its changelog: "name (1:0.9-2) unstable; ..."."""
    for changelog in sorted(package.glob("usr/share/doc/*/changelog*.gz")):
        with gzip.open(changelog, "rt") as lines:
            if found := re.search(r"\((.*?)\)", next(lines, "")):
                return found[1]
    return "of an unknown version"


def main(out: Path, sets: Path, threads: int = 2) -> None:
    start = time.time()
    if list(out.glob("*.tar")):
        raise ValueError(f"{out} has shards already: name another folder, or delete them")
    known, seen, counts = held(sets), set(), Counter()
    fetch(out / "packages", [name for names in PACKAGES.values() for name in names])
    print(f"sets and packages: {time.time() - start:.0f} s", flush=True)
    shutil.rmtree(out / "pictures", ignore_errors=True)
    (out / "licences").mkdir(exist_ok=True)
    with open(out / "sources.tsv", "w") as sources, open(out / "licences.txt", "w") as table:
        for kind, packages in PACKAGES.items():
            for name in packages:
                package = out / "packages" / name
                kept = gather(package, out / "pictures" / kind, seen, known, threads,
                              fonts=kind == "glyphs")
                counts[kind] += len(kept)
                for picture, path in kept:
                    sources.write(f"{kind}/{name}/{picture}\t{path}\n")
                text, named = licences(package)
                (out / "licences" / f"{name}.txt").write_text(text)
                table.write(f"{name} {version(package)}: {len(kept)} pictures; "
                            f"{', '.join(named)}\n")
    paths = pack(open_images(out / "pictures"), out, 200 * 10 ** 6)
    for path in paths:
        print(path.name, hashlib.sha256(path.read_bytes()).hexdigest())
    print(f"{counts.total()} pictures: {dict(counts)}; "
          f"{sum(path.stat().st_size for path in paths) / 1e6:.0f} MB; "
          f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4):
        sys.exit(f"usage: python {sys.argv[0]} FOLDER SETS [THREADS]")
    with one_sentence("uncurated.py"):
        main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:]))
