"""data/detection.py: COCO's and VOC's files beside pycocotools and torchvision, and the ground
truth that is measured against."""
import json
import pickle

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, VOCDetection, wrap_dataset_for_transforms_v2

from data.annotations import Broken, check_segmentation
from data.detection import Scenes, decode_masks, encode_masks, open_detection, open_val
from data.scenes import DemoScenes
from data.stream import fault_of
from tests.data.layouts import (
    ANNOTATIONS,
    H,
    W,
    annotation,
    blob,
    opened,
    rle,
    write_coco,
    write_voc,
)


@pytest.fixture
def masks():
    return pytest.importorskip("pycocotools.mask")


def test_coco_is_read_as_torchvision_reads_it(tmp_path, masks):
    compressed = dict(ANNOTATIONS[3], id=77, image_id=12, segmentation=masks.frPyObjects(
        rle(blob()), H, W))
    compressed["segmentation"]["counts"] = compressed["segmentation"]["counts"].decode()
    val = opened(tmp_path, annotations=[*ANNOTATIONS, compressed])
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
    val = opened(tmp_path)
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
        for counts in (ours["counts"][:-1], ours["counts"] + "P"):
            with pytest.raises(Broken, match="do not add up"):
                check_segmentation(ours | {"counts": counts}, (31, 17))
    runs = {"size": [31, 17], "counts": [400, 50, 43, 34]}
    counts = masks.frPyObjects(runs, 31, 17)["counts"].decode()
    assert counts[-1] == "@" and check_segmentation(runs | {"counts": counts}, (31, 17))
    with pytest.raises(Broken, match="do not add up"):  # the same five bits
        check_segmentation(runs | {"counts": counts[:-1] + "\0"}, (31, 17))


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
    val = opened(tmp_path)
    for name in ("pycocotools", "pycocotools.mask", "faster_coco_eval", "faster_coco_eval.core",
                 "faster_coco_eval.core.mask"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        val[0]
    assert "masks" not in val.without_masks()[0][1] and val.has_masks


def test_measured_by_the_tool_it_equals_the_file(tmp_path, masks):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    val, rng = opened(tmp_path), numpy.random.default_rng(0)
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
    val = opened(tmp_path, annotations=[plain[0] | {"segmentation": []}, *plain[1:]])
    assert not val.has_masks and "masks" not in val[0][1]
    assert len(val.left_out) == 1 and not open_val(str(tmp_path)).left_out
    assert val[0][1]["area"].tolist() == [20.5 * 15, 50 * 18, 20 * 15]
    assert "segmentation" not in val.as_coco()["annotations"][0]


def test_an_area_that_the_file_lacks_is_the_masks(tmp_path, masks):
    val = opened(tmp_path, annotations=[ANNOTATIONS[2] | {"area": None}, ANNOTATIONS[3]])
    assert val.target(0)["area"].tolist() == [blob().sum()] and val.target(1)["area"] == 280
    assert val.without_masks().target(0)["area"].tolist() == [20 * 15]
    val = opened(tmp_path, annotations=[ANNOTATIONS[3] | {"area": 10 ** 400}])
    assert val.target(1)["area"].tolist() == [blob().sum()]


def test_an_object_with_a_broken_mask_is_there_without_masks(tmp_path, masks):
    boxes = [[1, 1, 5, 5], [2, 2, 6, 6], [3, 3, 7, 7]]
    broken = [annotation(k, 12, 3, box, [[1, 1, 5, 5]]) for k, box in enumerate(boxes)]
    val = opened(tmp_path, annotations=[broken[0], ANNOTATIONS[0], broken[1], ANNOTATIONS[1],
                                        broken[2]])
    whole = open_val(str(tmp_path), "train2017").target(0)
    assert val.has_masks and len(val.left_out) == 3
    for name, x in val.target(0).items():
        assert name == "image_id" or torch.equal(x, whole[name][:2])
    assert val.without_masks().target(0)["boxes"][::2].tolist() == [
        [x, y, x + w, y + h] for x, y, w, h in boxes]
    assert len(val.as_coco()["annotations"]) == 2


@pytest.mark.parametrize("given, has_masks, said", [
    ([], True, []),
    ([ANNOTATIONS[0], ANNOTATIONS[3] | {"segmentation": []},
      annotation(4, 40, 3, [1, 1, 9, 9], [])],
     False, ["annotation 1 has no mask: all count as boxes"]),
    ([ANNOTATIONS[3] | {"segmentation": None}], False, ["annotation 1 has no mask"]),
    ([ANNOTATIONS[0], annotation(6, 12, 3, [9, 9, 0, 0], None)], True, ["annotation 6: its box"])],
    ids=["no object", "one lacks", "all lack", "one that is broken lacks"])
def test_a_set_has_masks_unless_an_object_lacks_one(tmp_path, given, has_masks, said):
    val = opened(tmp_path, annotations=given)           # train has masks
    path = tmp_path / "annotations" / "instances_val2017.json"
    assert val.has_masks == has_masks and len(val.left_out) == len(said)
    assert all(line.startswith(f"{path}: {words}") for line, words in zip(val.left_out, said))


def test_other_folder_names(tmp_path):
    for split in ("images/a", "images/b"):
        path = write_coco(tmp_path / "x", split.split("/")[1])
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "x" / path.stem[-1]).rename(tmp_path / split)
    val = open_detection(str(tmp_path), "images/a", "images/b",
                         "x/annotations/instances_{split}.json")
    assert [len(part) for part in val] == [3, 3]


def test_one_folder_of_images_with_a_file_of_each_part(tmp_path, masks):
    for part in ("train", "val"):
        write_coco(tmp_path, "images", ANNOTATIONS[:2] if part == "val" else ANNOTATIONS).rename(
            tmp_path / f"{part}.json")
    files = "train.json, val.json"
    train, val = open_detection(str(tmp_path), "images", "images", files)
    alone = [open_val(str(tmp_path), "images", names) for names in (files, "val.json")]
    assert [len(part.target(0)["boxes"]) for part in (train, val, *alone)] == [3, 2, 2, 2]


def test_val_is_opened_alone(tmp_path):
    coco, voc = tmp_path / "coco", tmp_path / "voc"
    write_coco(coco)
    write_voc(voc)
    (voc / "ImageSets/Main/train.txt").unlink()
    assert open_val(str(coco)).category_ids == [3, 7, 90] and len(open_val("")) == 300
    assert open_val(str(voc)).classes == ["person"]
    known = open_val(str(voc), classes=["cat", "person"])
    assert known.classes == ["cat", "person"] and known.target(0)["labels"].tolist() == [2]
    with pytest.raises(ValueError, match="val.txt has objects of an unknown class: person"):
        open_val(str(voc), classes=["cat"])


def test_a_digest_is_of_the_content(tmp_path):
    def of(name, annotations=ANNOTATIONS, **more):
        write_coco(tmp_path / name, annotations=annotations, **more)
        return open_val(str(tmp_path / name))
    val, moved = of("a"), of("b")
    assert val.digest() == moved.digest() and len(val.digest()) == 16
    *first, changed, last = ANNOTATIONS                 # the last of its image
    others = [of("c", [*first, changed | change, last]) for change in (
        {"bbox": [4, 3, 20, 15]}, {"category_id": 7}, {"iscrowd": 0}, {"area": 3}, {"image_id": 40},
        {"segmentation": [[4, 3, 24, 3, 24, 18]]})]
    others += [val, val.without_masks(), val.subset([0, 1]), val.subset([1, 0]), of("d", images=[
        {"id": number, "file_name": f"{number:012}.png", "height": H, "width": W + (number == 8)}
        for number in (12, 40, 8)])]
    others += [Scenes(DemoScenes(*about)) for about in (
        ("train", 9), ("val", 9), ("val", 8), ("val", 9, 1), ("val", 9, 0, 48))]
    digests = [scenes.digest() for scenes in [*others, others[-1].without_masks()]]
    assert len({*digests}) == len(digests)
    boxes = val.without_masks()
    assert val.subset([0, 2]).without_masks().digest() == boxes.subset([0, 2]).digest()


def test_an_image_that_cannot_be_read_raises_a_fault(tmp_path):
    val = opened(tmp_path).without_masks()
    file = tmp_path / "val2017" / val.name(0)
    file.write_bytes(file.read_bytes()[:60])
    Image.new("RGB", (W, H + 1)).save(tmp_path / "val2017" / val.name(1))
    causes = []
    for i in range(2):
        with pytest.raises(Exception) as error:
            val[i]
        causes.append(fault_of(error.value, val.name(i)))
    assert causes[0].name == "000000000012.png" and causes[0].cause in ("truncated", "damaged")
    assert causes[1][1:3] == ("other size", "60 x 41 pixels, its annotation says 60 x 40")
    assert len(val.target(0)["boxes"]) == 3             # they can be measured all the same


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
