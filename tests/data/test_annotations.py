"""data/annotations.py: what of COCO's and VOC's files is broken, and how it is named."""
import pytest

from data.annotations import Broken, check_segmentation, fit_box
from data.detection import open_detection
from tests.data.layouts import (
    ANNOTATIONS,
    CATEGORIES,
    OBJECT,
    XML,
    H,
    W,
    annotation,
    opened,
    write_coco,
    write_voc,
)


def refused(folder, **more):
    with pytest.raises(ValueError) as error:
        opened(folder, **more)
    return str(error.value).replace(str(folder), "")


def test_what_is_broken_is_left_out_and_named(tmp_path):
    boxes = {"has no area": [5, 5, 0, 3], "not finite": [5, float("nan"), 2, 2],
             "outside the image of 60 x 40": [70, 5, 10, 10], "not four numbers": [1, 2, 3]}
    bad = [annotation(100 + k, 12, 3, box, []) for k, box in enumerate(boxes.values())]
    bad += [annotation(104, 99, 3, [1, 1, 5, 5], []),
            annotation(105, 12, 3, [1, 1, 5, 5], [[1, 1, 5, 5]]),
            annotation(106, 12, 3, [1, 1, 5, 5], {"size": [H, W], "counts": [7, 9]}),
            annotation(107, 12, 3, [1, 1, 5, 5], {"size": [W, H], "counts": [H * W]}),
            annotation(108, 12, 3, [10 ** 400, 1, 5, 5], [])]
    reasons = [*boxes, "no image 99", *[f", where masks are used: {why}" for why in (
        "its polygon is not three", "the runs of its mask do not add up", "its mask is not of 40")],
        "not four numbers"]
    write_coco(tmp_path, "train2017")
    write_coco(tmp_path, annotations=[*ANNOTATIONS, *bad])
    (tmp_path / "val2017" / f"{40:012}.png").unlink()
    val = open_detection(str(tmp_path))[1]
    assert len(val) == 2 and len(val.without_masks().target(0)["boxes"]) == 6
    path = tmp_path / "annotations" / "instances_val2017.json"
    for k, (line, reason) in enumerate(zip(val.left_out[:-1], reasons, strict=True)):
        assert line.startswith(f"{path}: annotation {100 + k}") and reason in line
    assert val.left_out[-1].startswith(f"{path}: 000000000040.png: no such file in ")


def test_a_polygon_keeps_its_parts_of_three_points():
    good, short = [1, 1, 5, 1, 5, 5], [1, 1, 5, 5]
    assert check_segmentation([short, good, [], good], (H, W)) == [good, good]
    for given in ([short], [[]], [good, [1] * 7], [good, "part"], [good, [1, 2, 3, 4, 5, None]]):
        with pytest.raises(Broken, match="not three or more points"):
            check_segmentation(given, (H, W))


@pytest.mark.parametrize("far", [5e8, -5e8, 10 ** 400, 5 * W + 1, float("nan")])
def test_a_polygon_far_outside_its_image_is_broken(far):
    assert check_segmentation([[0, 0, 5 * W, 0, 0, 5 * W]], (H, W))
    with pytest.raises(Broken, match="its polygon lies far outside the image"):
        check_segmentation([[0, 0, 1, 0, 0, far]], (H, W))


def test_a_box_is_clipped_to_its_image():
    assert fit_box((-3, 2, 70, 12.5), (H, W)) == (0, 2, 60, 12.5)
    assert fit_box((3, -1, 5, 99), (H, W)) == (3, 0, 5, 40)


def test_a_file_that_is_no_coco_is_named_with_its_entry(tmp_path):
    path = "/annotations/instances_val2017.json"
    one = {"id": 1, "file_name": "a.png", "height": 1, "width": 1}
    for more, said in [
            ({"categories": []}, "annotations[0] is of category 7, which no entry of categories"),
            ({"categories": CATEGORIES * 2}, "two categories have the same id"),
            ({"images": [one, one]}, "images[1] has the id 1, as another image"),
            ({"images": [{"id": 1}]}, "images[0] has no 'file_name' that is a text"),
            ({"images": [one | {"width": None}]}, "images[0] has no 'width' that is a whole"),
            ({"images": [one | {"id": 2 ** 53 + 1}]}, "images[0] has no 'id' that is a whole"),
            ({"images": [one | {"height": True}]}, "images[0] has no 'height' that is a whole"),
            ({"images": None}, "has no 'images' that is a list"),
            ({"annotations": [7]}, "annotations[0] has no 'image_id'")]:
        said_so = refused(tmp_path, **more)
        assert said_so.startswith(path) and said in said_so
    assert "differ in their categories: [(3, 'cat')" in refused(
        tmp_path, annotations=[], categories=[{"id": 4, "name": "cat"}, *CATEGORIES[::2]])
    assert f"no image is left: {path}: none is listed" in refused(tmp_path, images=[],
                                                                  annotations=[])
    for width, height in ((0, 40), (60, -40), (10 ** 5, 10 ** 4)):
        image = one | {"width": width, "height": height}
        assert refused(tmp_path, images=[image], annotations=[]) == (
            f"no image is left: {path}: a.png: no image of {width} x {height} pixels is used")
    write_coco(tmp_path).write_text("{")
    with pytest.raises(ValueError, match="instances_val2017.json is not JSON"):
        open_detection(str(tmp_path))
    with pytest.raises(ValueError, match="there is no .*instances_val2017.json.*Pascal"):
        open_detection(str(tmp_path / "elsewhere"), "val2017")
    with pytest.raises(ValueError, match="one.json is not one file of train and one of val"):
        open_detection(str(tmp_path), annotations="one.json")


def test_broken_entries_of_voc_are_left_out_and_named(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text(
        "2007_01\n2007_02\nmissing\n2007_03\n2007_04\n")
    (tmp_path / "Annotations/2007_01.xml").write_text(XML.format("", "".join(
        OBJECT.format(*thing) for thing in [("dog", 0, 9, 9, 3, 9), ("", 0, 1, 1, 2, 2),
                                            ("dog", 0, "x", 1, 2, 2), ("dog", 0, 1, 1, 2, 2)])))
    (tmp_path / "Annotations/2007_02.xml").write_text("<annotation>")
    (tmp_path / "Annotations/2007_03.xml").write_text("<annotation/>")
    (tmp_path / "JPEGImages/2007_04.jpg").touch()
    (tmp_path / "Annotations/2007_04.xml").write_text(XML.format("", "").replace("60", "0"))
    write_voc(tmp_path / "other")
    (tmp_path / "ImageSets/Main/val.txt").write_text("2007_01\n")
    train, _ = open_detection(str(tmp_path))
    assert len(train) == 1 and train.target(0)["boxes"].tolist() == [[0, 0, 2, 2]]
    for line, said in zip(train.left_out, [
            "2007_01.xml, object 1: its box, 8, 8 to 3, 9, has no area",
            "2007_01.xml, object 2: it has no name", "2007_01.xml, object 3: its box is not four",
            "2007_02.xml: not XML", "Main/train.txt: missing: no such image in",
            "2007_03.xml: no size", "2007_04.xml: no image of 0 x 40 pixels is used"],
            strict=True):
        assert said in line
    (tmp_path / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(ValueError, match="val.txt is unreadable: No such file"):
        open_detection(str(tmp_path))
