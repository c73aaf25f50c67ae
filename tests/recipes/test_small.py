"""recipes/small.py: what a survey sees, the rule for every size of set, and what may help."""
import dataclasses

import numpy
import pytest
from PIL import Image

from data.images import open_images
from data.stream import NoReadableImage
from multicrop import decode
from recipes.command_line import configure
from recipes.config import Config
from recipes.small import Survey, remedies, small, survey


def survey_of(count, gray=0.0, short_side=120):
    return Survey(count, short_side, gray, (0.5, 0.4, 0.3), (0.2, 0.2, 0.2))


# ----------------------------------------------------------------------------------- the survey
def test_a_survey_says_what_the_pictures_are_like(tmp_path):
    for i in range(8):
        noise = numpy.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=numpy.uint8)
        noise[..., 0] = noise[..., 0] // 4 + 100
        picture = Image.fromarray(noise)
        (picture if i < 6 else picture.convert("L")).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    found = survey(open_images(tmp_path), decode)
    assert found == survey(open_images(tmp_path), decode)
    assert (found.count, found.gray) == (9, 0.25) and found.short_side in (43, 44)
    pixels = numpy.concatenate([
        numpy.asarray(decode((tmp_path / f"{i}.png").read_bytes())).reshape(-1, 3)
        for i in range(8)]) / 255
    assert numpy.allclose(found.mean, pixels.mean(0), atol=0.01)
    assert numpy.allclose(found.std, pixels.std(0), atol=0.1)     # smaller: images are resized


def test_pictures_of_one_shade_have_a_deviation(tmp_path):
    Image.new("RGB", (30, 30), (200, 10, 200)).save(tmp_path / "0.png")
    assert survey(open_images(tmp_path), decode).std == (0.05, 0.05, 0.05)


def test_a_set_without_a_readable_picture_is_refused(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(NoReadableImage, match="no readable image among 1; broken.png: no p"):
        survey(open_images(tmp_path), decode)


# ------------------------------------------------------------------------------------- the rule
@pytest.mark.parametrize("count", [8, 30, 46, 200, 500, 1_000, 4_000, 20_000, 99_999])
@pytest.mark.parametrize("given", [{}, {"batch_size": 6}, {"prototypes": 1000}], ids=str)
@pytest.mark.parametrize("world", [1, 3])
def test_every_size_of_set_gets_a_recipe_with_reasons(count, given, world):
    rule = small(survey_of(count), given, world)
    assert set(rule) <= {field.name for field in dataclasses.fields(Config)}
    assert all(len(reason) >= 7 for _, reason in rule.values())
    config = Config(**{name: value for name, (value, _) in rule.items()} | given)
    assert config.batch_size % world == config.queue % world == 0
    assert 2 <= config.batch_size <= max(count, 6) and config.batch_size <= 128
    seen = config.steps * config.batch_size
    assert config.steps >= 400 and seen >= min(24.9 * count, 320_000 - config.batch_size)
    assert config.steps == 400 or seen <= 320_000 + config.batch_size
    assert "prototypes" in given or config.prototypes <= max(count / 4, 2)
    assert config.batch_size + config.queue >= config.prototypes / 2
    assert config.peak_lr() == pytest.approx(4.8)
    assert config.mean == (0.5, 0.4, 0.3) and config.std == (0.2, 0.2, 0.2)
    assert Config(**config.as_dict()) == config


@pytest.mark.parametrize("count", [1, 7])
def test_a_handful_of_pictures_is_refused(count):
    with pytest.raises(ValueError, match=f"{count} images? cannot .* at least 8"):
        small(survey_of(count), {})


@pytest.mark.parametrize("count, side, crops, gray, reason", [
    (99_999, 47, "2x64@0.4-1+4x32@0.15-0.4", 0.6, "gray already"),
    (9_999, 48, "2x64@0.25-1+4x32@0.08-0.25", 0.5, "colour tells images apart"),
    (10_000, 48, "2x64+4x32", 0.5, "colour tells images apart")])
def test_number_size_and_colour_of_the_pictures_count(count, side, crops, gray, reason):
    rule = small(survey_of(count, gray, side), {})
    assert rule["crops"][0] == crops and reason in rule["gray"][1]


def test_prototypes_grow_with_the_set_and_no_further():
    assert [small(survey_of(count), {})["prototypes"][0] for count in (
        200, 1_000, 16_383, 16_384, 99_999)] == [32, 128, 128, 256, 256]


def test_a_trunk_that_has_learned_gets_a_quarter_of_the_rate():
    new, learned = (small(survey_of(500), given)["lr"] for given in ({}, {"init": "trunk.pt"}))
    assert learned[0] == new[0] / 4 and "learned already" in learned[1]
    assert [small(survey_of(500), given)["steps"][0] for given in ({}, {"init": "trunk.pt"})] == [
        400, 200]
    byol = small(survey_of(500), {"init": "trunk.pt", "method": "byol"})
    assert byol["lr"][0] == learned[0] and "predictor" in byol
    found = Config(method="byol", init="trunk.pt", **{name: value for name, (value, _) in
                                                      byol.items()})
    assert remedies(found).startswith("nothing that is known")
    config = configure({"data": "photos/", "recipe": "demo", "init": "trunk.pt",
                        "lr": learned[0], "batch_size": 128})
    assert "--lr" not in remedies(config)


def test_a_larger_trunk_gets_half_the_rate():
    new, same, larger, learned = (small(survey_of(500), given)["lr"] for given in (
        {}, {"arch": "regnety_100mf"}, {"arch": "regnety_200mf"},
        {"arch": "regnety_200mf", "init": "trunk.pt"}))
    assert same == new and larger[0] == new[0] / 2 and "half of regnety_100mf's" in larger[1]
    assert learned[0] == new[0] / 4


# ----------------------------------------------------------------------------------- the remedies
def test_remedies_name_what_differs_from_what_helped():
    text = remedies(configure({"recipe": "seer", "arch": "regnety_16gf"}))
    assert text.split(", ") == [
        "--strength 0.2 (now 1)", "--epsilon 0.03 (now 0.05)", "--prototypes 256 (now 16000)",
        "--gray 0 (now 0.2)", "--blur 0 (now 0.5)", "--freeze-prototypes 0 (now 313)"]
    assert "--head-bn" in remedies(configure({"arch": "regnety_256gf"})).split(", ")
    assert remedies(configure({"lr": 1.2})).split(", ") == ["--lr 9.6 (now 1.2)"]
    for method in ("mocov2", "deepcluster_v2"):                     # their numbers follow the set's
        rule = small(survey_of(200), {"method": method})
        config = Config(method=method, **{name: value for name, (value, _) in rule.items()})
        assert remedies(config).startswith("nothing that is known")


def test_a_run_at_the_values_that_helped_is_told_what_is_left():
    rule = {name: value for name, (value, _) in small(survey_of(2_000), {}).items()}
    assert remedies(Config(**rule)).startswith("nothing that is known")
