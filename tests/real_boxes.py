"""A small real set with boxes, from a package of pip: trees in aerial photographs.

    python tests/real_boxes.py trees/     # needs pip; 20 MB
    python evaluate.py detect runs/mine --data trees/

trees/ has Pascal VOC's layout. Its images are tiles of 200 pixels (20 m) of the photographs in
`deepforest` 2.1.0 (MIT licence; the photographs are the National Ecological Observatory Network's).
train: 132 tiles of one photograph, 563 boxes; val: 38 tiles of three others, 364 boxes. A tree that
a border cuts has a box in each of its tiles, which is "difficult" below 40 % of the tree's area.

trees/unlabelled/: overlapping tiles of the training photograph, to pretrain on.
"""
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from PIL import Image

PACKAGE = "deepforest==2.1.0"
SPLITS = {"train": ["2019_YELL_2_528000_4978000_image_crop2"],
          "val": ["2019_YELL_2_541000_4977000_image_crop", "OSBS_029", "SOAP_061"]}
TILE, STEP = 200, 50                    # pixels; of the unlabelled tiles from one to the next
VISIBLE = 0.4


def fetch(work: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    subprocess.run([*pip, "-d", work, PACKAGE], check=True)
    with zipfile.ZipFile(next(work.glob("deepforest*.whl"))) as package:
        package.extractall(work)


def boxes_of(path: Path) -> list[tuple[int, int, int, int]]:
    """x1, y1, x2, y2 from 0, the last two outside."""
    boxes = []
    for box in ElementTree.parse(path).iter("bndbox"):
        x1, y1, x2, y2 = (int(box.findtext(name)) for name in ("xmin", "ymin", "xmax", "ymax"))
        boxes.append((x1 - 1, y1 - 1, x2, y2))
    return boxes


def annotation(name: str, x: int, y: int, boxes: list[tuple[int, int, int, int]]) -> Element:
    """VOC's, of the tile whose corner is at x, y."""
    root = Element("annotation")
    SubElement(root, "filename").text = name
    size = SubElement(root, "size")
    for key, value in (("width", TILE), ("height", TILE), ("depth", 3)):
        SubElement(size, key).text = str(value)
    for x1, y1, x2, y2 in boxes:
        left, top = max(x1 - x, 0), max(y1 - y, 0)
        right, bottom = min(x2 - x, TILE), min(y2 - y, TILE)
        if left >= right or top >= bottom:
            continue
        visible = (right - left) * (bottom - top) / ((x2 - x1) * (y2 - y1))
        thing = SubElement(root, "object")
        SubElement(thing, "name").text = "tree"
        SubElement(thing, "difficult").text = str(int(visible < VISIBLE))
        box = SubElement(thing, "bndbox")
        corners = left + 1, top + 1, right, bottom
        for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners):
            SubElement(box, key).text = str(value)
    return root


def tiles(image: Image.Image, step: int) -> list[tuple[int, int]]:
    return [(x, y) for y in range(0, image.height - TILE + 1, step)
            for x in range(0, image.width - TILE + 1, step)]


def main(out: Path) -> None:
    work = out / "package"
    if not work.exists():
        work.mkdir(parents=True)
        fetch(work)
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main", "unlabelled"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    for split, sources in SPLITS.items():
        names = []
        for source in sources:
            path = work / "deepforest" / "data" / source
            image, boxes = Image.open(f"{path}.png").convert("RGB"), boxes_of(f"{path}.xml")
            for x, y in tiles(image, TILE):
                names.append(name := f"{source}-{x}-{y}")
                image.crop((x, y, x + TILE, y + TILE)).save(
                    out / "JPEGImages" / f"{name}.jpg", quality=95)
                ElementTree.ElementTree(annotation(f"{name}.jpg", x, y, boxes)).write(
                    out / "Annotations" / f"{name}.xml")
            for x, y in tiles(image, STEP) if split == "train" else ():
                image.crop((x, y, x + TILE, y + TILE)).save(
                    out / "unlabelled" / f"{source}-{x}-{y}.jpg", quality=95)
        (out / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        print(split, len(names))
    print("unlabelled", len([*(out / "unlabelled").iterdir()]))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    main(Path(sys.argv[1]))
