"""Load weights into a model, from any public RegNet checkpoint. Its keys tell whose it is.

    loaded = load_weights(trunk, "seer_regnety_128gf")      # an official file, downloaded once
    load_weights(swav, "runs/mine/checkpoint.pt")           # trunk, head and prototypes
    describe(loaded.tensors)                                # "regnety_128gf"

A file's parts are the trunk, the head and prototypes of SwAV, fc, a classifier, and detector, the
rest of one. The model takes the parts that it has; what is returned names the others. Loading
succeeds as a whole or leaves the model as it was: a ValueError then names tensors that are missing,
unexpected, of another shape or type, or not finite.

Needs torch; to name the arch of a file also regnet.py. The licences of official files are in
weights/official.py.
"""
import dataclasses
import re

import torch
from torch import Tensor, nn

from weights.files import Loaded, read
from weights.names import without_wrappers
from weights.official import OFFICIAL
from weights.sharded import put


def load_weights(model: nn.Module, source, trust: bool = False, quiet: bool = False) -> Loaded:
    """Load a file into a trunk (this project's, or torchvision's with or without its fc) or a SwAV.

    source, trust, quiet: as in `files.read`; or source is what that returned. The trunk is loaded
    always; head, prototypes and fc where both the file and the model have them. Values are copied
    into the model's tensors. A model on the meta device gets the file's own tensors instead: a
    mapped file is then all the memory it takes, and two such models share it. num_batches_tracked
    may be missing. Raises ValueError, and leaves the model as it was, where anything else does not
    fit.
    """
    state = model.state_dict(keep_vars=True)
    keys = {without_wrappers(key).removeprefix("trunk."): key for key in state}     # by name here
    old = {name: state[key] for name, key in keys.items()}
    if isinstance(source, str) and source in OFFICIAL:
        check_arch(old, source)
    loaded = source if isinstance(source, Loaded) else read(source, trust, quiet)
    new = loaded.tensors

    in_model, in_file = {_part(name) for name in old}, {_part(name) for name in new}
    unused, untouched = in_file - in_model, in_model - in_file
    if faults := _faults(old, new, (in_model & in_file) | {"trunk"}, untouched):
        raise ValueError(f"{loaded.path} holds {describe(new)}, the model is {describe(old)}; "
                         + "; ".join(faults))
    with torch.no_grad():
        for name in old:
            if _part(name) in untouched:
                continue
            value = new.get(name, torch.zeros((), dtype=torch.long)).detach()
            if name == "prototypes.weight" and (value.norm(dim=1) - 1).abs().max() > 1e-3:
                value = nn.functional.normalize(value, dim=1)   # facebookresearch/swav's are not
            _put(model, keys[name], old[name], value)
    return loaded._replace(unused=tuple(sorted(unused)), untouched=tuple(sorted(untouched)))


def _part(name: str) -> str:
    match = re.match(r"(head|prototypes|fc|detector)s?\.", name)
    return match[1] if match else "trunk"


def _faults(old: dict[str, Tensor], new: dict[str, Tensor], shared: set[str],
            untouched: set[str]) -> list[str]:
    """Where the file's tensors (new) do not fit the model's (old), in the parts that both have: a
    phrase for each kind of fault, with the first three names."""
    wanted = {name for name in old if _part(name) in shared}
    given = {name for name in new if _part(name) in shared}
    both = sorted(wanted & given)
    missing = [name for name in sorted(wanted - given) if not name.endswith("num_batches_tracked")]
    if any(old[name].is_meta for name in old if _part(name) in untouched):
        missing += [f"the whole of {part}" for part in sorted(untouched)]   # meta: no values yet
    kinds = {
        "missing": missing,
        "unexpected": sorted(given - wanted),
        "of another shape": [f"{name} {tuple(new[name].shape)} for {tuple(old[name].shape)}"
                             for name in both if new[name].shape != old[name].shape],
        "of another type": [f"{name} {new[name].dtype} for {old[name].dtype}" for name in both
                            if new[name].is_floating_point() != old[name].is_floating_point()],
        "not finite": [name for name in both
                       if not (new[name].is_meta or new[name].isfinite().all())]}
    return [f"{kind}: {', '.join(names[:3])}" + ", ..." * (len(names) > 3)
            for kind, names in kinds.items() if names]


def _put(model: nn.Module, key: str, old: Tensor, new: Tensor) -> None:
    """Copy new into old, the model's tensor at key; on the meta device, replace old by new."""
    if not old.is_meta:
        put(old, new)
        return
    owner, _, leaf = key.rpartition(".")
    new = new.to(old.dtype)
    setattr(model.get_submodule(owner), leaf, nn.Parameter(new, old.requires_grad)
            if isinstance(old, nn.Parameter) else new)


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
    """(a name of regnet.ARCHS, its rounding of widths), or ("resnet50", ""); None for any other
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
    """The network in words: its arch, or else its widths, depths and group widths."""
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
    """Compare a model with the official file of that name, before the file is downloaded. Raises
    ValueError where it is another network. Nothing is checked where regnet.py is not there."""
    entry = OFFICIAL[name]
    try:
        from regnet import ARCHS
    except ImportError:
        return
    fits, note = arch_of(tensors) == (entry.arch, ""), ""           # ResNet-50
    if entry.arch in ARCHS:
        params = ARCHS[entry.arch]
        if entry.licence in ("torchvision", "swag"):
            rounded = dataclasses.replace(params, rounding="torchvision")
            note = " with rounding='torchvision'" * (rounded.stages() != params.stages())
            params = rounded
        fits = stages_of(tensors) == (params.stages(), bool(params.se_ratio))
    if not fits:
        raise ValueError(f"{name} is of {entry.arch}{note}, and the model is {describe(tensors)}")
