"""Files of other methods, public ones and runs' own: right arch, right tensors in their place."""
import json
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch import nn

from evaluation.export import swav_of
from methods.barlow_twins import BarlowTwins
from methods.build import RESNETS, build_trunk
from methods.byol import BYOL
from methods.deepcluster_v2 import DeepCluster
from methods.dino import DINO
from methods.mocov2 import MoCo
from methods.simclr import SimCLR
from methods.supervised import Supervised
from swav import SwAV
from tests.helpers import ORACLES, equal
from training.checkpoint import init_weights, start_from
from weights.__main__ import summary
from weights.files import read, state_dict_of
from weights.load import arch_of, load_weights
from weights.names import own_names, part_of, to_ours

LAYOUTS = json.loads((ORACLES / "method_keys.json").read_text())
TRUNK = {entry["key"].removeprefix("module."): entry["shape"] for entry in json.loads(
    (ORACLES / "resnet50_swav_keys.json").read_text())["keys"]
    if not entry["key"].startswith(("module.projection_head", "module.prototypes"))}


def widened(shape: list[int], width: int) -> list[int]:
    """Of a tensor of ResNet-50, all widths times `width`; images keep 3 channels, kernels their
    size."""
    return [n if n == 3 else n * width for n in shape[:2]] + shape[2:]


def published(*layouts: str) -> dict:
    """What a file of these layouts holds; on the meta device, but for the queue's position."""
    content = {}
    for layout in layouts:
        entry, inner = LAYOUTS[layout], content
        for key in entry["inside"]:
            inner = inner.setdefault(key, {})
        trunk = {prefix + key: torch.empty(widened(shape, entry.get("width", 1)), device="meta")
                 for prefix in entry["trunks"] for key, shape in TRUNK.items()}
        rest, heads = ({key: torch.zeros(shape, device="cpu" if "_ptr" in key else "meta")
                        for key, shape in entry.get(part, {}).items()}
                       for part in ("rest", "heads"))
        inner |= {"trunk": trunk, "heads": heads} if heads else trunk | rest
    return content


def network(kind: type, *args, arch: str = "resnet50", **options) -> nn.Module:
    with torch.device("meta"):
        return kind(build_trunk(arch), *args, **options)


@pytest.mark.parametrize("layouts, kind, args, options", [
    (["moco"], MoCo, [(2048, 128), 65536], {}),
    (["dino student", "dino teacher", "dino center"], DINO, [(4096, 256), 60000, True],
     {"steps": 1}),
    (["barlow_twins"], BarlowTwins, [], {}), (["vissl barlow_twins"], BarlowTwins, [], {}),
    (["vissl simclr"], SimCLR, [], {}),
    (["deepcluster_v2"], DeepCluster, [3000], {"steps_per_epoch": 1}),
    *((["swav " + width], SwAV, [(hidden, 128), 3000, True], {"arch": "resnet50" + width})
      for width, hidden in (("w2", 8192), ("w4", 8192), ("w5", 10240)))],
    ids=lambda value: "-".join(value) if isinstance(value, list) and value
    and isinstance(value[0], str) else "")
def test_a_public_file_has_the_names_and_shapes_of_the_method(layouts, kind, args, options):
    """At the published sizes, of which no memory is taken."""
    tensors, layout = to_ours(state_dict_of(published(*layouts)))
    method = network(kind, *args, **options)
    state = method.state_dict()
    expected = {name: state[key].shape for key, name in own_names(state).items()
                if part_of(name) != "memory"}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    assert arch_of(tensors) == (options.get("arch", "resnet50"), "")
    assert layout == ("vissl" if "vissl" in layouts[0] else "torchvision")


@pytest.mark.parametrize("arch, millions", [
    ("resnet50", 23.5), ("resnet50w2", 94), ("resnet50w4", 375), ("resnet50w5", 586)])
def test_the_wide_resnets_have_the_published_sizes(arch, millions):
    trunk = network(lambda trunk: trunk, arch=arch)
    parameters = sum(p.numel() for p in trunk.parameters()) / 1e6
    assert parameters == pytest.approx(millions, abs=0.51)
    assert {key: list(value.shape) for key, value in trunk.state_dict().items()} == {
        key: widened(shape, RESNETS[arch]) for key, shape in TRUNK.items()}
    assert trunk.num_features == 2048 * RESNETS[arch]
    assert trunk(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 2048 * RESNETS[arch])
    geometry = [[(name, m.kernel_size, m.stride, m.padding) for name, m in network.named_modules()
                 if isinstance(m, nn.Conv2d)] for network in (trunk, torchvision.models.resnet50())]
    assert geometry[0] == geometry[1]
    assert arch_of(trunk.state_dict()) == (arch, "")
    other = dict(trunk.state_dict(), **{"conv1.weight": torch.empty(96, 3, 7, 7)})
    assert arch_of(other) is None               # torchvision's wide_resnet50_2 has a stem of 64


def test_a_head_of_other_layers_is_left_out():
    """lightly's BYOL: there biases are not where they are here; the trunks fit."""
    tensors, _ = to_ours(state_dict_of(published("lightly byol")))
    assert {part_of(name) for name in tensors} == {
        "trunk", "head", "predictor", "momentum trunk", "momentum head"}
    state = own_names(network(BYOL, steps=1).state_dict()).values()
    assert {name for name in tensors if "trunk" in part_of(name)} == {
        name for name in state if "trunk" in part_of(name)}
    assert "head.0.bias" in state and "head.0.bias" not in tensors
    assert "head.3.bias" in tensors and "head.3.bias" not in state


class Tiny(nn.Module):
    """A trunk with names of a ResNet."""
    num_features = 4

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        block = nn.ModuleDict({"conv1": nn.Conv2d(4, 4, 1, bias=False), "bn1": nn.BatchNorm2d(4)})
        self.layer1 = nn.Sequential(block)


METHODS = {
    "swav": lambda: SwAV(Tiny(), (6, 5), 7, True), "simclr": lambda: SimCLR(Tiny(), (6, 5)),
    "mocov2": lambda: MoCo(Tiny(), (6, 5), 8),
    "byol": lambda: BYOL(Tiny(), (6, 5), (7, 5), steps=9),
    "barlow_twins": lambda: BarlowTwins(Tiny(), (6, 5, 5)),
    "dino": lambda: DINO(Tiny(), (6, 5), 7, True, steps=9),
    "deepcluster_v2": lambda: DeepCluster(Tiny(), 9, (6, 5), (7, 7, 4), steps_per_epoch=1),
    "supervised": lambda: Supervised(Tiny(), torch.tensor([0, 1]), 2)}


def trained(name: str) -> nn.Module:
    """All of its tensors other than those of a fresh one."""
    method = METHODS[name]()
    for i, tensor in enumerate(method.state_dict().values()):
        torch.manual_seed(i)
        tensor.copy_(torch.rand(tensor.shape) * 100 if tensor.dtype == torch.long
                     else torch.rand(tensor.shape))
    if name in ("swav", "deepcluster_v2"):
        for layer in method.prototypes if name != "swav" else [method.prototypes]:
            layer.weight.data = nn.functional.normalize(layer.weight.data, dim=1)
    return method


def as_published(name: str, state: dict) -> dict:
    """The file that the method's own repository would write."""
    def renamed(*pairs):
        return {theirs + key.removeprefix(ours): value for ours, theirs in pairs
                for key, value in state.items() if key.startswith(ours)}
    if name == "mocov2":
        ring = torch.empty(5, 8)
        for age, key in enumerate(state["queue"]):              # the next one will be at 3
            ring[:, (3 - 1 - age) % 8] = key
        return {"epoch": 200, "arch": "resnet50", "state_dict": renamed(
            ("trunk.", "module.encoder_q."), ("head.", "module.encoder_q.fc."),
            ("key.0.", "module.encoder_k."), ("key.1.", "module.encoder_k.fc."))
            | {"module.queue": ring, "module.queue_ptr": torch.tensor([3])}}
    if name == "barlow_twins":
        return {"epoch": 1, "optimizer": {}, "model": renamed(
            ("trunk.", "module.backbone."), ("head.", "module.projector."))
            | {"module.bn.running_mean": torch.ones(5)}}
    if name == "dino":
        return {"student": renamed(
            ("trunk.", "module.backbone."), ("head.mlp.", "module.head.mlp."),
            ("head.last.", "module.head.last_layer.")), "teacher": renamed(
            ("teacher.0.", "backbone."), ("teacher.1.mlp.", "head.mlp."),
            ("teacher.1.last.weight", "head.last_layer.weight_v"))
            | {"head.last_layer.weight_g": torch.ones(7, 1)},
            "dino_loss": {"center": state["center"][None]}, "epoch": 3}
    if name == "deepcluster_v2":
        return renamed(("trunk.", "module."), ("head.", "module.projection_head."), *(
            (f"prototypes.{i}.", f"module.prototypes.prototypes{i}.") for i in range(3)))
    heads = renamed(("head.0.", "0.clf.0."), ("head.2.", "1.clf.0."))                   # simclr
    return {"classy_state_dict": {"base_model": {"model": {
        "trunk": renamed(("trunk.", "_feature_blocks.")), "heads": heads}}}}


@pytest.mark.parametrize("name", ["mocov2", "barlow_twins", "dino", "deepcluster_v2", "simclr"])
def test_each_tensor_of_a_public_file_gets_to_its_place(put, name):
    donor, method = trained(name), METHODS[name]()
    loaded = load_weights(method, put(as_published(name, donor.state_dict())))
    state = method.state_dict()
    for key, value in donor.state_dict().items():
        assert part_of(key) == "memory" or torch.equal(state[key], value), key
    assert loaded.unused == ()
    assert loaded.untouched == (("memory",) if name == "deepcluster_v2" else ())


@pytest.mark.parametrize("name", METHODS)
def test_a_runs_own_checkpoint_goes_into_its_method_and_the_trunk_into_others(put, name):
    donor = trained(name)
    state = donor.state_dict()
    path = put({"version": 4, "config": {"method": name}, "model": state}, "checkpoint.pt")
    method = METHODS[name]()
    loaded = load_weights(method, init_weights(str(path), name, True))
    assert set(loaded.untouched) <= {"memory"} and loaded.config == {"method": name}
    for key, value in method.state_dict().items():
        assert part_of(key) == "memory" or torch.equal(value, state[key]), key
    assert "trunk: 0.0 M parameters" in summary(read(path))
    assert equal(read(put(read(path).tensors)).tensors, read(path).tensors)     # by names here
    for other in {"mocov2", "swav"} - {name}:
        method = METHODS[other]()
        before = {key: value.clone() for key, value in method.state_dict().items()}
        loaded = load_weights(method, init_weights(str(path), other, True))
        assert loaded.loaded == (("trunk",) if other == "swav" else ("momentum trunk", "trunk"))
        for key, value in method.state_dict().items():
            twin = key.replace("key.0.", "trunk.")
            assert torch.equal(value, state[twin] if twin.startswith("trunk.") else before[key])


def test_a_momentum_encoder_that_is_not_in_the_file_is_a_copy(put):
    """SimCLR's head is like MoCo's: both go on from it."""
    state = trained("simclr").state_dict()
    method = METHODS["mocov2"]()
    loaded = load_weights(method, put(as_published("simclr", state)))
    assert loaded.untouched == ("queue",) and "momentum head" in loaded.loaded
    for key, value in method.state_dict().items():
        if key != "queue":
            twin = key.replace("key.0.", "trunk.").replace("key.1.", "head.")
            assert torch.equal(value, state[twin]), key
    longer = MoCo(Tiny(), (6, 5), 9)
    loaded = load_weights(longer, put(as_published("mocov2", trained("mocov2").state_dict())))
    assert loaded.untouched == loaded.unused == ("queue",)


def test_init_takes_the_checkpoint_of_a_runs_folder(put, capsys):
    donor = trained("byol")
    path = put({"version": 4, "config": {"method": "byol"}, "model": donor.state_dict()},
               "checkpoint.pt")
    method = METHODS["byol"]()
    start_from(str(path.parent), method, 0, "byol")
    assert equal(dict(method.state_dict()), dict(donor.state_dict()))
    start_from(str(path.parent), METHODS["dino"](), 0, "dino")
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("the trunk, head, momentum head, momentum trunk, predictor")
    assert second.endswith("the trunk, momentum trunk; new: center, head, momentum head")


def test_a_single_clustering_is_named_as_swavs_prototypes(put):
    method = DeepCluster(Tiny(), 9, (6, 5), (7,), steps_per_epoch=1)
    loaded = read(put({"model": method.state_dict()}))
    assert loaded.tensors["prototypes.weight"].shape == (7, 5)
    fresh = DeepCluster(Tiny(), 9, (6, 5), (7,), steps_per_epoch=1)
    assert load_weights(fresh, loaded).untouched == ("memory",)
    torch.testing.assert_close(fresh.prototypes[0].weight, nn.functional.normalize(
        method.prototypes[0].weight, dim=1))
    assert load_weights(METHODS["swav"](), loaded).untouched == ()


def test_clusters_are_never_of_a_head_that_was_not_loaded(put):
    state = trained("swav").state_dict()
    for left, sentence in ((set(), None), ({"head.0.bias"}, "no head of SwAV's kind"),
                           ({"prototypes.weight"}, "holds no prototypes")):
        file = put({"model": {key: x for key, x in state.items() if key not in left}})
        task = SimpleNamespace(trunk=Tiny(), source="a run", loaded=read(file))
        if sentence:
            with pytest.raises(ValueError, match=sentence):
                swav_of(task)
        else:
            assert torch.equal(swav_of(task).head[0].bias, state["head.0.bias"])
    dino = put({"model": trained("dino").state_dict()})
    with pytest.raises(ValueError, match="holds no prototypes"):
        swav_of(SimpleNamespace(trunk=Tiny(), source="a run", loaded=read(dino)))
