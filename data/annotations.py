"""Annotation files of detection: COCO's JSON, Pascal VOC's XML.

    read_coco("coco/annotations/instances_val2017.json", "coco/val2017").entries
    read_voc("VOC2012", "val").left_out              # what is broken, and why

COCO's format: cocodataset.org/#format-data; boxes x, y, width, height from 0. VOC's: the
development kit, doi 10.1007/s11263-009-0275-4; boxes xmin, ymin, xmax, ymax, of whole
pixels from 1, both ends inside. Here a box is x1, y1, x2, y2 from 0, clipped to its image.

A file that cannot be understood raises ValueError, with its name and the entry's; an image that is
not there and an object that is broken are left out, and named. An object of which the mask alone is
broken is left out where masks are used.
"""
import json
import math
import os
from pathlib import Path
from typing import NamedTuple, Sequence
from xml.etree import ElementTree

from data.images import read_list
from data.shards import is_picture
from multicrop import MAX_PIXELS

LEAST = 0.01                             # pixels: a box of a smaller side has no area
FAR = 5                                  # longer sides: no polygon reaches beyond
MOST = 2 ** 53                           # of a whole number or an area: what a float64 tells apart


class Thing(NamedTuple):
    """An object as its file says."""
    box: tuple[float, float, float, float]
    category: int | str                  # COCO's id, VOC's name
    crowd: bool
    area: float = math.nan               # nan: the file does not say
    segmentation: list | dict | None = None              # None: the file has none; []: broken


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
    path: Path                           # of what lists the images
    no_masks: str                        # why these count as boxes alone; "": as masks


class Broken(ValueError):
    """An object or an image that cannot be used: why."""


def check_size(height: int, width: int) -> tuple[int, int]:
    """Raises Broken for a size that no image has that can be used."""
    if min(height, width) < 1 or height * width > MAX_PIXELS:
        raise Broken(f"no image of {width} x {height} pixels is used")
    return height, width


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
    """Polygons, but for parts of fewer than three points, or RLE, as it is; None for none. Raises
    Broken."""
    if not given:
        return None
    if isinstance(given, list):
        parts = [part for part in given if not (isinstance(part, list) and len(part) < 6)]
        if not parts or not all(isinstance(part, list) and len(part) % 2 == 0 and
                                {*map(type, part)} <= {int, float} for part in parts):
            raise Broken("its polygon is not three or more points")
        # the tool takes memory by a polygon's length, and ends the process where there is none left
        far = FAR * max(size)
        if not all(-far <= x <= far for part in parts for x in part):       # nor nan
            raise Broken("its polygon lies far outside the image")
        return parts
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
    fourth on, the difference to the last run but one. Empty where the letters are no runs: the
    tool would read on behind their end."""
    runs, value, shift = [], 0, 0
    for letter in counts.encode():
        if not 48 <= letter < 112:
            return []
        value |= (letter - 48 & 31) << shift
        shift += 5
        if not letter - 48 & 32:
            value -= (letter - 48 & 16) << shift - 4
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value, shift = 0, 0
    return [] if shift else runs


def _take(entry, key: str, kind: type, where: str):
    """A value of a JSON object. Raises ValueError where it has none of that kind, or a number
    beyond MOST."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind or kind is int and abs(value) > MOST:
        words = {list: "list", str: "text", int: "whole number of at most 2^53"}[kind]
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
    data, classes, entries = _load(path), {}, {}
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
    left_out, without_mask = _add_things(path, data, classes, entries)
    kept = []
    for entry in entries.values():
        try:
            check_size(*entry.size)
            if not os.path.isfile(os.path.join(images, entry.name)):
                raise Broken(f"no such file in {images}")
            kept.append(entry)
        except Broken as error:
            left_out.append(f"{path}: {entry.name}: {error}")
    first = next((without_mask[entry.number] for entry in kept if entry.number in without_mask), "")
    return Annotations(kept, dict(sorted(classes.items())), left_out, Path(path),
                       first and f"{first} has no mask: all count as boxes")


def _add_things(path, data: dict, classes: dict, entries: dict[int, Entry]
                ) -> tuple[list[str], dict[int, str]]:
    """-> what is left out, and the first annotation without a mask of each image that has one."""
    left_out, without_mask = [], {}
    for k, annotation in enumerate(_take(data, "annotations", list, path)):
        where = f"{path}: annotations[{k}]"
        number = _take(annotation, "image_id", int, where)
        category = _take(annotation, "category_id", int, where)
        if category not in classes:
            raise ValueError(f"{where} is of category {category}, which no entry of categories has")
        name = f"{path}: annotation {annotation.get('id', k)}"
        try:
            if number not in entries:
                raise Broken(f"there is no image {number}")
            thing, why = _coco_thing(annotation, category, entries[number].size)
        except Broken as error:
            left_out.append(f"{name}: {error}")
            continue
        entries[number].things.append(thing)
        if why:
            left_out.append(f"{name}, where masks are used: {why}")
        if thing.segmentation is None:
            without_mask.setdefault(number, name)
    return left_out, without_mask


def _coco_thing(annotation: dict, category: int, size: tuple[int, int]) -> tuple[Thing, str]:
    """And why its mask is broken, or ""."""
    try:
        x, y, width, height = map(float, annotation.get("bbox"))
    except (TypeError, ValueError, OverflowError):
        raise Broken("its box is not four numbers") from None
    box, area = fit_box((x, y, x + width, y + height), size), annotation.get("area")
    try:
        segmentation, why = check_segmentation(annotation.get("segmentation"), size), ""
    except Broken as error:
        segmentation, why = [], str(error)
    return Thing(box, category, annotation.get("iscrowd") == 1,
                 area if type(area) in (int, float) and 0 <= area <= MOST else math.nan,
                 segmentation), why


def read_voc(root: str | os.PathLike, split: str) -> Annotations:
    """Of the images that ImageSets/Main/SPLIT.txt lists. Objects that are difficult become crowd
    regions: they count neither as found nor as missed. Raises ValueError for a list that cannot be
    read."""
    root, left_out, entries = Path(root), [], []
    listed = root / "ImageSets" / "Main" / f"{split}.txt"
    lines = [os.fsdecode(line).split()[0] for line in read_list(str(listed))]
    files = {Path(name).stem: name for name in sorted(os.listdir(root / "JPEGImages"))
             if is_picture(name)}
    for number, stem in enumerate(lines, 1):
        path = root / "Annotations" / f"{stem}.xml"
        if stem not in files:
            left_out.append(f"{listed}: {stem}: no such image in {root / 'JPEGImages'}")
            continue
        try:
            tree = ElementTree.parse(path).getroot()
            size = check_size(*(int(tree.findtext(f"size/{side}")) for side in ("height", "width")))
        except (OSError, ElementTree.ParseError, TypeError, ValueError) as error:
            why = getattr(error, "strerror", None) or (
                f"not XML, {error}" if isinstance(error, ElementTree.ParseError) else
                str(error) if isinstance(error, Broken) else
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
    return Annotations(entries, {name: name for name in sorted(names)}, left_out, listed,
                       "Pascal VOC has no masks")


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
