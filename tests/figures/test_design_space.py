"""regnet.py against pycls' published counts, torchvision's networks and stored feature maps."""
import json
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from regnet import ARCHS, RegNet, RegNetParams, complexity, parse, sample

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY = torch.load(DATA / "regnet_tiny.pt", weights_only=True)
TORCHVISION = [name for name in torchvision.models.list_models() if name.startswith("regnet_")]


def our_name(name):
    """regnet_y_1_6gf -> regnety_1.6gf"""
    family, size = name.removeprefix("regnet_").split("_", 1)
    return f"regnet{family}_{size.replace('_', '.')}"


@pytest.mark.parametrize("entry", json.loads((DATA / "regnet_widths.json").read_text()),
                         ids=lambda e: e.get("name"))
def test_generator_gives_the_stages_of_pycls(entry):
    stages = RegNetParams(*(entry[k] for k in ("depth", "w_0", "w_a", "w_m", "group_width"))).stages()
    assert [s.width for s in stages] == entry["widths"]
    assert [s.depth for s in stages] == entry["depths"]
    assert [s.group_width for s in stages] == entry["group_widths"]


def test_complexity_equals_the_published_counts_to_the_digit():
    entries = json.loads((DATA / "regnet_complexity.json").read_text())
    names = [e["name"].lower().replace("-", "_").replace(".0gf", "gf") for e in entries]
    assert set(ARCHS) == {*names, "regnety_100mf"}
    for name, e in zip(names, entries):
        assert complexity(ARCHS[name]) == (e["params"], e["flops"], e["acts"]), name
        assert complexity(ARCHS[name], num_classes=0).params == e["trunk_params"], name


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_counted_parameters_are_those_of_the_module(name):
    with torch.device("meta"):
        module = RegNet(ARCHS[name])
    assert sum(p.numel() for p in module.parameters()) == complexity(ARCHS[name], num_classes=0).params


@pytest.mark.parametrize("resolution", [96, 160, 225])
def test_activations_and_flops_are_those_of_the_convolutions_run(resolution):
    params = ARCHS["regnety_200mf"]
    net, seen = RegNet(params), [0, 0]

    def count(conv, _, out):
        seen[0] += out.numel()
        per_output = conv.weight[0].numel() + (conv.bias is not None)
        seen[1] += per_output * out.numel()

    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(count)
    net.eval()(torch.zeros(1, 3, resolution, resolution))
    expected = complexity(params, resolution, num_classes=0)
    assert (expected.activations, expected.flops) == tuple(seen)


@pytest.mark.parametrize("name", TORCHVISION)
def test_shapes_and_names_are_torchvisions(name):
    with torch.device("meta"):
        ours = RegNet(replace(ARCHS[our_name(name)], rounding="torchvision"))
    # torchvision's generator cannot run on meta: its big ones are compared by their published counts
    weights = torchvision.models.get_model_weights(name)
    published = next(iter(weights)).meta["num_params"]
    if "swag" in next(iter(weights)).name.lower() or published > 60e6:
        assert complexity(ours.params).params == published
        return
    theirs = getattr(torchvision.models, name)()
    theirs.fc = torch.nn.Identity()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name", ["regnet_x_400mf", "regnet_y_400mf", "regnet_y_800mf"])
@pytest.mark.parametrize("training", [False, True])
def test_outputs_gradients_and_statistics_equal_torchvisions(name, training):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    theirs.fc = torch.nn.Identity()
    ours = RegNet(replace(ARCHS[our_name(name)], rounding="torchvision"))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(2, 3, 96, 96)
    outputs = [net.train(training)(images) for net in (theirs, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-6)
    for out in outputs:
        out.square().mean().backward()
    for (key, theirs_p), ours_p in zip(theirs.named_parameters(), ours.parameters()):
        torch.testing.assert_close(ours_p.grad, theirs_p.grad, rtol=1e-4, atol=1e-5, msg=key)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


@pytest.mark.parametrize("name", ["regnet_y", "regnet_x"])
def test_tiny_networks_give_the_stored_maps_and_features(name):
    case = TINY[name]
    net = RegNet(RegNetParams(**case["params"])).eval()
    net.load_state_dict({k: v for k, v in case["torchvision"].items() if not k.startswith("fc.")})
    with torch.no_grad():       # float64: the stored float32 values are within 1e-5 of it
        images = case["input"].double()
        maps, features = net.double().forward_stages(images), net(images)
    assert len(maps) == len(case["stage_outputs"])
    for ours, expected in zip(maps, case["stage_outputs"]):
        torch.testing.assert_close(ours.float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.float(), case["features"], rtol=1e-5, atol=1e-5)


def test_init_is_he_fan_out_without_dividing_by_groups():
    torch.manual_seed(0)
    for module in RegNet(ARCHS["regnety_1.6gf"]).modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.kernel_size[0] ** 2 * module.out_channels
            std = module.weight.std().item()
            assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.03)
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


def test_ten_billion_parameters_build_on_meta_at_once():
    start = time.perf_counter()
    with torch.device("meta"):
        net = RegNet(ARCHS["regnety_10b"])
    assert time.perf_counter() - start < 2
    assert sum(p.numel() for p in net.parameters()) == 9_323_934_872 and len(net.blocks()) == 27


@pytest.mark.parametrize("wrong", [dict(depth=0), dict(w_0=20), dict(w_0=0), dict(w_a=-1.0),
                                   dict(w_m=1.0), dict(group_width=0), dict(rounding="half up")])
def test_parameters_outside_the_space_are_named(wrong):
    good = dict(depth=8, w_0=24, w_a=24.48, w_m=2.54, group_width=8)
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RegNetParams(**good | wrong)


# -------------------------------------------------------------------------- the space, as a command
def regnet(*argv):
    return subprocess.run([sys.executable, ROOT / "regnet.py", *argv], capture_output=True, text=True)


@pytest.mark.parametrize("flops", [2e8, 4e8, 4e9, 256e9])
@pytest.mark.parametrize("se_ratio", [None, 0.25])
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


def test_a_budget_without_networks_is_refused():
    for flops, sentence in ((1e6, "none of 50 networks"), (0, "is none"), (float("nan"), "is none")):
        with pytest.raises(ValueError, match=sentence):
            sample(flops, random.Random(0), draws=50)


def test_the_command_samples_the_same_networks_again():
    first, again, other = (regnet("sample", "--flops", "200e6", "--count", "4", "--seed", seed).stdout
                           for seed in "001")
    assert first == again != other and len(first.splitlines()) == 5
    name = first.splitlines()[1].split()[0]
    assert complexity(parse(name)).flops <= 200e6
    assert f"depth {name.split(',')[0]}," in regnet("show", name).stdout


def test_the_command_explains_seers_256gf():
    text = regnet("show", "27,640,230.83,2.53,373").stdout
    assert text == regnet("show", "regnety_256gf").stdout
    rows = [line.split() for line in text.splitlines()]
    assert ["9", "2717.47", "1.56", "2", "4096.6", "4096"] in rows
    assert ["3", "17", "4096", "373", "11", "4103"] in rows
    assert "1282.601 M parameters" in text and "254.385 GF" in text


def test_the_command_prints_the_published_networks():
    rows = [line.split() for line in regnet().stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == list(ARCHS)
    for name, widths, depths, groups, params, flops, activations in rows:
        stages = [list(map(int, column.split(","))) for column in (widths, depths, groups)]
        assert list(zip(*stages)) == [tuple(stage) for stage in ARCHS[name].stages()]
        cost = complexity(ARCHS[name])
        assert (params, flops, activations) == (f"{cost.params / 1e6:.3f}", f"{cost.flops / 1e9:.3f}",
                                                f"{cost.activations / 1e6:.2f}")


@pytest.mark.parametrize("argv, sentence", [
    (["show", "27,641,2,1,3"], "breaks w_0 a multiple of 8, w_m 1.001"),
    (["show", "regnety_257gf"], "neither a published network nor five numbers"),
    (["show", "27,640,1e308,2.5,373"], "breaks widths below a million"),
    (["show", "27,640,230.83,inf,373"], "breaks w_m 1.001 to 1000"),
    (["show", "27,640,230.83,2.53,373,0,9"], "neither a published network nor five numbers"),
    (["sample", "--count", "0"], "--count must be at least 1"),
    (["show", "1,2,3"], "neither a published network nor five numbers"),
    (["sample", "--flops", "-1"], "is none")])
def test_what_is_outside_the_space_gets_a_sentence(argv, sentence):
    result = regnet(*argv)
    assert result.returncode == 2 and sentence in result.stderr and "Traceback" not in result.stderr
