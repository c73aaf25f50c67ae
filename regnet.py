"""RegNet: a design space of convolutional networks, from 200 MF to 10 billion parameters.

Papers: "Designing Network Design Spaces" (arXiv 2003.13678) for the space and its RegNetX and
RegNetY; SEER (arXiv 2103.01988 and 2202.08360) for RegNetY-64GF, -128GF, -256GF and -10B.

A RegNet is five numbers. The width of block j is first a line, u_j = w_0 + w_a * j (eq. 2),
then snapped to w_0 * w_m^k for a whole k (eq. 3-4) and to a multiple of 8; a run of equal widths is
a stage; widths are last made divisible by the group width of the 3x3 convolution.

    import torch
    from regnet import ARCHS, RegNet, complexity
    params = ARCHS["regnety_400mf"]            # RegNetParams -> .stages() -> RegNet
    features = RegNet(params)(torch.randn(2, 3, 224, 224))       # (2, 440)
    print(params.stages(), complexity(params))

    python -m figures.design_space      # the published networks; one explained; random members

How the paper comes to this: it does not search for one network, it narrows a *space* of networks
down, and keeps what makes its random members better (sections 3 and 4):

    AnyNetX_A   stem, four stages, head; each stage has a depth d_i, a width w_i, a bottleneck
                ratio b_i and a group width g_i of its own: 16 numbers, some 10^18 networks
    AnyNetX_B   one b for all stages: nothing is lost
    AnyNetX_C   one g for all stages: nothing is lost
    AnyNetX_D   widths never decrease: much better
    AnyNetX_E   depths never decrease: better
    RegNetX     the best of these have block widths near a straight line, so: a line, quantised.
                Five numbers with b = 1, the best; good ones have 12 to 28 blocks and w_m >= 2
    RegNetY     X with squeeze-and-excitation: better again

Parameter names are torchvision's, so weights move both ways with `load_state_dict`. The module
tree takes no notice of devices or ranks; `RegNet.blocks()` gives the residual blocks to whoever
wants to wrap them (activation checkpointing, FSDP, compile).

Differs from the reference (pycls):
- generated in pure Python float64, so it also works under `torch.device("meta")`;
- the trunk ends at the pooled features: there is no classifier;
- the bottleneck ratio is 1, as in every published RegNetX and RegNetY.

Shapes: B images, C features, w a stage's width.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Stage(NamedTuple):
    width: int
    depth: int
    group_width: int


@dataclass(frozen=True)
class RegNetParams:
    """The five parameters of a RegNet (arXiv 2003.13678, section 3.3), and what is common to all.

    depth: number of blocks.  w_0, w_a, w_m: initial width, slope, and width multiplier.
    group_width: channels per group of the 3x3 convolutions, at most the stage's width.
    se_ratio: width of squeeze-and-excitation relative to the block's input; 0 or None: RegNetX.
    stem_width: channels of the first convolution.
    rounding: "pycls" (the paper's), or "torchvision", whose rule for making widths divisible by
        group widths gives other networks for RegNetX-400MF, X-4.0GF, Y-800MF, Y-4.0GF, Y-8.0GF.
    Raises ValueError for parameters outside the space.
    """
    depth: int
    w_0: int
    w_a: float
    w_m: float
    group_width: int
    se_ratio: float | None = 0.25
    stem_width: int = 32
    rounding: str = "pycls"

    def __post_init__(self):
        rules = {"depth 1 to 1000": 1 <= self.depth <= 1000, "w_0 > 0": self.w_0 > 0,
                 "widths below a million": self.w_0 + self.w_a * self.depth < 1e6,
                 "w_0 a multiple of 8": self.w_0 % 8 == 0, "w_a >= 0": self.w_a >= 0,
                 "w_m 1.001 to 1000": 1.001 <= self.w_m <= 1000,
                 "group_width >= 1": self.group_width >= 1,
                 "0 <= se_ratio <= 1": 0 <= (self.se_ratio or 0) <= 1,
                 "stem_width >= 1": self.stem_width >= 1,
                 "rounding 'pycls' or 'torchvision'": self.rounding in ("pycls", "torchvision")}
        broken = [rule for rule, holds in rules.items() if not holds]
        if broken:
            raise ValueError(f"not a RegNet: {self} breaks {', '.join(broken)}")

    def stages(self) -> list[Stage]:
        """Runs of equal block widths, made divisible by the group width."""
        widths = [width for _, _, width in self.blocks()]
        stages = []
        for width in sorted(set(widths)):                                # never decreasing in j
            group_width = min(self.group_width, width)
            stages.append(Stage(self._divisible(width, group_width), widths.count(width),
                                group_width))
        return stages

    def blocks(self) -> list[tuple[float, float, int]]:
        """Of each block u_j, s_j and w_j: the line, the power of w_m that it is, and the width, for
        the nearest whole power (section 3.3, equations 2 to 4) and a multiple of 8."""
        blocks = []
        for j in range(self.depth):
            u = self.w_0 + self.w_a * j                                  # eq. 2
            s = math.log(u / self.w_0) / math.log(self.w_m)              # eq. 3
            blocks.append((u, s, 8 * round(self.w_0 * self.w_m ** round(s) / 8)))     # eq. 4
        return blocks

    def _divisible(self, width: int, group_width: int) -> int:
        if self.rounding == "pycls":
            return group_width * round(width / group_width)              # half to even
        nearest = group_width * int((width + group_width / 2) // group_width)     # half up
        return nearest if nearest >= 0.9 * width else nearest + group_width


# depth, w_0, w_a, w_m, group width. Up to 32GF: pycls. 64GF and 128GF: ClassyVision and VISSL.
# 256GF and 10B: VISSL's SEER models. (ClassyVision's own 256GF is another network.)
# RegNetY-100MF is not published: three stages, for images of 64 pixels and for CPUs.
_X = {
    "200mf": (13, 24, 36.44, 2.49, 8), "400mf": (22, 24, 24.48, 2.54, 16),
    "600mf": (16, 48, 36.97, 2.24, 24), "800mf": (16, 56, 35.73, 2.28, 16),
    "1.6gf": (18, 80, 34.01, 2.25, 24), "3.2gf": (25, 88, 26.31, 2.25, 48),
    "4gf": (23, 96, 38.65, 2.43, 40), "6.4gf": (17, 184, 60.83, 2.07, 56),
    "8gf": (23, 80, 49.56, 2.88, 120), "12gf": (19, 168, 73.36, 2.37, 112),
    "16gf": (22, 216, 55.59, 2.1, 128), "32gf": (23, 320, 69.86, 2.0, 168),
}
_Y = {
    "100mf": (8, 24, 24.48, 2.54, 8),
    "200mf": (13, 24, 36.44, 2.49, 8), "400mf": (16, 48, 27.89, 2.09, 8),
    "600mf": (15, 48, 32.54, 2.32, 16), "800mf": (14, 56, 38.84, 2.4, 16),
    "1.6gf": (27, 48, 20.71, 2.65, 24), "3.2gf": (21, 80, 42.63, 2.66, 24),
    "4gf": (22, 96, 31.41, 2.24, 64), "6.4gf": (25, 112, 33.22, 2.27, 72),
    "8gf": (17, 192, 76.82, 2.19, 56), "12gf": (19, 168, 73.36, 2.37, 112),
    "16gf": (18, 200, 106.23, 2.48, 112), "32gf": (20, 232, 115.89, 2.53, 232),
    "64gf": (20, 352, 147.48, 2.4, 328), "128gf": (27, 456, 160.83, 2.52, 264),
    "256gf": (27, 640, 230.83, 2.53, 373), "10b": (27, 1744, 620.83, 2.52, 1010),
}
ARCHS: dict[str, RegNetParams] = (
    {f"regnetx_{size}": RegNetParams(*five, se_ratio=None) for size, five in _X.items()}
    | {f"regnety_{size}": RegNetParams(*five) for size, five in _Y.items()})


class ConvNormAct(nn.Sequential):
    """Convolution without bias, BatchNorm, and (unless act=False) ReLU."""

    def __init__(self, w_in: int, w_out: int, kernel: int, stride: int = 1, groups: int = 1,
                 act: bool = True):
        conv = nn.Conv2d(w_in, w_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        norm = nn.BatchNorm2d(w_out, eps=1e-5, momentum=0.1)
        super().__init__(conv, norm, *([nn.ReLU(inplace=True)] if act else []))


class SqueezeExcitation(nn.Module):
    """Gate each channel by a two-layer network on its spatial mean (arXiv 1709.01507)."""

    def __init__(self, width: int, squeezed: int):
        super().__init__()
        self.fc1 = nn.Conv2d(width, squeezed, 1)
        self.fc2 = nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.adaptive_avg_pool2d(x, 1)                               # (B, w, 1, 1)
        gate = self.fc2(F.relu(self.fc1(gate)))
        return torch.sigmoid(gate) * x


class Bottleneck(nn.Sequential):
    """1x1, grouped 3x3, squeeze-and-excitation, 1x1: the residual branch f of a block."""

    def __init__(self, w_in: int, w_out: int, stride: int, group_width: int, se_ratio: float):
        super().__init__()
        self.a = ConvNormAct(w_in, w_out, 1)
        self.b = ConvNormAct(w_out, w_out, 3, stride, groups=w_out // group_width)
        if se_ratio:
            self.se = SqueezeExcitation(w_out, round(se_ratio * w_in))   # of the block's *input*
        self.c = ConvNormAct(w_out, w_out, 1, act=False)


class Block(nn.Module):
    """y = relu(shortcut(x) + f(x)); the shortcut is a 1x1 convolution where shapes change."""

    def __init__(self, w_in: int, w_out: int, stride: int, group_width: int, se_ratio: float):
        super().__init__()
        change = w_in != w_out or stride != 1
        self.proj = ConvNormAct(w_in, w_out, 1, stride, act=False) if change else None
        self.f = Bottleneck(w_in, w_out, stride, group_width, se_ratio)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.proj is None else self.proj(x)
        return F.relu(shortcut + self.f(x), inplace=True)


class RegNet(nn.Module):
    """Stem, stages, global average pool.

    forward(images): (B, 3, H, W) -> features (B, C), C = .num_features.
    forward_stages(images): one map per stage, (B, w, H/4, W/4), (B, w, H/8, W/8), ...
    """

    def __init__(self, params: RegNetParams):
        super().__init__()
        self.params = params
        self.stem = ConvNormAct(3, params.stem_width, 3, stride=2)
        self.trunk_output = nn.Sequential()
        width = params.stem_width
        for s, stage in enumerate(params.stages(), 1):
            blocks = nn.Sequential()
            for i in range(stage.depth):
                blocks.add_module(f"block{s}-{i}", Block(
                    width, stage.width, 2 if i == 0 else 1, stage.group_width, params.se_ratio))
                width = stage.width
            self.trunk_output.add_module(f"block{s}", blocks)
        self.num_features = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):       # He's fan-out, not divided by the groups
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, images: Tensor) -> Tensor:
        maps = self.trunk_output(self.stem(images))                      # (B, C, H/32, W/32)
        return F.adaptive_avg_pool2d(maps, 1).flatten(1)                 # (B, C)

    def forward_stages(self, images: Tensor) -> list[Tensor]:
        x, maps = self.stem(images), []
        for stage in self.trunk_output:
            x = stage(x)
            maps.append(x)
        return maps

    def blocks(self) -> list[Block]:
        """The residual blocks in order, for wrappers applied from outside."""
        return [block for stage in self.trunk_output for block in stage]


class Complexity(NamedTuple):
    params: int
    flops: int
    activations: int


def complexity(params: RegNetParams, resolution: int = 224, num_classes: int = 1000) -> Complexity:
    """Cost of one image, counted as the paper and pycls do; no network is built.

    params: learnable parameters.  flops: multiply-adds of convolutions and linear layer.
    activations: elements of all convolutions' outputs, and the logits.
    The published figures include a classifier of 1000 classes; num_classes=0 is the trunk alone.
    """
    total = [0, 0, 0]

    def conv(size, kernel, w_in, w_out, groups=1, norm=True):
        """A convolution with an output of size x size, with BatchNorm or else with a bias."""
        weights, outputs = kernel * kernel * w_in * w_out // groups, w_out * size * size
        total[0] += weights + w_out * (2 if norm else 1)
        total[1] += weights * size * size + (0 if norm else outputs)
        total[2] += outputs

    width, size = params.stem_width, (resolution + 1) // 2
    conv(size, 3, 3, width)
    for stage in params.stages():
        for i in range(stage.depth):
            size_in, w_out = size, stage.width
            size = (size + 1) // 2 if i == 0 else size
            if i == 0:
                conv(size, 1, width, w_out)
            conv(size_in, 1, width, w_out)
            conv(size, 3, w_out, w_out, groups=w_out // stage.group_width)
            if params.se_ratio:
                squeezed = round(params.se_ratio * width)
                conv(1, 1, w_out, squeezed, norm=False)
                conv(1, 1, squeezed, w_out, norm=False)
            conv(size, 1, w_out, w_out)
            width = w_out
    if num_classes:
        conv(1, 1, width, num_classes, norm=False)
    return Complexity(*total)


if __name__ == "__main__":
    raise SystemExit("regnet.py prints nothing: python -m figures.design_space does")
