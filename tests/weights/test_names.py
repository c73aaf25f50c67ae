"""weights/names.py: each library's layout against its stored outputs, in and out."""
import json
from dataclasses import replace

import pytest
import torch
import torchvision

from evaluation.task import load_trunk
from methods.build import build_method
from recipes.command_line import configure
from regnet import ARCHS, RegNet
from tests.helpers import ORACLES, equal
from tests.oracles.make_layouts import fill, images
from weights.__main__ import write
from weights.files import read
from weights.load import arch_of, load_weights
from weights.names import TARGETS, from_ours, translate

TINY = torch.load(ORACLES / "regnet_tiny.pt", weights_only=True)
OTHERS = json.loads((ORACLES / "layouts.json").read_text())
SCHEMES = ["torchvision", "timm", "classy", "pycls", "vissl", "vissl_fsdp"]


@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_gives_the_stored_features(put, tiny, kind, scheme):
    case, trunk = TINY[kind], tiny(kind)
    loaded = load_weights(trunk, put(case[scheme]))
    assert loaded.layout == scheme.removesuffix("_fsdp")
    assert loaded.unused == (("head", "prototypes") if "vissl" in scheme else
                             () if scheme == "classy" else ("fc",))
    with torch.no_grad():
        maps = trunk.double().forward_stages(case["input"].double())
        features = trunk(case["input"].double())
    for output, expected in zip(maps, case["stage_outputs"]):
        torch.testing.assert_close(output.float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.float(), case["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
@pytest.mark.parametrize("scheme", ["vissl", "vissl_fsdp"])
def test_head_and_prototypes_load_into_swav(put, tiny_swav, kind, scheme):
    case, model = TINY[kind], tiny_swav(kind)
    loaded = load_weights(model, put(case[scheme]))
    assert loaded.unused == loaded.untouched == ()
    with torch.no_grad():
        embeddings, scores = model([case["input"]])
    torch.testing.assert_close(embeddings, case["embedding"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, case["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", OTHERS, ids=lambda entry: entry["made_by"])
def test_full_networks_of_other_libraries(put, entry):
    """timm's and transformers' own outputs under random weights (tests/oracles/make_layouts.py)."""
    arch = entry["made_by"].rpartition(" ")[2]
    loaded = read(put(fill(entry["shapes"])))
    rounding = "torchvision" if "_tv" in entry["made_by"] else "pycls"
    assert arch_of(loaded.tensors) == (arch, rounding)
    trunk = RegNet(replace(ARCHS[arch], rounding=rounding)).double().eval()
    load_weights(trunk, loaded)
    with torch.no_grad():
        features = trunk(images().double())
    torch.testing.assert_close(features, torch.tensor(entry["features"]).double(),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["regnet_y_400mf", *(
    pytest.param(name, marks=pytest.mark.long)
    for name in ("regnet_x_400mf", "regnet_y_800mf", "resnet50"))])
def test_full_networks_of_torchvision(put, name):
    theirs = getattr(torchvision.models, name)().eval()
    trunk, *_ = load_trunk(str(put(theirs.state_dict())))
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(trunk(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_swavs_own_resnet50(put):
    """Keys and shapes of its file; prototypes are brought to unit norm."""
    keys = json.loads((ORACLES / "resnet50_swav_keys.json").read_text())["keys"]
    state = {entry["key"]: torch.randn(entry["shape"]).to(
        getattr(torch, entry["dtype"].removeprefix("torch."))) for entry in keys}
    model = build_method(configure({"recipe": "swav"}))
    loaded = load_weights(model, put(state))
    assert loaded.unused == loaded.untouched == () and len(loaded.tensors) == len(keys)
    for ours, theirs in (("trunk.conv1.weight", "module.conv1.weight"),
                         ("trunk.layer4.2.bn3.running_var", "module.layer4.2.bn3.running_var"),
                         ("head.1.running_mean", "module.projection_head.1.running_mean"),
                         ("head.3.bias", "module.projection_head.3.bias")):
        assert torch.equal(model.state_dict()[ours], state[theirs])
    expected = torch.nn.functional.normalize(state["module.prototypes.weight"], dim=1)
    torch.testing.assert_close(model.prototypes.weight.detach(), expected)
    again = read(put({"state_dict": state, "epoch": 3}, "wrapped.pt"))
    assert again.layout == loaded.layout and equal(again.tensors, loaded.tensors)


@pytest.mark.parametrize("wrap", [
    *(lambda key, prefix=prefix: prefix + key for prefix in (
        "module.", "_orig_mod.", "module._orig_mod.", "trunk.", "regnet.", "_fsdp_wrapped_module.",
        "_checkpoint_wrapped_module.")),
    lambda key: key.replace(".f.", ".f._checkpoint_wrapped_module.")],
    ids=lambda wrap: wrap("x.f.y"))
def test_what_wrappers_add_is_taken_off(tiny, put, wrap):
    state, trunk = TINY["regnet_y"]["torchvision"], tiny()
    wrapped = {wrap(key): value for key, value in state.items()}
    assert set(wrapped) != set(state)
    load_weights(trunk, put(wrapped))
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, state[name])


def test_a_tensor_that_is_there_twice_is_refused(put, tiny):
    state = dict(TINY["regnet_y"]["torchvision"])
    for twice in ("module.stem.0.weight", "stem.conv.weight"):
        with pytest.raises(ValueError, match="twice|unexpected: stem.conv.weight"):
            load_weights(tiny(), put(state | {twice: torch.zeros(32, 3, 3, 3)}))


def flat(tree):
    """All tensors in nested dicts, by path."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    return {f"{key}/{rest}": tensor for key, value in tree.items()
            if isinstance(value, (dict, torch.Tensor)) for rest, tensor in flat(value).items()}


@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
@pytest.mark.parametrize("layout", ["torchvision", "timm", "classy", "pycls", "vissl"])
def test_what_goes_out_are_the_librarys_own_names(put, kind, layout):
    """The stored file of a library, made again from VISSL's or torchvision's."""
    source = "vissl" if layout == "vissl" else "torchvision"
    made = flat(from_ours(read(put(TINY[kind][source])).tensors, layout))
    stored = {key: value for key, value in flat(TINY[kind][layout]).items()
              if layout != "vissl" or "/model/" in key}
    if layout == "classy":
        assert not any(key.startswith("head") for key in made)
    assert set(made) == set(stored)
    assert all(torch.equal(made[key], value) for key, value in stored.items())


@pytest.mark.parametrize("layout", TARGETS)
@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
def test_round_trips_are_bitwise(tmp_path, put, kind, layout):
    tensors = read(put(TINY[kind]["vissl"])).tensors | {
        name: value for name, value in TINY[kind]["torchvision"].items() if name.startswith("fc.")}
    write(tensors, layout, tmp_path / "out.pt")
    back = read(tmp_path / "out.pt")
    assert back.layout.removesuffix("_x") == layout
    assert all(torch.equal(tensors[name], value) for name, value in back.tensors.items())
    lost = {name.split(".")[0] for name in set(tensors) - set(back.tensors)}
    assert lost == {"vissl": set(), "classy": {"fc", "head", "prototypes"}}.get(
        layout, {"head", "prototypes"})


@pytest.mark.parametrize("layout", ["torchvision", "timm", "vissl"])
def test_a_resnet_goes_out_and_comes_back(tmp_path, layout):
    with torch.device("meta"):
        keys = torchvision.models.resnet50().state_dict()
    tensors = {key: torch.tensor([float(i)]) for i, key in enumerate(keys)}     # only names matter
    write(tensors, layout, tmp_path / "out.pt")
    assert ("fc.weight" in torch.load(tmp_path / "out.pt")) == (layout != "vissl")
    assert equal(read(tmp_path / "out.pt").tensors, tensors)
    with pytest.raises(ValueError, match="no names for a ResNet"):
        write(tensors, "pycls", tmp_path / "out.pt")


def test_a_name_is_translated_or_there_is_none():
    assert translate("s1.b2.conv1.bn", "timm", "torchvision") == (
        "trunk_output.block1.block1-1.f.a.1")
    assert translate("trunk_output.block3.block3-0.f.c.0", "torchvision", "vissl") == (
        "_feature_blocks.res4.block3-0.f.c")
    for name, source, target in (("s1.b2.conv9", "timm", "pycls"), ("fc", "torchvision", "classy"),
                                 ("s1.b2.stem.conv", "timm", "torchvision"),
                                 ("conv1.conv", "timm", "torchvision")):
        assert translate(name, source, target) is None
