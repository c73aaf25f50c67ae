"""figures/design_space.py: random members lie in the space, and the command prints what it has."""
import random
import runpy
import sys

import pytest

from figures.design_space import main, parse, sample
from regnet import ARCHS, complexity


def printed(capsys, *argv):
    main(list(argv))
    return capsys.readouterr().out


@pytest.mark.parametrize("flops, se_ratio", [
    (2e8, None), (4e8, 0.25),
    *(pytest.param(flops, se_ratio, marks=pytest.mark.long) for flops, se_ratio in (
        (2e8, 0.25), (4e8, None), (4e9, None), (4e9, 0.25), (256e9, None), (256e9, 0.25)))])
def test_samples_lie_in_the_space_and_in_the_budget(flops, se_ratio):
    rng, found = random.Random(0), []
    for _ in range(3):
        params = sample(flops, rng, se_ratio)
        cost, scale = complexity(params), max(1, flops / 16e9) ** 0.5
        assert 0.9 * flops <= cost.flops <= flops and params.se_ratio == se_ratio
        assert len(params.stages()) == 4 and 12 <= params.depth <= 28 and 2 <= params.w_m <= 3
        assert 7 <= params.w_0 / scale <= 257 and 7 <= params.w_a / scale <= 257
        assert 5 <= params.group_width / scale <= 182               # the nearest power of two
        assert cost.params <= 3e6 + 5.5e-3 * flops
        assert cost.activations <= 6.5e6 * (flops / 1e9) ** 0.5
        found.append(params)
    assert len(set(found)) == 3 and sample(flops, random.Random(0), se_ratio) == found[0]


@pytest.mark.parametrize("flops, sentence", [
    (1e6, "none of 50 networks"), (0, "is none"), (float("nan"), "is none")])
def test_a_budget_without_networks_is_refused(flops, sentence):
    with pytest.raises(ValueError, match=sentence):
        sample(flops, random.Random(0), draws=50)


def test_the_command_samples_the_same_networks_again(capsys):
    first, again, other = (
        printed(capsys, "sample", "--flops", "200e6", "--count", "4", "--seed", seed)
        for seed in "001")
    assert first == again != other and len(first.splitlines()) == 5
    name = first.splitlines()[1].split()[0]
    assert complexity(parse(name)).flops <= 200e6
    assert f"depth {name.split(',')[0]}," in printed(capsys, "show", name)


def test_the_command_explains_seers_256gf(capsys):
    text = printed(capsys, "show", "27,640,230.83,2.53,373")
    assert text == printed(capsys, "show", "regnety_256gf")
    rows = [line.split() for line in text.splitlines()]
    assert ["9", "2717.47", "1.56", "2", "4096.6", "4096"] in rows
    assert ["3", "17", "4096", "373", "11", "4103"] in rows
    assert "1282.601 M parameters" in text and "254.385 GF" in text


def test_the_command_prints_the_published_networks(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["design_space.py"])            # python -m figures.design_space
    monkeypatch.delitem(sys.modules, "figures.design_space")        # or runpy warns of it
    runpy.run_module("figures.design_space", run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(ARCHS)
    for name, widths, depths, groups, params, flops, activations in rows:
        stages = [list(map(int, column.split(","))) for column in (widths, depths, groups)]
        assert list(zip(*stages)) == [tuple(stage) for stage in ARCHS[name].stages()]
        cost = complexity(ARCHS[name])
        assert (params, flops, activations) == (
            f"{cost.params / 1e6:.3f}", f"{cost.flops / 1e9:.3f}", f"{cost.activations / 1e6:.2f}")


@pytest.mark.parametrize("argv, sentence", [
    (["show", "27,641,2,1,3"], "breaks w_0 a multiple of 8, w_m 1.001"),
    (["show", "regnety_257gf"], "neither a published network nor five numbers"),
    (["show", "27,640,1e308,2.5,373"], "breaks widths below a million"),
    (["show", "27,640,230.83,inf,373"], "breaks w_m 1.001 to 1000"),
    (["show", "27,640,230.83,2.53,373,0,9"], "neither a published network nor five numbers"),
    (["sample", "--count", "0"], "--count: '0': needs a whole number from 1 to 10,000"),
    (["show", "1,2,3"], "neither a published network nor five numbers"),
    (["sample", "--flops", "-1"], "--flops: '-1': needs a number from 1e+06 to 1e+13")])
def test_what_is_outside_the_space_gets_a_sentence(argv, sentence, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    *usage, error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(usage) <= 1
    assert error.startswith("python -m figures.design_space") and sentence in error
