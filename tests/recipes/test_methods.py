"""recipes/methods.py: the other methods' published recipes, against the numbers of their papers."""
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.demo import DemoImages
from methods.build import METHODS, build_method, options_of_others
from multicrop import MultiCrop
from recipes.command_line import choose_recipe, configure, explain
from recipes.config import Config, with_length
from recipes.methods import PUBLISHED
from recipes.published import SWAV

IMAGENET = 1_281_167


class Many:
    """A set of a number of images that is not looked into."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def recipe(name: str, world: int = 1) -> Config:
    """For ImageNet."""
    return with_length(configure({"recipe": name}, world, Many(IMAGENET)), IMAGENET)


def test_there_is_one_of_each_method():
    assert {*PUBLISHED} == {*METHODS} - {"swav"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_is_whole_and_has_its_sources(name):
    """It sets what decides a run, by a source, and no option of another method."""
    rule = PUBLISHED[name]
    wanted = {*SWAV["swav"], "method", "solarize", "exclude_bias_bn"} - options_of_others(name)
    assert {*rule} == wanted | {*METHODS[name].options.split()}
    assert all(source for _, source in rule.values())
    config = recipe(name)
    assert (config.method, config.recipe, config.arch) == (name, name, "resnet50")
    assert Config(**config.as_dict()) == config == recipe(name, world=8)


# numbers beside the trunk, counted by hand: weights and biases, gains and offsets of BatchNorm
@pytest.mark.parametrize("name, numbers", [
    ("simclr", 2048 * 2048 + 2048 + 2 * 2048 + 2048 * 128 + 128),
    ("mocov2", 2048 * 2048 + 2048 + 2048 * 128 + 128),
    ("byol", 2048 * 4096 + 256 * 4096 + 2 * (4096 + 2 * 4096 + 4096 * 256)),
    ("barlow_twins", 2048 * 8192 + 2 * 8192 * 8192 + 2 * 2 * 8192),
    ("dino", 2048 * 4096 + 4096 + 2 * 4096 + 4096 * 256 + 256 + 256 * 60_000),
    ("deepcluster_v2", 2048 * 2048 + 2048 + 2 * 2048 + 2048 * 128 + 128),
    ("supervised", 2048 * 1000 + 1000)])
def test_a_recipe_builds_its_method(name, numbers):
    method = build_method(recipe(name), "meta", world=8)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    assert trained - sum(p.numel() for p in method.trunk.parameters()) == numbers


# epochs of ImageNet, images a step, epochs of warm-up, peak and last learning rate: the papers and
# repositories in their own terms
@pytest.mark.parametrize("name, epochs, batch, warmup, peak, last", [
    ("simclr", 1000, 4096, 10, 0.3 * 4096 / 256, 0), ("mocov2", 800, 256, 0, 0.03, 0),
    ("byol", 1000, 4096, 10, 0.2 * 4096 / 256, 0),
    ("barlow_twins", 1000, 2048, 10, 0.2 * 2048 / 256, 0.0016),
    ("dino", 800, 4080, 10, 0.3 * 4080 / 256, 0.0048),
    ("deepcluster_v2", 800, 4096, 10, 4.8, 0.0048), ("supervised", 100, 256, 5, 0.2, 0)])
def test_schedules(name, epochs, batch, warmup, peak, last):
    config = recipe(name)
    assert config.steps == pytest.approx(epochs * (IMAGENET // batch), rel=3e-3)
    assert config.warmup_steps() == pytest.approx(warmup * (IMAGENET // batch), rel=3e-3)
    assert config.peak_lr() == config.lr_at(config.warmup_steps()) == pytest.approx(peak)
    assert config.lr_at(config.steps) == pytest.approx(last, rel=5e-3)


def test_numbers_of_the_papers():
    assert recipe("simclr").steps == 1000 * IMAGENET // 4096 + 1       # as its code counts
    byol, barlow, dino = map(recipe, ("byol", "barlow_twins", "dino"))
    for config in byol, barlow, dino:
        assert config.blur[:2] == (1.0, 0.1) and config.solarize[:2] == (0.0, 0.2)
        assert config.exclude_bias_bn and config.trust_coefficient == 0.001
    assert byol.weight_decay == barlow.weight_decay == 1.5e-6 and byol.target_momentum == 0.996
    assert barlow.lr * barlow.loss_scale == pytest.approx(0.0048)       # the paper's, of biases
    assert len(dino.blur) == len(dino.solarize) == sum(spec.count for spec in dino.crops) == 8
    assert round(dino.teacher_warmup * 800) == 50 and dino.freeze_prototypes == IMAGENET // 4080
    assert dino.crops == ((2, 224, (0.14, 1.0)), (6, 96, (0.05, 0.14)))
    assert (recipe("deepcluster_v2").prototypes, recipe("deepcluster_v2").clusterings) == (3000, 3)
    moco = recipe("mocov2")
    assert moco.trust_coefficient == 0 and not moco.exclude_bias_bn
    assert (moco.queue, moco.target_momentum, moco.temperature) == (65_536, 0.999, 0.2)
    factors = [MultiCrop(moco.crops, moco.strength, jitter=1.0).draw(random.Random(i))
               for i in range(200)]
    assert 0.38 < max(abs(x[1] - 1) for x in factors) <= 0.4            # brightness of 0.4
    assert 0.095 < max(abs(x[4]) for x in factors) <= 0.1               # hue of 0.1


@pytest.mark.parametrize("method", METHODS)
def test_the_demos_peak_learning_rate(method):
    """docs/methods.md: half of SwAV's with a momentum encoder."""
    expected = 2.4 if "target_momentum" in METHODS[method].options else 4.8
    assert configure({"method": method}).peak_lr() == pytest.approx(expected)


class Lazy(Sequence):
    """Crops that are computed when they are asked for, as data.loader's on a device."""

    def __init__(self, crops):
        self.crops, self.asked = crops, []

    def __len__(self):
        return len(self.crops)

    def __getitem__(self, i):
        crops = self.crops[i]                                       # at the end IndexError
        self.asked.append(i)
        return crops


@pytest.mark.parametrize("method", METHODS)
def test_each_crop_is_asked_for_once(method):
    config = configure({"method": method})
    model = build_method(config)
    crops = Lazy([torch.zeros(2 * spec.count, 3, 32, 32) for spec in config.crops])
    with torch.no_grad():
        model(crops)
    assert crops.asked == [*range(len(crops))]


def test_a_rule_follows_the_batch_and_the_processes():
    assert configure({"method": "byol", "batch_size": 512}).peak_lr() == pytest.approx(2.4)
    images = DemoImages("train", 4096)
    for world in (3, 6, 12):                                        # MoCo's queue is whole on each
        config = configure({"method": "mocov2", "recipe": "small"}, world, images)
        assert config.queue % config.batch_size == 0 and 1900 < config.queue <= 2048
    dino = recipe("dino")
    longer = replace(dino, steps=10 * dino.steps, extended_at=dino.steps)
    assert build_method(longer, "meta").warmup == build_method(dino, "meta").warmup > 0


@pytest.mark.parametrize("given, images, name", [
    ({"method": "byol", "arch": "resnet50"}, None, "byol"),
    ({"method": "byol", "data": "many"}, Many(IMAGENET), "byol"),
    ({"method": "dino", "data": "many", "arch": "regnety_4gf"}, Many(IMAGENET), "dino"),
    ({"method": "byol", "data": "few", "arch": "resnet50"}, Many(1000), "small"),
    ({"method": "byol"}, None, "demo"), ({"recipe": "byol", "data": "few"}, Many(1000), "byol")])
def test_the_recipe_follows_from_the_method(given, images, name):
    assert choose_recipe(given, images) == name
    if name in PUBLISHED:
        config = configure(given, 8, images)
        assert (config.method, config.recipe) == (name, name)
        assert config.arch == given.get("arch", "resnet50")


@pytest.mark.parametrize("given, message", [
    ({"recipe": "byol", "method": "dino"}, "--recipe byol is for --method byol, not dino"),
    ({"recipe": "byol", "method": "swav"}, "--recipe byol is for --method byol, not swav"),
    ({"method": "byol", "recipe": "seer"}, "--recipe seer is for --method swav; byol has"),
    ({"method": "byol", "recipe": "byoll"}, "unknown recipe 'byoll'; there is byol"),
    ({"recipe": "byol", "epsilon": 0.03}, "--method byol takes no --epsilon"),
    ({"recipe": "byol", "blur": "x"}, "blur 'x' is not NUMBER"),
    ({"recipe": "byol", "crops": "2x64+4x32"}, "--crops 2x64.*: byol needs .*exactly two"),
    ({"recipe": "dino", "crops": "1x64+4x32"}, "--crops 1x64.*: dino needs .*two of the first")])
def test_what_a_method_cannot_take_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        configure(given)


def test_explain_prints_a_published_recipe(monkeypatch):
    monkeypatch.setattr("recipes.command_line.settle", lambda *_: SimpleNamespace(text="input"))
    lines = explain({"recipe": "byol", "lr": 0.45}, 1, Many(IMAGENET)).splitlines()
    assert lines[0] == "recipe byol for 1,281,167 images" and len(lines) == len(
        PUBLISHED["byol"]) + 2
    assert "  --method byol".ljust(46) + "arXiv 2006.07733" in lines
    assert "  --weight-decay 1.5e-06".ljust(46) + "paper" in lines
    assert "  --lr 0.45".ljust(46) + "given; the recipe has 0.2" in lines
