"""evaluation/detect.py: input, recipes, training, resuming, and the command line."""
import functools
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.ops import masks_to_boxes

import evaluate
from data.detection import Scenes
from data.scenes import DemoScenes
from data.stream import Positions, Stream
from evaluation import supervised
from evaluation.coco import detect, measure
from evaluation.detect import SEER, change_recipe, choose_recipe, collate, fit, prepare
from evaluation.detector import Detector
from evaluation.supervised import save
from methods.build import build_trunk
from multicrop import BadImage
from tests.evaluation.conftest import RANDOM
from tests.helpers import run_ranks
from weights.atomic import load

needs_tool = pytest.mark.skipif(importlib.util.find_spec("faster_coco_eval") is None,
                                reason="pip install faster-coco-eval")
TINY = SEER._replace(steps=4, batch_size=2, times=2, sides=(48,), longest=80, width=16, anchor=4,
                     proposals=32, samples=16)


def write_scenes(folder, **counts):
    """The built-in scenes in COCO's layout, 48 pixels."""
    (folder / "annotations").mkdir(parents=True)
    for split, count in counts.items():
        scenes = Scenes(DemoScenes(split, count, size=48))
        (folder / split).mkdir()
        for i in range(count):
            image = scenes[i][0].permute(1, 2, 0).numpy()
            Image.fromarray(image).save(folder / split / scenes.name(i))
        (folder / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(scenes.as_coco()))
    return folder


def options(folder, out, *more):
    return ["--data", folder, "--out", out, "--train=train", "--val=val", "--workers=0",
            "--device=cpu", "--precision=fp32", "--batch-size=2", *more]


def tiny(recipe=TINY, masks=True, seed=0):
    torch.manual_seed(seed)
    return Detector(build_trunk("regnety_100mf"), 12, masks, **recipe.of_detector)


class Damaged(DemoScenes):
    """Images whose number is in `broken` cannot be read."""
    broken = ()

    def scene(self, i, masks=True):
        if i in self.broken:
            raise ValueError("cut short")
        return super().scene(i, masks)

    def target(self, i, masks=True):
        return super().scene(i, masks)[1]


def damaged(split, count, broken):
    source = Damaged(split, count, size=48)
    source.broken = broken
    return Scenes(source)


def test_seers_schedule():
    rates = [SEER.lr_at(step) for step in (0, 49, 99, 59_999, 60_000, 79_999, 80_000, 89_999)]
    assert rates == pytest.approx([0.0002, 0.01, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002])
    assert SEER._replace(batch_size=8).lr_at(99) == pytest.approx(0.01)
    assert (SEER.sides[0], SEER.sides[-1], len(SEER.sides)) == (640, 800, 6)


def test_the_recipe_for_small_sets():
    assert choose_recipe(118_287, 480) == SEER
    scenes, few, photos = choose_recipe(2000, 160), choose_recipe(20, 160), choose_recipe(800, 375)
    assert (scenes.steps, few.steps, photos.steps) == (750, 500, 500)
    assert (scenes.width, scenes.anchor, scenes.sides, scenes.lr) == (64, 4, (160,), 0.08)
    assert (photos.width, photos.anchor, photos.sides, photos.lr) == (256, 8, (375,), 0.04)


def test_flags_change_the_recipe():
    def changed(*flags, count=1000):
        parsed = evaluate.parse(["detect", *RANDOM, *flags])
        return change_recipe(SEER, parsed, count)

    assert changed() == SEER
    recipe = changed("--epochs=4", "--batch-size=8", "--lr=0.1", "--size=480")
    assert (recipe.steps, recipe.batch_size, recipe.lr) == (500, 8, 0.1)
    assert (recipe.sides, recipe.longest) == ((480,), 800)
    assert (changed("--steps=3").steps, changed("--steps=3").times) == (3, 3)
    few = SEER._replace(times=4)
    assert [change_recipe(few, evaluate.parse(["detect", *RANDOM, f"--steps={steps}"]), 9).times
            for steps in (1000, 5000, 90_000)] == [4, 10, 20]


def test_flips_move_boxes_and_masks_alike():
    scene, seen = Scenes(DemoScenes(size=64))[3], set()
    scene[1]["iscrowd"][0] = 1
    for seed in range(8):
        image, target, _ = prepare(scene, seed, 0, longest=107)
        flipped = not torch.equal(image, scene[0])
        seen.add(flipped)
        assert torch.equal(image, scene[0].flip(2) if flipped else scene[0])
        masks, boxes = target["masks"], target["boxes"]
        assert torch.equal(masks, scene[1]["masks"][1:].flip(2 if flipped else ()))
        assert torch.equal(boxes, masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1]))
        assert torch.equal(target["labels"], scene[1]["labels"][1:])        # without the crowd
    assert seen == {True, False}


class Narrow(DemoScenes):
    """Images of one row of pixels."""

    def scene(self, i, masks=True):
        image, target = super().scene(i, masks)
        return image[:, :1].repeat(1, 1, 2), target


def test_an_image_too_narrow_to_be_resized_is_left_out(capsys):
    scenes = Scenes(Narrow("val", 2, size=48))
    with pytest.raises(BadImage, match="too narrow"):
        prepare(scenes[0], 0, 0, longest=100)
    assert list(detect(tiny(), scenes, range(2), "cpu")) == []
    assert "left out: val-000001.png: too narrow, 96 x 1 pixels" in capsys.readouterr().err


@needs_tool
def test_broken_images_are_counted(tmp_path):
    """Of training ones the names; of val the number, and AP is of the others."""
    train, val = damaged("train", 6, {1, 4}), damaged("val", 5, {2})
    training = fit(tiny(), train, val, TINY._replace(steps=6), tmp_path)
    assert training.faults == ["train-000001.png: damaged", "train-000004.png: damaged"]
    assert training.counted == 4
    rows = json.loads((tmp_path / "predictions-bbox.json").read_text())
    assert {row["image_id"] for row in rows} <= {1, 2, 4, 5}
    metrics, counted = measure(training.model, val.subset([0, 1, 3, 4]), "cpu")
    assert (metrics, counted) == (training.metrics, 4)
    with pytest.raises(ValueError, match="no image of val"):
        measure(training.model, val.subset([2]), "cpu")


@needs_tool
def test_detect(tmp_path, command, refused):
    """The command line, with boxes alone."""
    folder = write_scenes(tmp_path / "scenes", train=3, val=1)
    result = command("detect", *RANDOM, *options(folder, tmp_path / "out", "--steps=1"),
                     "--boxes-only")
    assert (result["train"], result["val"], result["recipe"]["steps"]) == (3, 1, 1)
    assert result["box"].keys() == {"AP", "AP50", "AP75", "small", "medium", "large"}
    assert "mask" not in result and "rcnn" not in "".join(load(tmp_path / "out" / "best.pt"))
    trained = ["detect", tmp_path / "out", "--data", folder, "--val=val", "--workers=0",
               "--device=cpu"]
    again = command(*trained, "--out", tmp_path / "again")      # its data have masks, it has none
    assert again["box"] == result["box"] and "mask" not in again
    assert json.loads((tmp_path / "again" / "predictions-bbox.json").read_text()) == json.loads(
        (tmp_path / "out" / "predictions-bbox.json").read_text())
    assert "is there already" in refused(*map(str, trained), f"--out={tmp_path / 'again'}")
    assert "--steps is of training" in refused(*map(str, trained), "--steps=3")


@needs_tool
@pytest.mark.long
def test_train_measure_and_show(tmp_path, command, refused):
    """On a set in COCO's layout; what is trained is measured again, and shown."""
    folder = write_scenes(tmp_path / "scenes", train=4, val=3)
    (folder / "val" / "val-000002.png").write_bytes(b"no")
    result = command("detect", *RANDOM, *options(folder, tmp_path / "out", "--steps=2"),
                     f"--sheet={tmp_path / 'sheet.png'}")
    assert (result["train"], result["val"], result["left_out"]) == (4, 2, 1)
    assert (result["size"], result["recipe"]["steps"]) == (48, 2)
    assert result["box"].keys() == result["mask"].keys() and "AP50" in result["box"]
    assert (tmp_path / "sheet.png").exists()
    for name in ("best", "last"):
        again = command("detect", tmp_path / "out" / f"{name}.pt", "--data", folder, "--val=val",
                        "--workers=0", "--device=cpu")
        assert [again[kind] for kind in ("box", "mask")] == [result["box"], result["mask"]]
    show = ("detect", tmp_path / "out", "--data", folder / "val", "--workers=0", "--device=cpu",
            f"--show={tmp_path / 'found'}")
    shown = command(*show)
    assert (shown["pictures"], shown["left_out"]) == (2, 1)
    rows = json.loads((tmp_path / "found" / "detections.json").read_text())
    assert len(rows) == shown["detections"] > 0
    assert {"file_name", "category", "bbox", "score", "segmentation"} <= rows[0].keys()
    assert (tmp_path / "found" / "000001-val-000001.png").exists()
    assert "is there already" in refused(*map(str, show))
    assert "holds no detector" in refused("detect", *RANDOM, *map(str, show[2:]))


@needs_tool
@pytest.mark.long
def test_what_goes_on_ends_as_the_whole(tmp_path, monkeypatch):
    """Killed after its first checkpoint; then with activation checkpointing. Boxes alone, some of
    the labels, broken images."""
    train = damaged("train", 12, {3}).share("0.5").without_masks()
    val = damaged("val", 4, {1}).without_masks()

    def run(out, **more):
        return fit(tiny(masks=False), train, val, TINY._replace(steps=6), tmp_path / out, **more)

    def save_once(path, state):
        save(path, state)
        if path.name == "checkpoint.pt":
            raise KeyboardInterrupt

    whole = run("whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised, "save", save_once)
        run("parts")
    assert load(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    parts = run("parts", checkpoint_activations=True)
    assert (parts.metrics, parts.best, parts.faults) == (whole.metrics, whole.best, whole.faults)
    for name in ("last.pt", "best.pt"):
        tensors, expected = load(tmp_path / "parts" / name), load(tmp_path / "whole" / name)
        assert all(torch.equal(tensors[key], x) for key, x in expected.items())
    again = run("parts")                                # finished: no step is left
    assert (again.metrics, again.step) == (whole.metrics, 6)
    with pytest.raises(ValueError, match="holds another run"):
        fit(tiny(masks=False), train, val, TINY._replace(steps=7), tmp_path / "parts")
    with pytest.raises(ValueError, match="holds another run"):
        fit(tiny(masks=False), train.subset([0, 1, 2, 3, 5, 4]), val, TINY._replace(steps=6),
            tmp_path / "parts")


def test_the_order_is_that_of_positions():
    """The same images for a step, whatever the ranks and workers: by position alone."""
    train = Scenes(DemoScenes(count=10, size=48))
    stream = Stream(train, functools.partial(prepare, longest=80), seed=3)
    joined = [collate([stream[p] for p in positions]) for positions in Positions(0, 3, 4)]
    halves = [[collate([stream[p] for p in positions]) for positions in Positions(0, 3, 4, rank, 2)]
              for rank in (0, 1)]
    for whole, first, second in zip(joined, *halves):
        images = first[0] + second[0]
        assert all(map(torch.equal, whole[0], images)) and len(images) == 4
        assert whole[2] == first[2] + second[2] and len({*whole[2]}) == 4


def measured(rank, out):
    """Five images, of which one cannot be read."""
    return measure(tiny(), damaged("val", 5, {1}), "cpu", out=Path(out))


@needs_tool
@pytest.mark.long
def test_two_ranks_measure_as_one(tmp_path):
    for out in ("one", "two"):
        (tmp_path / out).mkdir()
    alone = measured(0, tmp_path / "one")
    assert run_ranks(measured, tmp_path, str(tmp_path / "two")) == [alone, alone]
    for name in ("bbox", "segm"):
        one, two = (json.loads((tmp_path / out / f"predictions-{name}.json").read_text())
                    for out in ("one", "two"))
        assert one == two and len({row["image_id"] for row in one}) == 4


@needs_tool
@pytest.mark.measured
def test_eight_images_are_learned(tmp_path):
    """On the images that it was trained with. Their true masks, through torchvision's 28 x 28
    pixels, have an AP of 70, so AP50 is looked at."""
    few = Scenes(DemoScenes(count=8))
    recipe = choose_recipe(8, 160)._replace(steps=400, times=1)
    training = fit(tiny(recipe), few, few, recipe, tmp_path)
    assert training.metrics["box"]["AP"] > 90 and training.metrics["mask"]["AP50"] > 90
