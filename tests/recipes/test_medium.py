"""recipes/medium.py: what lies between SwAV's settings and SEER's, and lengths that suit a set."""
import math

import pytest
import torch

import train
from data.demo import DemoImages
from recipes.command_line import choose_recipe, configure, explain
from recipes.config import with_length
from recipes.input import duration
from recipes.medium import largest_for, length_for, medium, prototypes_for, training_flops
from tests.helpers import refuse
from training import cost, plan
from training.step_time import passes, step_time


class Many:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count


def test_both_ends_are_the_published_settings():
    assert length_for(1_281_167) == 200 * 1_281_167 and length_for(10 ** 9) == 10 ** 9
    assert prototypes_for(1_281_167) == 3000 and 15_500 < prototypes_for(10 ** 9) <= 16_000
    assert largest_for(1_281_167) == 4 and largest_for(10 ** 9) == pytest.approx(256)
    assert length_for(120_000) == 200 * 120_000         # never more than 200 epochs
    between = [length_for(10 ** n) for n in (5, 6, 7, 8, 9, 10)]
    assert between == sorted(between) and between[-1] == 10 ** 9


def test_training_takes_three_forward_passes():
    """Of the trunk, over all crops, against the plan's count on the meta device."""
    config = configure({"arch": "regnety_400mf", "crops": "2x96+3x64"})
    assert training_flops(config.arch, config.crops) == 6 * cost.cost(config).trunk_flops


@pytest.mark.parametrize("count, world", [(1_281_167, 8), *(
    pytest.param(count, world, marks=pytest.mark.long) for world in (1, 3, 8, 64)
    for count in (100_000, 1_281_167, 30_000_000) if (count, world) != (1_281_167, 8))])
def test_the_rule_makes_a_run(count, world):
    config = with_length(configure({"data": "many", "device": "cuda"}, world, Many(count)), count)
    assert config.recipe == "medium" and config.batch_size % world == config.queue % world == 0
    assert 250 <= config.batch_size <= 4096
    assert bool(config.queue) == (config.batch_size <= 512)
    assert config.queue_start + config.freeze_prototypes < config.steps / 5
    assert config.steps == math.ceil(length_for(count) / config.batch_size)
    assert all(reason for _, reason in medium(count, {}, world).values())


@pytest.mark.long
def test_the_network_follows_from_the_processes_and_the_days():
    def arch(count, *rest, **options):
        return medium(count, {}, *rest, **options)["arch"]

    assert arch(1_281_167, 8)[0] == "regnety_4gf"       # as large as suits so many images
    assert arch(100_000_000, 8)[0] == "regnety_32gf"
    assert arch(100_000_000, 1)[0] == "regnety_800mf"   # fewer GPUs, or days
    assert arch(100_000_000, 8, 0.25)[0] == "regnety_800mf"
    name, reason = arch(100_000, 1, cpu=True)
    assert name == "regnety_100mf" and "2 days" in reason
    assert "more than 0.01 days" in arch(100_000, 1, 0.01, cpu=True)[1]
    assert medium(100_000, {"arch": "regnety_16gf"})["arch"][0] == "regnety_16gf"


def test_a_length_follows_a_set_that_is_much_smaller():
    """A network's name alone: not a billion of 4,096 images."""
    images = DemoImages("train")
    config = with_length(configure({"arch": "regnety_256gf"}, 8, images), len(images))
    assert config.recipe == "seer" and config.steps == 400 and config.freeze_prototypes == 20
    assert "not 1,000,000,000, which would be 244,141 epochs" in explain(
        {"arch": "regnety_256gf"}, 8, images)
    for count in (10 ** 8, 10 ** 9):                    # not more than ten times smaller
        config = configure({"arch": "regnety_32gf", "recipe": "seer"}, 8, Many(count))
        assert config.images == 10 ** 9 and config.freeze_prototypes == 313
    asked = configure({"arch": "regnety_256gf", "images": 10 ** 9}, 8, images)
    assert asked.images == 10 ** 9                      # what is asked for is done


@pytest.mark.long
def test_the_time_of_a_run_is_said():
    config = with_length(configure({"arch": "regnety_100mf", "images": 10 ** 9, "micro_batch": 16,
                                    "checkpoint_activations": True}), 10 ** 9)
    step = step_time(cost.cost(config), passes(config), config, 16, True, 512)
    said = plan.expected_time(config, torch.bfloat16, 512)
    assert said == (f"at least {duration(config.steps * step.total)}, as predicted for an H100 a "
                    f"process ({step.utilisation:.0%} of 790 TFLOP/s)")


@pytest.mark.long
def test_medium_needs_a_set(capsys):
    assert "name it (--data)" in refuse(capsys, "--recipe=medium", "--plan")
    assert choose_recipe({"recipe": "medium"}, None) == "medium"
    train.main(["--plan", "--recipe=seer", "--arch=regnety_200mf"])
    assert "1,000," in capsys.readouterr().out
