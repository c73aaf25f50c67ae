"""data/detection.py and data/annotations.py: COCO's and VOC's files beside pycocotools and
torchvision, what is broken, and the ground truth that is measured against."""
import json
import pickle

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, VOCDetection, wrap_dataset_for_transforms_v2

from data.annotations import Broken, check_segmentation, fit_box
from data.detection import decode_masks, encode_masks, open_detection
from data.stream import fault_of

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


def open_val(folder, **more):
    write_coco(folder, "train2017")
    write_coco(folder, **more)
    return open_detection(str(folder))[1]


def refused(folder, **more):
    with pytest.raises(ValueError) as error:
        open_val(folder, **more)
    return str(error.value).replace(str(folder), "")


@pytest.fixture
def masks():
    return pytest.importorskip("pycocotools.mask")


def test_coco_is_read_as_torchvision_reads_it(tmp_path, masks):
    compressed = dict(ANNOTATIONS[3], id=77, image_id=12, segmentation=masks.frPyObjects(
        rle(blob()), H, W))
    compressed["segmentation"]["counts"] = compressed["segmentation"]["counts"].decode()
    val = open_val(tmp_path, annotations=[*ANNOTATIONS, compressed])
    theirs = wrap_dataset_for_transforms_v2(
        CocoDetection(tmp_path / "val2017", tmp_path / "annotations/instances_val2017.json"),
        target_keys=["image_id", "boxes", "masks", "labels", "iscrowd", "area"])
    by_id = {theirs.ids[i]: theirs[i] for i in range(len(theirs))}
    assert len(val) == 3 and val.has_masks and not val.left_out
    assert val.classes == ["cat", "dog", "cup"] and val.category_ids == [3, 7, 90]
    for i in range(3):
        image, target = val[i]
        their_image, their_target = by_id[target["image_id"]]
        assert torch.equal(image, torch.from_numpy(numpy.array(their_image)).permute(2, 0, 1))
        assert val.size(i) == (H, W) and val.name(i) == f"{target['image_id']:012}.png"
        if not len(target["boxes"]):                    # torchvision gives no keys here
            assert target["masks"].shape == (0, H, W) and target["boxes"].shape == (0, 4)
            continue
        assert torch.equal(target["boxes"], torch.Tensor(their_target["boxes"]))
        categories = [val.category_ids[k - 1] for k in target["labels"]]
        assert categories == their_target["labels"].tolist()
        assert torch.equal(target["masks"], torch.Tensor(their_target["masks"]).byte())
        assert target["iscrowd"].tolist() == their_target["iscrowd"]
        assert target["area"].tolist() == their_target["area"]
    assert val.target(1)["masks"][0].numpy().tolist() == blob().tolist()
    assert val.target(2)["image_id"] == 8 and not len(val.target(2)["labels"])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
def test_kinds_and_shapes_hold_with_workers(tmp_path, masks, workers):
    val = open_val(tmp_path)
    loader = DataLoader(val, None, num_workers=workers,
                        multiprocessing_context="spawn" if workers else None)
    for i, (image, target) in enumerate(loader):
        n = len(target["labels"])
        kinds = {key: (x.dtype, tuple(x.shape)) for key, x in target.items() if key != "image_id"}
        assert kinds == {
            "boxes": (torch.float32, (n, 4)), "labels": (torch.int64, (n,)),
            "iscrowd": (torch.int64, (n,)), "area": (torch.float32, (n,)),
            "masks": (torch.uint8, (n, H, W))}
        assert image.dtype == torch.uint8 and type(target["image_id"]) is int
        assert all(torch.equal(target[key], x) for key, x in val[i][1].items() if key in kinds)


def test_masks_come_back_from_rle(masks):
    generator = torch.Generator().manual_seed(0)
    given = (torch.rand(5, 31, 17, generator=generator) < 0.4).byte()
    given[3] = 0
    rles = json.loads(json.dumps(encode_masks(given)))
    assert torch.equal(decode_masks(rles, 31, 17), given)
    for mask, ours in zip(given.numpy(), rles):
        assert check_segmentation(ours, (31, 17)) and check_segmentation(rle(mask), (31, 17))
        assert torch.equal(decode_masks([rle(mask)], 31, 17)[0], torch.from_numpy(mask))
        broken = ours | {"counts": ours["counts"][:-1]}
        with pytest.raises(Broken, match="do not add up"):
            check_segmentation(broken, (31, 17))


@pytest.mark.parametrize("tool", ["pycocotools", "faster_coco_eval.core"])
def test_both_tools_give_the_same_masks(tmp_path, monkeypatch, tool):
    import importlib
    module = pytest.importorskip(f"{tool}.mask")
    other = pytest.importorskip("pycocotools.mask")
    monkeypatch.setattr("data.detection.mask_tool", lambda: importlib.import_module(f"{tool}.mask"))
    ours = decode_masks([a["segmentation"] for a in ANNOTATIONS], H, W)
    assert module and ours.sum((1, 2)).tolist() == [
        int(other.area(other.merge(rles) if isinstance(rles, list) else rles)) for rles in
        (other.frPyObjects(a["segmentation"], H, W) for a in ANNOTATIONS)]
    assert torch.equal(decode_masks(encode_masks(ours), H, W), ours)


def test_a_missing_tool_is_asked_for(tmp_path, monkeypatch):
    val = open_val(tmp_path)
    for name in ("pycocotools", "pycocotools.mask", "faster_coco_eval", "faster_coco_eval.core",
                 "faster_coco_eval.core.mask"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        val[0]
    assert "masks" not in val.without_masks()[0][1] and val.has_masks


def test_measured_by_the_tool_it_equals_the_file(tmp_path, masks):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    val, rng = open_val(tmp_path), numpy.random.default_rng(0)
    path = tmp_path / "annotations/instances_val2017.json"
    truth = json.loads(json.dumps(val.as_coco()))
    assert min(a["id"] for a in truth["annotations"]) == 1
    (tmp_path / "ours.json").write_text(json.dumps(truth))
    results = []
    for a in ANNOTATIONS * 4:
        box = (numpy.array(a["bbox"]) + rng.normal(0, 1, 4)).tolist()
        results.append({"image_id": a["image_id"], "category_id": a["category_id"], "bbox": box,
                        "score": float(rng.random())})
    for kind in ("bbox", "segm"):
        stats = []
        for file in (path, tmp_path / "ours.json"):
            coco = COCO(file)
            found = results if kind == "bbox" else [
                {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.5,
                 "segmentation": coco.annToRLE(a)} for a in coco.dataset["annotations"]]
            measured = COCOeval(coco, coco.loadRes(found), kind)
            measured.evaluate()
            measured.accumulate()
            measured.summarize()
            stats.append(measured.stats.tolist())
        assert stats[0] == stats[1] and (stats[0][0] == pytest.approx(1) if kind == "segm" else
                                         0 < stats[0][0] < 1)


def test_boxes_alone(tmp_path):
    plain = [{key: x for key, x in a.items() if key not in ("segmentation", "area")}
             for a in ANNOTATIONS]
    val = open_val(tmp_path, annotations=[plain[0] | {"segmentation": []}, *plain[1:]])
    assert not val.has_masks and "masks" not in val[0][1]
    assert val[0][1]["area"].tolist() == [20.5 * 15, 50 * 18, 20 * 15]
    assert "segmentation" not in val.as_coco()["annotations"][0]


def test_an_area_that_the_file_lacks_is_the_masks(tmp_path, masks):
    val = open_val(tmp_path, annotations=[ANNOTATIONS[2] | {"area": None}, ANNOTATIONS[3]])
    assert val.target(0)["area"].tolist() == [blob().sum()] and val.target(1)["area"] == 280
    assert val.without_masks().target(0)["area"].tolist() == [20 * 15]


def test_what_is_broken_is_left_out_and_named(tmp_path):
    boxes = {"has no area": [5, 5, 0, 3], "not finite": [5, float("nan"), 2, 2],
             "outside the image of 60 x 40": [70, 5, 10, 10], "not four numbers": [1, 2, 3]}
    bad = [annotation(100 + k, 12, 3, box, []) for k, box in enumerate(boxes.values())]
    bad += [annotation(104, 99, 3, [1, 1, 5, 5], []),
            annotation(105, 12, 3, [1, 1, 5, 5], [[1, 1, 5, 5]]),
            annotation(106, 12, 3, [1, 1, 5, 5], {"size": [H, W], "counts": [7, 9]}),
            annotation(107, 12, 3, [1, 1, 5, 5], {"size": [W, H], "counts": [H * W]}),
            annotation(108, 12, 3, [10 ** 400, 1, 5, 5], [])]
    reasons = [*boxes, "no image 99", "three or more points", "do not add up", "of 40 rows",
               "not four numbers"]
    write_coco(tmp_path, "train2017")
    write_coco(tmp_path, annotations=[*ANNOTATIONS, *bad])
    (tmp_path / "val2017" / f"{40:012}.png").unlink()
    val = open_detection(str(tmp_path))[1]
    assert len(val) == 2 and len(val.without_masks().target(0)["boxes"]) == 3
    assert len(val.left_out) == 10
    for k, (line, reason) in enumerate(zip(val.left_out, reasons)):
        assert line.startswith(f"annotation {100 + k}: ") and reason in line
    assert val.left_out[-1].startswith("000000000040.png: no such file in ")


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
            ({"images": None}, "has no 'images' that is a list"),
            ({"annotations": [7]}, "annotations[0] has no 'image_id'")]:
        said_so = refused(tmp_path, **more)
        assert said_so.startswith(path) and said in said_so
    assert "differ in their categories: [(3, 'cat')" in refused(
        tmp_path, annotations=[], categories=[{"id": 4, "name": "cat"}, *CATEGORIES[::2]])
    assert "no image is left: none is listed" in refused(tmp_path, images=[], annotations=[])
    write_coco(tmp_path).write_text("{")
    with pytest.raises(ValueError, match="instances_val2017.json is not JSON"):
        open_detection(str(tmp_path))
    with pytest.raises(ValueError, match="there is no .*instances_val2017.json.*Pascal"):
        open_detection(str(tmp_path / "elsewhere"), "val2017")
    with pytest.raises(ValueError, match="one.json is the file of both train and val"):
        open_detection(str(tmp_path), annotations="one.json")


def test_other_folder_names(tmp_path):
    for split in ("images/a", "images/b"):
        path = write_coco(tmp_path / "x", split.split("/")[1])
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "x" / path.stem[-1]).rename(tmp_path / split)
    val = open_detection(str(tmp_path), "images/a", "images/b",
                         "x/annotations/instances_{split}.json")
    assert [len(part) for part in val] == [3, 3]


def test_an_image_that_cannot_be_read_raises_a_fault(tmp_path):
    val = open_val(tmp_path).without_masks()
    file = tmp_path / "val2017" / val.name(0)
    file.write_bytes(file.read_bytes()[:60])
    Image.new("RGB", (W, H + 1)).save(tmp_path / "val2017" / val.name(1))
    causes = []
    for i in range(2):
        with pytest.raises(Exception) as error:
            val[i]
        causes.append(fault_of(error.value, val.name(i)))
    assert causes[0].name == "000000000012.png" and causes[0].cause in ("truncated", "damaged")
    assert causes[1][1:] == ("other size", "60 x 41 pixels, its annotation says 60 x 40")
    assert len(val.target(0)["boxes"]) == 3             # they can be measured all the same


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


def test_voc(tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2012"
    write_voc(root)
    train, val = open_detection(str(root))
    theirs = VOCDetection(tmp_path, image_set="train")
    assert train.classes == val.classes == ["cat", "dog", "person"] and not train.has_masks
    assert train.category_ids == [1, 2, 3] and not train.left_out + val.left_out
    for i in range(2):
        objects = theirs[i][1]["annotation"].get("object", [])
        target = train[i][1]
        assert [train.classes[k - 1] for k in target["labels"]] == [o["name"] for o in objects]
        assert target["iscrowd"].tolist() == [int(o["difficult"]) for o in objects]
        assert (target["boxes"] + torch.tensor([1, 1, 0, 0])).int().tolist() == [
            [int(o["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for o in objects]
    assert train[0][1]["boxes"].tolist() == [[0, 0, 60, 40], [4, 5, 5, 7]]
    assert train[0][1]["area"].tolist() == [2400, 2] and train[1][1]["boxes"].shape == (0, 4)
    assert val.name(0) == "2007_03.jpg" and val.target(0)["labels"].tolist() == [3]


def test_broken_entries_of_voc_are_left_out_and_named(tmp_path):
    write_voc(tmp_path)
    (tmp_path / "ImageSets/Main/train.txt").write_text("2007_01\n2007_02\nmissing\n2007_03\n")
    (tmp_path / "Annotations/2007_01.xml").write_text(XML.format("", "".join(
        OBJECT.format(*thing) for thing in [("dog", 0, 9, 9, 3, 9), ("", 0, 1, 1, 2, 2),
                                            ("dog", 0, "x", 1, 2, 2), ("dog", 0, 1, 1, 2, 2)])))
    (tmp_path / "Annotations/2007_02.xml").write_text("<annotation>")
    (tmp_path / "Annotations/2007_03.xml").write_text("<annotation/>")
    write_voc(tmp_path / "other")
    (tmp_path / "ImageSets/Main/val.txt").write_text("2007_01\n")
    train, _ = open_detection(str(tmp_path))
    assert len(train) == 1 and train.target(0)["boxes"].tolist() == [[0, 0, 2, 2]]
    for line, said in zip(train.left_out, [
            "2007_01.xml, object 1: its box, 8, 8 to 3, 9, has no area",
            "2007_01.xml, object 2: it has no name", "2007_01.xml, object 3: its box is not four",
            "2007_02.xml: not XML", "missing: no such image in", "2007_03.xml: no size"],
            strict=True):
        assert said in line
    (tmp_path / "ImageSets/Main/val.txt").unlink()
    with pytest.raises(ValueError, match="val.txt is unreadable: No such file"):
        open_detection(str(tmp_path))


def test_parts_and_shares_of_the_built_in_scenes():
    train, val = open_detection("")
    assert (len(train), len(val)) == (2000, 300) and len(train.classes) == 12
    one, ten = train.share("0.01"), train.share("0.1")
    assert (len(one), len(ten)) == (20, 200) and {*one.indices} < {*ten.indices}
    assert min(one.indices) < 500 < 1500 < max(one.indices)
    assert one.indices == train.share("0.01").indices and len(train.share("0.00001")) == 1
    assert len(train.share("1")) == 2000
    assert ten.subset([5, 3]).name(1) == ten.name(3) == train.name(ten.indices[3])
    assert torch.equal(ten.subset([5, 3])[1][0], train[ten.indices[3]][0])
    for labels in ("0", "1.01", "nan", "list.txt"):
        with pytest.raises(ValueError, match=f"--labels {labels} is no share"):
            train.share(labels)
    small = pickle.loads(pickle.dumps(val.subset([4]).without_masks()))
    assert small[0][1].keys() == val[4][1].keys() - {"masks"} == small.target(0).keys()


def test_the_tool_finds_no_fault_with_the_built_in_truth(masks):
    val = open_detection("")[1].subset(range(12))
    truth = json.loads(json.dumps(val.as_coco()))
    for a, mask in zip(truth["annotations"], torch.cat([val.target(i)["masks"] for i in range(12)]),
                       strict=True):
        assert masks.toBbox(a["segmentation"]).tolist() == a["bbox"]
        assert int(masks.area(a["segmentation"])) == a["area"] == int(mask.sum())
