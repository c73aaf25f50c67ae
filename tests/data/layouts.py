"""COCO's layout and Pascal VOC's, small, as tests of detection write them."""
import json

import numpy
from PIL import Image

from data.detection import open_detection

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 90, "name": "cup"}]
H, W = 40, 60


def annotation(number, image, category, box, segmentation, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "iscrowd": 0,
            "area": 200.5, "segmentation": segmentation} | more


def rle(mask):
    """Runs down the columns, zeros first: COCO's definition, by hand."""
    flat = numpy.concatenate([[0], mask.T.ravel(), [2]])
    ends = numpy.flatnonzero(flat[1:] != flat[:-1])
    runs = numpy.diff(numpy.concatenate([[0], ends])).tolist()
    return {"size": [*mask.shape], "counts": runs}


def blob():
    mask = numpy.zeros((H, W), numpy.uint8)
    mask[5:20, 10:30] = 1
    mask[8:12, 15:20] = 0
    return mask


ANNOTATIONS = [
    annotation(5, 12, 7, [4.25, 3.5, 20.5, 15], [[4.3, 3.5, 24.7, 3.6, 24, 18.5, 5, 18]]),
    annotation(2, 12, 90, [2, 20, 50, 18], [[2, 20, 12, 20, 12, 38, 2, 38],
                                            [40, 22, 52, 22, 52, 38]]),
    annotation(9, 12, 3, [10, 5, 20, 15], rle(blob()), iscrowd=1),
    annotation(1, 40, 3, [10, 5, 20, 15], rle(blob()), area=280),
]


def write_coco(folder, split="val2017", annotations=ANNOTATIONS, **more):
    """Three images of H x W, of which number 8 has no object."""
    images = 12, 40, 8
    (folder / split).mkdir(parents=True, exist_ok=True)
    for number in images:
        pixels = numpy.random.default_rng(number).integers(0, 256, (H, W, 3), dtype=numpy.uint8)
        Image.fromarray(pixels).save(folder / split / f"{number:012}.png")
    data = {"images": [{"id": number, "file_name": f"{number:012}.png", "height": H, "width": W}
                       for number in images],
            "categories": CATEGORIES, "annotations": list(annotations)} | more
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def opened(folder, **more):
    """val."""
    write_coco(folder, "train2017")
    write_coco(folder, **more)
    return open_detection(str(folder))[1]


XML = """<annotation><folder>VOC</folder><filename>{0}.jpg</filename>
<size><width>60</width><height>40</height><depth>3</depth></size>{1}</annotation>"""
OBJECT = """<object><name>{0}</name><difficult>{1}</difficult><bndbox><xmin>{2}</xmin>
<ymin>{3}</ymin><xmax>{4}</xmax><ymax>{5}</ymax></bndbox></object>"""


def write_voc(root):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    things = {"2007_01": [("dog", 0, 1, 1, 60, 40), ("cat", 1, 5, 6, 5, 7)], "2007_02": [],
              "2007_03": [("person", 0, 11, 12, 30, 20)]}
    for name, objects in things.items():
        Image.new("RGB", (W, H)).save(root / "JPEGImages" / f"{name}.jpg")
        (root / "Annotations" / f"{name}.xml").write_text(
            XML.format(name, "".join(OBJECT.format(*thing) for thing in objects)))
    (root / "ImageSets/Main/train.txt").write_text("2007_01\n2007_02\n")
    (root / "ImageSets/Main/val.txt").write_text("2007_03 1\n")
