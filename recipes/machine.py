"""The machine of a run: memory layout, padding and cuDNN's search, measured; computing threads.

    config, text = choose(config, device, dtype)        # config.micro_batch is decided by then

How fast the same network is computed depends on the machine: on a CPU channels-last wins, on a GPU
either layout was seen to be several times as fast as the other. So what was not asked for is
decided at the start of a run: by passes forward and backward of its own trunk, on crops of its
sizes and in its precision, before its own weights are there. Rank 0 decides for all. The choice is
kept in the configuration, so that a run that is resumed measures nothing. (cuDNN's search is made
again in each process, and may choose another algorithm.)

Not measured is what cannot matter: padding where no width is odd, and away from CUDA; cuDNN's
search away from CUDA; all on a CPU that would take minutes. A compiled trunk is measured as it is
before it is compiled.
"""
import itertools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed.hardware import autocast, layout, processors
from distributed.padding import odd_widths
from distributed.ranks import fail_together, gather_lists, is_main
from distributed.wrap import arrange, stages_of
from methods.build import build_trunk
from recipes.config import Config
from recipes.input import LONG
from recipes.medium import training_flops
from regnet import ARCHS

LIMIT, CPU_LIMIT = 60.0, 10.0           # seconds: nothing is tried that may take longer
PASSES = 3                   # that are timed, after one that is not; the fastest counts
SHARE = 0.1                  # of the limit, after which a variant is not timed again
GAIN = 1.1                   # times as fast as the usual way, or that stays
CPU_IMAGES, CPU_FLOP = 8, 1.2e10        # that are measured on a CPU: of a micro-batch at most


class Variant(NamedTuple):
    """A way to compute a trunk. cudnn_benchmark: cuDNN times its algorithms for each shape."""
    channels_last: bool
    pad_widths: bool
    cudnn_benchmark: bool

    def __str__(self):
        return ("channels-last" if self.channels_last else "contiguous") \
            + ", padded" * self.pad_widths + ", cudnn.benchmark" * self.cudnn_benchmark


def choose(config: Config, device: torch.device, dtype: torch.dtype,
           clock: Callable[[], float] = time.perf_counter) -> tuple[Config, str]:
    """The configuration with channels_last, pad_widths, cudnn_benchmark and threads decided; a
    table of what was measured, or "". A collective.

    clock: seconds. The run's random state stays as it is.
    """
    found = []
    with fail_together():
        if is_main():
            threads = config.threads or (processors() if device.type == "cpu" else 0)
            set_machine(device, threads)
            found = [(*fastest(config, device, dtype, clock), threads)]
    (variant, text, threads), = gather_lists(found)
    set_machine(device, threads, variant.cudnn_benchmark)
    return replace(config, **variant._asdict(), threads=threads), text


def set_machine(device: torch.device, threads: int, cudnn_benchmark: bool = False) -> None:
    """What PyTorch keeps for a whole process. threads: on a CPU."""
    if device.type == "cpu":
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = cudnn_benchmark


def fastest(config: Config, device: torch.device, dtype: torch.dtype,
            clock: Callable[[], float]) -> tuple[Variant, str]:
    """The variant to take, and the table. Layout and padding are tried in all combinations, cuDNN's
    search with the best of them."""
    usual, layouts, widths, searches = open_ways(config, device)
    if len(layouts) * len(widths) * len(searches) == 1:
        return usual, ""
    limit = CPU_LIMIT if device.type == "cpu" else LIMIT
    seconds, begin, longest = {}, clock(), 0.0
    variants = itertools.chain(
        (Variant(*way, searches[0]) for way in itertools.product(layouts, widths)),
        (min(seconds, key=seconds.get)._replace(cudnn_benchmark=search) for search in searches[1:]))
    for variant in variants:
        start = clock()
        if start - begin + longest > limit:
            break
        seconds[variant] = measure(config, device, dtype, variant, clock, start + SHARE * limit)
        longest = max(longest, clock() - start)
    best = min(seconds, key=seconds.get)
    if seconds[usual] <= GAIN * seconds[best]:
        best = usual
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    return best, table(seconds, best, images_of(config, device), clock() - begin)


def open_ways(config: Config, device: torch.device) -> tuple[Variant, list, list, list]:
    """The usual variant, which has what was asked for; and what is to be tried of each of its three
    parts, the usual first."""
    odd = config.arch in ARCHS and bool(odd_widths(ARCHS[config.arch]))
    cuda, cpu = device.type == "cuda", device.type == "cpu"
    # the padded copies of one block at a time are made with activation checkpointing alone
    odd = odd and (config.checkpoint_activations or not config.shard)
    timed = cuda or cpu and training_flops(config.arch, config.crops) <= LONG

    def ways(asked: bool | None, usual: bool, tried: bool) -> list[bool]:
        return [usual, not usual][:1 + tried] if asked is None else [asked]

    each = (ways(config.channels_last, cpu, timed), ways(config.pad_widths, False, cuda and odd),
            ways(config.cudnn_benchmark, False, cuda))
    return Variant(*(tried[0] for tried in each)), *each


def images_of(config: Config, device: torch.device) -> int:
    """Of a pass that is measured: the micro-batch, of which a CPU takes a part."""
    if device.type != "cpu":
        return config.micro_batch
    affordable = int(CPU_FLOP / training_flops(config.arch, config.crops))
    return min(config.micro_batch, CPU_IMAGES, max(2, affordable))


def measure(config: Config, device: torch.device, dtype: torch.dtype, variant: Variant,
            clock: Callable[[], float], end: float) -> float:
    """Seconds of a pass; infinity where it fails, as where memory has no room for it. No further
    pass begins when the clock is at end."""
    torch.backends.cudnn.benchmark, seconds = variant.cudnn_benchmark, math.inf
    try:
        trunk, crops, held = prepared(config, device, variant)
        one_pass(trunk, crops, device, dtype)
        for _ in range(PASSES):
            start = clock()
            one_pass(trunk, crops, device, dtype)
            seconds = min(seconds, clock() - start)
            if clock() >= end:
                break
    except RuntimeError:                # OutOfMemoryError is one; cuDNN may have no algorithm
        return math.inf
    return seconds


def prepared(config: Config, device: torch.device, variant: Variant
             ) -> tuple[nn.Module, list[Tensor], list[Tensor]]:
    """A trunk as wrap leaves it; noise for each crop size; the memory of the optimizer's momentum,
    so that what has no room in the run has none here."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        trunk = shallow_trunk(config, device) if config.shard else build_trunk(config.arch)
        crops = [torch.randn(spec.count * images_of(config, device), 3, spec.size, spec.size)
                 for spec in config.crops]
    arrange(trunk, device, bool(config.checkpoint_activations),
            variant.channels_last and not config.shard, variant.pad_widths)    # as wrap does
    form = layout(device, variant.channels_last)
    return (trunk, [x.to(memory_format=form) for x in crops],
            [torch.empty_like(p) for p in trunk.parameters()])


def shallow_trunk(config: Config, device: torch.device) -> nn.Module:
    """For a run in shards, whose whole weights have no room: all blocks of a stage that follow its
    second one have the weights of that, and take as long as their own would. These are noise."""
    with torch.device("meta"):
        trunk = build_trunk(config.arch)
    for _, stage in stages_of(trunk):
        for block in stage[2:]:         # a block of its own, for wrap's sake, with the same tensors
            for module, second in zip(block.modules(), stage[1].modules()):
                module._parameters, module._buffers = second._parameters, second._buffers
    for tensor in trunk.to_empty(device=device).state_dict().values():
        nn.init.normal_(tensor, 0.0, 0.02) if tensor.dim() else tensor.zero_()
    return trunk


def one_pass(trunk: nn.Module, crops: list[Tensor], device: torch.device,
             dtype: torch.dtype) -> None:
    """Forward and backward of all crop sizes, to their end on the device."""
    with autocast(device, dtype):
        features = torch.cat([trunk(images) for images in crops])        # (V*B, C)
    features.float().square().sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(seconds: dict[Variant, float], best: Variant, images: int, spent: float) -> str:
    """What was measured, the chosen one marked."""
    lines = [f"  {str(variant):<42}" + (f"{1e3 * took:>9.1f} ms" if took < math.inf else
                                        "does not run") + "  chosen" * (variant == best)
             for variant, took in seconds.items()]
    return "\n".join([f"the trunk forward and backward, {images} images, measured in {spent:.1f} s "
                      "(kept for the whole run):", *lines])
