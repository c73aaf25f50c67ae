"""Cost: what a step of a run takes: multiply-adds, bytes of memory, bytes sent.

    counted = cost(configure({"arch": "regnety_256gf"}))
    memory(counted, config, micro_batch=32, checkpointing=False, ranks=8)       # bytes by part
    traffic(counted, config, 32, False, gpus=8)                                 # bytes by purpose

It counts on the meta device, so neither a GPU nor the network's memory is needed. Its multiply-adds
are exact; the peak memory of a step is predicted to some per cent (`python -m bench step` measures
both).
"""
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from distributed.fsdp import shard_ranks
from distributed.padding import odd_widths
from distributed.wrap import stages_of, sync_group
from methods.build import METHODS, build_method
from recipes.config import Config
from regnet import ARCHS, complexity
from swav import ASSIGNED, assigned_sizes

NODE = 8                     # GPUs
# NCCL's buffers of one group of ranks: 32 channels, each with a ring and a tree, each of these with
# the buffers of three protocols (its src/include/device.h; NCCL_BUFFSIZE 4 MiB): an estimate
NCCL_BUFFERS = 32 * 2 * (4 * 2 ** 20 + 120 * 640 * 8 * 8 + 8 * 512 * 8 * 16)


class Cost(NamedTuple):
    """Of a network: parameters, and BatchNorm layers with their channels. Units are what a sharded
    run gathers at once: the stem, each block, the head. Of one image, over all its crops:
    multiply-adds of a forward pass, and bytes of the trunk kept for backward."""
    trunk_params: int
    params: int                          # that learn: of trunk, head and prototypes
    units: list[int]                     # that are sharded, of each in its order: no BatchNorm's
    norms: list[int]                     # channels of the trunk's BatchNorms: one pass a crop size
    head_norms: list[int]                # of the head's: one pass for all sizes
    trunk_flops: int
    flops: int                           # of trunk, head and prototypes
    first_flops: int                     # the same, of those sizes that the codes are made from
    activations: int                     # bytes, without checkpointing
    inputs: int                          # bytes, with it: the inputs of blocks, and the stem
    block: int                           # bytes, with it: of the largest block, in backward
    still: int                           # bytes of buffers, and of a momentum encoder


def cost(config: Config, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Counted on the meta device: takes a second or two, and no memory, also for 10 billion."""
    specs, arch, model = config.crops, config.arch, build_method(config, "meta")
    trunk_params, params = (sum(p.numel() for p in m.parameters() if p.requires_grad)
                            for m in (model.trunk, model))
    still = sum(4 * x.numel() for x in (*model.parameters(), *model.buffers())
                if not x.requires_grad)
    norms = [m.num_features for m in model.trunk.modules() if isinstance(m, _BatchNorm)]
    beside = [m for m in model.modules() if m not in set(model.trunk.modules())
              and any(p.requires_grad for p in m.parameters(recurse=False))]
    head_norms = [m.num_features for m in beside if isinstance(m, _BatchNorm)]
    head_flops = sum(m.weight.numel() for m in beside if isinstance(m, nn.Linear))   # of a crop
    flops, kept = {}, {}
    for spec in specs:
        if arch in ARCHS:
            flops[spec] = complexity(ARCHS[arch], spec.size, num_classes=0).flops
        else:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model.trunk(torch.empty(2, 3, spec.size, spec.size, device="meta"))
            flops[spec] = counter.get_total_flops() // 4         # of two crops; 2 a multiply-add
        kept[spec] = kept_for_backward(model.trunk, spec.size, dtype)
    total = sum(spec.count * flops[spec] for spec in specs)
    views = sum(spec.count for spec in specs)
    first = first_sizes(config)
    return Cost(
        trunk_params, params, unit_params(model), norms, head_norms,
        total, total + views * head_flops,
        sum(spec.count * (flops[spec] + head_flops) for spec in specs[:first]),
        *(sum(spec.count * kept[spec][i] for spec in specs) for i in (0, 1)),
        max(spec.count * kept[spec][2] for spec in specs), still)


def unit_params(model: nn.Module) -> list[int]:
    """Parameters that are sharded, of the stem, each block and the head. Whole on every rank are
    those of BatchNorm, and the prototypes."""
    def sharded(module: nn.Module) -> int:
        return sum(p.numel() for part in module.modules() if not isinstance(part, _BatchNorm)
                   for p in part.parameters(recurse=False))

    blocks = [sharded(block) for _, stage in stages_of(model.trunk) for block in stage]
    head = getattr(model, "head", nn.Identity())
    return [sharded(model.trunk) - sum(blocks), *blocks, sharded(head)]


def shards_of(config: Config, ranks: int) -> int:
    """Ranks among which the weights are sharded; 1: they are whole."""
    return shard_ranks(config.shard_group, ranks, NODE) if config.shard else 1


def first_sizes(config: Config) -> int:
    """Of the crop sizes, how many go through the first pass of accumulation, for the codes."""
    counts = [spec.count for spec in config.crops]
    all_of_them = config.method != "swav" or config.codes_need_all_crops()
    return len(counts) if all_of_them else assigned_sizes(counts)


def kept_for_backward(trunk: nn.Module, size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes a crop: all that autograd saves; then, with activation checkpointing, what is kept
    throughout, and the most that one block takes in backward, with the gradient of its output."""
    trunk = trunk.to(dtype)
    owned = {t.untyped_storage()._cdata for t in (*trunk.parameters(), *trunk.buffers())}
    kept, outside, inside, alive = {}, set(), {}, []
    where = [outside]                    # last: the set of storages that is being filled

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in owned:
            alive.append(tensor)         # or its address would be given to another one
            kept[storage._cdata] = storage.nbytes()
            where[-1].add(storage._cdata)
        return tensor

    def enter(block, inputs):
        keep(*inputs)
        where.append(set())

    def leave(block, inputs, output):
        storages = where.pop() - outside
        inside[block] = sum(kept[storage] for storage in storages) + output.nbytes

    hooks = [hook for _, stage in stages_of(trunk) for block in stage for hook in (
        block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
    crops = 2                            # BatchNorm wants more than one value of a channel
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trunk(torch.empty(crops, 3, size, size, dtype=dtype, device="meta"))
    for hook in hooks:
        hook.remove()
    return (sum(kept.values()) // crops, sum(kept[storage] for storage in outside) // crops,
            max(inside.values()) // crops)


def memory(cost: Cost, config: Config, micro_batch: int, checkpointing: bool, ranks: int,
           dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Bytes at the peak of a step, by part. On GPUs, where config.device names nothing else."""
    device, norms = torch.device(config.device or "cuda"), cost.norms + cost.head_norms
    group, shards = sync_group(config.sync_bn_group, ranks), shards_of(config, ranks)
    groups = ((ranks > 1) + (group > 1) + 2 * (1 < shards < ranks)) * (device.type == "cuda")
    views, share = sum(spec.count for spec in config.crops), config.batch_size // ranks
    pixels = sum(spec.count * 3 * spec.size ** 2 for spec in config.crops)
    kept = cost.inputs + cost.block if checkpointing else cost.activations
    rows = share + config.queue // ranks
    outputs = config.prototypes if "prototypes" in METHODS[config.method].options else 0
    codes = 2 * ASSIGNED * rows * outputs * 4                 # scores of the whole share, and codes
    # of the head in autocast; then in float32 scores, log p, and the gradients of both
    loss = views * (2 * dtype.itemsize * sum(config.head) + 4 * 4 * outputs)
    # whether odd widths are padded is measured later
    padded = (config.arch in ARCHS and bool(odd_widths(ARCHS[config.arch]))
              and config.pad_widths is not False and device.type == "cuda")
    # all of them without checkpointing, where padding is not tried, but may be asked for
    copied = (max(cost.units[:-1]) if checkpointing else
              sum(cost.units[:-1]) * len(config.crops) * bool(config.pad_widths))
    parameters = (shard_memory(cost, shards, ranks, copied * padded, dtype)
                  if shards > 1 else
                  whole_memory(cost, config, micro_batch, checkpointing, padded, dtype))
    if config.method != "swav":
        parameters["momentum encoder, queue, memory"] = cost.still
        # in float32: values, what log-softmax or squares keep, and gradients
        parameters["matrices of the loss"] = 16 * {
            "simclr": views ** 2 * share * config.batch_size,
            "barlow_twins": config.head[-1] ** 2}.get(config.method, 0)
    return parameters | {
        "activations of the trunk": micro_batch * kept,
        "head, scores and loss": micro_batch * loss + codes,
        "crops, uint8 and float32": share * pixels + micro_batch * 4 * pixels,
        # statistics of the widest layer, from all ranks of the group
        "SyncBatchNorm's buffers": 4 * group * (2 * max(norms) + 1) if group > 1 else 0,
        "NCCL's buffers (estimate)": NCCL_BUFFERS * groups,
    }


def whole_memory(cost: Cost, config: Config, micro_batch: int, checkpointing: bool, padded: bool,
                 dtype: torch.dtype) -> dict[str, float]:
    """Bytes of parameters, by part, where each rank has all of them."""
    cast = 0 if dtype == torch.float32 else dtype.itemsize * cost.params
    if padded and not checkpointing:
        # padded copies, of each crop size, take the place of a cast
        cast += dtype.itemsize * cost.trunk_params * (len(config.crops) - (cast > 0))
    if checkpointing:   # all are there when forward ends; in backward one block takes their place
        cast = max(cast - micro_batch * cost.block, 0)
    return {
        "weights, float32": 4 * cost.params,
        "gradients = communication buffers": 4 * cost.params,         # DDP's buckets
        "momentum": 4 * cost.params,
        "weights cast for autocast": cast,
    }


def shard_memory(cost: Cost, shards: int, ranks: int, padded: int,
                 dtype: torch.dtype) -> dict[str, float]:
    """Bytes of parameters, by part, where a rank has one of so many shards. Two units are whole at
    once: the one that is computed, and the one that is gathered before it is needed, or whose
    gradients are sent. padded: parameters of which padded copies are there at once."""
    sharded, pair = sum(cost.units), max(map(sum, pairwise(cost.units)))
    return {
        "weights, float32 shards": 4 * sharded / shards,
        # of several replicas, also what is summed in the group, and not yet over the replicas
        "gradients, float32 shards": 4 * sharded / shards * (1 + (shards < ranks)),
        "momentum, float32 shards": 4 * sharded / shards,
        # weights, gradients and momentum
        "BatchNorm and prototypes, whole": 12 * (cost.params - sharded),
        "gathered weights of two units": dtype.itemsize * pair,
        # as backward makes them, and the float32 copy that is sent
        "gradients of two units": (dtype.itemsize + 4) * pair,
        "padded weights": dtype.itemsize * padded,
    }


def shard_passes(cost: Cost, config: Config, micro_batches: int) -> tuple[int, int]:
    """Parameters that a step gathers, and those whose gradients it scatters, each counted as often
    as it is. The trunk goes forward and backward once a crop size and micro-batch, and forward once
    more in the pass for the codes; the head has all sizes at once."""
    sizes, accumulating = len(config.crops), micro_batches > 1
    trunk, head = sum(cost.units[:-1]), cost.units[-1]
    return (micro_batches * (trunk * (2 * sizes + first_sizes(config) * accumulating)
                             + head * (2 + accumulating)),
            micro_batches * (trunk * sizes + head))


def norm_passes(config: Config, micro_batches: int, checkpointing: bool) -> tuple[int, ...]:
    """Passes of a step through the BatchNorms: of the trunk forward and backward, then of the
    head. Each is a collective a layer where they are synchronised."""
    counts, accumulating = [spec.count for spec in config.crops], micro_batches > 1
    sizes, first = len(counts), first_sizes(config) * accumulating
    return (micro_batches * (sizes * (1 + checkpointing) + first), micro_batches * sizes,
            micro_batches * (1 + accumulating), micro_batches)


def traffic(cost: Cost, config: Config, micro_batch: int, checkpointing: bool, gpus: int) -> dict:
    """Bytes each GPU sends in a step, by purpose; collectives in rings."""
    micro_batches, ring = config.batch_size // gpus // micro_batch, 2 * (gpus - 1) / gpus
    shards = shards_of(config, gpus)
    parameters = (shard_traffic(cost, config, micro_batches, shards, gpus) if shards > 1 else
                  {"gradients": ring * 4 * cost.params})
    group = sync_group(config.sync_bn_group, gpus)

    def forward(norms):             # all-gather of means, deviations and a count
        return 4 * sum(2 * channels + 1 for channels in norms) * (group - 1)

    def backward(norms):            # all-reduce of two sums
        return 4 * 2 * sum(norms) * 2 * (group - 1) / group

    trunk_forward, trunk_backward, head_forward, head_backward = norm_passes(
        config, micro_batches, checkpointing)
    synchronised = (
        trunk_forward * forward(cost.norms) + trunk_backward * backward(cost.norms)
        + head_forward * forward(cost.head_norms) + head_backward * backward(cost.head_norms))
    return parameters | {
        "SyncBatchNorm": synchronised,
        "Sinkhorn": ring * 4 * ASSIGNED * config.prototypes * config.sinkhorn_iterations}


def shard_traffic(cost: Cost, config: Config, micro_batches: int, shards: int,
                  gpus: int) -> dict[str, float]:
    """Bytes each GPU sends in a step for weights and gradients. Gradients are scattered in float32,
    and at the end summed over the replicas, which are the GPUs that hold the same shard."""
    gathered, scattered = shard_passes(cost, config, micro_batches)
    others, replicas = (shards - 1) / shards, gpus // shards
    return {
        "all-gather, weights": others * gathered_bytes(config) * gathered,
        "reduce-scatter, gradients": others * 4 * scattered,
        "all-reduce, replicas": 2 * (replicas - 1) / replicas * 4 * sum(cost.units) / shards,
        "all-reduce, not sharded":
            2 * (gpus - 1) / gpus * 4 * (cost.params - sum(cost.units))}


def gathered_bytes(config: Config) -> int:
    """Of a gathered weight: bf16, unless the run computes in float32."""
    return 4 if config.precision == "fp32" else 2


def work(cost: Cost, checkpointing: bool = False, accumulating: bool = False) -> float:
    """TFLOP an image: 3 forward passes, one more of the trunk with activation checkpointing, and
    one for the codes of several micro-batches."""
    adds = 3 * cost.flops + checkpointing * cost.trunk_flops + accumulating * cost.first_flops
    return 2 * adds / 1e12
