"""The plan: what a run takes, in memory, time and traffic, predicted without a GPU.

    python train.py --plan --arch regnety_256gf --gpus 8 --gpu-memory 80 --tflops 790

    print(plan(configure({"arch": "regnety_256gf"}), gpus=8))
    config = fit(config, ranks=8, limit=80e9, dtype=torch.bfloat16)     # chooses the micro-batch

It counts on the meta device: no GPU, and no memory, is needed to learn what a network would take.
Its multiply-adds are exact; what the step's peak comes to is predicted to some per cent (`bench.py
step` measures both).
"""
import math
import os
import sys
from dataclasses import replace
from typing import NamedTuple

try:
    import resource
except ImportError:                      # Windows
    resource = None

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from multicrop import parse_crops
from recipes import Config, parse_head, with_length
from regnet import ARCHS, complexity
from scale import (ASSIGNED, PRECISIONS, assigned_sizes, build_model, stages_of, sync_group)

ROOM = 0.9                   # of the memory that the plan fills; the rest: context, workspaces
IMAGENET = 1_281_167         # pictures a plan in epochs counts with where there is no --data


class Cost(NamedTuple):
    """Of a network: parameters, and BatchNorm layers with their channels. Of one picture, over all
    its crops: multiply-adds of a forward pass, and bytes of the trunk kept for the backward."""
    trunk_params: int
    params: int                          # of trunk, head and prototypes
    norms: list[int]                     # channels of the trunk's BatchNorms: one pass a crop size
    head_norms: list[int]                # of the head's: one pass for all sizes
    trunk_flops: int
    flops: int                           # of trunk, head and prototypes
    assigned_flops: int                  # the same, of those sizes that hold assigned crops
    activations: int                     # bytes, without checkpointing
    inputs: int                          # bytes, with it: the inputs of blocks, and the stem
    block: int                           # bytes, with it: the largest block, computed again


def cost(config: Config, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Counted on the meta device: takes a second or two, and no memory, also for 10 billion."""
    specs, arch = parse_crops(config.crops), config.arch
    model = build_model(arch, parse_head(config.head), config.prototypes, config.head_bn,
                        device="meta")
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
    first = assigned_sizes([spec.count for spec in specs])
    return Cost(
        trunk_params, params, norms, head_norms, total, total + views * head_flops,
        sum(spec.count * (flops[spec] + head_flops) for spec in specs[:first]),
        *(sum(spec.count * kept[spec][i] for spec in specs) for i in (0, 1)),
        max(spec.count * kept[spec][2] for spec in specs))


def kept_for_backward(trunk: nn.Module, size: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Bytes a crop: all that autograd saves; then, with checkpointing, what is kept throughout, and
    the most that one block takes when it is computed again, with the gradient of its output."""
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
        mine = where.pop() - outside
        inside[block] = sum(kept[storage] for storage in mine) + output.nbytes

    hooks = [hook for _, stage in stages_of(trunk) for block in stage for hook in (
        block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
    crops = 2                            # BatchNorm wants more than one value of a channel
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        trunk(torch.empty(crops, 3, size, size, dtype=dtype, device="meta"))
    for hook in hooks:
        hook.remove()
    return (sum(kept.values()) // crops, sum(kept[storage] for storage in outside) // crops,
            max(inside.values()) // crops)


def roofline(config: Config, dtype: torch.dtype, flops_a_second: float,
             bytes_a_second: float) -> float:
    """Seconds, at the least, of forward and backward of a micro-batch: the sum over layers of the
    larger of what its arithmetic and what its memory takes, were each as fast as measured alone.

    A convolution or linear layer computes three products (output, gradients of input and of
    weights; the first layer no gradient of the pictures), each with its two operands read and its
    result written. BatchNorm, with a ReLU behind it or not, goes over its map eight times: it reads
    for the statistics, reads and writes; and backward reads map and gradient twice, and writes. All
    else (squeeze-and-excitation's mean and product, residuals, the loss) is left out.
    """
    layers, crops = [], 2                # BatchNorm wants more than one value of a channel
    model = build_model(config.arch, parse_head(config.head), config.prototypes, config.head_bn,
                        device="meta")

    def count(module, inputs, output):
        n_in, n_out, w = inputs[0].numel() / crops, output.numel() / crops, 0
        if isinstance(module, _BatchNorm):
            layers.append((0, 8 * n_out, 0))
        else:
            w = module.weight.numel()
            per_output = w // len(module.weight)             # multiply-adds
            products = 2 if inputs[0].shape[1] == 3 else 3           # of pictures, or of maps
            layers.append((products * 2 * n_out * per_output, products * (n_in + n_out),
                           products * w))

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm)):
            module.register_forward_hook(count)
    specs, seconds = parse_crops(config.crops), 0.0
    passes = [(model.trunk, (3, spec.size, spec.size), spec.count) for spec in specs]
    passes.append((nn.Sequential(model.head, model.prototypes), (model.trunk.num_features,),
                   sum(spec.count for spec in specs)))
    for network, shape, views in passes:
        layers.clear()
        network(torch.empty(crops, *shape, device="meta"))
        rows = views * config.micro_batch
        seconds += sum(max(rows * flops / flops_a_second,
                           (rows * maps + weights) * dtype.itemsize / bytes_a_second)
                       for flops, maps, weights in layers)
    return seconds


def memory(cost: Cost, config: Config, micro_batch: int, recompute: bool, ranks: int,
           dtype: torch.dtype = torch.bfloat16) -> dict[str, float]:
    """Bytes at the peak of a step, by part."""
    specs, head = parse_crops(config.crops), parse_head(config.head)
    views, share = sum(spec.count for spec in specs), config.batch_size // ranks
    pixels = sum(spec.count * 3 * spec.size ** 2 for spec in specs)
    kept = cost.inputs + cost.block if recompute else cost.activations
    codes = 2 * ASSIGNED * share * config.prototypes * 4      # scores of the whole share, and codes
    # of the head in autocast; then in float32 scores, log p, and the gradients of both
    loss = views * (2 * dtype.itemsize * sum(head) + 4 * 4 * config.prototypes)
    cast = 0 if dtype == torch.float32 else dtype.itemsize * cost.params
    if recompute:       # all are there when forward ends; in backward one block is instead of them
        cast = max(cast - micro_batch * cost.block, 0)
    return {
        "weights, float32": 4 * cost.params,
        "gradients = communication buffers": 4 * cost.params,         # DDP's buckets
        "momentum": 4 * cost.params,
        "weights cast for autocast": cast,
        "activations of the trunk": micro_batch * kept,
        "head, scores and loss": micro_batch * loss + codes,
        "pictures, uint8 and float32": share * pixels + micro_batch * 4 * pixels,
    }


def largest_micro_batch(cost: Cost, config: Config, recompute: bool, ranks: int, limit: float,
                        dtype: torch.dtype = torch.bfloat16) -> int:
    """The largest part of a rank's share of the batch that fits into ROOM of limit; 0: none.
    Raises ValueError where the share can only be cut into much less than that."""
    share = config.batch_size // ranks
    room = next((n for n in range(share, 0, -1) if ROOM * limit >= sum(
        memory(cost, config, n, recompute, ranks, dtype).values())), 0)
    fitting = next((n for n in range(room, 0, -1) if share % n == 0), 0)
    if 8 * fitting < room:
        good = 2 ** int(math.log2(room))
        raise ValueError(f"--batch-size {config.batch_size} gives each process {share} pictures; "
                         f"it has room for {room} at once, but no number from {fitting + 1} to "
                         f"that divides them; take {math.ceil(share / good) * good * ranks}")
    return fitting


def fit(config: Config, ranks: int, limit: float, dtype: torch.dtype) -> Config:
    """A configuration with its open questions answered: micro_batch and checkpoint_activations.

    Blocks are computed again only where fewer than 16 pictures would fit otherwise. limit: bytes a
    rank has. Raises ValueError where not one picture fits.
    """
    if config.micro_batch and config.checkpoint_activations is not None:
        return config
    of = cost(config, dtype)
    most = {again: largest_micro_batch(of, config, again, ranks, limit, dtype)
            for again in (False, True)}
    recompute = config.checkpoint_activations
    if recompute is None:
        wanted = config.micro_batch or min(16, config.batch_size // ranks)
        recompute = most[False] < min(wanted, max(most[True], 1))
    micro_batch = config.micro_batch or most[recompute]
    if not micro_batch:
        need = sum(memory(of, config, 1, recompute, ranks, dtype).values())
        raise ValueError(f"{config.arch} needs {need / 1e9:.0f} GB on every device for one picture "
                         f"at a time, and {ROOM:.0%} of {limit / 1e9:.0f} GB are there; a smaller "
                         "--arch fits, or --micro-batch 1 tries all the same")
    return replace(config, micro_batch=micro_batch, checkpoint_activations=recompute)


def memory_of(device: torch.device) -> float:
    """Bytes this rank may plan with: a GPU's; of a CPU's machine half, shared by its ranks."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):             # Windows does not say
        whole = 16e9
    return whole / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: torch.device) -> float:
    """Bytes, so far: of the allocator on a GPU; of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps" or resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def traffic(cost: Cost, config: Config, micro_batch: int, recompute: bool, gpus: int) -> dict:
    """Bytes each GPU sends in a step, by purpose; collectives in rings."""
    counts = [spec.count for spec in parse_crops(config.crops)]
    pieces, ring = config.batch_size // gpus // micro_batch, 2 * (gpus - 1) / gpus
    group = sync_group(config.sync_bn_group, gpus, torch.device("cuda"))

    def forward(norms):             # all-gather of means, deviations and a count
        return 4 * sum(2 * channels + 1 for channels in norms) * (group - 1)

    def backward(norms):            # all-reduce of two sums
        return 4 * 2 * sum(norms) * 2 * (group - 1) / group

    sizes, first = len(counts), assigned_sizes(counts) * (pieces > 1)
    synchronised = pieces * (
        (sizes * (1 + recompute) + first) * forward(cost.norms) + sizes * backward(cost.norms)
        + (1 + (pieces > 1)) * forward(cost.head_norms) + backward(cost.head_norms))
    return {"gradients": ring * 4 * cost.params, "SyncBatchNorm": synchronised,
            "Sinkhorn": ring * 4 * ASSIGNED * config.prototypes * config.sinkhorn_iterations}


def work(cost: Cost, recompute: bool = False, joint: bool = False) -> float:
    """TFLOP a picture: 3 forward passes, one more of the trunk where blocks are computed again, and
    one of the assigned crops where codes are made of several micro-batches."""
    adds = 3 * cost.flops + recompute * cost.trunk_flops + joint * cost.assigned_flops
    return 2 * adds / 1e12


def plan(config: Config, num_images: int | None = None, gpus: int = 8, gpu_memory: float = 80.0,
         tflops: float = 790.0, utilisation: float = 0.4) -> str:
    """What a run takes, in words; gpu_memory in GB, tflops of one GPU in the run's precision.

    Raises ValueError for a machine of nothing, and where a given --micro-batch does not divide.
    """
    if not all(0 < x < math.inf for x in (gpus, gpu_memory, tflops, utilisation)):
        raise ValueError("--gpus, --gpu-memory, --tflops and --utilisation must be above 0")
    config = with_length(config, num_images or IMAGENET)
    dtype = PRECISIONS.get(config.precision, torch.bfloat16)
    of = cost(config, dtype)
    share, limit = config.batch_size // gpus, gpu_memory * 1e9
    seen = config.steps * config.batch_size
    shown = {}
    for recompute in (False, True):
        micro_batch = config.micro_batch or largest_micro_batch(of, config, recompute, gpus, limit,
                                                                dtype)
        parts = memory(of, config, micro_batch or 1, recompute, gpus, dtype)
        column = {"GB, for micro-batches of": str(micro_batch or 1)}
        column |= {name: f"{size / 1e9:.2f}" for name, size in parts.items()}
        total = sum(parts.values()) / 1e9
        column[f"sum, of at most {ROOM * gpu_memory:.0f}"] = f"{total:.2f}"
        if total > ROOM * gpu_memory:
            micro_batch = 0
        pieces = share // micro_batch if micro_batch else 0
        spent = work(of, recompute, pieces > 1)
        rate = gpus * tflops * utilisation / spent
        sent = traffic(of, config, micro_batch, recompute, gpus) if micro_batch else {}
        column |= {
            "batch = GPUs x micro-batches x pictures": f"{gpus} x {pieces} x {micro_batch}",
            "TFLOP a picture, all passes": f"{spent:.3f}",
            "pictures/s": f"{rate:,.0f}", "days": f"{seen / rate / 86400:,.1f}",
        } if micro_batch else {"does not fit": "-"}
        column |= {f"GB sent a step: {name}": f"{size / 1e9:.3f}" for name, size in sent.items()}
        shown["per block" if recompute else "no checkpointing"] = column
    names = list(dict.fromkeys(name for column in shown.values() for name in column))
    lines = [f"{name:<42}" + "".join(f"{column.get(name, '-'):>18}" for column in shown.values())
             for name in names]
    million = 1e6
    return "\n".join([
        f"recipe {config.recipe}: {config.arch}, {of.params / million:,.1f} M parameters (trunk "
        f"{of.trunk_params / million:,.1f} M), crops {config.crops}",
        f"TFLOP a picture: {work(of):.3f}, {work(of, True):.3f} with blocks computed again",
        f"{seen:,} pictures in {config.steps:,} steps of {config.batch_size:,}, on {gpus} GPUs of "
        f"{gpu_memory:g} GB and {tflops:g} TFLOP/s, of which {utilisation:.0%} is reached "
        "(assumed)",
        "", " " * 42 + "".join(f"{name:>18}" for name in shown), *lines])
