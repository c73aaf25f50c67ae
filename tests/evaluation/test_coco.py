"""evaluation/coco.py against a closed form, and one tool against the other."""
import sys

import pytest
import torch

from data.detection import Scenes
from data.scenes import DemoScenes
from evaluation.coco import as_results, average_precision


@pytest.fixture(params=["faster_coco_eval", "pycocotools"])
def tool(request, monkeypatch):
    """Only one of both tools can be imported."""
    pytest.importorskip(request.param)
    other, = {"faster_coco_eval", "pycocotools"} - {request.param}
    for name in (other, *(name for name in sys.modules if name.startswith(f"{other}."))):
        monkeypatch.setitem(sys.modules, name, None)
    return request.param


def test_one_of_two_objects_found(tool):
    """With IoU 0.62 it counts at 0.5, 0.55 and 0.6, and to recall 0.5: at 51 of 101 places."""
    truth = {"images": [{"id": 7, "height": 300, "width": 300}],
             "categories": [{"id": 3, "name": "ring"}],
             "annotations": [{"id": 1 + i, "image_id": 7, "category_id": 3, "iscrowd": 0,
                              "bbox": [100 * i, 0, 100, 20 + 80 * i], "area": area}
                             for i, area in enumerate((2000, 10_000))]}
    found = {"boxes": torch.tensor([[100., 0, 162, 100]]), "labels": torch.tensor([2]),
             "scores": torch.tensor([0.9])}
    results = as_results(found, 7, [1, 3])["bbox"]
    assert results == [{"image_id": 7, "category_id": 3, "bbox": [100, 0, 62, 100], "score": 0.9}]
    half = round(100 * 51 / 101, 2)
    assert average_precision(truth, results, "bbox") == {
        "AP": round(0.3 * 100 * 51 / 101, 2), "AP50": half, "AP75": 0, "small": None, "medium": 0,
        "large": 30.0}
    assert average_precision(truth, results, "bbox", (3000, 20_000)) == {
        "AP": round(0.3 * 100 * 51 / 101, 2), "AP50": half, "AP75": 0, "small": 0, "medium": 30.0,
        "large": None}
    assert average_precision(truth, [], "bbox")["AP"] == 0


def found_in(scenes, shift):
    """The objects themselves, moved, all but each third, as results."""
    results = {"bbox": [], "segm": []}
    for i in range(len(scenes)):
        target = scenes.target(i)
        kept = torch.arange(len(target["labels"])) % 3 > (0 if shift else -1)
        found = {"boxes": target["boxes"][kept] + shift, "labels": target["labels"][kept],
                 "masks": target["masks"][kept][:, None].roll(shift, 3).float(),
                 "scores": torch.linspace(0.9, 0.3, len(kept))[kept]}
        for kind, rows in as_results(found, target["image_id"], scenes.category_ids).items():
            results[kind] += rows
    return results


def test_what_is_there_has_100_per_cent(tool):
    scenes = Scenes(DemoScenes("val", count=12))
    for kind, rows in found_in(scenes, 0).items():
        got = average_precision(scenes.as_coco(), rows, kind, scenes.area_limits)
        assert set(got.values()) == {100.0}, kind


def test_both_tools_measure_the_same(monkeypatch):
    pytest.importorskip("faster_coco_eval")
    pytest.importorskip("pycocotools")
    scenes = Scenes(DemoScenes("val", count=12))
    for kind, rows in found_in(scenes, 1).items():
        by_faster = average_precision(scenes.as_coco(), rows, kind, scenes.area_limits)
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "faster_coco_eval", None)
            assert average_precision(scenes.as_coco(), rows, kind,
                                     scenes.area_limits) == by_faster
        assert 0 < by_faster["small"] < by_faster["large"] < 95


def test_a_missing_tool_is_asked_for(monkeypatch):
    for name in ("faster_coco_eval", "pycocotools.coco", "pycocotools"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install faster-coco-eval"):
        average_precision({}, [], "bbox")
