"""Load weights into a model, from any public RegNet checkpoint. Its keys tell whose it is.

    loaded = load_weights(trunk, "seer_regnety_128gf")      # an official file, downloaded once
    load_weights(swav, "runs/mine/checkpoint.pt")           # trunk, head and prototypes
    describe(loaded.tensors)                                # "regnety_128gf"

A file's parts are the trunk, what its method has besides (head, prototypes, predictor, momentum
trunk and head, queue, center), fc, a classifier, and detector, the rest of one. The model takes the
parts that it has; what is returned names the others. Loading succeeds as a whole or leaves the
model as it was: a ValueError then names tensors that are missing, unexpected, of another shape or
type, or not finite.

Needs torch; to name the arch of a file also regnet.py. The licences of official files are in
weights/official.py.
"""
import dataclasses
import re

import torch
from torch import Tensor, nn

from weights.files import Loaded, read
from weights.names import own_names, part_of
from weights.official import OFFICIAL
from weights.sharded import put


def load_weights(model: nn.Module, source, trust: bool = False, quiet: bool = False) -> Loaded:
    """Load a file into a trunk (this project's, or torchvision's with or without its fc), a SwAV or
    another method.

    source, trust, quiet: as in `files.read`; or source is what that returned. The trunk is loaded
    always, any other part where both the file and the model have it; but a head of other layers is
    left out, and what rests on it, prototypes of another number, a queue of another length, and
    the memory of another run's images. A momentum encoder that the file does not have is a copy of
    what it has. Values are copied into the model's tensors. A model on the meta device gets the
    file's own tensors instead: a mapped file is then all the memory it takes, and two such models
    share it. num_batches_tracked may be missing. Raises ValueError, and leaves the model as it was,
    where anything else does not fit.
    """
    state = model.state_dict(keep_vars=True)
    keys = {name: key for key, name in own_names(state).items()}                    # by name here
    old = {name: state[key] for name, key in keys.items()}
    if isinstance(source, str) and source in OFFICIAL:
        check_arch(old, source)
    loaded = source if isinstance(source, Loaded) else read(source, trust, quiet)
    in_model, in_file = ({part_of(name) for name in names} for names in (old, loaded.tensors))
    new = loaded.tensors | {name: loaded.tensors[twin].clone() for name in old
                            if part_of(name) not in in_file
                            and (twin := _without_momentum(name)) in loaded.tensors}
    shared = in_model & {part_of(name) for name in new} - _left_out(old, new) | {"trunk"}
    unused, untouched = in_file - shared, in_model - shared
    if faults := _faults(old, new, shared, untouched):
        raise ValueError(f"{loaded.path} holds {describe(new)}, the model is {describe(old)}; "
                         + "; ".join(faults))
    with torch.no_grad():
        for name in old:
            if part_of(name) in untouched:
                continue
            value = new.get(name, torch.zeros((), dtype=torch.long)).detach()
            if part_of(name) == "prototypes" and (value.norm(dim=1) - 1).abs().max() > 1e-3:
                value = nn.functional.normalize(value, dim=1)   # facebookresearch/swav's are not
            _put(model, keys[name], old[name], value)
    return loaded._replace(loaded=tuple(sorted(shared & in_model)), unused=tuple(sorted(unused)),
                           untouched=tuple(sorted(untouched)))


def _without_momentum(name: str) -> str:
    """Of a momentum encoder's tensor: the name of the one that it follows."""
    return re.sub(r"^momentum\.0\.", "", re.sub(r"^momentum\.1\.", "head.", name))


def _left_out(old: dict[str, Tensor], new: dict[str, Tensor]) -> set[str]:
    """Parts that a file (new) may have for a network, or for images, that are not the model's."""
    heads = [{name for name in tensors if part_of(name) == "head"
              and not name.endswith("num_batches_tracked")} for tensors in (old, new)]
    left = {"memory"} | {part for part in ("queue", "center") if part in old and part in new
                         and old[part].shape != new[part].shape}
    left |= {"prototypes" for name in old.keys() & new.keys() if part_of(name) == "prototypes"
             and len(old[name]) != len(new[name])}
    rest = {"head", "momentum head", "prototypes", "predictor", "queue", "center"}
    return left if heads[0] == heads[1] else left | rest


def _faults(old: dict[str, Tensor], new: dict[str, Tensor], shared: set[str],
            untouched: set[str]) -> list[str]:
    """Where the file's tensors (new) do not fit the model's (old), in the parts that both have: a
    phrase for each kind of fault, with the first three names."""
    wanted = {name for name in old if part_of(name) in shared}
    given = {name for name in new if part_of(name) in shared}
    both = sorted(wanted & given)
    missing = [name for name in sorted(wanted - given) if not name.endswith("num_batches_tracked")]
    if any(old[name].is_meta for name in old if part_of(name) in untouched):
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
    """(a name of regnet.ARCHS, its rounding of widths), or ("resnet50", ""), or a wider one,
    ("resnet50w2", ""); None for any other network. Raises ImportError where regnet.py is not there.
    """
    from regnet import ARCHS
    if "layer1.0.conv1.weight" in tensors:
        first = tensors["layer1.0.conv1.weight"]
        plain = ("layer3.5.conv3.weight" in tensors and "layer3.6.conv3.weight" not in tensors
                 and first.shape[:1] == tensors.get("conv1.weight", first).shape[:1])
        name = plain and {(64,): "resnet50", (128,): "resnet50w2", (256,): "resnet50w4",
                          (320,): "resnet50w5"}.get(tuple(first.shape[:1]))
        return (name, "") if name else None
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
    fits, note = arch_of(tensors) == (entry.arch, ""), ""           # a ResNet
    if entry.arch in ARCHS:
        params = ARCHS[entry.arch]
        if entry.licence in ("torchvision", "swag"):
            rounded = dataclasses.replace(params, rounding="torchvision")
            note = " with rounding='torchvision'" * (rounded.stages() != params.stages())
            params = rounded
        fits = stages_of(tensors) == (params.stages(), bool(params.se_ratio))
    if not fits:
        raise ValueError(f"{name} is of {entry.arch}{note}, and the model is {describe(tensors)}")
