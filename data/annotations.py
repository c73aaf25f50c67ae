"""Annotation files of detection: COCO's JSON, Pascal VOC's XML.

    read_coco("coco/annotations/instances_val2017.json", "coco/val2017").entries
    read_voc("VOC2012", "val").left_out              # what is broken, and why

COCO's format: cocodataset.org/#format-data; boxes x, y, width, height from 0. VOC's: the
development kit, doi 10.1007/s11263-009-0275-4; boxes xmin, ymin, xmax, ymax, of whole
pixels from 1, both ends inside. Here a box is x1, y1, x2, y2 from 0, clipped to its image.

A file that cannot be understood raises ValueError, with its name and the entry's; an image that is
not there and an object that is broken are left out, and named.
"""
import json
import math
import os
from pathlib import Path
from typing import NamedTuple, Sequence
from xml.etree import ElementTree

from data.images import read_list
from data.shards import is_picture

LEAST = 0.01                             # pixels: a box of a smaller side has no area


class Thing(NamedTuple):
    """An object as its file says."""
    box: tuple[float, float, float, float]
    category: int | str                  # COCO's id, VOC's name
    crowd: bool
    area: float = math.nan               # nan: the file does not say
    segmentation: list | dict | None = None


class Entry(NamedTuple):
    """An image as its file says."""
    name: str                            # below the images' folder
    number: int                          # its id
    size: tuple[int, int]                # H, W
    things: list[Thing]


class Annotations(NamedTuple):
    entries: list[Entry]
    classes: dict[int | str, str]        # of a Thing's category, the name, in order of the labels
    left_out: list[str]                  # what and why


class Broken(ValueError):
    """An object that cannot be used: why."""


def fit_box(corners: Sequence, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """x1, y1, x2, y2, clipped to an image of H, W. Raises Broken."""
    try:
        x1, y1, x2, y2 = map(float, corners)
    except (TypeError, ValueError, OverflowError):
        raise Broken("its box is not four numbers") from None
    said, (height, width) = f"its box, {x1:g}, {y1:g} to {x2:g}, {y2:g},", size
    if not all(map(math.isfinite, (x1, y1, x2, y2))):
        raise Broken(f"{said} is not finite")
    if x2 - x1 < LEAST or y2 - y1 < LEAST:
        raise Broken(f"{said} has no area")
    x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if x2 - x1 < LEAST or y2 - y1 < LEAST:
        raise Broken(f"{said} lies outside the image of {width} x {height}")
    return x1, y1, x2, y2


def check_segmentation(given, size: tuple[int, int]) -> list | dict | None:
    """Polygons, or RLE, as they are; None for none. Raises Broken."""
    if not given:
        return None
    if isinstance(given, list):
        for part in given:
            if not (isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0 and
                    all(isinstance(x, (int, float)) and abs(x) < math.inf for x in part)):
                raise Broken("its polygon is not three or more points")
        return given
    if not isinstance(given, dict) or given.get("size") != [*size]:
        raise Broken(f"its mask is not of {size[0]} rows and {size[1]} columns")
    counts = given.get("counts")
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not (isinstance(runs, list) and all(isinstance(x, int) and x >= 0 for x in runs)
            and sum(runs) == size[0] * size[1]):
        raise Broken("the runs of its mask do not add up to the image")
    return given


def _runs(counts: str) -> list[int]:
    """COCO's compressed RLE -> its runs: five bits a letter, the lowest first, signed; from the
    fourth on, the difference to the last run but one."""
    runs, value, shift = [], 0, 0
    for letter in counts.encode():
        value |= (letter - 48 & 31) << shift
        shift += 5
        if not letter - 48 & 32:
            value -= (letter - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return runs


def _take(entry, key: str, kind: type, where: str):
    """A value of a JSON object. Raises ValueError where it has none of that kind."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind):
        words = {list: "list", str: "text", int: "whole number"}[kind]
        raise ValueError(f"{where} has no {key!r} that is a {words}")
    return value


def _load(path: str | os.PathLike):
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except OSError as error:
        raise ValueError(f"{path} is unreadable: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def read_coco(path: str | os.PathLike, images: str | os.PathLike) -> Annotations:
    """images: their folder. Raises ValueError where the file is not in COCO's format."""
    data, classes, entries, left_out = _load(path), {}, {}, []
    for k, category in enumerate(_take(data, "categories", list, path)):
        where = f"{path}: categories[{k}]"
        classes[_take(category, "id", int, where)] = _take(category, "name", str, where)
    if len(classes) < len(data["categories"]):
        raise ValueError(f"{path}: two categories have the same id")
    for k, image in enumerate(_take(data, "images", list, path)):
        where = f"{path}: images[{k}]"
        number, name = _take(image, "id", int, where), _take(image, "file_name", str, where)
        if number in entries:
            raise ValueError(f"{where} has the id {number}, as another image")
        size = _take(image, "height", int, where), _take(image, "width", int, where)
        entries[number] = Entry(name, number, size, [])
    for k, annotation in enumerate(_take(data, "annotations", list, path)):
        where = f"{path}: annotations[{k}]"
        number = _take(annotation, "image_id", int, where)
        category = _take(annotation, "category_id", int, where)
        if category not in classes:
            raise ValueError(f"{where} is of category {category}, which no entry of categories has")
        try:
            if number not in entries:
                raise Broken(f"there is no image {number}")
            entries[number].things.append(_coco_thing(annotation, category, entries[number].size))
        except Broken as error:
            left_out.append(f"annotation {annotation.get('id', k)}: {error}")
    kept = []
    for entry in entries.values():
        if os.path.isfile(os.path.join(images, entry.name)):
            kept.append(entry)
        else:
            left_out.append(f"{entry.name}: no such file in {images}")
    return Annotations(kept, dict(sorted(classes.items())), left_out)


def _coco_thing(annotation: dict, category: int, size: tuple[int, int]) -> Thing:
    try:
        x, y, width, height = map(float, annotation.get("bbox"))
    except (TypeError, ValueError, OverflowError):
        raise Broken("its box is not four numbers") from None
    area = annotation.get("area")
    return Thing(fit_box((x, y, x + width, y + height), size), category,
                 annotation.get("iscrowd") == 1,
                 area if isinstance(area, (int, float)) and 0 <= area < math.inf else math.nan,
                 check_segmentation(annotation.get("segmentation"), size))


def read_voc(root: str | os.PathLike, split: str) -> Annotations:
    """Of the images that ImageSets/Main/SPLIT.txt lists. Objects that are difficult become crowd
    regions: they count neither as found nor as missed. Raises ValueError for a list that cannot be
    read."""
    root, left_out, entries = Path(root), [], []
    lines = [os.fsdecode(line).split()[0]
             for line in read_list(str(root / "ImageSets" / "Main" / f"{split}.txt"))]
    files = {Path(name).stem: name for name in sorted(os.listdir(root / "JPEGImages"))
             if is_picture(name)}
    for number, stem in enumerate(lines, 1):
        path = root / "Annotations" / f"{stem}.xml"
        if stem not in files:
            left_out.append(f"{stem}: no such image in {root / 'JPEGImages'}")
            continue
        try:
            tree = ElementTree.parse(path).getroot()
            size = int(tree.findtext("size/height")), int(tree.findtext("size/width"))
        except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
            why = getattr(error, "strerror", None) or (
                f"not XML, {error}" if isinstance(error, ElementTree.ParseError) else
                "no size of the image")
            left_out.append(f"{path}: {why}")
            continue
        entries.append(Entry(files[stem], number, size, []))
        for k, item in enumerate(tree.iter("object"), 1):
            try:
                entries[-1].things.append(_voc_thing(item, size))
            except Broken as error:
                left_out.append(f"{path}, object {k}: {error}")
    names = {thing.category for entry in entries for thing in entry.things}
    return Annotations(entries, {name: name for name in sorted(names)}, left_out)


def _voc_thing(item: ElementTree.Element, size: tuple[int, int]) -> Thing:
    if not (name := (item.findtext("name") or "").strip()):
        raise Broken("it has no name")
    try:
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{corner}"))
                          for corner in ("xmin", "ymin", "xmax", "ymax"))
    except (TypeError, ValueError):
        raise Broken("its box is not four numbers") from None
    return Thing(fit_box((x1 - 1, y1 - 1, x2, y2), size), name,
                 (item.findtext("difficult") or "").strip() == "1")
