"""Files of weights: any public checkpoint of a RegNet -> tensors with torchvision's names.

    loaded = read("model.pyth")                 # or a URL, an official name, a run's folder, or the
                                                # folder of a sharded checkpoint
    loaded.tensors["stem.0.weight"]             # float32 (32, 3, 3, 3), on the CPU
    loaded.layout                               # "pycls": whose names the file has

Nothing in a file is executed: it is read as tensors and plain values alone. Objects of any other
class are never made: a file that holds some is refused, or with trust=True read without them. A
file in torch's zip format is mapped into memory: the disk is read where a tensor is used.

Needs torch, and for .safetensors that library. Raises ValueError. The messages of `open_file` and
`state_dict_of` begin with a verb ("holds no network"): `read` puts the file's path before them.
"""
import hashlib
import os
import pickle
import re
import types
import urllib.parse
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from weights.names import to_ours
from weights.official import OFFICIAL, download, fetch
from weights.sharded import is_sharded, load_whole
from weights.terminal import reason


class Loaded(NamedTuple):
    """What a file holds. `load_weights` also says which of its parts (trunk, head, prototypes, ...;
    names.part_of) the model took, which it has no place for, and which of the model's the file does
    not have."""
    tensors: dict[str, Tensor]     # torchvision's names; head.N.*, prototypes.weight, ...; fc.*
    layout: str                    # a key of names.BLOCKS
    path: Path
    config: dict = {}              # of a run's checkpoint: its configuration
    loaded: tuple[str, ...] = ()           # parts of both
    unused: tuple[str, ...] = ()           # parts of the file alone
    untouched: tuple[str, ...] = ()        # parts of the model alone


class Inert:
    """Stands for an object of a class that is not loaded: takes any call, does nothing."""

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
    """Makes tensors and plain containers; every other class or function becomes an Inert.

    A pickle can set attributes on what `find_class` returns. So that is never a class written in
    Python, and never torch's own function, but a new lambda that calls it.
    """
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
    """Tensors with torchvision's names, from a path, a URL or a name of official.OFFICIAL.

    Of a run's folder it is trunk.pt. A file with objects of other classes is refused, unless trust:
    then they are left out. quiet: print no licence. Raises ValueError for what cannot be read.
    """
    path = _path_of(source, quiet)
    content = load_whole(path, "model/") if path.is_dir() else None     # its errors name the path
    try:
        content = content or open_file(path, trust)
        tensors, layout = to_ours(state_dict_of(content))
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    config = content["config"] if {"version", "config", "model"} <= content.keys() else {}
    return Loaded(tensors, layout, path, config)


def _path_of(source: str | os.PathLike, quiet: bool) -> Path:
    """The file that is meant; downloaded, where source is a URL or an official name."""
    path, text = Path(source), str(source)
    text = next((name for name, entry in OFFICIAL.items() if entry.url == text), text)
    if text in OFFICIAL:
        path = fetch(text, quiet)
    elif re.match(r"https?://", text):
        # many URLs end in model.pth: a hash of the whole URL keeps their files apart
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        name = urllib.parse.urlsplit(text).path.rpartition("/")[2]
        path = download(text, Path(torch.hub.get_dir(), "checkpoints", f"{digest}-{name}"))
    if path.is_dir() and not is_sharded(path):      # a run's
        path = path / "trunk.pt"
        if not path.is_file():
            raise ValueError(f"{source} is a folder without a trunk.pt: name a file")
    if not path.exists():
        raise ValueError(f"{source} is neither a file nor the name of an official one "
                         "(python -m weights lists them)")
    return path


def open_file(path: Path, trust: bool = False):
    """What a .pt, .pth, .torch, .pyth, .tar, .bin or .safetensors file holds, on the CPU; mapped
    into memory where its format allows. Raises ValueError."""
    try:
        open(path, "rb").close()
    except OSError as error:
        raise ValueError(f"is unreadable: {error.strerror}") from None
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("needs safetensors to be read: pip install safetensors") from None
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
        if trust:                           # what torch.load uses of a pickle module
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
        # torch's words about a pickle advise to load it with weights_only=False
        why = "" if isinstance(error, pickle.UnpicklingError) else f" ({reason(error)})"
        raise ValueError(f"is damaged, or no file of weights{why}") from None


def foreign_names(path: Path, zipped: bool, error: Exception) -> list[str]:
    """The names of the classes and functions that made torch refuse a file."""
    found = re.findall(r"GLOBAL ([\w.]+)", str(error))
    try:
        if zipped:
            found = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:                   # the file is damaged, as `error` says already
        pass
    return sorted(set(found))


def state_dict_of(content) -> dict[str, Tensor]:
    """The state dict in what a file holds: it may lie inside the dicts of VISSL, pycls, this
    project or facebookresearch's (swav, moco, barlowtwins, dino). DINO's teacher is put beside its
    student, with "momentum." before its names. Raises ValueError where there is none."""
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
    if isinstance(content, dict) and all(isinstance(content.get(key), dict)
                                         for key in ("student", "teacher")):
        loss = content.get("dino_loss")
        center = loss.get("center") if isinstance(loss, dict) else None
        content = content["student"] | {
            f"momentum.{key}": value for key, value in content["teacher"].items()} | (
            {"center": center.flatten()} if isinstance(center, Tensor) else {})
    for wrapper in ("model", "model_state", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)
               } if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(key, str) for key in tensors):
        raise ValueError("holds no network")
    return tensors
