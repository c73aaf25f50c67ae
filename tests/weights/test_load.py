"""weights.py: each library's layout against stored outputs, whole loads or none, files that lie."""
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from data.make_layouts import fill, images
from ranks import run_ranks
from test_alone import ROOT
from test_images import write_pictures

import checkpoint
import evaluate
import train
import weights
from recipes import configure
from regnet import ARCHS, RegNet, RegNetParams
from swav import SwAV
from weights import LICENCES, OFFICIAL, load_weights, read

DATA = Path(__file__).parent / "data"
TINY = torch.load(DATA / "regnet_tiny.pt", weights_only=True)
SCHEMES = ["torchvision", "timm", "classy", "pycls", "vissl", "vissl_fsdp"]
OTHERS = json.loads((DATA / "layouts.json").read_text())


def tiny(kind="regnet_y"):
    torch.manual_seed(1)
    return RegNet(RegNetParams(**TINY[kind]["params"])).eval()


def tiny_swav(kind="regnet_y"):
    return SwAV(tiny(kind), TINY[kind]["head_dims"][1:], TINY[kind]["num_prototypes"]).eval()


def put(tmp_path, content, name="file.pt"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


def flat(tree):
    """All tensors in nested dicts, by path."""
    if isinstance(tree, torch.Tensor):
        return {"": tree}
    return {f"{key}/{rest}": tensor for key, value in tree.items() if isinstance(value, (dict, torch.Tensor))
            for rest, tensor in flat(value).items()}


# ------------------------------------------------------------------------------- what comes in
@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_gives_the_stored_features(tmp_path, kind, scheme):
    case = TINY[kind]
    trunk = tiny(kind)
    loaded = load_weights(trunk, put(tmp_path, case[scheme]))
    assert loaded.layout == scheme.removesuffix("_fsdp")
    assert loaded.unused == (("head", "prototypes") if "vissl" in scheme else
                             () if scheme == "classy" else ("fc",))
    with torch.no_grad():
        maps, features = trunk.double().forward_stages(case["input"].double()), trunk(case["input"].double())
    for mine, expected in zip(maps, case["stage_outputs"]):
        torch.testing.assert_close(mine.float(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features.float(), case["features"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
@pytest.mark.parametrize("scheme", ["vissl", "vissl_fsdp"])
def test_head_and_prototypes_load_into_swav(tmp_path, kind, scheme):
    case, model = TINY[kind], tiny_swav(kind)
    loaded = load_weights(model, put(tmp_path, case[scheme]))
    assert loaded.unused == loaded.untouched == ()
    with torch.no_grad():
        embeddings, scores = model([case["input"]])
    torch.testing.assert_close(embeddings, case["embedding"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores, case["scores"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scheme", ["torchvision", "timm", "pycls"])
def test_a_classifier_is_loaded_where_the_model_has_one(tmp_path, scheme):
    case = TINY["regnet_y"]
    p = case["params"]
    model = torchvision.models.RegNet(torchvision.models.regnet.BlockParams.from_init_params(
        p["depth"], p["w_0"], p["w_a"], p["w_m"], p["group_width"], se_ratio=p["se_ratio"]),
        num_classes=case["num_classes"]).eval()
    assert load_weights(model, put(tmp_path, case[scheme])).unused == ()
    with torch.no_grad():
        torch.testing.assert_close(model.double()(case["input"].double()).float(), case["logits"],
                                   rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("entry", OTHERS, ids=lambda entry: entry["made_by"])
def test_full_networks_of_other_libraries(tmp_path, entry):
    """timm's and transformers' own outputs under random weights (data/make_layouts.py)."""
    arch = entry["made_by"].rpartition(" ")[2]
    loaded = read(put(tmp_path, fill(entry["shapes"])))
    rounding = "torchvision" if "_tv" in entry["made_by"] else "pycls"
    assert weights.arch_of(loaded.tensors) == (arch, rounding)
    trunk = RegNet(replace(ARCHS[arch], rounding=rounding)).double().eval()
    load_weights(trunk, loaded)
    with torch.no_grad():
        features = trunk(images().double())
    torch.testing.assert_close(features, torch.tensor(entry["features"]).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["regnet_x_400mf", "regnet_y_400mf", "regnet_y_800mf", "resnet50"])
def test_full_networks_of_torchvision(tmp_path, name):
    theirs = getattr(torchvision.models, name)().eval()
    trunk, *_ = evaluate.load_trunk(str(put(tmp_path, theirs.state_dict())))
    theirs.fc = torch.nn.Identity()
    with torch.no_grad():
        torch.testing.assert_close(trunk(images()), theirs(images()), rtol=1e-4, atol=1e-5)


def test_swavs_own_resnet50(tmp_path):
    """Keys and shapes of its file; prototypes are brought to unit norm."""
    keys = json.loads((DATA / "resnet50_swav_keys.json").read_text())["keys"]
    state = {entry["key"]: torch.randn(entry["shape"]).to(getattr(torch, entry["dtype"].removeprefix("torch.")))
             for entry in keys}
    for content in (state, {"state_dict": state, "epoch": 3}):
        model = train.fresh_model(configure({"recipe": "swav"}))
        loaded = load_weights(model, put(tmp_path, content))
        assert loaded.unused == loaded.untouched == () and len(loaded.tensors) == len(keys)
        for ours, theirs in (("trunk.conv1.weight", "module.conv1.weight"),
                             ("trunk.layer4.2.bn3.running_var", "module.layer4.2.bn3.running_var"),
                             ("head.1.running_mean", "module.projection_head.1.running_mean"),
                             ("head.3.bias", "module.projection_head.3.bias")):
            assert torch.equal(model.state_dict()[ours], state[theirs])
        expected = torch.nn.functional.normalize(state["module.prototypes.weight"], dim=1)
        torch.testing.assert_close(model.prototypes.weight.detach(), expected)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "trunk.", "regnet.",
                                    "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_what_wrappers_add_is_taken_off(tmp_path, prefix):
    state = TINY["regnet_y"]["torchvision"]
    trunk = tiny()
    load_weights(trunk, put(tmp_path, {prefix + key: value for key, value in state.items()}))
    middle = {key.replace(".f.", ".f._checkpoint_wrapped_module.") for key in state}
    assert middle != set(state)
    again = tiny()
    load_weights(again, put(tmp_path, {key.replace(".f.", ".f._checkpoint_wrapped_module."): value
                                       for key, value in state.items()}))
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, state[name]) and torch.equal(value, again.state_dict()[name])


def test_a_runs_folder_checkpoint_and_trunk(tmp_path):
    out = tmp_path / "run"
    write_pictures(tmp_path / "photos", 8)
    train.main(["--recipe=demo", f"--data={tmp_path / 'photos'}", f"--out={out}", "--steps=1", "--batch-size=4", "--crops=2x32+2x16",
                "--head=32-16", "--prototypes=12", "--workers=0", "--device=cpu", "--log-every=1"])
    state = checkpoint.load(out / "checkpoint.pt")["model"]
    config = replace(configure({"recipe": "demo"}), head="32-16", prototypes=12, seed=5)
    model = train.fresh_model(config)
    loaded = load_weights(model, out / "checkpoint.pt")
    assert loaded.config["batch_size"] == 4 and loaded.untouched == ()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for source in (out, out / "trunk.pt"):
        model = train.fresh_model(config)
        before = model.head[0].weight.clone()
        assert load_weights(model, source).untouched == ("head", "prototypes")
        assert torch.equal(model.trunk.state_dict()["stem.0.weight"], state["trunk.stem.0.weight"])
        assert torch.equal(model.head[0].weight, before)


# -------------------------------------------------------------------------------- what goes out
@pytest.mark.parametrize("layout", ["torchvision", "timm", "pycls", "classy", "vissl", "transformers"])
@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
def test_round_trips_are_bitwise(tmp_path, kind, layout):
    tensors = read(put(tmp_path, TINY[kind]["vissl"])).tensors | {
        name: value for name, value in TINY[kind]["torchvision"].items() if name.startswith("fc.")}
    weights.write(tensors, layout, tmp_path / "out.pt")
    back = read(tmp_path / "out.pt")
    assert back.layout.removesuffix("_x") == layout
    assert all(torch.equal(tensors[name], value) for name, value in back.tensors.items())
    lost = {name.split(".")[0] for name in set(tensors) - set(back.tensors)}
    assert lost == {"vissl": set(), "classy": {"fc", "head", "prototypes"}}.get(layout, {"head", "prototypes"})


@pytest.mark.parametrize("kind", ["regnet_y", "regnet_x"])
@pytest.mark.parametrize("layout", ["torchvision", "timm", "classy", "pycls", "vissl"])
def test_what_goes_out_are_the_librarys_own_names(tmp_path, kind, layout):
    """The stored file of a library, made again from VISSL's or torchvision's."""
    source = "vissl" if layout == "vissl" else "torchvision"
    made = flat(weights.from_ours(read(put(tmp_path, TINY[kind][source])).tensors, layout))
    stored = {key: value for key, value in flat(TINY[kind][layout]).items()
              if layout != "vissl" or "/model/" in key}
    if layout == "classy":
        assert not any(key.startswith("head") for key in made)
    assert set(made) == set(stored)
    assert all(torch.equal(made[key], value) for key, value in stored.items())


# ---------------------------------------------------------------------------- what does not fit
def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_loaded(tmp_path):
    good = TINY["regnet_y"]["torchvision"]
    missing = {k: v for k, v in good.items() if k != "trunk_output.block2.block2-0.f.a.0.weight"}
    odd = good | {"trunk_output.block2.block2-0.f.a.0.weight": torch.zeros(3, 3, 1, 1)}
    more = good | {"trunk_output.block9.block9-0.f.a.0.weight": torch.zeros(1)}
    strange = good | {"mystery.weight": torch.zeros(1)}
    for state, sentence in ((missing, "missing: trunk_output.block2.block2-0.f.a.0.weight"),
                            (odd, r"of another shape: trunk_output.block2.block2-0.f.a.0.weight \(3, 3, 1, 1\)"),
                            (more, "unexpected: trunk_output.block9"), (strange, "unexpected: mystery.weight")):
        trunk = tiny()
        before = {name: value.clone() for name, value in trunk.state_dict().items()}
        with pytest.raises(ValueError, match=sentence):
            load_weights(trunk, put(tmp_path, state))
        assert all(torch.equal(value, before[name]) for name, value in trunk.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_missing_or_misshapen_tensor_is_named(tmp_path, scheme):
    """In every scheme, each kind of tensor in turn."""
    good = read(put(tmp_path, TINY["regnet_y"][scheme]))
    raw = weights.state_dict_of(TINY["regnet_y"][scheme])
    kinds = [key for key in raw if "num_batches" not in key and not re.search(
        "heads|fc|[234]-[1-9]|b[2-9]|s[234]", key)]
    assert len(kinds) > 20
    for key in kinds:
        others = {k: v for k, v in raw.items() if k != key}
        name = (set(good.tensors) - set(weights.to_ours(others)[0])).pop()
        for state, sentence in ((others, f"missing: {name}"), (
                raw | {key: torch.zeros(7)}, f"of another shape: {name} (7,)"), (
                raw | {key: torch.zeros(raw[key].shape, dtype=torch.int8)}, f"of another type: {name}")):
            with pytest.raises(ValueError) as error:
                load_weights(tiny(), put(tmp_path, state))
            assert sentence in str(error.value)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    state = dict(TINY["regnet_y"]["torchvision"])
    for twice in ("module.stem.0.weight", "stem.conv.weight"):
        with pytest.raises(ValueError, match="twice|unexpected: stem.conv.weight"):
            load_weights(tiny(), put(tmp_path, state | {twice: torch.zeros(32, 3, 3, 3)}))


def test_num_batches_tracked_is_optional(tmp_path):
    state = {k: v for k, v in TINY["regnet_y"]["timm"].items() if "num_batches" not in k}
    load_weights(tiny(), put(tmp_path, state))
    with torch.device("meta"):
        trunk = tiny()
    load_weights(trunk, put(tmp_path, state))
    assert trunk.stem[1].num_batches_tracked == 0


def test_the_arch_that_would_fit_is_named(tmp_path):
    path = put(tmp_path, RegNet(ARCHS["regnety_400mf"]).state_dict())
    with pytest.raises(ValueError, match="holds regnety_400mf, the model is regnety_200mf"):
        load_weights(RegNet(ARCHS["regnety_200mf"]), path)
    rounded = RegNet(replace(ARCHS["regnety_800mf"], rounding="torchvision")).state_dict()
    with pytest.raises(ValueError, match="holds regnety_800mf with rounding='torchvision'"):
        load_weights(RegNet(ARCHS["regnety_800mf"]), put(tmp_path, rounded))
    with torch.device("meta"):
        classy = RegNet(RegNetParams(27, 640, 124.47, 2.04, 848)).state_dict()
        seer = RegNet(ARCHS["regnety_256gf"]).state_dict()
    assert "ClassyVision's 256GF" in weights.describe(classy)
    assert weights.describe(seer) == "regnety_256gf"


def test_head_and_prototypes_of_other_widths_are_named(tmp_path):
    model = SwAV(tiny(), (48, 48, 32), prototypes=10)
    with pytest.raises(ValueError, match=r"of another shape: prototypes.weight \(24, 32\) for \(10, 32\)"):
        load_weights(model, put(tmp_path, TINY["regnet_y"]["vissl"]))


# ------------------------------------------------------------------------------ files that lie
class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


class Meter:
    def __init__(self):
        self.values = {"top1": [1, 2]}


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_classes_are_refused_by_name_and_never_made(tmp_path, monkeypatch, zipped):
    monkeypatch.setitem(os.environ, "BOMB", str(tmp_path / "exploded"))
    content = {"classy_state_dict": TINY["regnet_y"]["vissl"]["classy_state_dict"]
               | {"meters": [Meter(), Bomb()], "hooks": {"a": Meter}}}
    path = tmp_path / "vissl.torch"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="trust=True") as error:
        read(path)
    assert "Meter" in str(error.value) and (not zipped or "posix.system" in str(error.value))
    model = tiny_swav()
    assert load_weights(model, path, trust=True).layout == "vissl"
    with torch.no_grad():
        torch.testing.assert_close(model([TINY["regnet_y"]["input"]])[1], TINY["regnet_y"]["scores"],
                                   rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)                        # the bomb is a real one
    assert (tmp_path / "exploded").exists()


def test_a_torchscript_program_is_not_run(tmp_path):
    class Program(torch.nn.Module):
        def forward(self, x):
            return x + 1

    torch.jit.script(Program()).save(str(tmp_path / "program.pt"))
    for trust in (False, True):
        with pytest.raises(ValueError, match="TorchScript program, not a file of weights"):
            read(tmp_path / "program.pt", trust)


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_cannot_change_torch(tmp_path):
    """BUILD sets attributes of what it is given: it is never given torch's own functions."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    attack = (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}U\x0c__defaults__Nstb.")
    path = tmp_path / "attack.pt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    path.write_bytes(whole[:whole.index(b"}q\x00X\x01") if b"}q\x00X\x01" in whole else 60] + attack)
    with pytest.raises(ValueError):
        read(path, trust=True)
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before
    unpickler = weights._InertUnpickler(io.BytesIO(attack))
    unpickler.load()
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before


@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_gets_a_sentence(tmp_path):
    whole = put(tmp_path, {f"stem.{i}.weight": torch.ones(3) for i in range(3)}).read_bytes()
    rng, refused = random.Random(0), 0
    path = tmp_path / "damaged.pt"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        for trust in (False, True):
            try:
                read(path, trust)
            except ValueError as error:
                refused += 1
                assert "damaged.pt" in str(error) and not (trust and "trust=True" in str(error))
    assert refused > 50
    torch.save({"stem.0.weight": torch.ones(1)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="is damaged, or no file of weights"):
        read(path)


def test_trust_makes_nothing_of_a_pickle_that_is_only_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "BOMB", str(tmp_path / "exploded"))
    for name, write in (("a.pt", lambda p: torch.save(Bomb(), p)),
                        ("b.pt", lambda p: p.write_bytes(pickle.dumps(Bomb())))):
        write(tmp_path / name)
        for trust in (False, True):
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name, trust)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_foreign_files_get_a_sentence(tmp_path):
    whole = put(tmp_path, TINY["regnet_y"]["torchvision"]).read_bytes()
    for i, (content, sentence) in enumerate([
            (whole[:len(whole) // 2], "is damaged, or no file of weights"), (b"", "is damaged"),
            (b"hello", "is damaged, or no file of weights")]):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(content)
        for trust in (False, True):
            with pytest.raises(ValueError, match=sentence):
                read(path, trust)
    for content, sentence in [
            ({"a": 1}, "holds no network"), ([1], "holds no network"), ({}, "holds no network"),
            (torch.zeros(2), "holds no network"),
            (torchvision.models.resnet18().state_dict(), "a network that is no RegNet"),
            ({"encoder.0.weight": torch.zeros(1)}, "names that are known: they are like 'encoder.0.weight'"),
            ({"type": "shard_list", "shards": []}, "shard_list of sharded training: consolidate"),
            ({"classy_state_dict": {"base_model": 3}}, "VISSL file without a network")]:
        with pytest.raises(ValueError, match=sentence):
            load_weights(tiny(), put(tmp_path, content))
    with pytest.raises(ValueError, match="neither a file nor the name of an official one"):
        read("seer_regnety_257gf")


def test_safetensors_in_and_out(tmp_path):
    pytest.importorskip("safetensors")
    tensors = read(put(tmp_path, TINY["regnet_y"]["torchvision"])).tensors
    weights.write(tensors, "timm", tmp_path / "model.safetensors")
    back = read(tmp_path / "model.safetensors")
    assert back.layout == "timm" and all(torch.equal(tensors[k], v) for k, v in back.tensors.items())


def test_safetensors_are_asked_for_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install safetensors"):
        read(tmp_path / "a.safetensors")


# ------------------------------------------------------------------------------- official files
@pytest.fixture
def hub(tmp_path, monkeypatch):
    """torch.hub's cache in a folder of its own; nothing is ever downloaded."""
    def refuse(url, *_, **__):
        raise OSError("no network here")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(weights, "_told", set())
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def test_official_files_come_from_the_cache(hub, capsys, monkeypatch):
    trunk = RegNet(ARCHS["regnety_400mf"])
    torch.save(torchvision.models.regnet_y_400mf().state_dict(), hub / "regnet_y_400mf-c65dace8.pth")
    for _ in range(2):
        assert load_weights(trunk, "torchvision_regnety_400mf_v1").unused == ("fc",)
    assert capsys.readouterr().err.count("BSD-3-Clause") == 1
    # SEER's of a size that fits into a test, under the name of a real one
    entry = OFFICIAL["seer_regnety_128gf"]._replace(arch="regnety_200mf")
    monkeypatch.setitem(OFFICIAL, "seer_regnety_128gf", entry)
    model = SwAV(RegNet(ARCHS["regnety_200mf"]), (16, 8), 4)
    tensors = {key.removeprefix("trunk."): value for key, value in model.state_dict().items()}
    torch.save(weights.from_ours(tensors, "vissl"), hub / "seer_regnety_128gf.torch")
    assert load_weights(model, "seer_regnety_128gf").layout == "vissl"
    assert "non-commercial research only" in capsys.readouterr().err


def test_the_arch_is_checked_before_a_download(hub):
    with pytest.raises(ValueError, match="is of regnety_128gf, and the model is regnety_400mf"):
        load_weights(RegNet(ARCHS["regnety_400mf"]), "seer_regnety_128gf")
    with pytest.raises(ValueError, match="is of regnety_800mf, as torchvision rounds"):
        load_weights(RegNet(ARCHS["regnety_800mf"]), "torchvision_regnety_800mf_v1")
    with pytest.raises(ValueError, match="https.*could not be downloaded: no network.*put the file at"):
        load_weights(RegNet(ARCHS["regnety_400mf"]), "torchvision_regnety_400mf_v2")
    with pytest.raises(ValueError, match="could not be downloaded"):
        read("https://example.org/model.pt")


def test_torchvisions_addresses_are_torchvisions():
    for name in torchvision.models.list_models():
        if name.startswith("regnet_"):
            for entry in torchvision.models.get_model_weights(name):
                assert any(official.url == entry.url for official in OFFICIAL.values()), entry


def test_each_official_file_has_a_known_arch_licence_and_place():
    assert len(OFFICIAL) == 10 + 2 + 7 + 28 + 6
    assert {entry.licence for entry in OFFICIAL.values()} == set(LICENCES)
    assert {entry.arch for entry in OFFICIAL.values()} <= {*ARCHS, "resnet50"}
    assert len({entry.url for entry in OFFICIAL.values()}) == len(OFFICIAL)


# --------------------------------------------------------------------------- memory, and programs
def test_a_model_on_the_meta_device_takes_the_files_own_memory(tmp_path):
    path = put(tmp_path, TINY["regnet_y"]["torchvision"])
    with torch.device("meta"):
        trunk = tiny()
    loaded = load_weights(trunk, path)
    for name, parameter in trunk.named_parameters():
        assert parameter.data_ptr() == loaded.tensors[name].data_ptr() and parameter.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(trunk.eval()(TINY["regnet_y"]["input"]), TINY["regnet_y"]["features"],
                                   rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        model = tiny_swav()
    stored = TINY["regnet_y"]["vissl"]
    heads = stored["classy_state_dict"]["base_model"]["model"]["heads"]
    loaded = load_weights(model, put(tmp_path, stored, "vissl.pt"))
    assert torch.equal(model.prototypes.weight, heads["0.prototypes0.weight"])
    assert model.prototypes.weight.data_ptr() == loaded.tensors["prototypes.weight"].data_ptr()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()([TINY["regnet_y"]["input"]])[1],
                                   TINY["regnet_y"]["scores"], rtol=1e-4, atol=1e-5)
    with torch.device("meta"):
        model = tiny_swav()
    with pytest.raises(ValueError, match="missing: the whole of head, the whole of prototypes"):
        load_weights(model, path)


def test_a_file_is_mapped_not_read(tmp_path):
    path = put(tmp_path, {"stem.0.weight": torch.ones(1 << 20), "stem.1.weight": torch.ones(1),
                          "stem.1.bias": torch.ones(1)})
    tensor = read(path).tensors["stem.0.weight"]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    assert str(path) in maps.read_text() and tensor.sum() == 1 << 20


def test_urls_that_end_alike_are_kept_apart(hub, monkeypatch):
    networks = {f"https://example.org/{name}/model.pth?download=1": RegNet(ARCHS[name]).state_dict()
                for name in ("regnety_200mf", "regnetx_200mf")}
    asked = []

    def download(url, path, digest=None):
        asked.append(url)
        torch.save(networks[url], path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        for url in networks:
            loaded = read(url)
            assert weights.describe(loaded.tensors) in url and loaded.path.suffix == ".pth"
    assert asked == list(networks)

    def broken(*_):
        raise RuntimeError("invalid hash value")
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(ValueError, match="invalid hash value"):
        read(OFFICIAL["torchvision_regnety_400mf_v1"].url)


@pytest.mark.parametrize("layout", ["torchvision", "timm", "vissl"])
def test_a_resnet_goes_out_and_comes_back(tmp_path, layout):
    tensors = torchvision.models.resnet50().state_dict()
    weights.write(tensors, layout, tmp_path / "out.pt")
    assert ("fc.weight" in torch.load(tmp_path / "out.pt")) == (layout != "vissl")
    back = read(tmp_path / "out.pt").tensors
    assert set(back) == set(tensors) and all(torch.equal(tensors[k], v) for k, v in back.items())
    with pytest.raises(ValueError, match="no names for a ResNet"):
        weights.write(tensors, "pycls", tmp_path / "out.pt")


def test_an_official_download_of_another_arch_is_not_begun(hub):
    with pytest.raises(ValueError, match="seer_regnety_10b is of regnety_10b, not regnety_400mf"):
        evaluate.load_trunk("seer_regnety_10b", "regnety_400mf")


def test_a_config_of_another_library_beside_a_file_is_left_alone(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["RegNetModel"]}')
    assert evaluate.load_trunk(str(put(tmp_path, fill(OTHERS[-1]["shapes"]), "pytorch_model.bin")))[1] == {}


def starts(rank, folder, source):
    """What --init makes of a file on this rank: the sum of its stem, or the error."""
    os.environ["LOCAL_RANK"] = str(rank)
    model = train.fresh_model(configure({"recipe": "demo", "arch": "regnety_200mf"}))
    try:
        train.start_from(f"{folder}/{source}", model, rank)
    except ValueError as error:
        return str(error)
    return model.trunk.stem[0].weight.sum().item()


def test_two_ranks_start_alike_or_fail_alike(tmp_path):
    trunk = RegNet(ARCHS["regnety_200mf"])
    put(tmp_path, trunk.state_dict(), "good.pt")
    (tmp_path / "bad.pt").write_bytes(b"no")
    assert run_ranks(starts, tmp_path, str(tmp_path), "good.pt") == [trunk.stem[0].weight.sum().item()] * 2
    first, second = run_ranks(starts, tmp_path, str(tmp_path), "bad.pt")
    assert first == second and "bad.pt is damaged" in first


def test_the_command_says_what_a_file_is_and_converts_it(tmp_path, capsys):
    path = put(tmp_path, TINY["regnet_y"]["vissl"])
    weights.main([str(path), "--to", "timm", str(tmp_path / "timm.pt")])
    printed = capsys.readouterr().out
    assert "named as in vissl" in printed and "head: 50-48-48-32\n" in printed
    assert "prototypes: 24" in printed and "licence: that of where the file comes from" in printed
    assert set(torch.load(tmp_path / "timm.pt")) == {
        key for key in TINY["regnet_y"]["timm"] if not key.startswith("head.fc")}
    weights.main([])
    listing = capsys.readouterr().out
    assert all(name in listing and entry.url in listing for name, entry in OFFICIAL.items())
    assert "37.41+ GB" in listing
    weights.main([str(put(tmp_path, {"head.0.weight": torch.ones(2, 2)}, "head.pt"))])
    assert "trunk" not in capsys.readouterr().out
    for argv in ([str(tmp_path / "nowhere.pt")], [str(tmp_path)], ["https://local host/x.pt"],
                 [str(path), "--to", "keras", str(tmp_path / "x")],
                 [str(path), "--to", "transformers_x", str(tmp_path / "x")],
                 [str(path), "--to", "timm", str(tmp_path / "no" / "folder")]):
        with pytest.raises(SystemExit) as stop:
            weights.main(argv)
        assert stop.value.code == 2 and "weights.py: error:" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_run_starts_from_weights(tmp_path, capsys):
    write_pictures(tmp_path / "photos", 8)
    arch = ["--recipe=demo", f"--data={tmp_path / 'photos'}", "--arch=regnety_200mf", "--batch-size=4", "--crops=2x64+2x48",
            "--head=16-8", "--prototypes=4", "--workers=0", "--device=cpu", "--lr=0", "--steps=1"]
    source = put(tmp_path, torchvision.models.regnet_y_400mf().state_dict())
    with pytest.raises(SystemExit):
        train.main([*arch, f"--init={source}", f"--out={tmp_path / 'wrong'}"])
    assert "holds regnety_400mf, the model is regnety_200mf" in capsys.readouterr().err
    trunk = RegNet(ARCHS["regnety_200mf"])
    source = put(tmp_path, weights.from_ours(trunk.state_dict(), "pycls"))
    train.main([*arch, f"--init={source}", f"--out={tmp_path / 'run'}"])
    assert "the trunk; new: head, prototypes" in capsys.readouterr().out
    trained = torch.load(tmp_path / "run" / "trunk.pt")
    for name, value in trunk.named_parameters():                    # lr 0: as they came
        assert torch.equal(trained[name], value), name


def test_a_file_of_another_library_is_evaluated(tmp_path, capsys):
    path = put(tmp_path, fill(OTHERS[0]["shapes"]))
    trunk, config, _ = evaluate.load_trunk(str(path))
    assert config == {} and trunk.num_features == 440 and not trunk.training
    with pytest.raises(ValueError, match="holds regnety_400mf, not regnety_200mf"):
        evaluate.load_trunk(str(path), "regnety_200mf")
    with pytest.raises(ValueError, match="a RegNetY of widths 10,15,25,50"):
        evaluate.load_trunk(str(put(tmp_path, TINY["regnet_y"]["timm"])))


def test_weights_works_alone(tmp_path):
    (tmp_path / "weights.py").write_text((ROOT / "weights.py").read_text())
    put(tmp_path, torchvision.models.regnet_y_400mf().state_dict(), "a.pt")
    script = ("from torchvision.models import regnet_y_400mf\nfrom weights import load_weights\n"
              "model = regnet_y_400mf()\nprint(load_weights(model, 'a.pt').layout)")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment,
                            capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "torchvision", result.stderr
