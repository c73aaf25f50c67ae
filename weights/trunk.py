"""Trunk: a network by its name, without weights or with those of a file.

    trunk = build_trunk("regnety_16gf")                     # images (N, 3, s, s) -> features (N, C)
    trunk, loaded = open_trunk("seer_regnety_32gf")         # anything that weights.files reads

Needs torch, torchvision and regnet.py.
"""
from dataclasses import replace

import torch
import torchvision
from torch import nn
from torchvision.models.resnet import Bottleneck

from regnet import ARCHS, RegNet
from weights.files import Loaded, read
from weights.load import arch_of, describe, load_weights
from weights.official import OFFICIAL

RESNETS = {"resnet50": 1, "resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}     # widths


def build_trunk(arch: str, rounding: str = "pycls") -> nn.Module:
    """A name of regnet.ARCHS or RESNETS. ValueError: neither.  rounding: as in RegNetParams."""
    if arch in RESNETS:
        return build_resnet50(RESNETS[arch])
    if arch not in ARCHS:
        raise ValueError(f"unknown arch {arch!r}; there is "
                         + ", ".join(sorted([*ARCHS, *RESNETS])))
    return RegNet(replace(ARCHS[arch], rounding=rounding))


def build_resnet50(width: int = 1) -> nn.Module:
    """torchvision's ResNet-50, SwAV's own trunk; or all its widths times `width`, the stem's and
    the blocks' inner ones too, as facebookresearch/swav and VISSL have it (94, 375 and 586 million
    parameters at 2, 4 and 5). Its `width_per_group` would change the inner ones alone."""
    trunk = torchvision.models.resnet50()
    if width > 1:
        planes = trunk.inplanes = 64 * width
        trunk.conv1 = nn.Conv2d(3, planes, 7, stride=2, padding=3, bias=False)
        trunk.bn1 = nn.BatchNorm2d(planes)
        for i, (blocks, stride) in enumerate([(3, 1), (4, 2), (6, 2), (3, 2)]):
            layer = trunk._make_layer(Bottleneck, planes * 2 ** i, blocks, stride)
            setattr(trunk, f"layer{i + 1}", layer)
        for module in trunk.modules():
            if isinstance(module, nn.Conv2d):       # as torchvision begins
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    trunk.num_features, trunk.fc = 2048 * width, nn.Identity()
    return trunk


def open_trunk(source, arch: str = "", trust: bool = False) -> tuple[nn.Module, Loaded]:
    """The trunk in a file, in eval mode, and what else the file holds.

    source, trust: as in files.read; or source is what that returned.  arch: what it has to be; "":
    any. Raises ValueError where there is no trunk, none that is known, or another one.
    """
    if isinstance(source, str) and source in OFFICIAL and arch not in ("", OFFICIAL[source].arch):
        raise ValueError(f"{source} is of {OFFICIAL[source].arch}, not {arch}")
    loaded = source if isinstance(source, Loaded) else read(source, trust)
    known = arch_of(loaded.tensors)
    if not known or arch not in ("", known[0]):
        raise ValueError(f"{loaded.path} holds {describe(loaded.tensors)}, not "
                         + (arch or "one of regnet.ARCHS"))
    with torch.device("meta"):
        trunk = build_trunk(*known)
    load_weights(trunk, loaded)
    return trunk.eval(), loaded
