"""Parameter names: what each library calls the tensors of the same network, translated both ways.

    from torchvision.models import regnet_y_400mf
    from weights.names import from_ours, to_ours, translate
    tensors, layout = to_ours(regnet_y_400mf().state_dict())         # or another library's
    state = from_ours(tensors, "timm")                   # what timm's own file would hold
    translate("s1.b2.conv1.bn", "timm", "torchvision")   # "trunk_output.block1.block1-1.f.a.1"

This project's names are torchvision's. A layout is the set of names that one library uses, a key
of BLOCKS. BLOCKS and NAMES translate a RegNet, PARTS what a method has besides its trunk. A
ResNet-50 has torchvision's names in every library; VISSL puts a prefix before them. Tensors are not
changed, with two exceptions: pycls trains on BGR images, so the input channels of its first
convolution are reversed, both ways; the queue of facebookresearch/moco is put in order.

Errors are ValueErrors. The message of `to_ours` begins with a verb ("holds stem.0.weight twice"):
its caller puts the name of the file before it.
"""
import re
from typing import Iterable

import torch
from torch import Tensor

# layout -> the name of a block. {s} is its stage, from 1, and {i} its number there, from 0;
# {s0} is s - 1, {s2} is s + 1 and {i1} is i + 1
BLOCKS = {
    "torchvision": "trunk_output.block{s}.block{s}-{i}",
    "timm": "s{s}.b{i1}",
    "pycls": "s{s}.b{i1}",
    "classy": "trunk_output.block{s}.block{s}-{i}",
    "vissl": "_feature_blocks.res{s2}.block{s}-{i}",
    "transformers": "encoder.stages.{s0}.layers.{i}",
    "transformers_x": "encoder.stages.{s0}.layers.{i}",         # of a RegNetX
}
TARGETS = list(BLOCKS)[:-1]            # for a RegNetX from_ours takes transformers_x itself
_TABLE = """
torchvision timm            pycls       classy            transformers
stem.0      stem.conv       stem.conv   stem.stem.0       embedder.embedder.convolution
stem.1      stem.bn         stem.bn     stem.stem.1       embedder.embedder.normalization
proj.0      downsample.conv proj        proj              shortcut.convolution
proj.1      downsample.bn   bn          bn                shortcut.normalization
f.a.0       conv1.conv      f.a         f.a.0             layer.0.convolution
f.a.1       conv1.bn        f.a_bn      f.a.1             layer.0.normalization
f.b.0       conv2.conv      f.b         f.b.0             layer.1.convolution
f.b.1       conv2.bn        f.b_bn      f.b.1             layer.1.normalization
f.se.fc1    se.fc1          f.se.f_ex.0 f.se.excitation.0 layer.2.attention.0
f.se.fc2    se.fc2          f.se.f_ex.2 f.se.excitation.2 layer.2.attention.2
f.c.0       conv3.conv      f.c         f.c               layer.3.convolution
f.c.1       conv3.bn        f.c_bn      f.final_bn        layer.3.normalization
fc          head.fc         head.fc     -                 classifier.1
"""
_COLUMNS = list(zip(*(row.split() for row in _TABLE.strip().splitlines())))
# layout -> torchvision's name of a module (within its block, if it is in one) -> the layout's name,
# "-" where there is none
NAMES = {column[0]: dict(zip(_COLUMNS[0][1:], column[1:])) for column in _COLUMNS}
NAMES["vissl"] = NAMES["classy"] | {part: f"_feature_blocks.conv1.{part}"
                                    for part in ("stem.0", "stem.1")}
# a RegNetX has no squeeze-and-excitation, so its third convolution is layer.2
NAMES["transformers_x"] = NAMES["transformers"] | {
    "f.se.fc1": "-", "f.se.fc2": "-",
    "f.c.0": "layer.2.convolution", "f.c.1": "layer.2.normalization"}
# the beginning of a name in a method's file -> here, by the first that fits. A momentum encoder is
# momentum: 0 its trunk, 1 its head
PARTS = [(re.compile(theirs), ours) for theirs, ours in (
    (r"(?:key|target|teacher)\.([01])\.", r"momentum.\1."),               # a method's here
    (r"encoder_q\.fc\.", "head."), (r"encoder_q\.", ""),                 # facebookresearch/moco's
    (r"encoder_k\.fc\.", "momentum.1."), (r"encoder_k\.", "momentum.0."),
    (r"momentum\.backbone\.", "momentum.0."),                            # facebookresearch/dino's
    (r"momentum\.head\.last_layer\.weight(_v)?$", "momentum.1.last.weight"),
    (r"momentum\.head\.", "momentum.1."),
    (r"head\.last_layer\.weight(_v)?$", "head.last.weight"),
    (r"backbone\.", ""), (r"projector\.", "head."),              # facebookresearch/barlowtwins's
    (r"teacher_backbone\.", "momentum.0."),                              # lightly's
    (r"teacher_projection_head\.layers\.", "momentum.1."),
    (r"projection_head\.layers\.", "head."), (r"prediction_head\.layers\.", "predictor."),
    (r"(?:heads\.)?(?:0\.)?projection_head\.", "head."),        # facebookresearch/swav's, VISSL's
    (r"(?:(?:heads\.)?0|prototypes)\.prototypes(\d+)\.", r"prototypes.\1."),
    (r"(?:heads\.)?0\.clf\.0\.", "fc."))]
VISSL_MLP = re.compile(r"heads\.(\d+)\.clf\.(\d+)\.")      # a head of several modules
# what no method here has: a queue's position, Barlow Twins' last BatchNorm, which has no weights,
# the fixed norms of DINO's last layer, a classifier beside the method
LEFT_OUT = re.compile(r"queue_ptr|bn\.(running_mean|running_var|num_batches_tracked)"
                      r"|(momentum\.)?head\.last_layer\.weight_g|online_classifier\..+")
OWN = re.compile(r"(?:head|momentum\.1)\.(?:(?:mlp\.)?\d+|last)|predictor\.\d+"
                 r"|prototypes(?:\.\d+)?")
# what a method keeps besides weights, by its part; DeepCluster-v2's memory is of the run's images
STATE = {"queue": "queue", "center": "center",
         **dict.fromkeys(("memory", "assignments", "epoch", "moved"), "memory")}
RESNET = re.compile(r"conv1|bn1|layer\d\.\d+\.(?:conv\d|bn\d|downsample\.\d)")
# what DDP, torch.compile, FSDP and activation checkpointing add to a name
WRAPPERS = re.compile(r"module|_orig_mod|_fsdp_wrapped_module|_fpw_module"
                      r"|_checkpoint_wrapped_module|block\d+-part\d+")


def without_wrappers(key: str) -> str:
    """module.stem.0.weight -> stem.0.weight"""
    return ".".join(part for part in key.split(".") if not WRAPPERS.fullmatch(part))


def part_of(name: str) -> str:
    """The part of a method that a tensor of this name belongs to: trunk, where it is no other's."""
    match = re.match(r"(head|prototypes|predictor|fc|detector|momentum\.[01])s?\.", name)
    part = match[1] if match else STATE.get(name, "trunk")
    return {"momentum.0": "momentum trunk", "momentum.1": "momentum head"}.get(part, part)


def own_names(keys: Iterable[str]) -> dict[str, str]:
    """Keys of a state dict, a file's or a model's -> this project's names of a method's parts: a
    trunk's without a prefix, those of others as in PARTS; within the trunk nothing changes. What no
    method here has is not in the result."""
    paths = {key: re.sub(r"^(?:trunk\.)?(?:base_model\.)?(?:regnet\.)?", "", without_wrappers(key))
             for key in keys}
    found = {match.groups() for path in paths.values() if (match := VISSL_MLP.match(path))}
    step = 3 if ("0", "1") in found else 2          # Linear, BatchNorm, ReLU; or without BatchNorm
    names = {}
    for key, path in paths.items():
        if LEFT_OUT.fullmatch(path):
            continue
        if len({module for module, _ in found}) > 1:
            path = VISSL_MLP.sub(lambda m: f"head.{step * int(m[1]) + int(m[2])}.", path)
        names[key] = next((pattern.sub(ours, path, 1) for pattern, ours in PARTS
                           if pattern.match(path)), path)
    if "prototypes.1.weight" not in names.values():         # one of one has no number
        names = {key: re.sub(r"^prototypes\.0\.", "prototypes.", name)
                 for key, name in names.items()}
    return names


def _pattern(block: str) -> re.Pattern:
    """block{s}.block{s}-{i} -> block(?P<s>\\d+)\\.block(?P=s)\\-(?P<i>\\d+)\\.(?P<part>.+)"""
    seen = set()

    def number(match):
        field = match[1]
        if field in seen:
            return f"(?P={field})"
        seen.add(field)
        return rf"(?P<{field}>\d+)"

    return re.compile(re.sub(r"\\{(\w+)\\}", number, re.escape(block)) + r"\.(?P<part>.+)")


PATTERNS = {layout: _pattern(block) for layout, block in BLOCKS.items()}


def translate(name: str, source: str, target: str) -> str | None:
    """The name of a RegNet's module in the source layout -> in the target layout; None where either
    has none."""
    match = PATTERNS[source].fullmatch(name)
    part = match["part"] if match else name
    ours = next((ours for ours, theirs in NAMES[source].items() if theirs == part), "")
    theirs = NAMES[target].get(ours, "-")
    if theirs == "-" or bool(match) != ours.startswith(("proj.", "f.")):
        return None
    if not match:                       # the stem, or fc
        return theirs
    at = {field: int(value) for field, value in match.groupdict().items() if field != "part"}
    s = at["s"] if "s" in at else at["s0"] + 1
    i = at["i"] if "i" in at else at["i1"] - 1
    return BLOCKS[target].format(s=s, s0=s - 1, s2=s + 1, i=i, i1=i + 1) + "." + theirs


def _rename(name: str, layout: str) -> str | None:
    """A module's name in layout -> here; also of a ResNet and a method's parts. None: unknown."""
    bare = name.removeprefix("_feature_blocks.")
    if RESNET.fullmatch(bare) or OWN.fullmatch(name):
        return bare
    if name.startswith("momentum.0."):
        inner = _rename(name.removeprefix("momentum.0."), layout)
        return inner and f"momentum.0.{inner}"
    return translate(name, layout, "torchvision")


def to_ours(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A flat state dict in any layout -> the same with torchvision's names, and the layout.

    A method's own parts are named as by own_names, a classifier fc. An unknown key stays as it is.
    Raises ValueError where half of the names or more are unknown, or two keys mean one tensor.
    """
    plain = {}
    for key, path in own_names(tensors).items():
        if path in plain:
            raise ValueError(f"holds {path} twice, once as {key}")
        plain[path] = tensors[key]
    # without weight, bias, running_mean
    names = {key.rpartition(".")[0] for key in plain if "." in key}
    layout = max(BLOCKS, key=lambda layout: sum(
        translate(name, layout, "torchvision") is not None for name in names))

    renamed = {name: _rename(name, layout) for name in names}
    if 2 * sum(new is not None for new in renamed.values()) <= len(renamed):
        raise ValueError("holds no RegNet or ResNet-50 under any names known here; the first are "
                         + ", ".join(map(repr, list(tensors)[:3])))
    result = {}
    for key, tensor in plain.items():
        name, _, leaf = key.rpartition(".")
        new = f"{renamed[name]}.{leaf}" if renamed.get(name) else key
        if new in result:
            raise ValueError(f"holds {new} twice, once as {key}")
        result[new] = tensor
    if layout == "pycls" and result.get("stem.0.weight", torch.empty(0)).dim() == 4:
        result["stem.0.weight"] = result["stem.0.weight"].flip(1)            # BGR -> RGB
    ends = [tensor for key, tensor in tensors.items() if without_wrappers(key) == "queue_ptr"]
    if ends and "queue" in result:          # (D, L), a ring: the oldest key is where the next goes
        result["queue"] = result["queue"].t().roll(-int(ends[0]), 0).flip(0)     # newest first
    if any("_feature_blocks" in name for name in names):
        layout = "vissl"
    return result, layout


def from_ours(tensors: dict[str, Tensor], layout: str) -> dict:
    """Tensors with torchvision's names -> what a file of that layout holds: a state dict, for VISSL
    and pycls inside their nested dicts. What a method has besides its trunk is left out where the
    layout has no names for it. Raises ValueError where it has none for the trunk."""
    if layout not in TARGETS:
        raise ValueError(f"unknown layout {layout!r}; there is {', '.join(TARGETS)}")
    resnet = "layer1.0.conv1.weight" in tensors
    if resnet and layout not in ("torchvision", "timm", "vissl"):
        raise ValueError(f"{layout} has no names for a ResNet here")
    prefix = "regnet." * (layout == "transformers" and "fc.weight" in tensors)
    if layout == "transformers" and not any(".f.se." in key for key in tensors):
        layout = "transformers_x"
    trunk, heads = {}, {}               # heads: VISSL's, apart from the trunk
    for key, tensor in tensors.items():
        name, _, leaf = key.rpartition(".")
        if layout == "vissl" and re.fullmatch(r"head\.\d+|prototypes(\.\d+)?|fc", name):
            name = {"fc": "clf.0", "prototypes": "prototypes0"}.get(
                name, name.replace("head.", "projection_head.").replace("types.", "types"))
            heads[f"0.{name}.{leaf}"] = tensor
        elif resnet and (RESNET.fullmatch(name) or name == "fc"):
            trunk["_feature_blocks." * (layout == "vissl") + key] = tensor
        elif theirs := translate(name, "torchvision", layout):
            flip = layout == "pycls" and key == "stem.0.weight"              # RGB -> BGR
            theirs = theirs if name == "fc" else prefix + theirs
            trunk[f"{theirs}.{leaf}"] = tensor.flip(1) if flip else tensor
        elif part_of(key) in ("trunk", "detector"):
            raise ValueError(f"{layout} has no name for {key}")
    if layout == "vissl":
        return {"type": "consolidated", "classy_state_dict": {
            "base_model": {"model": {"trunk": trunk, "heads": heads}}}}
    return {"model_state": trunk} if layout == "pycls" else trunk
