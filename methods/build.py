"""Build: a trunk by its name, a method by its configuration.

    trunk = build_trunk("regnety_16gf")                     # images (N, 3, s, s) -> features (N, C)
    method = build_method(config, device="cuda", world=8)   # SwAV on that trunk

What a training loop needs of a method, as SwAV (swav.py) has it. `outputs` is what forward gives, a
tuple of tensors whose rows are crop-major; A views of an image have targets, B images.

    forward(crops, one tensor per size) -> outputs, the embeddings first
    targets(outputs, step) -> (A, B, ...), without gradient
    joint: whether targets are of the whole batch; else micro-batches have their own
    loss(outputs, targets) -> scalar
    before_step(step), after_step(step): before and after the optimizer's; after_step only where
        the step was not skipped
    statistics(outputs, loss) -> numbers for the log;  state_dict(), load_state_dict()
    assigned(crops, all_crops) -> outputs (A, B, ...) of the views that have targets, which targets
        takes too: for a batch in several micro-batches, whose images are joined along the second
        dimension. all_crops: whether all go through the network, as BatchNorm of the head needs it
    .trunk, the product; .queue, a swav.Queue or None

The mean of the loss over micro-batches and ranks is the batch's. A momentum encoder, a centre, a
memory are parameters without gradient or buffers, the same on all ranks, which change in after_step
alone. BatchNorm's statistics are put back where a step is skipped (training/rollback.py), and what
else forward and targets keep is overwritten at the next step: so a skipped step leaves no trace.
train.py takes SwAV alone so far; the other files of this folder are to be called from other code.
"""
from dataclasses import replace

import torch
import torchvision
from torch import nn

from regnet import ARCHS, RegNet
from swav import SwAV

TRUNKS = (*ARCHS, "resnet50")


def build_trunk(arch: str, rounding: str = "pycls") -> nn.Module:
    """A name of regnet.ARCHS, or resnet50: torchvision's, SwAV's own trunk. ValueError: neither.
    rounding: as in RegNetParams."""
    if arch not in TRUNKS:
        raise ValueError(f"unknown arch {arch!r}; there is {', '.join(sorted(TRUNKS))}")
    if arch == "resnet50":
        trunk = torchvision.models.resnet50()
        trunk.num_features, trunk.fc = trunk.fc.in_features, nn.Identity()
        return trunk
    return RegNet(replace(ARCHS[arch], rounding=rounding))


def build_method(config, device="cpu", world: int = 1) -> SwAV:
    """A fresh SwAV, its weights drawn from config.seed on the device itself, so that 10 billion
    parameters never pass the host.

    config: anything with the fields of recipes.config.Config.  world: number of processes, which
    share the queue.
    """
    torch.manual_seed(config.seed)
    with torch.device(device):
        return SwAV(build_trunk(config.arch), config.head, config.prototypes, config.head_bn,
                    counts=[spec.count for spec in config.crops], epsilon=config.epsilon,
                    iterations=config.sinkhorn_iterations, hard=config.hard,
                    temperature=config.temperature, queue=config.queue // world,
                    queue_start=config.queue_start, frozen_steps=config.freeze_prototypes)
