"""Parameter names: what each library calls the tensors of the same network, translated both ways.

    from torchvision.models import regnet_y_400mf
    from weights.names import from_ours, to_ours, translate
    tensors, layout = to_ours(regnet_y_400mf().state_dict())         # or another library's
    state = from_ours(tensors, "timm")                   # what timm's own file would hold
    translate("s1.b2.conv1.bn", "timm", "torchvision")   # "trunk_output.block1.block1-1.f.a.1"

This project's names are torchvision's. A layout is the set of names that one library uses, a key
of BLOCKS. BLOCKS and NAMES translate a RegNet, HEADS the parts of SwAV. A ResNet-50 has
torchvision's names in every library; VISSL puts a prefix before them. Tensors are not changed, with
one exception: pycls trains on BGR images, so the input channels of its first convolution are
reversed, both ways.

Errors are ValueErrors. The message of `to_ours` begins with a verb ("holds stem.0.weight twice"):
its caller puts the name of the file before it.
"""
import re

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
# VISSL's and facebookresearch/swav's names of head, prototypes and classifier -> this project's
HEADS = {r"(?:heads\.)?(?:0\.)?projection_head\.(\d+)": r"head.\1",
         r"(?:heads\.)?0\.prototypes0|prototypes\.prototypes0": "prototypes",
         r"(?:heads\.)?0\.clf\.0": "fc", r"(head\.\d+|prototypes)": r"\1"}
RESNET = re.compile(r"conv1|bn1|layer\d\.\d+\.(?:conv\d|bn\d|downsample\.\d)")
# what DDP, torch.compile, FSDP and activation checkpointing add to a name
WRAPPERS = re.compile(r"module|_orig_mod|_fsdp_wrapped_module|_fpw_module"
                      r"|_checkpoint_wrapped_module|block\d+-part\d+")


def without_wrappers(key: str) -> str:
    """module.stem.0.weight -> stem.0.weight"""
    return ".".join(part for part in key.split(".") if not WRAPPERS.fullmatch(part))


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
    """A module's name in layout -> here; also of a ResNet and of SwAV's parts. None: unknown."""
    bare = name.removeprefix("_feature_blocks.")
    if RESNET.fullmatch(bare):
        return bare
    for pattern, ours in HEADS.items():
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return translate(name, layout, "torchvision")


def to_ours(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A flat state dict in any layout -> the same with torchvision's names, and the layout.

    SwAV's own parts become head.N and prototypes, a classifier fc. An unknown key stays as it is.
    Raises ValueError where half of the names or more are unknown, or two keys mean one tensor.
    """
    plain = {}
    for key, tensor in tensors.items():
        path = re.sub(r"^(?:trunk\.)?(?:base_model\.)?(?:regnet\.)?", "", without_wrappers(key))
        if path in plain:
            raise ValueError(f"holds {path} twice, once as {key}")
        plain[path] = tensor
    names = {key.rpartition(".")[0] for key in plain}        # without weight, bias, running_mean
    layout = max(BLOCKS, key=lambda layout: sum(
        translate(name, layout, "torchvision") is not None for name in names))

    renamed = {name: _rename(name, layout) for name in names}
    if 2 * sum(new is not None for new in renamed.values()) <= len(renamed):
        raise ValueError("holds no RegNet or ResNet-50 under any names known here; the first are "
                         + ", ".join(map(repr, list(tensors)[:3])))
    result = {}
    for key, tensor in plain.items():
        name, _, leaf = key.rpartition(".")
        new = f"{renamed[name]}.{leaf}" if renamed[name] else key
        if new in result:
            raise ValueError(f"holds {new} twice, once as {key}")
        result[new] = tensor
    if layout == "pycls" and result.get("stem.0.weight", torch.empty(0)).dim() == 4:
        result["stem.0.weight"] = result["stem.0.weight"].flip(1)            # BGR -> RGB
    if any("_feature_blocks" in name for name in names):
        layout = "vissl"
    return result, layout


def from_ours(tensors: dict[str, Tensor], layout: str) -> dict:
    """Tensors with torchvision's names -> what a file of that layout holds: a state dict, for VISSL
    and pycls inside their nested dicts. head, prototypes and fc are left out where the layout has
    no names for them. Raises ValueError where it has none for the trunk."""
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
        if layout == "vissl" and re.fullmatch(r"head\.\d+|prototypes|fc", name):
            name = {"fc": "clf.0", "prototypes": "prototypes0"}.get(name, f"projection_{name}")
            heads[f"0.{name}.{leaf}"] = tensor
        elif resnet and (RESNET.fullmatch(name) or name == "fc"):
            trunk["_feature_blocks." * (layout == "vissl") + key] = tensor
        elif theirs := translate(name, "torchvision", layout):
            flip = layout == "pycls" and key == "stem.0.weight"              # RGB -> BGR
            theirs = theirs if name == "fc" else prefix + theirs
            trunk[f"{theirs}.{leaf}"] = tensor.flip(1) if flip else tensor
        elif not re.fullmatch(r"head\.\d+|prototypes|fc", name):
            raise ValueError(f"{layout} has no name for {key}")
    if layout == "vissl":
        return {"type": "consolidated", "classy_state_dict": {
            "base_model": {"model": {"trunk": trunk, "heads": heads}}}}
    return {"model_state": trunk} if layout == "pycls" else trunk
