"""Scale: SEER's batch on the hardware there is. Device, the model's wrappers, and one step.

    model = build_model("regnety_16gf", (4096, 4096, 256), 16000, head_bn=True, device="cuda")
    wrapped = wrap(model, device, checkpoint_activations=True, sync_bn_group=32)
    loss, _, _ = swav_backward(model, wrapped, micro_batches, counts=[2, 4], codes_of=codes_of)

SwAV's codes share a batch out among the prototypes, so a batch that is cut into micro-batches to
fit must not be cut for Sinkhorn. The step therefore goes twice over the assigned crops: first for
their scores alone, without gradient; then, with the codes of the whole batch in hand, forward and
backward a micro-batch at a time. DDP communicates in the last one. With BatchNorm in eval mode the
gradient is that of the joined batch; what BatchNorm does in training is said at `swav_backward`.

The method's files know nothing of all this. Papers: SEER (arXiv 2103.01988, section 3.3) for mixed
precision, activation checkpointing and SyncBatchNorm in groups; arXiv 1604.06174 for checkpointing.

Shapes: B pictures of this rank, b of a micro-batch, V crops, A assigned crops, D embedding,
K prototypes. The assigned crops are the first two.
"""
import warnings
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Callable, Sequence

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from regnet import ARCHS, Block, RegNet
from swav import SwAV, swav_loss

TRUNKS = (*ARCHS, "resnet50")
ASSIGNED = 2                 # crops of a picture that get codes: the first two
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# ----------------------------------------------------------------------------- the hardware
def pick_device(name: str, local_rank: int = 0) -> torch.device:
    if not name:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":            # not every build for a CPU has oneDNN
            native = (torch.backends.mkldnn.is_available()
                      and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        else:
            native = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if native else "fp32"
    return PRECISIONS[name]


# --------------------------------------------------------------------------------- the model
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


def build_model(arch: str, head: Sequence[int], prototypes: int, head_bn: bool = False,
                seed: int = 0, device="cpu") -> SwAV:
    """A fresh SwAV, its weights drawn on the device itself: 10 billion never pass the host."""
    torch.manual_seed(seed)
    with torch.device(device):
        return SwAV(build_trunk(arch), head, prototypes, head_bn)


def wrap(model: SwAV, device: torch.device, sync_bn_group: int = 0,
         checkpoint_activations: bool = False, compiled: bool = False) -> nn.Module:
    """Everything that is done to the built model from outside, in this order:

    1. SyncBatchNorm over groups of ranks: replaces BatchNorm modules, so it comes first;
    2. activation checkpointing: replaces the stages, whatever is in them by then;
    3. memory layout: of all weights;
    4. compiling: of the trunk as it is by then, so that checkpointing is inside the graph;
    5. DDP: last, for it takes the parameters as it finds them.

    No name of a parameter changes. `model` is changed in place and goes on being the model: its
    state dict, and the passes without gradient. What is returned is for passes with gradient.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    group = sync_group(sync_bn_group, ranks, device)
    if group > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model, dist.new_subgroups(group)[0])
    if checkpoint_activations:
        checkpoint_blocks(model.trunk)
    model.to(memory_format=layout(device))
    if compiled:
        compile_trunk(model.trunk)
    if ranks == 1:
        return model
    # Running statistics are rank 0's, which is the one that saves: nothing is broadcast for them.
    with warnings.catch_warnings():         # of an option whose successor torch 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None,
                                       broadcast_buffers=False, gradient_as_bucket_view=True)


def sync_group(wanted: int, ranks: int, device: torch.device) -> int:
    """Ranks that share their BatchNorm statistics: as many as wanted, if that divides their number;
    1 on a CPU, for which PyTorch has no SyncBatchNorm."""
    if device.type != "cuda":
        return 1
    return max(n for n in range(1, max(1, min(wanted, ranks)) + 1) if ranks % n == 0)


def layout(device: torch.device) -> torch.memory_format:
    """Channels-last is 1.2 to 1.4 times as fast on a CPU; on a GPU nothing was measured."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


# ------------------------------------------------------------------- activation checkpointing
class Recomputed(nn.Sequential):
    """Blocks of which only the inputs are kept; backward computes each block again.

    A block works on copies of its buffers, and the first computation's go back into the block: so
    running statistics are updated once, bitwise as without, also by SyncBatchNorm and in a
    compiled graph (whose backward must not find its inputs changed by the next crop size).
    """

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            buffers = dict(block.named_buffers())
            copies = {name: buffer.clone() for name, buffer in buffers.items()}
            # nothing in a block is random
            x = checkpoint(functional_call, block, copies, x, use_reentrant=False,
                           preserve_rng_state=False)
            for name, buffer in buffers.items():
                buffer.copy_(copies[name])
        return x


def checkpoint_blocks(trunk: nn.Module) -> None:
    """Make each stage of a RegNet or a ResNet a Recomputed one; names stay as they are."""
    for name, stage in stages_of(trunk):
        parent, _, child = name.rpartition(".")
        recomputed = Recomputed(OrderedDict(stage.named_children()))
        setattr(trunk.get_submodule(parent), child, recomputed)


def check_compiler(device: torch.device, backend="inductor") -> None:
    """Raises ValueError where nothing can be compiled for this device."""
    try:
        torch.compile(torch.neg, backend=backend)(torch.zeros(1, device=device))
    except Exception as error:                  # of many kinds
        reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
        raise ValueError("--compile needs a C++ compiler, on a GPU Triton too, and does not work "
                         f"here: {reason}") from None


def compile_trunk(trunk: nn.Module, backend="inductor") -> None:
    """Compile a trunk's training pass: one graph per crop size, made in the first step. (The pass
    for the codes of several micro-batches, which has no gradient, makes another of the first size.)
    In eval mode, where sizes may be any, it stays as it is."""
    # DDP would cut the graph at its buckets, which it cannot do in a checkpointed block; gradients
    # are complete only after the last crop size anyway
    torch._dynamo.config.optimize_ddp = False
    torch._dynamo.config.recompile_limit = 64           # crop sizes; beyond the limit it gives up
    eager, fast = trunk.forward, torch.compile(trunk.forward, backend=backend, dynamic=False)
    trunk.forward = lambda images: (fast if trunk.training else eager)(images)


def stages_of(trunk: nn.Module) -> list[tuple[str, nn.Sequential]]:
    """Names and modules of the stages: sequences of residual blocks."""
    kinds = (Block, torchvision.models.resnet.Bottleneck)
    return [(name, module) for name, module in trunk.named_modules()
            if isinstance(module, nn.Sequential) and isinstance(module[0], kinds)]


@contextmanager
def still_statistics(module: nn.Module):
    """BatchNorm normalises by its batch, as in training; afterwards its buffers are as before."""
    kept = [(buffer, buffer.clone()) for norm in module.modules() if isinstance(norm, _BatchNorm)
            for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


# ------------------------------------------------------------------------------------ the step
def assigned_sizes(counts: Sequence[int]) -> int:
    """How many of the crop sizes, with so many crops each, hold the assigned crops."""
    return next(i for i in range(1, len(counts) + 1) if sum(counts[:i]) >= ASSIGNED)


def swav_backward(model: SwAV, wrapped: nn.Module, micro_batches: Sequence, counts: Sequence[int],
                  codes_of: Callable, temperature: float = 0.1, dtype: torch.dtype = torch.float32,
                  scaler: torch.amp.GradScaler | None = None,
                  prepare: Callable = lambda crops: crops) -> tuple[Tensor, Tensor, Tensor]:
    """Forward, codes, loss and backward of one batch: its gradient is added to .grad.

    model, wrapped: the same network, before and after `wrap`.
    micro_batches: each a list with one entry per crop size; all hold the same number of pictures.
    counts: number of crops of each size.
    codes_of(embeddings (V*B, D), scores (V*B, K), V) -> codes (A, B, K), of the first two crops.
    prepare: entries of a micro-batch -> crops, one tensor (count * b, 3, s, s) per size. Called
        once a pass, so that only one micro-batch of float pixels exists at a time.
    dtype: of autocast.  scaler: for float16.

    Returns the loss, and embeddings and scores of this rank's pictures: of all crops where there is
    one micro-batch, else of the assigned ones.

    Differs from the joined batch where BatchNorm is in training: the trunk's normalises each
    micro-batch by itself (SyncBatchNorm: together with the other ranks'), as on so many more
    ranks. A head's BatchNorm sees all crops in the second pass, but in the first, for the codes,
    the assigned ones alone.
    """
    device = next(model.parameters()).device
    num_crops, joint = sum(counts), len(micro_batches) > 1

    def forward(network, entries):
        # An autocast of its own for each pass: weights cast without gradient must not be reused.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return network(prepare(entries))

    if joint:
        sizes = assigned_sizes(counts)
        computed = sum(counts[:sizes])
        with torch.no_grad(), still_statistics(model):
            passes = [[x.unflatten(0, (computed, -1))[:ASSIGNED].clone()
                       for x in forward(model, entries[:sizes])] for entries in micro_batches]
        embeddings, scores = (torch.cat(parts, dim=1).flatten(0, 1) for parts in zip(*passes))
        del passes                                               # (A*B, D), (A*B, K) remain
        codes = codes_of(embeddings, scores, ASSIGNED).chunk(len(micro_batches), dim=1)

    total = 0.0
    for i, entries in enumerate(micro_batches):
        silent = i < len(micro_batches) - 1 and isinstance(wrapped, DistributedDataParallel)
        with wrapped.no_sync() if silent else nullcontext():
            mine = forward(wrapped, entries)
            if not joint:
                embeddings, scores = mine
                codes = [codes_of(embeddings, scores, num_crops)]
            loss = swav_loss(mine[1], codes[i], num_crops, temperature=temperature)
            loss = loss / len(micro_batches)
            (scaler.scale(loss) if scaler else loss).backward()
        total += loss.detach()
    return total, embeddings.detach(), scores.detach()
