"""Weights: every public RegNet checkpoint, told apart by its keys; official files by name.

    load_weights(trunk, "seer_regnety_128gf")             # an official file, downloaded once
    load_weights(swav, "runs/mine/checkpoint.pt")         # trunk, head and prototypes
    tensors = read("model.pyth").tensors                  # torchvision's names

    python weights.py                                     # the official files
    python weights.py FILE                                # what is it?
    python weights.py FILE --to timm OUT                  # and in another library's names

The same network has other names in every library; NAMES is the whole translation, both ways. A file
is read as tensors and plain values alone: nothing in it is executed. It is loaded whole or not at
all: a tensor that is missing, unexpected or of another shape is named. Of a file's three parts (the
trunk; head and prototypes of SwAV; fc, a classifier) the model takes those that it has, and what is
returned says which were left.

Needs torch; to name the network in a file also regnet.py, and for .safetensors that library.
Licences: SEER's weights are for non-commercial research only, SwAV's and SWAG's are CC BY-NC 4.0.
"""
import dataclasses
import hashlib
import http.client
import os
import pickle
import re
import sys
import types
import urllib.parse
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

# ------------------------------------------------------------------------------ the translation
# {s} is the stage, from 1, and {i} the block, from 0; {s0}, {s2} and {i1} are one less or more.
BLOCKS = {
    "torchvision": "trunk_output.block{s}.block{s}-{i}",
    "timm": "s{s}.b{i1}",
    "pycls": "s{s}.b{i1}",
    "classy": "trunk_output.block{s}.block{s}-{i}",
    "vissl": "_feature_blocks.res{s2}.block{s}-{i}",
    "transformers": "encoder.stages.{s0}.layers.{i}",
    "transformers_x": "encoder.stages.{s0}.layers.{i}",
}
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
NAMES = {column[0]: dict(zip(_COLUMNS[0][1:], column[1:])) for column in _COLUMNS}
NAMES["vissl"] = NAMES["classy"] | {part: f"_feature_blocks.conv1.{part}"
                                    for part in ("stem.0", "stem.1")}
# without squeeze-and-excitation what follows it moves up
NAMES["transformers_x"] = NAMES["transformers"] | {
    "f.se.fc1": "-", "f.se.fc2": "-",
    "f.c.0": "layer.2.convolution", "f.c.1": "layer.2.normalization"}
# VISSL's and facebookresearch/swav's names of SwAV's own parts -> this project's
HEADS = {r"(?:heads\.)?(?:0\.)?projection_head\.(\d+)": r"head.\1",
         r"(?:heads\.)?0\.prototypes0|prototypes\.prototypes0": "prototypes",
         r"(?:heads\.)?0\.clf\.0": "fc", r"(head\.\d+|prototypes)": r"\1"}
RESNET = re.compile(r"conv1|bn1|layer\d\.\d+\.(?:conv\d|bn\d|downsample\.\d)")
WRAPPERS = re.compile(r"module|_orig_mod|_fsdp_wrapped_module|_fpw_module"
                      r"|_checkpoint_wrapped_module|block\d+-part\d+")


def _pattern(block: str) -> re.Pattern:
    """block{s}.block{s}-{i} -> block(?P<s>\\d+)\\.block(?P=s)\\-(?P<i>\\d+)\\.(?P<part>.+)"""
    seen = set()

    def field(match):
        again = match[1] in seen
        seen.add(match[1])
        return f"(?P={match[1]})" if again else rf"(?P<{match[1]}>\d+)"

    return re.compile(re.sub(r"\\{(\w+)\\}", field, re.escape(block)) + r"\.(?P<part>.+)")


TARGETS = list(BLOCKS)[:-1]            # transformers_x is chosen where it is needed
PATTERNS = {layout: _pattern(block) for layout, block in BLOCKS.items()}


def translate(name: str, source: str, target: str) -> str | None:
    """A module's name in one layout -> in another; None where either has none."""
    match = PATTERNS[source].fullmatch(name)
    part = match["part"] if match else name
    ours = next((ours for ours, theirs in NAMES[source].items() if theirs == part), "")
    theirs = NAMES[target].get(ours, "-")
    if theirs == "-" or bool(match) != ours.startswith(("proj.", "f.")):
        return None
    if not match:
        return theirs
    at = {field: int(value) for field, value in match.groupdict().items() if field != "part"}
    s = at["s"] if "s" in at else at["s0"] + 1
    i = at["i"] if "i" in at else at["i1"] - 1
    return BLOCKS[target].format(s=s, s0=s - 1, s2=s + 1, i=i, i1=i + 1) + "." + theirs


def to_ours(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """A flat state dict in any layout -> the same with torchvision's names, and the layout.

    SwAV's own parts become head.N and prototypes. A key that is unknown stays as it is. Raises
    ValueError where that is so of half of them.
    """
    plain = {}
    for key, tensor in tensors.items():
        path = ".".join(part for part in key.split(".") if not WRAPPERS.fullmatch(part))
        path = re.sub(r"^(?:trunk\.)?(?:base_model\.)?(?:regnet\.)?", "", path)
        if path in plain:
            raise ValueError(f"holds {path} twice, once as {key}")
        plain[path] = tensor
    names = {key.rpartition(".")[0] for key in plain}        # without weight, bias, running_mean
    layout = max(BLOCKS, key=lambda layout: sum(
        translate(name, layout, "torchvision") is not None for name in names))

    def rename(name):
        bare = name.removeprefix("_feature_blocks.")
        if RESNET.fullmatch(bare):
            return bare
        for pattern, ours in HEADS.items():
            if re.fullmatch(pattern, name):
                return re.sub(pattern, ours, name)
        return translate(name, layout, "torchvision")

    renamed = {name: rename(name) for name in names}
    if 2 * sum(new is not None for new in renamed.values()) <= len(renamed):
        raise ValueError("holds no RegNet or ResNet-50 with names that are known: they are like "
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
    """The way back: what the library's own file holds, without the parts (head, prototypes, fc)
    that it has no name for. Raises ValueError where it has none for the trunk."""
    if layout not in TARGETS:
        raise ValueError(f"unknown layout {layout!r}; there is {', '.join(TARGETS)}")
    resnet = "layer1.0.conv1.weight" in tensors
    if resnet and layout not in ("torchvision", "timm", "vissl"):
        raise ValueError(f"{layout} has no names for a ResNet here")
    prefix = "regnet." * (layout == "transformers" and "fc.weight" in tensors)
    if layout == "transformers" and not any(".f.se." in key for key in tensors):
        layout = "transformers_x"
    trunk, heads = {}, {}
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


# -------------------------------------------------------------------------------- official files
LICENCES = {
    "seer": "SEER License Agreement: non-commercial research only "
            "(github.com/facebookresearch/vissl, projects/SEER/MODEL_LICENSE.md)",
    "swav": "CC BY-NC 4.0: non-commercial (github.com/facebookresearch/swav)",
    "swag": "CC BY-NC 4.0: non-commercial (github.com/facebookresearch/SWAG)",
    "vissl": "none of their own; VISSL's repository is MIT (github.com/facebookresearch/vissl)",
    "torchvision": "BSD-3-Clause (github.com/pytorch/vision)",
}


class Official(NamedTuple):
    url: str
    arch: str                      # a name of regnet.ARCHS, or resnet50
    licence: str                   # a key of LICENCES
    about: str


def _official() -> dict[str, Official]:
    vissl = "https://dl.fbaipublicfiles.com/vissl/model_zoo/"
    swav = "https://dl.fbaipublicfiles.com/deepcluster/"
    vision = "https://download.pytorch.org/models/"
    files = {}
    for size, path in {
            "32gf": "seer_regnet32d/seer_regnet32gf_model_iteration244000.torch",
            "64gf": "seer_regnet64/seer_regnet64gf_model_final_checkpoint_phase0.torch",
            "128gf": "swav_ig1b_regnet128Gf_cnstant_bs32_node16_sinkhorn10_proto16k_syncBN64_"
                     "warmup8k/model_final_checkpoint_phase0.torch",
            "256gf": "swav_ig1b_cosine_rg256gf_noBNhead_wd1e5_fairstore_bs16_node64_sinkhorn10_"
                     "proto16k_apex_syncBN64_warmup8k/model_final_checkpoint_phase0.torch",
            "10b": "seer_regnet10B/model_iteration124500_conso.torch"}.items():
        files[f"seer_regnety_{size}"] = Official(
            vissl + path, f"regnety_{size}", "seer", "SEER, a billion pictures, no labels")
    for size, path in {
            "32gf": "seer_regnet32_finetuned_in1k_model_final_checkpoint_phase78.torch",
            "64gf": "seer_regnet64_finetuned_in1k_model_final_checkpoint_phase78.torch",
            "128gf": "seer_regnet128_finetuned_in1k_model_final_checkpoint_phase78.torch",
            "256gf": "seer_regnet256_finetuned_in1k_model_final_checkpoint_phase38.torch",
            "10b": "seer_10b_finetuned_in1k_model_phase28_conso.torch"}.items():
        files[f"seer_ft_regnety_{size}"] = Official(
            f"{vissl}seer_finetuned/{path}", f"regnety_{size}", "seer",
            "SEER, fine-tuned on ImageNet at 384 pixels")
    for size, path in {
            "16gf": "swav_regnet16_in1k/swav_in1k_regnet16gf_model_final_checkpoint_phase799.torch",
            "128gf": "swav_regnet128_in1k/model_phase230.torch"}.items():
        files[f"swav_regnety_{size}"] = Official(
            vissl + path, f"regnety_{size}", "vissl", "SwAV on ImageNet, no labels")
    for run in ("100ep", "200ep", "400ep", "800ep", "200ep_bs256", "400ep_bs256", "400ep_2x224"):
        files[f"swav_resnet50_{run}"] = Official(
            f"{swav}swav_{run}_pretrain.pth.tar", "resnet50", "swav", "SwAV on ImageNet, no labels")
    for size, v1, v2 in (row.split() for row in """
            y_400mf c65dace8 e6988f5f; y_800mf 1b27b58c 58fc7688; y_1_6gf b11a554e 0d7bc02a
            y_3_2gf b5a9779c 9180c971; y_8gf d0d0e4a8 dc2b1b54; y_16gf 9e6ed7dd 3e4a00f9
            y_32gf 4dee3f7a 8db6d4b5; x_400mf adf1edd5 62229a5f; x_800mf ad17e45c 94a99ebd
            x_1_6gf e3633e7f a12f2b72; x_3_2gf f342aeae 7071aa85; x_8gf 03ceed89 2b70d774
            x_16gf 2007eb11 ba3796d7; x_32gf 9d47f8d0 6eb8fdc6""".replace("\n", ";").split(";")
            if row.strip()):
        arch = "regnet" + size[0] + "_" + size[2:].replace("_", ".")
        for version, digest in (("v1", v1), ("v2", v2)):
            files[f"torchvision_{arch}_{version}"] = Official(
                f"{vision}regnet_{size}-{digest}.pth", arch, "torchvision",
                f"torchvision, ImageNet with labels, recipe {version[1]}")
    for size, whole, linear in (("16gf", "43afe44d", "f3ec0043"), ("32gf", "04fdfa75", "e1583746"),
                                ("128gf", "c8ce3e52", "cbe8ce12")):
        for kind, part, digest in (("swag", "", whole), ("swag_linear", "lc_", linear)):
            files[f"{kind}_regnety_{size}"] = Official(
                f"{vision}regnet_y_{size}_{part}swag-{digest}.pth", f"regnety_{size}", "swag",
                "SWAG, hashtags, then ImageNet" + " with the trunk frozen" * (kind != "swag"))
    return files


OFFICIAL = _official()
_told = set()                      # licences that this process has printed


def fetch(name: str, quiet: bool = False) -> Path:
    """An official file in torch.hub's cache; downloaded where it is not there. Prints its licence
    once, unless quiet.

    A file is kept under the last part of its URL where that is its own (torchvision's: the same
    file torchvision keeps), else under its name here: two of SEER's end alike.
    """
    entry = OFFICIAL[name]
    last = entry.url.rpartition("/")[2]
    own = sum(other.url.endswith("/" + last) for other in OFFICIAL.values()) == 1
    path = Path(torch.hub.get_dir(), "checkpoints", last if own else f"{name}.torch")
    if entry.licence not in _told and not quiet:
        _told.add(entry.licence)
        print(f"licence of {name}: {LICENCES[entry.licence]}", file=sys.stderr)
    digest = re.search(r"-([0-9a-f]{8})\.", last)
    return download(entry.url, path, digest and digest[1], gigabytes(entry))


def gigabytes(entry: Official) -> float | None:
    """At least how large the file is, by the trunk's parameters in float32; None: not known here.
    (A file of VISSL's may hold the optimizer's state beside it.)"""
    if entry.arch == "resnet50":
        return 0.1
    try:
        from regnet import ARCHS, complexity
    except ImportError:
        return None
    return 4e-9 * complexity(ARCHS[entry.arch]).params


def download(url: str, path: Path, digest: str | None = None, size: float | None = None) -> Path:
    """Raises ValueError where it does not succeed."""
    if not path.exists():
        about = "" if size is None else f", {size:.2g} GB or more"
        print(f"downloading {url}{about}, to {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{url} could not be downloaded: {error}; put the file at {path}"
                             ) from None
    return path


# ------------------------------------------------------------------------------------ from files
class Loaded(NamedTuple):
    """What a file holds, and what `load_weights` left: parts of the file that the model has no
    place for, and parts of the model that the file does not have."""
    tensors: dict[str, Tensor]     # torchvision's names; head.N.*, prototypes.weight; fc.*
    layout: str                    # a key of BLOCKS
    path: Path
    config: dict = {}              # of a run's checkpoint: its configuration
    unused: tuple[str, ...] = ()
    untouched: tuple[str, ...] = ()


class Inert:
    """In the place of an object of a class that is not loaded: takes everything, does nothing."""

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass


class _InertUnpickler(pickle.Unpickler):
    """Makes tensors and plain containers; every other class and function becomes an Inert. Pickle
    can set attributes of what it is given, so that is never a live function or Python class."""
    CLASSES = {("collections", "OrderedDict"), ("torch", "Size"), ("torch", "device")}
    MAKERS = {"_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"}

    def find_class(self, module, name):
        dtype = getattr(torch, name, None) if module == "torch" else None
        if (module, name) in self.CLASSES or isinstance(dtype, torch.dtype):
            return super().find_class(module, name)
        if module == "torch._utils" and name in self.MAKERS:
            make = super().find_class(module, name)
            return lambda *args: make(*args)
        if module == "torch" and re.fullmatch(r"\w+Storage", name):
            return torch.serialization.StorageType(name)
        return type(name, (Inert,), {"__module__": module})


def read(source: str | os.PathLike, trust: bool = False, quiet: bool = False) -> Loaded:
    """A path, a URL or a name of OFFICIAL -> its tensors, with torchvision's names.

    A file with objects of other classes is refused, unless trust: then these are left out. (None
    of them is ever made.) Raises ValueError for what cannot be read.
    """
    path, text = Path(source), str(source)
    text = next((name for name, entry in OFFICIAL.items() if entry.url == text), text)
    if text in OFFICIAL:
        path = fetch(text, quiet)
    elif re.match(r"https?://", text):              # many end in model.pth: the whole URL counts
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = urllib.parse.urlsplit(text).path.rpartition("/")[2]
        path = download(text, Path(torch.hub.get_dir(), "checkpoints", f"{digest}-{name}"))
    if path.is_dir():                               # a run's
        path = path / "trunk.pt"
        if not path.is_file():
            raise ValueError(f"{source} is a folder without a trunk.pt: name a file")
    if not path.is_file():
        raise ValueError(f"{source} is neither a file nor the name of an official one (python "
                         "weights.py lists them)")
    try:
        content = open_file(path, trust)
        tensors, layout = to_ours(state_dict_of(content))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    config = content["config"] if {"version", "config", "model"} <= content.keys() else {}
    return Loaded(tensors, layout, path, config)


def open_file(path: Path, trust: bool = False):
    """What a .pt, .pth, .torch, .pyth, .tar, .bin or .safetensors file holds; on the CPU, mapped
    into memory where its format allows. Raises ValueError."""
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("pip install safetensors to read it") from None
        try:
            return load_file(path)
        except Exception as error:          # its errors share no class
            raise ValueError(f"is damaged, or no safetensors file ({error})") from None
    zipped = False
    try:
        zipped = zipfile.is_zipfile(path)
        options = dict(map_location="cpu", mmap=zipped or None)
        if zipped and any(re.search(r"/code/|/constants\.pkl$", name)
                          for name in zipfile.ZipFile(path).namelist()):
            raise ValueError("TorchScript")
        if trust:
            inert = types.SimpleNamespace(
                __name__="inert", Unpickler=_InertUnpickler, UnpicklingError=pickle.UnpicklingError,
                load=lambda file, **options: _InertUnpickler(file, **options).load())
            return torch.load(path, weights_only=False, pickle_module=inert, **options)
        return torch.load(path, weights_only=True, **options)
    except Exception as error:              # a damaged pickle raises nearly anything
        if "TorchScript" in str(error):
            raise ValueError("is a TorchScript program, not a file of weights") from None
        found = [] if trust else foreign_names(path, zipped, error)
        if found:
            raise ValueError(f"holds objects that are not tensors ({', '.join(found)}), which "
                             "could run code; load_weights(..., trust=True) leaves them out"
                             ) from None
        reason = (str(error).strip() or type(error).__name__).split("\n")[-1]
        raise ValueError(f"is damaged, or no file of weights ({reason})") from None


def foreign_names(path: Path, zipped: bool, error: Exception) -> list[str]:
    """The classes and functions for which torch refused a file."""
    found = re.findall(r"GLOBAL ([\w.]+)", str(error))
    try:
        if zipped:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                   # damaged; the first error says so
        pass
    return sorted(set(found))


def state_dict_of(content) -> dict[str, Tensor]:
    """The tensors in what a file holds: a state dict, or what VISSL, pycls, swav or this project
    keep it in. Raises ValueError."""
    if isinstance(content, dict) and content.get("type", "consolidated") in (
            "shard_list", "shard", "slice_list", "slice"):
        raise ValueError(f"is a {content['type']} of sharded training: consolidate it with VISSL's "
                         "convert_sharded_checkpoint.py first")
    if isinstance(content, dict) and isinstance(content.get("classy_state_dict"), dict):
        try:
            model = content["classy_state_dict"]["base_model"]["model"]
            parts = {f"heads.{key}": tensor for key, tensor in model.get("heads", {}).items()}
            content = model["trunk"] | parts
        except (KeyError, TypeError, AttributeError):
            raise ValueError("is a VISSL file without a network") from None
    for wrapper in ("model", "model_state", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)
               } if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError("holds no network")
    return tensors


# ------------------------------------------------------------------------------------ into models
def load_weights(model: nn.Module, source, trust: bool = False, quiet: bool = False) -> Loaded:
    """Load a file into a trunk (this project's, or torchvision's with or without its fc) or a SwAV.

    source, trust, quiet: as in `read`; or source is what it gave. The trunk is loaded whole; head
    and prototypes, and fc, where both the file and the model have them. Tensors are copied into the
    model's; those of a model on the meta device are replaced by the file's own, so that one copy of
    a mapped file is all the memory it takes (two such models share it). num_batches_tracked may be
    missing. Raises ValueError, and leaves the model as it was, where anything else does not fit.
    """
    wanted = {}                                     # name here -> name in the model, tensor
    for key, tensor in model.state_dict(keep_vars=True).items():
        path = ".".join(part for part in key.split(".") if not WRAPPERS.fullmatch(part))
        wanted[path.removeprefix("trunk.")] = key, tensor
    if isinstance(source, str) and source in OFFICIAL:
        check_arch({name: tensor for name, (_, tensor) in wanted.items()}, source)
    loaded = source if isinstance(source, Loaded) else read(source, trust, quiet)

    def part(name):
        match = re.match(r"(head|prototypes|fc)s?\.", name)
        return match[1] if match else "trunk"

    ours, theirs = {part(name) for name in wanted}, {part(name) for name in loaded.tensors}
    shared = (ours & theirs) | {"trunk"}
    mine = {name for name in wanted if part(name) in shared}
    given = {name for name in loaded.tensors if part(name) in shared}
    missing = [name for name in sorted(mine - given) if not name.endswith("num_batches_tracked")]
    unexpected = sorted(given - mine)
    pairs = {name: (loaded.tensors[name], wanted[name][1]) for name in sorted(mine & given)}
    misshapen = [f"{name} {tuple(new.shape)} for {tuple(old.shape)}"
                 for name, (new, old) in pairs.items() if new.shape != old.shape]
    mistyped = [f"{name} {new.dtype} for {old.dtype}" for name, (new, old) in pairs.items()
                if new.is_floating_point() != old.is_floating_point()]
    left = tuple(sorted(ours - theirs))
    if any(wanted[name][1].is_meta for name in wanted if part(name) in left):
        missing += [f"the whole of {name}" for name in left]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen,
              "of another type": mistyped}
    if any(faults.values()):
        found = "; ".join(f"{what}: {', '.join(names[:3])}" + ", ..." * (len(names) > 3)
                          for what, names in faults.items() if names)
        raise ValueError(f"{loaded.path} holds {describe(loaded.tensors)}, the model is "
                         f"{describe({name: t for name, (_, t) in wanted.items()})}; {found}")
    with torch.no_grad():
        for name in mine:
            key, old = wanted[name]
            new = loaded.tensors.get(name, torch.zeros((), dtype=torch.long)).detach()
            if name == "prototypes.weight" and (new.norm(dim=1) - 1).abs().max() > 1e-3:
                new = nn.functional.normalize(new, dim=1)   # swav normalises at the next step
            if not old.is_meta:
                old.copy_(new)
                continue
            owner, _, leaf = key.rpartition(".")
            new = new.to(old.dtype)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(new, old.requires_grad)
                    if isinstance(old, nn.Parameter) else new)
    return loaded._replace(unused=tuple(sorted(theirs - ours)), untouched=left)


def stages_of(tensors: dict[str, Tensor]) -> tuple[list[tuple[int, int, int]], bool]:
    """Width, depth and group width of each stage of a RegNet, and whether it is a RegNetY."""
    blocks = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"trunk_output\.block(\d+)\.block\d+-(\d+)\.f\.b\.0\.weight", name)
        if match and tensor.dim() == 4:
            blocks.setdefault(int(match[1]), {})[int(match[2])] = tuple(tensor.shape)
    stages = [(stage[0][0], len(stage), stage[0][1]) for _, stage in sorted(blocks.items())
              if 0 in stage]
    return stages, any(".f.se." in name for name in tensors)


def arch_of(tensors: dict[str, Tensor]) -> tuple[str, str] | None:
    """A name of regnet.ARCHS and its rounding of widths, or ("resnet50", ""); None: another
    network. Raises ImportError where regnet.py is not there."""
    from regnet import ARCHS
    if "layer1.0.conv1.weight" in tensors:
        width = tensors["layer1.0.conv1.weight"].shape[:1]
        plain = "layer3.5.conv3.weight" in tensors and "layer3.6.conv3.weight" not in tensors
        return ("resnet50", "") if plain and width == (64,) else None
    stages, squeeze = stages_of(tensors)
    for rounding in ("pycls", "torchvision"):
        for name, params in ARCHS.items():
            params = dataclasses.replace(params, rounding=rounding)
            if params.stages() == stages and bool(params.se_ratio) == squeeze:
                return name, rounding
    return None


def describe(tensors: dict[str, Tensor]) -> str:
    """The network in words, with the name of the arch that fits where it is known."""
    stages, squeeze = stages_of(tensors)
    try:
        known = arch_of(tensors)
    except ImportError:
        known = None
    if known and known[1] == "torchvision":
        return f"{known[0]} with rounding='torchvision'"
    if known:
        return known[0]
    if not stages:
        return "a network that is no RegNet"
    widths, depths, groups = (",".join(map(str, column)) for column in zip(*stages))
    note = ""
    if (widths, depths) == ("640,1696,2544,5088", "3,7,16,1"):
        note = (" (ClassyVision's 256GF, RegNetParams(27, 640, 124.47, 2.04, 848); SEER's is "
                "another network)")
    return (f"a RegNet{'Y' if squeeze else 'X'} of widths {widths}, depths {depths} and group "
            f"widths {groups}{note}")


def check_arch(tensors: dict[str, Tensor], name: str) -> None:
    """Before a download. Raises ValueError where the model is another network than the file."""
    entry = OFFICIAL[name]
    try:
        from regnet import ARCHS
    except ImportError:
        return
    fits = arch_of(tensors) == (entry.arch, "")
    if entry.arch in ARCHS:
        rounding = "torchvision" if entry.licence in ("torchvision", "swag") else "pycls"
        params = dataclasses.replace(ARCHS[entry.arch], rounding=rounding)
        fits = stages_of(tensors) == (params.stages(), bool(params.se_ratio))
    if not fits:
        raise ValueError(f"{name} is of {entry.arch}, as torchvision rounds its widths where that "
                         f"differs, and the model is {describe(tensors)}"
                         if entry.licence == "torchvision" else
                         f"{name} is of {entry.arch}, and the model is {describe(tensors)}")


# ------------------------------------------------------------------------------- the command line
def summary(loaded: Loaded) -> str:
    tensors = loaded.tensors
    trunk = [t for name, t in tensors.items() if not re.match(r"(head|prototypes|fc)\.", name)
             and not re.search(r"running_|num_batches", name)]
    linear = [t for name, t in tensors.items() if re.fullmatch(r"head\.\d+\.weight", name)
              and t.dim() == 2]
    lines = [f"{loaded.path}: {describe(tensors)}, named as in {loaded.layout}"]
    if trunk:
        lines.append(f"trunk: {sum(t.numel() for t in trunk) / 1e6:,.1f} M parameters, "
                     f"{str(trunk[0].dtype).removeprefix('torch.')}")
    if linear:
        norm = any(name.endswith("running_mean") for name in tensors if name.startswith("head."))
        lines.append("head: " + "-".join(str(n) for n in (
            linear[0].shape[1], *(t.shape[0] for t in linear))) + ", with BatchNorm" * norm)
    if "prototypes.weight" in tensors:
        lines.append(f"prototypes: {len(tensors['prototypes.weight']):,}")
    if "fc.weight" in tensors:
        lines.append(f"fc: {len(tensors['fc.weight']):,} classes")
    licences = {entry.licence for name, entry in OFFICIAL.items()
                if loaded.path.name in (entry.url.rpartition("/")[2], f"{name}.torch")}
    if not licences and len(tensors.get("prototypes.weight", ())) == 16000:
        licences, lines = {"seer"}, [*lines, "16,000 prototypes are SEER's, most likely"]
    lines.append("licence: " + (", or ".join(LICENCES[licence] for licence in sorted(licences))
                                or "that of where the file comes from; it does not say"))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    import argparse
    parser = argparse.ArgumentParser(description="What is in a file of weights, and conversion.")
    parser.add_argument("source", nargs="?", help="a file, a run's folder, or an official name; "
                                                  "none: the official files")
    parser.add_argument("--to", nargs=2, metavar=("LAYOUT", "OUT"),
                        help=f"write OUT, named as in LAYOUT: {', '.join(TARGETS)}")
    args = parser.parse_args(argv)
    if not args.source:
        for name, entry in OFFICIAL.items():
            size = gigabytes(entry)
            print(f"{name:<32} {entry.arch:<15} {'' if size is None else f'{size:.2f}+ GB':>9}  "
                  f"{entry.licence:<12} {entry.about}\n    {entry.url}")
        return
    try:
        loaded = read(args.source)
        print(summary(loaded))
        if args.to:
            write(loaded.tensors, args.to[0], Path(args.to[1]))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"weights.py: error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


def write(tensors: dict[str, Tensor], layout: str, out: Path) -> None:
    state = from_ours(tensors, layout)
    named = to_ours(state_dict_of(state))[0]
    left = sorted({key.split(".")[0] for key in tensors} - {key.split(".")[0] for key in named})
    if left:
        print(f"left out, for {layout} has no names for them: {', '.join(left)}", file=sys.stderr)
    if out.suffix == ".safetensors":
        try:
            from safetensors.torch import save_file
        except ImportError:
            raise ValueError("pip install safetensors to write it") from None
        if layout in ("vissl", "pycls"):
            raise ValueError(f"{layout}'s files are nested, which safetensors cannot be")
        return save_file({key: tensor.contiguous() for key, tensor in state.items()}, out)
    aside = out.with_name(out.name + ".tmp")
    try:
        torch.save(state, aside)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
