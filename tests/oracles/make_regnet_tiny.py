"""Write regnet_tiny.pt: two small RegNets in six checkpoint layouts, with their outputs.

    python -m tests.oracles.make_regnet_tiny

Random weights, BN parameters and BN statistics. The outputs are computed in float64 by `forward`,
written out here from the definition (Radosavovic et al., arXiv 2003.13678), and stored as float32:
stem 3x3, stride 2, 32 channels; every stage begins with stride 2; BN eps 1e-5; in Y
squeeze-and-excitation of round(0.25 * channels of the block's input), half to even.
`logits`: a linear classifier on the features. `embedding`: Linear-ReLU-Linear-ReLU-Linear on the
features, divided by its L2 norm. `scores`: embedding @ prototypes.T.

The layouts hold the same network under the names of torchvision, timm, ClassyVision, pycls (input
channels in BGR order) and VISSL (a training file, and a consolidated file of FSDP, where names
hold a part of the stage). Tensors that are equal in several layouts are stored once.
"""
import re
from pathlib import Path

import numpy
import torch
from torch.nn import functional as F

from tests.oracles.make_regnet_widths import KEYS, stages

# generator's parameters, SE ratio; classes; head; FSDP's part of each block, by stage
NETWORKS = {"regnet_y": ((9, 8, 5.53, 1.8, 5), 0.25, 7, (48, 48, 32), ("0", "01", "00", "0012")),
            "regnet_x": ((8, 16, 6.23, 1.6, 7), None, 5, (40, 40, 24), ("0", "00", "011", "00"))}
PROTOTYPES = 24
# names of a block's layers, and of the stem's two
TORCHVISION = "proj.0 proj.1 f.a.0 f.a.1 f.b.0 f.b.1 f.se.fc1 f.se.fc2 f.c.0 f.c.1".split()
LAYERS = {"timm": "downsample.conv downsample.bn conv1.conv conv1.bn conv2.conv conv2.bn "
                  "se.fc1 se.fc2 conv3.conv conv3.bn".split(),
          "pycls": "proj bn f.a f.a_bn f.b f.b_bn f.se.f_ex.0 f.se.f_ex.2 f.c f.c_bn".split(),
          "classy": "proj bn f.a.0 f.a.1 f.b.0 f.b.1 f.se.excitation.0 f.se.excitation.2 "
                    "f.c f.final_bn".split()}
STEMS = {"timm": ("stem.conv", "stem.bn"), "pycls": ("stem.conv", "stem.bn"),
         "classy": ("stem.stem.0", "stem.stem.1")}


def draw(kind: str, rng) -> dict[str, torch.Tensor]:
    """torchvision's state dict with its classifier fc; then head.* and prototypes.weight."""
    parameters, se_ratio, classes, head, _ = NETWORKS[kind]
    state = {}

    def weighted(name, w_out, *rest, bias=True):
        deviation = numpy.prod(rest) ** -0.5
        state[f"{name}.weight"] = rng.standard_normal((w_out, *rest)) * deviation
        if bias:
            state[f"{name}.bias"] = rng.standard_normal(w_out) * 0.3

    def conv_bn(name, w_out, w_in, kernel):
        weighted(f"{name}.0", w_out, w_in, kernel, kernel, bias=False)
        state[f"{name}.1.weight"] = rng.uniform(0.5, 1.5, w_out)
        state[f"{name}.1.bias"] = rng.standard_normal(w_out) * 0.3
        state[f"{name}.1.running_mean"] = rng.standard_normal(w_out) * 0.3
        state[f"{name}.1.running_var"] = rng.uniform(0.5, 1.5, w_out)
        state[f"{name}.1.num_batches_tracked"] = rng.integers(1, 5000)

    conv_bn("stem", 32, 3, 3)
    w_in = 32
    for s, (width, depth, group_width) in enumerate(zip(*stages(*parameters)), start=1):
        for i in range(depth):
            block = f"trunk_output.block{s}.block{s}-{i}"
            if i == 0:
                conv_bn(f"{block}.proj", width, w_in, 1)
            conv_bn(f"{block}.f.a", width, w_in, 1)
            conv_bn(f"{block}.f.b", width, group_width, 3)
            if se_ratio:
                se_width = round(se_ratio * w_in)
                weighted(f"{block}.f.se.fc1", se_width, width, 1, 1)
                weighted(f"{block}.f.se.fc2", width, se_width, 1, 1)
            conv_bn(f"{block}.f.c", width, width, 1)
            w_in = width
    weighted("fc", classes, w_in)
    for i, (before, width) in enumerate(zip((w_in, *head), head)):
        weighted(f"head.{2 * i}", width, before)
    weighted("prototypes", PROTOTYPES, head[-1], bias=False)
    rows = state["prototypes.weight"]
    state["prototypes.weight"] = rows / numpy.linalg.norm(rows, axis=1, keepdims=True)
    return {name: torch.tensor(value, dtype=torch.int64 if "num_batches" in name else torch.float32)
            for name, value in state.items()}


def forward(state: dict[str, torch.Tensor], images: torch.Tensor) -> dict:
    """The outputs in eval mode, float64."""
    p = {name: value.double() for name, value in state.items()}

    def conv_bn(x, name, stride=1):
        weight, bn = p[f"{name}.0.weight"], f"{name}.1."
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[2] // 2,
                     groups=x.shape[1] // weight.shape[1])
        return F.batch_norm(x, p[bn + "running_mean"], p[bn + "running_var"], p[bn + "weight"],
                            p[bn + "bias"], eps=1e-5)

    def gate(x, name):
        x = F.conv2d(x.mean((2, 3), keepdim=True), p[f"{name}.fc1.weight"], p[f"{name}.fc1.bias"])
        return F.conv2d(x.relu(), p[f"{name}.fc2.weight"], p[f"{name}.fc2.bias"]).sigmoid()

    def linear(x, name):
        return F.linear(x, p[f"{name}.weight"], p[f"{name}.bias"])

    x, maps = conv_bn(images.double(), "stem", 2).relu(), []
    for s in range(1, 5):
        i = 0
        while f"trunk_output.block{s}.block{s}-{i}.f.a.0.weight" in p:
            block, stride = f"trunk_output.block{s}.block{s}-{i}", 1 if i else 2
            y = conv_bn(x, f"{block}.f.a").relu()
            y = conv_bn(y, f"{block}.f.b", stride).relu()
            if f"{block}.f.se.fc1.weight" in p:
                y = y * gate(y, f"{block}.f.se")
            y = conv_bn(y, f"{block}.f.c")
            x = ((x if i else conv_bn(x, f"{block}.proj", 2)) + y).relu()
            i += 1
        maps.append(x)
    features = x.mean((2, 3))
    hidden = linear(linear(features, "head.0").relu(), "head.2").relu()
    embedding = F.normalize(linear(hidden, "head.4"))
    return {"features": features, "stage_outputs": maps, "logits": linear(features, "fc"),
            "embedding": embedding, "scores": embedding @ p["prototypes.weight"].T}


def rename(name: str, layout: str) -> str:
    """A name of torchvision's in another library's."""
    found = re.fullmatch(r"trunk_output\.block(\d)\.block\d-(\d+)\.(.+)\.(\w+)", name)
    if found:
        s, i, layer, leaf = found.groups()
        block = (f"trunk_output.block{s}.block{s}-{i}" if layout == "classy" else
                 f"s{s}.b{int(i) + 1}")
        return f"{block}.{LAYERS[layout][TORCHVISION.index(layer)]}.{leaf}"
    if name.startswith("stem."):
        return f"{STEMS[layout][int(name[5])]}{name[6:]}"
    return f"head.{name}"


def rename_vissl(name: str, parts: tuple[str, ...] = ()) -> str:
    """A name of ClassyVision's in VISSL's trunk, with `parts` in a file of FSDP."""
    found = re.fullmatch(r"trunk_output\.block(\d)\.block\d-(\d+)(.+)", name)
    if not found:
        return "_feature_blocks.conv1." + name.removeprefix("stem.")
    s, i, rest = found.groups()
    part = f"block{s}-part{parts[int(s) - 1][int(i)]}." if parts else ""
    return f"_feature_blocks.res{int(s) + 1}.{part}block{s}-{i}{rest}"


def layouts(state: dict[str, torch.Tensor], parts: tuple[str, ...]) -> dict:
    torchvision = {k: v for k, v in state.items() if not k.startswith(("head.", "prototypes."))}
    timm, pycls = ({rename(k, layout): v for k, v in torchvision.items()}
                   for layout in ("timm", "pycls"))
    pycls["stem.conv.weight"] = pycls["stem.conv.weight"].flip(1)           # RGB -> BGR
    classy = {rename(k, "classy"): v for k, v in torchvision.items() if not k.startswith("fc.")}
    heads = {f"0.projection_{k}": v for k, v in state.items() if k.startswith("head.")}
    heads["0.prototypes0.weight"] = state["prototypes.weight"]
    models = [{"trunk": {rename_vissl(k, parts): v for k, v in classy.items()}, "heads": heads}
              for parts in ((), parts)]
    vissl = {"phase_idx": 0, "iteration": 0, "loss": {"swav_criterion.num_iteration": torch.zeros(
        1, dtype=torch.int64)}, "iteration_num": 0, "train_phase_idx": 0, "classy_state_dict": {
            "train": True, "base_model": {"model": models[0], "meta": {"trunk": {}, "heads": []}},
            "meters": [], "optimizer": {}, "phase_idx": 0, "train_phase_idx": 0, "num_updates": 0,
            "losses": [], "hooks": {}, "loss": {}}, "type": "consolidated"}
    fsdp = {"type": "consolidated", "classy_state_dict": {"base_model": {"model": models[1]}}}
    return {"vissl": vissl, "vissl_fsdp": fsdp, "timm": timm, "torchvision": torchvision,
            "pycls": {"epoch": 99, "model_state": pycls}, "classy": classy}


def make() -> dict:
    content = {}
    for seed, (kind, (parameters, se_ratio, classes, head, parts)) in enumerate(NETWORKS.items()):
        rng = numpy.random.default_rng(seed)
        state = draw(kind, rng)
        images = rng.standard_normal((2, 3, 64, 64)) + rng.standard_normal((2, 3, 1, 1))
        images = torch.tensor(images, dtype=torch.float32)
        outputs = {name: [x.float() for x in value] if isinstance(value, list) else value.float()
                   for name, value in forward(state, images).items()}
        shape = dict(zip(("widths", "depths", "group_widths"), stages(*parameters)))
        trunk_params = sum(value.numel() for name, value in state.items() if name.startswith(
            ("stem.", "trunk_output.")) and name.endswith((".weight", ".bias")))
        content[kind] = {
            "params": dict(zip(KEYS, parameters)) | {"se_ratio": se_ratio}, **shape,
            "trunk_params": trunk_params, "num_classes": classes,
            "head_dims": [shape["widths"][-1], *head], "num_prototypes": PROTOTYPES,
            "input": images, **outputs, **layouts(state, parts)}
    return content


if __name__ == "__main__":
    torch.save(make(), Path(__file__).with_name("regnet_tiny.pt"))
