"""Speed and memory: predicted (the plan), and measured side by side with the ordinary way.

    python train.py --plan --arch regnety_256gf --gpus 8 --gpu-memory 80 --tflops 790
    python bench.py step --arch regnety_400mf --crops 2x96+4x64 --micro-batch 32
    python bench.py trunk --arch regnety_8gf --crops 1x128 --micro-batch 4    # and torchvision's
    python bench.py start              # from the command to the first step
    python bench.py sinkhorn           # against the textbook loop

The plan counts on the meta device: no GPU, and no memory, is needed to learn what a network would
take. Its multiply-adds are exact; what the step's peak comes to is predicted to some per cent.

Measured rows are ratios of medians taken in turn (ours, theirs, ours, theirs, ...), so a machine
whose speed drifts slows both; each is called twice and the second call is timed, as in a loop that
does nothing else. The ordinary way is written here, plainly, as one finds it elsewhere.

Shapes: B pictures, V crops, D embedding, K prototypes.
"""
import argparse
import datetime
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

try:
    import resource
except ImportError:                      # Windows
    resource = None

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from larc import LARC
from multicrop import MultiCrop, Photometric, parse_crops
from recipes import Config, configure, hyphens, parse_head, with_length
from regnet import ARCHS, complexity
from scale import (ASSIGNED, PRECISIONS, assigned_sizes, build_model, build_trunk, layout,
                   pick_device, pick_precision, stages_of, swav_backward, sync_group, wrap)
from sinkhorn import sinkhorn
from swav import swav_codes

ROOM = 0.9                   # of the memory that the plan fills; the rest: context, workspaces
IMAGENET = 1_281_167         # pictures a plan in epochs counts with where there is no --data


# ------------------------------------------------------------------------------------ the plan
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


# ------------------------------------------------------------------------------------ the step
class Clock:
    """Milliseconds by name; the device is waited for before and after."""

    def __init__(self, device: torch.device):
        self.device, self.ms = device, {}

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            wait_for(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for(self.device)
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3
            return result
        return call


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()


def peak_memory(device: torch.device) -> float:
    """Bytes, so far: of the allocator on a GPU; of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps" or resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def bf16_peak(device: torch.device) -> float:
    """TFLOP/s of a large product of bf16 matrices: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    clock = Clock(device)
    (a @ b, a @ b)
    times = []
    for _ in range(10):
        clock.ms.clear()
        clock.timed("product", torch.matmul)(a, b)
        times.append(clock.ms["product"])
    return 2 * n ** 3 / min(times) / 1e9


def our_step(config: Config, device: torch.device, dtype: torch.dtype,
             recompute: bool) -> Callable:
    """One step of train.py's on pictures that are there; step(clock) fills the clock."""
    specs = parse_crops(config.crops)
    model = build_model(config.arch, parse_head(config.head), config.prototypes, config.head_bn,
                        device=device)
    network = wrap(model, device, checkpoint_activations=recompute)
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    photometric, draw = Photometric().to(device), MultiCrop(specs).draw
    rng = random.Random(0)
    crops, params = random_crops(config, device), [
        torch.tensor([draw(rng) for _ in range(spec.count * config.micro_batch)]) for spec in specs]

    def distort(crops):
        return [photometric(c, p).to(memory_format=layout(device)) for c, p in zip(crops, params)]

    def codes_of(embeddings, scores, num_crops):
        return swav_codes(scores, num_crops, epsilon=config.epsilon,
                          iterations=config.sinkhorn_iterations)

    def update():
        optimizer.step()
        model.normalize_prototypes()

    def step(clock: Clock) -> None:
        optimizer.zero_grad(set_to_none=True)
        whole = clock.timed("forward, codes, backward", swav_backward)
        whole(model, clock.timed("forward", network), [crops], [spec.count for spec in specs],
              clock.timed("Sinkhorn", codes_of), config.temperature, dtype,
              prepare=clock.timed("distortion", distort))
        clock.timed("optimizer", update)()
        ms = clock.ms
        ms["backward"] = ms.pop("forward, codes, backward") - sum(
            ms[name] for name in ("distortion", "forward", "Sinkhorn"))

    return step


def ordinary_trunk(arch: str) -> nn.Module:
    """torchvision's; a few RegNets are rounded to other widths there."""
    if arch not in ARCHS:
        return torchvision.models.resnet50()
    p = ARCHS[arch]
    return torchvision.models.RegNet(torchvision.models.regnet.BlockParams.from_init_params(
        p.depth, p.w_0, p.w_a, p.w_m, p.group_width, se_ratio=p.se_ratio))


def ordinary_step(config: Config, device: torch.device) -> Callable:
    """The same step as it is usually written: torchvision's network, NCHW, eager, float32 or on a
    GPU bf16 autocast, the loss as a double loop, the textbook Sinkhorn, LARC tensor by tensor."""
    specs = parse_crops(config.crops)
    views = sum(spec.count for spec in specs)
    with torch.device(device):
        trunk = ordinary_trunk(config.arch)
        widths, head = [trunk.fc.in_features, *parse_head(config.head)], nn.Sequential()
        trunk.fc = nn.Identity()
        for i, (w_in, w_out) in enumerate(zip(widths, widths[1:])):
            head.append(nn.Linear(w_in, w_out))
            if i < len(widths) - 2:
                head.extend([nn.BatchNorm1d(w_out)] * config.head_bn + [nn.ReLU()])
        prototypes = nn.Linear(widths[-1], config.prototypes, bias=False)
    params = [p for m in (trunk, head, prototypes) for p in m.parameters()]
    optimizer = torch.optim.SGD(params, config.lr, config.momentum)
    crops = [crop.float() / 255 for crop in random_crops(config, device)]

    def forward():
        features = torch.cat([trunk(images) for images in crops])
        return prototypes(F.normalize(head(features), dim=1))

    def codes(scores):
        with torch.no_grad():
            return [textbook_sinkhorn(scores[a].float(), config.epsilon, config.sinkhorn_iterations)
                    for a in range(ASSIGNED)]

    def backward(scores, codes):
        loss = 0.0
        for a, code in enumerate(codes):
            subloss = 0.0
            for v in set(range(views)) - {a}:
                log_p = F.log_softmax(scores[v].float() / config.temperature, dim=1)
                subloss -= (code * log_p).sum(1).mean()
            loss += subloss / (views - 1)
        (loss / len(codes)).backward()

    @torch.no_grad()
    def update():
        for p in params:
            p_norm, g_norm = p.norm(), p.grad.norm()
            if p_norm != 0 and g_norm != 0:
                rate = 0.001 * p_norm / (g_norm + config.weight_decay * p_norm + 1e-8)
                p.grad += config.weight_decay * p
                p.grad *= rate
        optimizer.step()
        prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))

    def step(clock: Clock) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            scores = clock.timed("forward", forward)().unflatten(0, (views, -1))      # (V, B, K)
            assigned = clock.timed("Sinkhorn", codes)(scores)
            clock.timed("backward", backward)(scores, assigned)
        clock.timed("optimizer", update)()

    return step


def random_crops(config: Config, device: torch.device) -> list[Tensor]:
    return [torch.randint(0, 256, (spec.count * config.micro_batch, 3, spec.size, spec.size),
                          dtype=torch.uint8, device=device) for spec in parse_crops(config.crops)]


def bench_step(config: Config, device: torch.device, dtype: torch.dtype, recompute: bool,
               repeats: int) -> dict:
    """One process, one micro-batch. Medians of several repeats; the two ways taken in turn. The
    step is what the network takes: without distortion, which the ordinary way leaves to workers."""
    torch.manual_seed(0)
    before = peak_memory(device)
    steps = {"ours": our_step(config, device, dtype, recompute)}
    for _ in range(2):
        steps["ours"](Clock(device))
    taken = peak_memory(device) - before            # before the other network is there
    try:
        steps["ordinary"] = ordinary_step(config, device)
        steps["ordinary"](Clock(device))
    except torch.OutOfMemoryError:
        steps.pop("ordinary", None)
        print("the ordinary way has no room on this device")
    clocks = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            clock = Clock(device)
            step(clock)
            clocks[name].append(clock.ms)

    of = cost(config, dtype)
    planned = sum(memory(of, config, config.micro_batch, recompute, 1, dtype).values())
    peak, rows = bf16_peak(device), {}
    for name, measured in clocks.items():
        for part in measured[0]:
            ms = statistics.median(each[part] for each in measured)
            rows.setdefault(f"{part}, ms", {})[name] = ms
        whole = statistics.median(sum(each.values()) - each.get("distortion", 0)
                                  for each in measured)
        rows.setdefault("step, ms", {})[name] = whole
        rate = config.micro_batch / whole * 1e3
        rows.setdefault("images/s", {})[name] = rate
        rows.setdefault("share of bf16 peak", {})[name] = rate * work(of) / peak
    result = {"arch": config.arch, "crops": config.crops, "micro_batch": config.micro_batch,
              "precision": str(dtype).removeprefix("torch."), "checkpoint_activations": recompute,
              "repeats": repeats, "bf16_tflops": peak, "peak_gb": taken / 1e9,
              "planned_gb": planned / 1e9, **rows}
    print(f"{config.arch}, crops {config.crops}, micro-batch {config.micro_batch}, "
          f"{result['precision']}{', blocks computed again' * recompute}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}\n\n"
          + " " * 20 + "".join(f"{name:>12}" for name in steps))
    for row, values in rows.items():
        print(f"{row:<20}" + "".join(f"{values[name]:>12.4g}" if name in values else f"{'-':>12}"
                                     for name in steps))
    if "ordinary" in steps:
        result["ratio"] = rows["step, ms"]["ordinary"] / rows["step, ms"]["ours"]
        print(f"{'ratio':<20}{result['ratio']:>12.2f}")
    print(f"\npeak memory {taken / 1e9:.2f} GB, the plan says {planned / 1e9:.2f}; a bf16 matrix "
          f"product reaches {peak:.3g} TFLOP/s")
    return result


def bench_start(arch: str) -> dict:
    """Seconds from the command to the end of the first step of 8 pictures, and of one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--arch", arch,
                   "--batch-size=8", "--steps=100", "--log-every=1", "--device=cpu",
                   f"--out={folder}/run"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = next((line for line in process.stdout if line.startswith("step 1/")), "")
            seconds = time.perf_counter() - start
            process.terminate()
    if not line:
        raise RuntimeError(f"{' '.join(command)} did not reach its first step")
    print(f"{arch}: {seconds:.1f} s from the command to the end of the first step, 8 pictures")
    return {"arch": arch, "seconds": round(seconds, 2)}


# ----------------------------------------------------------------------------------- the trunk
def bench_trunk(arch: str, pictures: int, size: int, device: torch.device, dtype: torch.dtype,
                repeats: int) -> dict:
    """Forward, and forward and backward: in either memory layout, and torchvision's network (NCHW).
    Widths are rounded as torchvision does, so that both are the same network."""
    nets = {"torchvision": ordinary_trunk(arch), "NCHW": build_trunk(arch, "torchvision"),
            "channels-last": build_trunk(arch, "torchvision")}
    nets["torchvision"].fc = nn.Identity()
    layouts = dict.fromkeys(nets, torch.contiguous_format) | {"channels-last": torch.channels_last}
    images = torch.randn(pictures, 3, size, size, device=device)
    images = {name: images.to(memory_format=layouts[name]) for name in nets}
    nets = {name: net.to(device, memory_format=layouts[name]) for name, net in nets.items()}

    def features(name):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return nets[name](images[name])

    def step(name):
        nets[name].zero_grad(set_to_none=True)
        features(name).float().square().mean().backward()

    rows = {row: in_turn({name: partial(function, name) for name in nets}, repeats, device)
            for row, function in (("forward, ms", torch.no_grad()(features)), ("step, ms", step))}
    chosen = "channels-last" if layout(device) is torch.channels_last else "NCHW"
    precision = str(dtype).removeprefix("torch.")
    print(f"{arch}, {pictures} pictures of {size} pixels, {precision}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}; "
          f"train.py takes {chosen}\n"
          f"{'':<12}" + "".join(f"{name:>15}" for name in nets) + f"{'ratio':>8}")
    for row, ms in rows.items():
        ms["ratio"] = ms["torchvision"] / ms[chosen]
        print(f"{row:<12}" + "".join(f"{ms[name]:>15.1f}" for name in nets)
              + f"{ms['ratio']:>8.2f}")
    return {"arch": arch, "pictures": pictures, "size": size, "repeats": repeats, "layout": chosen,
            "precision": precision, **rows}


def in_turn(functions: dict, repeats: int, device=torch.device("cpu")) -> dict[str, float]:
    """Median milliseconds of each function's second call, the functions taken in turn."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            clock = Clock(device)
            clock.timed("", function)()
            times[name].append(clock.ms[""])
    return {name: statistics.median(t) for name, t in times.items()}


# ------------------------------------------------------------------------------------ sinkhorn
def textbook_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Exponentiate, then divide rows and columns in turn."""
    q = torch.exp(scores / epsilon)                                      # (B, K)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
    return q * q.shape[0]


def bench_sinkhorn(repeats: int) -> None:
    print(f"Sinkhorn, epsilon 0.05, 3 iterations, fp32, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, median of {repeats} in turn\n"
          f"{'B':>6} {'K':>6} {'textbook ms':>12} {'sinkhorn.py ms':>15} {'ratio':>6}")
    ratios = []
    for rows, prototypes in ((64, 3000), (512, 3000), (4096, 3000), (512, 16000), (4096, 16000)):
        torch.manual_seed(0)
        scores = (F.normalize(torch.randn(rows, 128), dim=1)
                  @ F.normalize(torch.randn(prototypes, 128), dim=1).t())
        ms = in_turn({"textbook": lambda: textbook_sinkhorn(scores, 0.05, 3),
                      "ours": lambda: sinkhorn(scores, 0.05, 3)}, repeats)
        ratios.append(ms["textbook"] / ms["ours"])
        print(f"{rows:>6} {prototypes:>6} {ms['textbook']:>12.2f} {ms['ours']:>15.2f} "
              f"{ratios[-1]:>6.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


# -------------------------------------------------------------------------------- small print
def read_results(path: Path) -> list:
    """Raises ValueError for a file that is no list of results."""
    try:
        results = json.loads(path.read_text()) if path.exists() else []
    except (ValueError, OSError):
        results = None
    if not isinstance(results, list):
        raise ValueError(f"--out {path} is no file of results; name another")
    return results


def write_results(path: Path, results: list, what: str, result: dict) -> None:
    """All results, with one more and what it was measured on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    results = [*results, {
        "what": what, "date": datetime.date.today().isoformat(), **result,
        "machine": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__}]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(aside, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure speed beside the ordinary way.")
    parser.add_argument("what", choices=["step", "trunk", "start", "sinkhorn"])
    parser.add_argument("--arch", default="regnety_400mf", help="of step, trunk and start")
    parser.add_argument("--crops", default="2x160+4x96", help="of step; of trunk the first size")
    parser.add_argument("--micro-batch", type=int, default=16, help="pictures of step and trunk")
    parser.add_argument("--checkpoint-activations", action="store_true", help="in step")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--device", default="", help="cuda, mps or cpu; none: the best one here")
    parser.add_argument("--repeats", type=int, default=0, help="(5; of sinkhorn 15)")
    parser.add_argument("--out", default="runs/bench.json", help="where results are added")
    args = parser.parse_args(hyphens(sys.argv[1:] if argv is None else argv))
    if args.what == "sinkhorn":
        return bench_sinkhorn(max(args.repeats, 0) or 15)
    try:
        if args.micro_batch < 1 or args.repeats < 0:
            raise ValueError("--micro-batch must be at least 1, and --repeats not below 0")
        out = Path(args.out)
        results = read_results(out)
        if args.what == "start":
            result = bench_start(args.arch)
        else:
            device, repeats = pick_device(args.device), args.repeats or 5
            dtype = pick_precision(args.precision, device)
            if args.what == "trunk":
                result = bench_trunk(args.arch, args.micro_batch, parse_crops(args.crops)[0].size,
                                     device, dtype, repeats)
            else:
                config = configure({"arch": args.arch, "crops": args.crops,
                                    "batch_size": max(2, args.micro_batch)})
                result = bench_step(replace(config, micro_batch=args.micro_batch), device, dtype,
                                    args.checkpoint_activations, repeats)
        write_results(out, results, args.what, result)
    except torch.OutOfMemoryError:
        fail("the device has no room for this step: try a smaller --micro-batch or "
             "--checkpoint-activations")
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))


def fail(sentence: str) -> None:
    print(f"bench.py: error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
