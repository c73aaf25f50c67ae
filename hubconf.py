"""For torch.hub: every trunk by its name, with or without weights. Nothing else is installed.

    import torch
    trunk = torch.hub.load(".", "regnety_100mf", source="local")        # "." is this folder
    trunk = torch.hub.load("OWNER/NAME", "regnety_32gf", weights="seer_regnety_32gf")   # of GitHub
    torch.hub.list("OWNER/NAME")                            # all names
    torch.hub.help("OWNER/NAME", "regnety_32gf")            # its official weights, their licences

torch.hub looks for this file at the top of a repository, and takes each function in it whose name
does not begin with "_" for an entry point.
"""
from regnet import ARCHS as _ARCHS
from weights.official import LICENCES as _LICENCES
from weights.official import OFFICIAL as _OFFICIAL
from weights.trunk import RESNETS as _RESNETS
from weights.trunk import build_trunk as _build_trunk
from weights.trunk import open_trunk as _open_trunk

dependencies = ["torch", "torchvision"]


def _entry_point(arch):
    def entry_point(weights=None, trust=False):
        return _open_trunk(weights, arch, trust)[0] if weights else _build_trunk(arch)

    official = "".join(f"\n    {name}: {entry.about}. Licence: {_LICENCES[entry.licence]}"
                       for name, entry in _OFFICIAL.items() if entry.arch == arch)
    entry_point.__doc__ = f"""The trunk {arch}: normalised images (N, 3, H, W) -> features (N, C).

    weights: None, for random ones; else an official name, the path of a file or of a run's folder,
    or a URL, in any layout that weights/names.py knows. The trunk is then in eval mode, and what
    else the file holds is left out. An official file is downloaded once; its licence is printed.
    trust: read a file that holds objects besides tensors, without them, as VISSL's may.
    Raises ValueError where the weights are not of this trunk.

    Official weights:{official or " none"}
    """
    return entry_point


globals().update({arch: _entry_point(arch) for arch in (*_ARCHS, *_RESNETS)})
