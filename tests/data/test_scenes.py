"""data/scenes.py: pure functions of their number, and boxes and masks that are what is visible."""
import math
import pickle

import numpy
import pytest
import torch
from PIL import Image, ImageDraw

from data import scenes as module
from data.demo import OUTLINES, PAINT, background
from data.scenes import SIZE, UNIT, DemoScenes, arrange, draw, main
from tests.helpers import equal

TRAIN, VAL = DemoScenes("train"), DemoScenes("val")


def test_scenes_are_pure_functions_of_seed_split_and_number():
    again = pickle.loads(pickle.dumps(DemoScenes("train", count=50)))
    assert len(TRAIN) == 2000 and len(VAL) == 300
    for i in (49, 0, 7):
        assert equal(again[i], TRAIN[i]) and again.name(i) == TRAIN.name(i)
        for other in (VAL, DemoScenes("train", seed=1)):
            assert not torch.equal(TRAIN[i][0], other[i][0])
    with pytest.raises(ValueError, match="no split 'test' .* only train, val"):
        DemoScenes("test")


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=pytest.mark.measured)])
def test_boxes_are_those_of_the_masks_which_share_no_pixel(count):
    for i in range(count):
        image, target = TRAIN[i]
        n = len(target["labels"])
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.uint8 and n
        assert target["image_id"] == i + 1 and not target["iscrowd"].any()
        assert 1 <= target["labels"].min() and target["labels"].max() <= len(OUTLINES)
        assert (target["masks"].sum(0) <= 1).all()
        for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
            x1, y1, x2, y2 = box.int().tolist()
            assert area == mask.sum() == mask[y1:y2, x1:x2].sum() > 0
            assert mask[y1:y2, [x1, x2 - 1]].any(0).all() and mask[[y1, y2 - 1], x1:x2].any(1).all()


def test_a_mask_is_where_its_thing_is_seen(monkeypatch):
    """A black background and things of known colours: what is painted tells what is seen."""
    def black(rng, side, unit):
        assert side / unit == SIZE / 64                  # the demo's images have 64 pixels
        return Image.new("RGB", (side, side))

    monkeypatch.setattr(module, "background", black)
    monkeypatch.setattr(module, "THING", (200, 201))
    for seed in range(8):
        image, target = draw(numpy.random.default_rng(seed), SIZE)
        covered = image[0] >= 100                        # half of 200: half of a pixel's quarters
        assert torch.equal(target["masks"].any(0), covered)


def polygon(z):
    mask = Image.new("1", (2 * SIZE,) * 2)
    ImageDraw.Draw(mask).polygon([(point.real, point.imag) for point in z], fill=1)
    return numpy.asarray(mask)


def test_things_are_arranged_as_by_a_naive_version():
    """One mask a thing, all of them seen anew for each thing that is tried."""
    refused, touching, seeds = 0, 0, 100
    for seed in range(seeds):
        shown, kinds = arrange(numpy.random.default_rng(seed), SIZE)
        rng, placed = numpy.random.default_rng(seed), []
        for _ in range(rng.integers(2, 11)):
            kind, (x, y) = int(rng.integers(12)), rng.random(2) * 2 * SIZE
            radius = 2 * SIZE * 2 ** rng.uniform(-5, -2)
            turned = radius * list(OUTLINES.values())[kind] * numpy.exp(2j * math.pi * rng.random())
            trial = [*placed, (kind, polygon(x + 1j * y + turned), PAINT * radius ** 2)]
            hidden, enough = numpy.zeros_like(shown, bool), True
            for _, mask, area in reversed(trial):
                enough &= (mask & ~hidden).sum() >= 0.4 * area
                hidden |= mask
            placed, refused = (trial, refused) if enough else (placed, refused + 1)
        expected = numpy.zeros_like(shown)
        for k, (_, mask, _) in enumerate(placed, 1):
            expected[mask] = k
        assert kinds == [kind for kind, *_ in placed] and numpy.array_equal(shown, expected)
        touching += ((shown[:, 1:] != shown[:, :-1]) & (shown[:, 1:] * shown[:, :-1] > 0)).any()
    assert refused and seeds / 4 < touching < seeds


def test_small_medium_and_large_ones_of_every_kind():
    areas, labels = [], []
    for i in range(100):
        target = VAL[i][1]
        areas += target["area"].tolist()
        labels += target["labels"].tolist()
    medium, large = VAL.area_limits
    assert (medium, large) == pytest.approx(((SIZE / 15) ** 2, (SIZE / 5) ** 2))
    size = numpy.digitize(areas, [medium, large])
    assert (numpy.bincount(size, minlength=3) > 0.1 * len(areas)).all()
    counts = numpy.bincount(labels, minlength=13)[1:]
    assert counts.min() > 0.5 * counts.mean()


@pytest.mark.long
def test_a_larger_background_has_more_clutter_not_larger():
    def edges(side, unit):
        pixels = numpy.asarray(background(numpy.random.default_rng(0), side, unit), float)
        return numpy.abs(numpy.diff(pixels, axis=1)).mean()

    assert edges(2560, 2 * UNIT) == pytest.approx(edges(1280, 2 * UNIT), rel=0.05)
    assert edges(2560, 4 * UNIT) == pytest.approx(edges(2560, 2 * UNIT) / 2, rel=0.1)


def test_the_sheet(tmp_path, capsys):
    main([str(tmp_path / "sheet.png")])
    page = Image.open(tmp_path / "sheet.png")
    assert page.size == (6 * (SIZE + 2) - 2, 4 * (SIZE + 2) - 2)
    x1, y1, x2, y2 = TRAIN[8][1]["boxes"][0].int().tolist()
    left, top = 2 * (SIZE + 2), SIZE + 2                 # of scene 8: second row, third column
    assert all(page.getpixel((left + x, top + y)) == (255, 255, 255)
               for x, y in ((x1, y1), (x2 - 1, y1), (x1, y2 - 1)))
    for argv, said in ([[str(tmp_path / "sheet.png")], "is there already"], [[], "needs one"]):
        with pytest.raises(SystemExit):
            main(argv)
        assert said in capsys.readouterr().err
