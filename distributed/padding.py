"""Padding: a RegNet's odd widths, computed as multiples of 8, by the same parameters.

    pad(trunk)                          # RegNetY-256GF: groups of 373 channels are computed as 376
    odd_widths(trunk.params)            # [Width(groups=2, channels=373), ...], of the stages

Matrix units read rows of 16 bytes, which 8 numbers of 16 bits fill. SEER's two largest networks
(arXiv 2202.08360) have groups of 373 and 1010 channels, and stages of 746, 1492, 4103 and 10444, or
2020 and 11110. Here each group of channels is widened with zeros to the next multiple of 8.

Parameters and buffers stay as they are, with their names; they are padded in each forward pass,
which then updates the real running statistics. A channel of padding is zero after every layer: its
weights, its BatchNorm's scale and shift are zero, and a gate multiplies zero. So outputs, gradients
and running statistics are those of the network without padding, but for the rounding of sums.

Within a stage maps stay padded. The first block of a stage pads its input, the last one returns the
real channels, so maps of stages and features have their usual shapes. Each pass makes a padded copy
of the weights, in the precision of autocast, which is kept for the backward pass.

Shapes: B images, g channels of a group, p of a padded one, G groups, w = G * g a stage's width.
"""
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from regnet import Block, RegNet, RegNetParams

MULTIPLE = 8


class Width(NamedTuple):
    """Of a dimension that holds channels: so many groups of so many."""
    groups: int
    channels: int

    @property
    def padded(self) -> int:
        """Channels of a padded group."""
        return math.ceil(self.channels / MULTIPLE) * MULTIPLE

    @property
    def odd(self) -> bool:
        return self.padded != self.channels

    def pad(self, x: Tensor, dim: int) -> Tensor:
        """(..., G * g, ...) -> (..., G * p, ...)"""
        if not self.odd:
            return x
        after = [0, 0] * (x.dim() - 1 - dim) + [0, self.padded - self.channels]
        return F.pad(x.unflatten(dim, (self.groups, self.channels)), after).flatten(dim, dim + 1)

    def crop(self, x: Tensor, dim: int) -> Tensor:
        """(..., G * p, ...) -> (..., G * g, ...)"""
        if not self.odd:
            return x
        groups = x.unflatten(dim, (self.groups, self.padded))
        return groups.narrow(dim + 1, 0, self.channels).flatten(dim, dim + 1)


class PaddedBlock(Block):
    """A block that computes with padded groups. It has the modules of the block it is made from,
    whatever BatchNorm they hold, under their names.

    before, after: channels of its input and output.  first, last: whether it is its stage's.
    """

    def __init__(self, block: Block, before: Width, after: Width, first: bool, last: bool):
        nn.Module.__init__(self)
        self.proj, self.f = block.proj, block.f
        self.block = (block,)           # in a tuple it is no module of this one: names stay
        self.before, self.after, self.first, self.last = before, after, first, last
        group = Width(1, after.channels)
        convolutions = {"proj.0": (after, before), "f.a.0": (after, before),
                        "f.b.0": (after, group), "f.c.0": (after, after)}
        if hasattr(block.f, "se"):
            squeezed = Width(1, block.f.se.fc1.out_channels)
            convolutions |= {"f.se.fc1": (squeezed, after), "f.se.fc2": (after, squeezed)}
        # of each tensor the channels of its first dimensions; BatchNorm's count has none
        self.widths = {name: convolutions.get(name.rpartition(".")[0], (after,))[:tensor.dim()]
                       for name, tensor in block.state_dict(keep_vars=True).items()}

    def forward(self, x: Tensor) -> Tensor:
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        padded = {name: self.pad(name, tensor) for name, tensor in tensors.items()}
        if self.first:
            x = self.before.pad(x, 1)                                    # (B, G * p, H, W)
        x = functional_call(self.block[0], padded, x)
        for name, buffer in self.named_buffers():
            if self.training and buffer.dim():
                buffer.copy_(self.after.crop(padded[name], 0))
        return self.after.crop(x, 1) if self.last else x

    def pad(self, name: str, tensor: Tensor) -> Tensor:
        kind = tensor.device.type
        if (tensor.dim() > 1 and torch.amp.is_autocast_available(kind)
                and torch.is_autocast_enabled(kind)):       # before it is padded: less to copy
            tensor = tensor.to(torch.get_autocast_dtype(kind))
        for dim, width in enumerate(self.widths[name]):
            tensor = width.pad(tensor, dim)
        return tensor


def widths(params: RegNetParams) -> list[Width]:
    """Of each stage."""
    return [Width(stage.width // stage.group_width, stage.group_width)
            for stage in params.stages()]


def odd_widths(params: RegNetParams) -> list[Width]:
    """Of the stages that `pad` changes."""
    return [width for width in widths(params) if width.odd]


def pad(trunk: nn.Module) -> None:
    """Make the blocks of a RegNet that have odd widths PaddedBlocks. Another trunk stays."""
    if not isinstance(trunk, RegNet):
        return
    before = Width(1, MULTIPLE)                 # the stem's output is taken as it is
    for stage, after in zip(trunk.trunk_output, widths(trunk.params)):
        last = len(stage) - 1
        for i, (name, block) in enumerate(list(stage.named_children())):
            width = before if i == 0 else after
            if width.odd or after.odd:
                setattr(stage, name, PaddedBlock(block, width, after, i == 0, i == last))
        before = after
