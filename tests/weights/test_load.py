"""weights/load.py: a model takes a file whole or not at all, and faults are named."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision

from evaluation.task import load_trunk
from methods.build import build_method
from recipes.command_line import configure
from regnet import ARCHS, RegNet, RegNetParams
from swav import SwAV
from tests.helpers import ORACLES, ROOT, run, write_pictures
from tests.oracles.make_layouts import fill
from weights.atomic import load
from weights.files import Loaded, state_dict_of
from weights.load import describe, load_weights
from weights.names import to_ours

TINY = torch.load(ORACLES / "regnet_tiny.pt", weights_only=True)
OTHERS = json.loads((ORACLES / "layouts.json").read_text())


@pytest.mark.parametrize("scheme", ["torchvision", "timm", "pycls"])
def test_a_classifier_is_loaded_where_the_model_has_one(put, scheme):
    case = TINY["regnet_y"]
    p = case["params"]
    model = torchvision.models.RegNet(torchvision.models.regnet.BlockParams.from_init_params(
        p["depth"], p["w_0"], p["w_a"], p["w_m"], p["group_width"], se_ratio=p["se_ratio"]),
        num_classes=case["num_classes"]).eval()
    assert load_weights(model, put(case[scheme])).unused == ()
    with torch.no_grad():
        torch.testing.assert_close(model.double()(case["input"].double()).float(), case["logits"],
                                   rtol=1e-4, atol=1e-5)


def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(put, tiny):
    good = TINY["regnet_y"]["torchvision"]
    name = "trunk_output.block2.block2-0.f.a.0.weight"
    for state, sentence in (
            ({k: v for k, v in good.items() if k != name}, f"missing: {name}"),
            (good | {name: torch.zeros(3, 3, 1, 1)}, rf"of another shape: {name} \(3, 3, 1, 1\)"),
            (good | {name: torch.full_like(good[name], torch.nan)}, f"not finite: {name}"),
            (good | {"trunk_output.block9.block9-0.f.a.0.weight": torch.zeros(1)},
             "unexpected: trunk_output.block9"),
            (good | {"mystery.weight": torch.zeros(1)}, "unexpected: mystery.weight")):
        trunk = tiny()
        before = {name: value.clone() for name, value in trunk.state_dict().items()}
        with pytest.raises(ValueError, match=sentence):
            load_weights(trunk, put(state))
        assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize("scheme", [
    "torchvision", "timm", "classy", "pycls", "vissl", "vissl_fsdp"])
def test_each_missing_or_misshapen_tensor_is_named(tmp_path, tiny, scheme):
    """In every scheme, each kind of tensor in turn: the stem's, and those of the first block. In
    each file one is missing, the next has another shape, the one after that another type."""
    raw, trunk = state_dict_of(TINY["regnet_y"][scheme]), tiny()
    names = dict(zip(raw, to_ours(raw)[0]))
    keys = [key for key, name in names.items() if "num_batches" not in name
            and re.match(r"stem|trunk_output\.block1\.block1-0", name)]
    assert len(keys) == 29
    for missing, odd, strange in zip(keys, keys[1:] + keys[:1], keys[2:] + keys[:2]):
        state = raw | {odd: torch.zeros(7),
                       strange: torch.zeros(raw[strange].shape, dtype=torch.int8)}
        del state[missing]
        with pytest.raises(ValueError) as error:
            load_weights(trunk, Loaded(*to_ours(state), tmp_path))
        for sentence in (f"; missing: {names[missing]};",
                         f"; of another shape: {names[odd]} (7,) for {tuple(raw[odd].shape)};",
                         f"; of another type: {names[strange]} torch.int8 for torch.float32"):
            assert sentence in str(error.value)


def test_num_batches_tracked_is_optional(put, tiny):
    state = {k: v for k, v in TINY["regnet_y"]["timm"].items() if "num_batches" not in k}
    load_weights(tiny(), put(state))
    with torch.device("meta"):
        trunk = tiny()
    load_weights(trunk, put(state))
    assert trunk.stem[1].num_batches_tracked == 0


def test_the_arch_that_would_fit_is_named():
    def loaded(params):
        return Loaded(RegNet(params).state_dict(), "torchvision", Path("file.pt"))

    with torch.device("meta"):
        with pytest.raises(ValueError, match="holds regnety_400mf, the model is regnety_200mf"):
            load_weights(RegNet(ARCHS["regnety_200mf"]), loaded(ARCHS["regnety_400mf"]))
        with pytest.raises(ValueError, match="holds regnety_800mf with rounding='torchvision'"):
            load_weights(RegNet(ARCHS["regnety_800mf"]),
                         loaded(replace(ARCHS["regnety_800mf"], rounding="torchvision")))
        classy = RegNet(RegNetParams(27, 640, 124.47, 2.04, 848)).state_dict()
        seer = RegNet(ARCHS["regnety_256gf"]).state_dict()
    assert "ClassyVision's 256GF" in describe(classy)
    assert describe(seer) == "regnety_256gf"


def test_prototypes_of_another_number_stay_as_they_began(put, tiny):
    model = SwAV(tiny(), (48, 48, 32), prototypes=10)
    before = model.prototypes.weight.clone()
    loaded = load_weights(model, put(TINY["regnet_y"]["vissl"]))
    assert loaded.untouched == loaded.unused == ("prototypes",)
    assert "head" in loaded.loaded and torch.equal(model.prototypes.weight, before)
    with torch.device("meta"):
        model = SwAV(tiny(), (48, 48, 32), prototypes=10)
    with pytest.raises(ValueError, match="missing: the whole of prototypes"):
        load_weights(model, put(TINY["regnet_y"]["vissl"]))


def test_a_head_of_other_widths_is_named(put, tiny):
    model = SwAV(tiny(), (48, 40, 32), prototypes=24)
    with pytest.raises(ValueError, match=r"shape: head\.\d\.\w+ .*\(48, 48\) for \(40, 48\)"):
        load_weights(model, put(TINY["regnet_y"]["vissl"]))


def test_a_model_on_the_meta_device_takes_the_files_own_memory(put, tiny, tiny_swav):
    case = TINY["regnet_y"]
    path = put(case["torchvision"])
    with torch.device("meta"):
        trunk, model, empty = tiny(), tiny_swav(), tiny_swav()
    loaded = load_weights(trunk, path)
    for name, parameter in trunk.named_parameters():
        assert parameter.data_ptr() == loaded.tensors[name].data_ptr() and parameter.requires_grad
    with torch.no_grad():
        features = trunk.eval()(case["input"])
    torch.testing.assert_close(features, case["features"], rtol=1e-4, atol=1e-4)
    heads = case["vissl"]["classy_state_dict"]["base_model"]["model"]["heads"]
    loaded = load_weights(model, put(case["vissl"], "vissl.pt"))
    assert torch.equal(model.prototypes.weight, heads["0.prototypes0.weight"])
    assert model.prototypes.weight.data_ptr() == loaded.tensors["prototypes.weight"].data_ptr()
    with torch.no_grad():
        _, scores = model.eval()([case["input"]])
    torch.testing.assert_close(scores, case["scores"], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="missing: the whole of head, the whole of prototypes"):
        load_weights(empty, path)


def test_a_runs_folder_checkpoint_and_trunk(tmp_path):
    out = tmp_path / "run"
    write_pictures(tmp_path / "photos", 8)
    run(tmp_path / "photos", out, "--steps=1")
    state = load(out / "checkpoint.pt")["model"]
    config = replace(configure({"recipe": "demo"}), head="32-16", prototypes=12, seed=5)
    model = build_method(config)
    loaded = load_weights(model, out / "checkpoint.pt")
    assert loaded.config["batch_size"] == 4 and loaded.untouched == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for source in (out, out / "trunk.pt"):
        model = build_method(config)
        before = model.head[0].weight.clone()
        assert load_weights(model, source).untouched == ("head", "prototypes")
        assert torch.equal(model.trunk.state_dict()["stem.0.weight"], state["trunk.stem.0.weight"])
        assert torch.equal(model.head[0].weight, before)


def test_a_file_of_another_library_is_evaluated(put):
    path = put(fill(OTHERS[0]["shapes"]))
    trunk, config, _ = load_trunk(str(path))
    assert config == {} and trunk.num_features == 440 and not trunk.training
    with pytest.raises(ValueError, match="holds regnety_400mf, not regnety_200mf"):
        load_trunk(str(path), "regnety_200mf")
    with pytest.raises(ValueError, match="a RegNetY of widths 10,15,25,50"):
        load_trunk(str(put(TINY["regnet_y"]["timm"])))


def test_a_config_of_another_library_beside_a_file_is_left_alone(tmp_path, put):
    (tmp_path / "config.json").write_text('{"architectures": ["RegNetModel"]}')
    assert load_trunk(str(put(fill(OTHERS[-1]["shapes"]), "pytorch_model.bin")))[1] == {}


@pytest.mark.long
def test_the_room_works_alone(tmp_path, put):
    """weights/ copied into an empty folder: library and command, without the other rooms."""
    shutil.copytree(ROOT / "weights", tmp_path / "weights")
    put(torchvision.models.regnet_y_400mf().state_dict(), "a.pt")
    script = ("import runpy, sys\nfrom torchvision.models import regnet_y_400mf\n"
              "from weights.load import load_weights\n"
              "print(load_weights(regnet_y_400mf(), 'a.pt').layout)\n"
              "for sys.argv[1:] in ([], ['a.pt']):\n"
              "    runpy.run_module('weights', run_name='__main__')\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    first, *listing = result.stdout.splitlines()
    names = [line.split()[0] for line in listing if line]
    assert first == "torchvision" and "seer_regnety_32gf" in names
    assert "a.pt: a RegNetY of widths 48,104,208,440" in result.stdout
