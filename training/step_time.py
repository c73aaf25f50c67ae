"""Step time: how long a step takes on GPUs that need not be here, and where the time goes.

    step = step_time(cost(config), passes(config), config, micro_batch=32, checkpointing=False,
                     gpus=8, gpu=Gpu())
    step.total, step.seconds["BatchNorm"], step.utilisation, step.hidden

A prediction, and a bound: each operation takes what its arithmetic or its memory takes at the rates
of the GPU (distributed/roofline.py), the host is never waited for, and kernels of odd widths or few
channels are as fast as others. Communication is that of rings over GPUs, NODE to a node.

Sharded, a unit is gathered while the one before it is computed, and its gradients are sent while
the next ones are made. So a pass over a crop size, forward or backward, waits for as much of its
communication as takes longer than its arithmetic: exposed = max(0, communication - compute).
"""
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from distributed.roofline import (
    Gpu,
    Operation,
    count,
    count_operations,
    roofline,
    without_elementwise,
)
from distributed.wrap import bucket_size, sync_group
from methods.build import build_method
from multicrop import CropSpec
from recipes.config import Config
from swav import ASSIGNED, swav_loss
from training.cost import (
    NODE,
    Cost,
    first_sizes,
    gathered_bytes,
    norm_passes,
    shard_passes,
    shards_of,
    traffic,
    work,
)

# seconds of a small collective: in a node; more for each doubling of the nodes (both assumed)
LATENCY, LATENCY_OF_NODES = 20e-6, 10e-6
AUGMENTATION = 640           # bytes read and written for a number of a crop (multicrop.Photometric)
KINDS = {"product": "convolutions and linear layers", "norm": "BatchNorm",
         "other": "element by element"}


class Passes(NamedTuple):
    """Operations of a crop in the trunk, by size, and in head and prototypes; of an image in the
    loss."""
    trunk: dict[CropSpec, list[Operation]]
    head: list[Operation]
    loss: list[Operation]


def passes(config: Config, dtype: torch.dtype = torch.bfloat16) -> Passes:
    """Counted on the meta device: takes a few seconds, and no memory."""
    method, views = build_method(config, "meta"), sum(spec.count for spec in config.crops)
    scores = torch.empty(2 * views, config.prototypes, device="meta", requires_grad=True)
    codes = torch.empty(ASSIGNED, 2, config.prototypes, device="meta")
    return Passes(
        {spec: count_operations(method.trunk, (3, spec.size, spec.size), dtype)
         for spec in config.crops},
        count_operations(nn.Sequential(method.head, method.prototypes),
                         (method.trunk.num_features,), dtype),
        count(lambda: swav_loss(scores, codes, views), [scores], 2))


class Step(NamedTuple):
    """seconds: by part, one after the other.  reduction: of the gradients' all-reduce, or of what a
    sharded run gathers and scatters, of which hidden go by during other work.  utilisation: share
    of the peak, all passes counted."""
    seconds: dict[str, float]
    reduction: float
    hidden: float
    utilisation: float

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def step_time(cost: Cost, counted: Passes, config: Config, micro_batch: int, checkpointing: bool,
              gpus: int, gpu: Gpu = Gpu()) -> Step:
    """Of a step on `gpus` GPUs. Compiled (config.compile), what goes element by element is taken to
    be part of the rest."""
    n = config.batch_size // gpus // micro_batch
    seconds, last_backward = computing(counted, config, micro_batch, n, checkpointing, gpu)
    seconds["casts, gradient sums, LARC"] = (
        weight_bytes(cost, config, n, checkpointing, gpus) / gpu.bandwidth / 1e9)
    if shards_of(config, gpus) > 1:
        reduction, waiting = shard_time(cost, counted, config, micro_batch, n, checkpointing, gpus,
                                        gpu)
        seconds["gathers, scatters, not hidden"] = waiting
    else:
        reduction, waiting = reduction_time(cost, config, gpus, gpu, last_backward)
        seconds["gradients, not hidden"] = waiting
    seconds["SyncBatchNorm and Sinkhorn"] = small_collectives(
        cost, config, micro_batch, n, checkpointing, gpus, gpu)
    spent = work(cost, checkpointing, n > 1) * n * micro_batch
    return Step(seconds, reduction, reduction - waiting,
                spent / gpu.tflops / sum(seconds.values()))


def computing(counted: Passes, config: Config, images: int, n: int, checkpointing: bool,
              gpu: Gpu) -> tuple[dict[str, float], float]:
    """Seconds of a step's n micro-batches by part; and of the last of its backward passes, of one
    crop size."""
    specs, views = config.crops, sum(spec.count for spec in config.crops)
    trunk = {spec: without_elementwise(operations) if config.compile else operations
             for spec, operations in counted.trunk.items()}
    first = specs[:first_sizes(config)] if n > 1 else ()
    seconds = dict.fromkeys(KINDS.values(), 0.0)
    for kind, name in KINDS.items():
        for spec, operations in [*((spec, trunk[spec]) for spec in specs), (None, counted.head)]:
            rows = images * (spec.count if spec else views)
            ours = [operation for operation in operations if operation.kind == kind]
            forward = least(gpu, (o for o in ours if not o.backward), rows)
            again = checkpointing * (spec is not None)
            seconds[name] += n * (least(gpu, ours, rows) + again * forward)
            if spec in first:
                seconds[name] += n * forward
            elif spec is None and first:
                seconds[name] += n * forward * sum(spec.count for spec in first) / views
    numbers = sum(spec.count * 3 * spec.size ** 2 for spec in (*specs, *first))
    # Sinkhorn reads and writes the matrix of float32 so often (sinkhorn.py)
    codes = ASSIGNED * n * images * config.prototypes * (48 + 8 * config.sinkhorn_iterations)
    seconds["augmentation, codes, loss"] = n * least(gpu, counted.loss, images) + (
        n * images * numbers * AUGMENTATION + codes) / gpu.bandwidth / 1e9
    first_size = specs[0]           # goes forward first, so backward last
    last = (o for o in trunk[first_size] if o.backward or checkpointing)
    return seconds, least(gpu, last, images * first_size.count)


def least(gpu: Gpu, operations: Iterable[Operation], rows: int) -> float:
    """Seconds of operations on so many crops or images."""
    return roofline(operations, rows, gpu.tflops * 1e12, gpu.bandwidth * 1e9)


def weight_bytes(cost: Cost, config: Config, n: int, checkpointing: bool, gpus: int) -> float:
    """Bytes of a step over the weights, outside the layers: a micro-batch casts weights to bf16
    (read 4, write 2), adds up the gradients of the crop sizes (6 for each but the first), casts
    them to float32 (6) and adds them to those that are there (12); checkpointing casts once more.
    A step sets gradients to zero (4) and makes LARC's 8 passes.

    Sharded, weights arrive and are put in their places (3 times what they take), each shard cast
    before; gradients are cast to float32 and sent (8, and what they take), each shard added."""
    if (shards := shards_of(config, gpus)) > 1:
        (gathered, scattered), size = shard_passes(cost, config, n), gathered_bytes(config)
        kept = cost.params - (1 - 1 / shards) * sum(cost.units)
        return (gathered * (3 * size + (4 + size) / shards)
                + scattered * (size + 8 + 12 / shards) + 36 * kept)
    half = 0 if config.precision == "fp32" else 1
    trunk = (12 - 6 * half) * (len(config.crops) - 1) + 6 * checkpointing * half
    return n * (trunk * cost.trunk_params + (12 + 12 * half) * cost.params) + 36 * cost.params


def ring_rate(gpu: Gpu, nodes: bool, of_node: int) -> float:
    """Bytes a second that each GPU sends in rings, where all of a node are in one. nodes: whether
    a ring joins several, with so many GPUs in each; then it goes over as many adapters."""
    return 1e9 * (min(gpu.nvlink, of_node * gpu.network) if nodes else gpu.nvlink)


def reduction_time(cost: Cost, config: Config, gpus: int, gpu: Gpu,
                   last_backward: float) -> tuple[float, float]:
    """Seconds of an all-reduce of the gradients; and those of them that are waited for."""
    if gpus == 1:
        return 0.0, 0.0
    reduction = (traffic(cost, config, 1, False, gpus)["gradients"]
                 / ring_rate(gpu, gpus > NODE, NODE))
    # a gradient is complete when the last crop size has gone backward; the last bucket waits
    last = min(1.0, bucket_size(size := 4 * cost.params / 2 ** 20) / size)
    return reduction, max(reduction - last_backward, last * reduction)


def shard_time(cost: Cost, counted: Passes, config: Config, images: int, n: int,
               checkpointing: bool, gpus: int, gpu: Gpu) -> tuple[float, float]:
    """Seconds of a step's gathers, scatters and all-reduces; and those that are waited for. The
    all-reduces over replicas go on beside the last backward pass, by other links. That of what is
    not sharded comes last, and is waited for."""
    shards, first = shards_of(config, gpus), config.crops[:first_sizes(config)] if n > 1 else ()
    replicas, views = gpus // shards, sum(spec.count for spec in config.crops)
    others = (shards - 1) / shards / ring_rate(gpu, shards > NODE, NODE)
    over_replicas = 2 * (replicas - 1) / replicas / shards / ring_rate(
        gpu, gpus > NODE, max(1, NODE // shards))
    trunk, head = sum(cost.units[:-1]), cost.units[-1]
    parts = [*((trunk * (spec is config.crops[0]), trunk, counted.trunk[spec], spec.count,
                spec.count * (spec in first), checkpointing) for spec in config.crops),
             (head, head, counted.head, views, sum(spec.count for spec in first), False)]
    spent = waiting = (traffic(cost, config, images, checkpointing, gpus)["all-reduce, not sharded"]
                       / ring_rate(gpu, gpus > NODE, NODE))
    for summed, params, operations, crops, crops_for_codes, again in parts:
        forward = [o for o in operations if not o.backward]
        backward = [o for o in operations if o.backward or again]
        gather, scatter = gathered_bytes(config) * params * others, 4 * params * others
        forth, back = (least(gpu, some, images * crops) for some in (forward, backward))
        passes = [(n, gather, forth), (n - 1, gather + scatter, back),
                  (1, max(gather + scatter, 4 * summed * over_replicas), back)]
        if crops_for_codes:
            passes.append((n, gather, least(gpu, forward, images * crops_for_codes)))
        spent += sum(times * sent for times, sent, _ in passes)
        waiting += sum(times * max(0.0, sent - computed) for times, sent, computed in passes)
    return spent, waiting


def small_collectives(cost: Cost, config: Config, micro_batch: int, n: int, checkpointing: bool,
                      gpus: int, gpu: Gpu) -> float:
    """Seconds of those that the next operation waits for: SyncBatchNorm's of each layer, in its
    group, and Sinkhorn's, among all GPUs."""
    def latency(ranks: int) -> float:
        nodes = max(1, ranks / NODE)
        return (ranks > 1) * (LATENCY + LATENCY_OF_NODES * math.log2(nodes))

    group = sync_group(config.sync_bn_group, gpus)
    sent = traffic(cost, config, micro_batch, checkpointing, gpus)
    passed = norm_passes(config, n, checkpointing)
    layers = len(cost.norms) * sum(passed[:2]) + len(cost.head_norms) * sum(passed[2:])
    rate = 1e9 * (gpu.nvlink if group <= NODE else gpu.network)
    return (layers * latency(group) + sent["SyncBatchNorm"] / rate
            + config.sinkhorn_iterations * latency(gpus))
