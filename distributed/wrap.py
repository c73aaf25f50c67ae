"""Wrap: SyncBatchNorm, padding, activation checkpointing, layout, compiling, DDP or shards.

    model = SwAV(build_trunk("regnety_16gf"), head_bn=True).to(device)
    wrapped = wrap(model, device, checkpoint_activations=True, sync_bn_group=32)
    embeddings, scores = wrapped(crops)             # for passes with gradient

The files of the method know nothing of this. Papers: SEER (arXiv 2103.01988, section 3.3) for mixed
precision, activation checkpointing and SyncBatchNorm in groups; arXiv 1604.06174 for checkpointing.
"""
import warnings
from collections import OrderedDict

import torch
import torch.distributed as dist
import torchvision
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from distributed.fsdp import Sharded, shard
from distributed.hardware import layout
from distributed.padding import pad
from distributed.ranks import fail_together, is_main
from distributed.sync_bn import convert
from larc import LARC, update
from regnet import Block


def wrap(model: nn.Module, device: torch.device, sync_bn_group: int = 0,
         checkpoint_activations: bool = False, compiled: bool = False,
         channels_last: bool | None = None, pad_widths: bool = False,
         compress_gradients: bool = False, mesh: DeviceMesh | None = None,
         dtype: torch.dtype = torch.float32) -> nn.Module | Sharded:
    """Everything that is done to a built model from outside, in this order:

    1. SyncBatchNorm over groups of ranks: replaces BatchNorm modules, so it comes first;
    2. padding of odd widths: replaces the blocks, with the modules that are in them by then;
    3. activation checkpointing: replaces the stages, so that a block is padded again in backward;
    4. memory layout: of convolutions' weights, for those of a linear layer have but one;
    5. compiling: of the trunk as it is by then, so that checkpointing is inside the graph;
    6. DDP, or shards over a mesh (fsdp.shard_mesh), which compute in dtype: last, for these take
       the parameters as they find them. Sharded weights are contiguous.

    No parameter's name changes. `model`, which has a .trunk, is changed in place; its state dict
    and its passes without gradient stay in use. What is returned is for passes with gradient.
    """
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    group = sync_group(sync_bn_group, ranks)
    if group > 1:
        convert(model, dist.new_subgroups(group)[0])    # its collectives do not wait for DDP's
    if mesh:                                            # a weight that is cut has one layout
        channels_last = False
    arrange(model.trunk, device, checkpoint_activations, channels_last, pad_widths)
    model.to(memory_format=layout(device, channels_last))       # a momentum encoder's trunk too
    if mesh:
        blocks = [block for _, stage in stages_of(model.trunk) for block in stage]
        return shard(model, blocks, mesh, dtype, compress_gradients)
    if compiled:
        compile_trunk(model.trunk)
    return model if ranks == 1 else distribute(model, device, compress_gradients)


def arrange(trunk: nn.Module, device: torch.device, checkpoint_activations: bool,
            channels_last: bool | None, pad_widths: bool) -> None:
    """Padding, activation checkpointing and memory layout of a trunk, in place."""
    if pad_widths:
        pad(trunk)
    if checkpoint_activations:
        checkpoint_stages(trunk)
    trunk.to(memory_format=layout(device, channels_last))


def sync_group(wanted: int, ranks: int) -> int:
    """Ranks that share their BatchNorm statistics: as many as wanted, if that divides their number,
    else the next lower number that does."""
    return max(n for n in range(1, max(1, min(wanted, ranks)) + 1) if ranks % n == 0)


def distribute(model: nn.Module, device: torch.device, compress: bool) -> nn.Module:
    """DDP, with gradients that exist once: from the first pass on they are views of the buckets
    that DDP sends. compress: sent as bf16, half the bytes.

    DDP itself makes them so in its first synchronised backward pass, and once more when it has
    sorted its buckets by what that pass was ready with. The first passes of an accumulation are not
    synchronised, and would make gradients beside the buckets. So two passes of zeros come first;
    gradients must stay after them (zero_grad(set_to_none=False)).
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 2 ** 20
    with warnings.catch_warnings():         # of an option whose successor torch 2.11 does not know
        warnings.simplefilter("ignore", FutureWarning)
        # Running statistics are saved from rank 0, so none are broadcast.
        wrapped = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None,
                                          bucket_cap_mb=bucket_size(size), broadcast_buffers=False,
                                          gradient_as_bucket_view=True)
    if compress:
        wrapped.register_comm_hook(None, bf16_compress_hook)
    # the last layers' gradients are ready first, as in a real pass
    forward, model.forward = model.forward, lambda zero: zero * sum(
        p.sum() for p in model.parameters())
    for _ in range(2):
        model.zero_grad()
        wrapped(torch.zeros((), device=device)).backward()
    model.forward = forward
    return wrapped


def bucket_size(size: float) -> float:
    """MiB of a bucket, for gradients of so many: a sixteenth, at least DDP's own 25.

    A bucket is one all-reduce. Many small ones are bound by latency, which grows with the ranks (a
    ring over n sends pieces of 1/n of a bucket); of few large ones the last, which nothing is left
    to overlap with, is long. Buckets take no memory beside the gradients, whatever their size.
    """
    return max(25.0, size / 16)


class CheckpointedStage(nn.Sequential):
    """Activation checkpointing of each block (arXiv 1604.06174): its input alone is kept, and the
    backward pass runs its forward pass again.

    A block works on copies of its buffers, and those of the first run go back into the block. So
    running statistics are updated once, bitwise as without checkpointing, also by SyncBatchNorm,
    and in a compiled graph, whose backward must not find its inputs changed by the next crop size.
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


def checkpoint_stages(trunk: nn.Module) -> None:
    """Make each stage of a RegNet or a ResNet a CheckpointedStage; names stay as they are."""
    for name, stage in stages_of(trunk):
        parent, _, child = name.rpartition(".")
        checkpointed = CheckpointedStage(OrderedDict(stage.named_children()))
        setattr(trunk.get_submodule(parent), child, checkpointed)


def check_compiler(device: torch.device, backend="inductor") -> None:
    """Raises ValueError where nothing can be compiled for this device."""
    try:
        torch.compile(torch.neg, backend=backend)(torch.zeros(1, device=device))
    except Exception as error:                  # of many kinds
        reason = str(getattr(error, "inner_exception", error)).strip().splitlines()[0]
        raise ValueError("--compile needs a C++ compiler, on a GPU Triton too, and does not work "
                         f"here: {reason}") from None


def try_update(optimizer: LARC) -> None:
    """Compile the update of a LARC(compiled=True) for its tensors, by a step without rate or
    gradient, which changes none of them. Where that fails on one rank, the update of all ranks
    stays as it is, for their weights must stay the same. A collective."""
    if not optimizer.compiled:
        return
    params = [p for group in optimizer.param_groups for p in group["params"]]
    grads, rates = [p.grad for p in params], [group["lr"] for group in optimizer.param_groups]
    try:
        with fail_together(Exception):
            for group in optimizer.param_groups:
                group["lr"] = 0.0
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
    except ValueError as error:
        optimizer.compiled, optimizer.update = False, update
        if is_main():
            print(f"LARC's update makes 13 passes over memory, not 7 ({error})")
    for p, grad in zip(params, grads):
        p.grad = grad
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate


def compile_trunk(trunk: nn.Module, backend="inductor") -> None:
    """Compile a trunk's training pass: one graph per crop size, made in the first step. (The pass
    for the codes of several micro-batches, which has no gradient, makes others of its sizes.)
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
