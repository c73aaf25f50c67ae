"""regnet.py against pycls' published counts, torchvision's networks and stored feature maps."""
import json
import runpy
import time
from dataclasses import replace

import pytest
import torch
import torchvision

from regnet import ARCHS, RegNet, RegNetParams, complexity
from tests.helpers import ORACLES, ROOT

TINY = torch.load(ORACLES / "regnet_tiny.pt", weights_only=True)
TORCHVISION = [name for name in torchvision.models.list_models() if name.startswith("regnet_")]


def our_name(name):
    """regnet_y_1_6gf -> regnety_1.6gf"""
    family, size = name.removeprefix("regnet_").split("_", 1)
    return f"regnet{family}_{size.replace('_', '.')}"


@pytest.mark.parametrize("entry", json.loads((ORACLES / "regnet_widths.json").read_text()),
                         ids=lambda e: e.get("name"))
def test_generator_gives_the_stages_of_pycls(entry):
    numbers = (entry[k] for k in ("depth", "w_0", "w_a", "w_m", "group_width"))
    stages = RegNetParams(*numbers).stages()
    assert [s.width for s in stages] == entry["widths"]
    assert [s.depth for s in stages] == entry["depths"]
    assert [s.group_width for s in stages] == entry["group_widths"]


def test_complexity_equals_the_published_counts_to_the_digit():
    entries = json.loads((ORACLES / "regnet_complexity.json").read_text())
    names = [e["name"].lower().replace("-", "_").replace(".0gf", "gf") for e in entries]
    assert set(ARCHS) == {*names, "regnety_100mf"}
    for name, e in zip(names, entries):
        assert complexity(ARCHS[name]) == (e["params"], e["flops"], e["acts"]), name
        assert complexity(ARCHS[name], num_classes=0).params == e["trunk_params"], name


@pytest.mark.parametrize("name", sorted(ARCHS))
def test_counted_parameters_are_those_of_the_module(name):
    with torch.device("meta"):
        module = RegNet(ARCHS[name])
    counted = complexity(ARCHS[name], num_classes=0).params
    assert sum(p.numel() for p in module.parameters()) == counted


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


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.long) if name.endswith(("_3_2gf", "_8gf", "_16gf"))
    else name for name in TORCHVISION])
def test_shapes_and_names_are_torchvisions(name):
    with torch.device("meta"):
        ours = RegNet(replace(ARCHS[our_name(name)], rounding="torchvision"))
    # torchvision's generator cannot run on meta: its big ones are compared by published counts
    weights = torchvision.models.get_model_weights(name)
    published = next(iter(weights)).meta["num_params"]
    if "swag" in next(iter(weights)).name.lower() or published > 60e6:
        assert complexity(ours.params).params == published
        return
    theirs = getattr(torchvision.models, name)()
    theirs.fc = torch.nn.Identity()
    assert {k: v.shape for k, v in ours.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()}


@pytest.mark.parametrize("name, training", [
    ("regnet_y_400mf", True),
    *(pytest.param(name, training, marks=pytest.mark.long) for name, training in (
        ("regnet_y_400mf", False), ("regnet_x_400mf", False), ("regnet_x_400mf", True),
        ("regnet_y_800mf", False), ("regnet_y_800mf", True)))])
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


def test_what_was_a_command_names_the_new_one():
    with pytest.raises(SystemExit, match="python -m figures.design_space"):
        runpy.run_path(str(ROOT / "regnet.py"), run_name="__main__")
