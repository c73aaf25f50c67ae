"""The plan: what a run takes, in memory, time and traffic, predicted without a GPU.

    python train.py --plan --arch regnety_256gf --gpus 8 --gpu-memory 80 --tflops 790

    print(plan(configure({"arch": "regnety_256gf"}), gpus=8))
    config = fit(config, ranks=8, limit=80e9, dtype=torch.bfloat16)     # chooses the micro-batch

It counts on the meta device, so neither a GPU nor the network's memory is needed. Its multiply-adds
are exact; the peak memory of a step is predicted to some per cent (`python -m bench step` measures
both).
"""
import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from distributed.hardware import PRECISIONS, memory_of
from distributed.ranks import gather_lists, rank_and_world
from distributed.wrap import stages_of, sync_group
from methods.build import build_method
from recipes.command_line import configure
from recipes.config import Config, with_length
from recipes.input import duration
from recipes.medium import TFLOPS, UTILISATION
from regnet import ARCHS, complexity
from swav import ASSIGNED, assigned_sizes

ROOM = 0.9                   # share of the memory that is planned; the rest: context, workspaces
IMAGENET = 1_281_167         # images of an epoch where there is no --data


class Cost(NamedTuple):
    """Of a network: parameters, and BatchNorm layers with their channels. Of one image, over all
    its crops: multiply-adds of a forward pass, and bytes of the trunk kept for backward."""
    trunk_params: int
    params: int                          # of trunk, head and prototypes
    norms: list[int]                     # channels of the trunk's BatchNorms: one pass a crop size
    head_norms: list[int]                # of the head's: one pass for all sizes
    trunk_flops: int
    flops: int                           # of trunk, head and prototypes
    first_flops: int                     # the same, of those sizes that the codes are made from
    activations: int                     # bytes, without checkpointing
    inputs: int                          # bytes, with it: the inputs of blocks, and the stem
    block: int                           # bytes, with it: of the largest block, in backward


def cost(config: Config, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Counted on the meta device: takes a second or two, and no memory, also for 10 billion."""
    specs, arch, model = config.crops, config.arch, build_method(config, "meta")
    trunk_params, params = (sum(p.numel() for p in m.parameters()) for m in (model.trunk, model))
    norms, head_norms = ([m.num_features for m in part.modules() if isinstance(m, _BatchNorm)]
                         for part in (model.trunk, model.head))
    linear = (model.prototypes, *(m for m in model.head if isinstance(m, nn.Linear)))
    head_flops = sum(m.weight.numel() for m in linear)                   # of a crop
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
        trunk_params, params, norms, head_norms, total, total + views * head_flops,
        sum(spec.count * (flops[spec] + head_flops) for spec in specs[:first]),
        *(sum(spec.count * kept[spec][i] for spec in specs) for i in (0, 1)),
        max(spec.count * kept[spec][2] for spec in specs))


def first_sizes(config: Config) -> int:
    """Of the crop sizes, how many go through the first pass of accumulation, for the codes."""
    counts = [spec.count for spec in config.crops]
    return len(counts) if config.codes_need_all_crops() else assigned_sizes(counts)


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
    """Bytes at the peak of a step, by part."""
    views, share = sum(spec.count for spec in config.crops), config.batch_size // ranks
    pixels = sum(spec.count * 3 * spec.size ** 2 for spec in config.crops)
    kept = cost.inputs + cost.block if checkpointing else cost.activations
    rows = share + config.queue // ranks
    codes = 2 * ASSIGNED * rows * config.prototypes * 4       # scores of the whole share, and codes
    # of the head in autocast; then in float32 scores, log p, and the gradients of both
    loss = views * (2 * dtype.itemsize * sum(config.head) + 4 * 4 * config.prototypes)
    cast = 0 if dtype == torch.float32 else dtype.itemsize * cost.params
    if checkpointing:   # all are there when forward ends; in backward one block takes their place
        cast = max(cast - micro_batch * cost.block, 0)
    return {
        "weights, float32": 4 * cost.params,
        "gradients = communication buffers": 4 * cost.params,         # DDP's buckets
        "momentum": 4 * cost.params,
        "weights cast for autocast": cast,
        "activations of the trunk": micro_batch * kept,
        "head, scores and loss": micro_batch * loss + codes,
        "crops, uint8 and float32": share * pixels + micro_batch * 4 * pixels,
    }


def largest_micro_batch(cost: Cost, config: Config, checkpointing: bool, ranks: int, limit: float,
                        dtype: torch.dtype = torch.bfloat16) -> int:
    """The largest part of a rank's share of the batch that fits into ROOM of limit; 0: none.
    Raises ValueError where the share can only be cut into much less than that."""
    share = config.batch_size // ranks
    room = next((n for n in range(share, 0, -1) if ROOM * limit >= sum(
        memory(cost, config, n, checkpointing, ranks, dtype).values())), 0)
    fitting = next((n for n in range(room, 0, -1) if share % n == 0), 0)
    if 8 * fitting < room:
        good = 2 ** int(math.log2(room))
        raise ValueError(f"--batch-size {config.batch_size} gives each process {share} images; "
                         f"it has room for {room} at once, but no number from {fitting + 1} to "
                         f"that divides them; take {math.ceil(share / good) * good * ranks}")
    return fitting


def fit(config: Config, ranks: int, limit: float, dtype: torch.dtype) -> Config:
    """The configuration with micro_batch and checkpoint_activations chosen, where they are open.

    Activation checkpointing is chosen only where fewer than 16 images would fit otherwise. limit:
    bytes a rank has. Raises ValueError where not one image fits.
    """
    if config.micro_batch and config.checkpoint_activations is not None:
        return config
    counted = cost(config, dtype)
    most = {checkpointing: largest_micro_batch(counted, config, checkpointing, ranks, limit, dtype)
            for checkpointing in (False, True)}
    checkpointing = config.checkpoint_activations
    if checkpointing is None:
        wanted = config.micro_batch or min(16, config.batch_size // ranks)
        checkpointing = most[False] < min(wanted, max(most[True], 1))
    micro_batch = config.micro_batch or most[checkpointing]
    if not micro_batch:
        need = sum(memory(counted, config, 1, checkpointing, ranks, dtype).values())
        raise ValueError(f"{config.arch} needs {need / 1e9:.0f} GB on every device for one image "
                         f"at a time, and {ROOM:.0%} of {limit / 1e9:.0f} GB are there; a smaller "
                         "--arch fits, or --micro-batch 1 tries all the same")
    return replace(config, micro_batch=micro_batch, checkpoint_activations=checkpointing)


def fit_ranks(config: Config, device: torch.device, dtype: torch.dtype) -> Config:
    """fit, for the ranks that there are: the smallest memory of all counts. A collective."""
    limit = min(gather_lists([memory_of(device)]))
    return fit(config, rank_and_world()[1], limit, dtype)


def traffic(cost: Cost, config: Config, micro_batch: int, checkpointing: bool, gpus: int) -> dict:
    """Bytes each GPU sends in a step, by purpose; collectives in rings."""
    counts = [spec.count for spec in config.crops]
    micro_batches, ring = config.batch_size // gpus // micro_batch, 2 * (gpus - 1) / gpus
    group = sync_group(config.sync_bn_group, gpus, torch.device("cuda"))

    def forward(norms):             # all-gather of means, deviations and a count
        return 4 * sum(2 * channels + 1 for channels in norms) * (group - 1)

    def backward(norms):            # all-reduce of two sums
        return 4 * 2 * sum(norms) * 2 * (group - 1) / group

    accumulating = micro_batches > 1
    sizes, first = len(counts), first_sizes(config) * accumulating
    synchronised = micro_batches * (
        (sizes * (1 + checkpointing) + first) * forward(cost.norms) + sizes * backward(cost.norms)
        + (1 + accumulating) * forward(cost.head_norms) + backward(cost.head_norms))
    return {"gradients": ring * 4 * cost.params, "SyncBatchNorm": synchronised,
            "Sinkhorn": ring * 4 * ASSIGNED * config.prototypes * config.sinkhorn_iterations}


def work(cost: Cost, checkpointing: bool = False, accumulating: bool = False) -> float:
    """TFLOP an image: 3 forward passes, one more of the trunk with activation checkpointing, and
    one for the codes of several micro-batches."""
    adds = 3 * cost.flops + checkpointing * cost.trunk_flops + accumulating * cost.first_flops
    return 2 * adds / 1e12


def plan(config: Config, num_images: int | None = None, gpus: int = 8, gpu_memory: float = 80.0,
         tflops: float = TFLOPS, utilisation: float = UTILISATION) -> str:
    """What a run takes, in words; gpu_memory in GB, tflops of one GPU in the run's precision.

    Raises ValueError for a machine of nothing, and where a given --micro-batch does not divide.
    """
    if not all(0 < x < math.inf for x in (gpus, gpu_memory, tflops, utilisation)):
        raise ValueError("--gpus, --gpu-memory, --tflops and --utilisation must be above 0")
    config = with_length(config, num_images or IMAGENET)
    counted = cost(config, PRECISIONS.get(config.precision, torch.bfloat16))
    columns = {"checkpointing" if checkpointing else "no checkpointing":
               column(counted, config, checkpointing, gpus, gpu_memory, tflops * utilisation)
               for checkpointing in (False, True)}
    names = list(dict.fromkeys(name for rows in columns.values() for name in rows))
    lines = [f"{name:<42}" + "".join(f"{rows.get(name, '-'):>18}" for rows in columns.values())
             for name in names]
    million, seen = 1e6, config.steps * config.batch_size
    return "\n".join([
        f"recipe {config.recipe}: {config.arch}, {counted.params / million:,.1f} M parameters "
        f"(trunk {counted.trunk_params / million:,.1f} M), crops {config.text('crops')}",
        f"TFLOP an image: {work(counted):.3f}, {work(counted, True):.3f} with activation "
        "checkpointing",
        f"{seen:,} images in {config.steps:,} steps of {config.batch_size:,}, on {gpus} GPUs of "
        f"{gpu_memory:g} GB and {tflops:g} TFLOP/s, of which {utilisation:.0%} is reached "
        "(assumed)",
        "", " " * 42 + "".join(f"{name:>18}" for name in columns), *lines])


def plan_of(given: dict, machine: dict, images=None) -> str:
    """--plan: given options, --gpus and the like -> the plan in words. images: of --data, or None.
    Without a recipe, an arch or data it is SEER's 256GF."""
    if images is None and "recipe" not in given:
        given = {"arch": Config.arch} | given
    config = configure({"device": "cuda"} | given, max(1, machine["gpus"]), images)
    return plan(config, None if images is None else len(images), **machine)


def expected_time(config: Config, dtype: torch.dtype, world: int) -> str:
    """Of the whole run on GPUs, in words: its FLOP at UTILISATION of an H100's."""
    spent = work(cost(config, dtype), bool(config.checkpoint_activations),
                 config.batch_size // world > config.micro_batch)
    seconds = config.steps * config.batch_size * spent / (world * UTILISATION * TFLOPS)
    return (f"about {duration(seconds)} at {UTILISATION:.0%} of {TFLOPS:g} TFLOP/s a process "
            "(assumed)")


def column(counted: Cost, config: Config, checkpointing: bool, gpus: int, gpu_memory: float,
           tflops: float) -> dict[str, str]:
    """A column of the plan: its rows' names and values. tflops: of one GPU, as training reaches."""
    dtype = PRECISIONS.get(config.precision, torch.bfloat16)
    micro_batch = config.micro_batch or largest_micro_batch(counted, config, checkpointing, gpus,
                                                            gpu_memory * 1e9, dtype)
    parts = memory(counted, config, micro_batch or 1, checkpointing, gpus, dtype)
    total = sum(parts.values()) / 1e9
    rows = {"GB, for micro-batches of": str(micro_batch or 1),
            **{name: f"{size / 1e9:.2f}" for name, size in parts.items()},
            f"sum, of at most {ROOM * gpu_memory:.0f}": f"{total:.2f}"}
    if total > ROOM * gpu_memory or not micro_batch:
        return rows | {"does not fit": "-"}
    micro_batches = config.batch_size // gpus // micro_batch
    spent = work(counted, checkpointing, micro_batches > 1)
    rate = gpus * tflops / spent
    sent = traffic(counted, config, micro_batch, checkpointing, gpus)
    return rows | {
        "batch = GPUs x micro-batches x images": f"{gpus} x {micro_batches} x {micro_batch}",
        "TFLOP an image, all passes": f"{spent:.3f}",
        "images/s": f"{rate:,.0f}",
        "days": f"{config.steps * config.batch_size / rate / 86400:,.1f}",
        **{f"GB sent a step: {name}": f"{size / 1e9:.3f}" for name, size in sent.items()}}
