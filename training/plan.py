"""The plan: what a run takes, in memory, time and traffic, predicted without a GPU.

    python train.py --plan --arch regnety_256gf --gpus 8 --gpu-memory 80 --tflops 790

    print(plan(configure({"arch": "regnety_256gf"}), gpus=8))
    config = fit(config, ranks=8, limit=80e9, dtype=torch.bfloat16)     # chooses the micro-batch

What is counted is in cost.py, how long it takes in step_time.py.
"""
import math
import os
from dataclasses import replace

import torch

from distributed.fsdp import shard_ranks
from distributed.hardware import PRECISIONS, memory_of
from distributed.ranks import gather_lists, is_main, rank_and_world
from distributed.roofline import Gpu
from recipes.command_line import configure
from recipes.config import Config, check_shards, with_length
from recipes.input import duration
from training.cost import NODE, Cost, cost, memory, shards_of, traffic, work
from training.step_time import Passes, passes, step_time

ROOM = 0.9                   # share of the memory that is planned; the rest: context, workspaces
IMAGENET = 1_281_167         # images of an epoch where there is no --data
# milliseconds that a core takes from file to crops, 2x160+4x96 (docs/data.md)
DECODING = {"500 x 375": 2.0, "12 megapixels": 40.0}


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


def fit(config: Config, ranks: int, limit: float, dtype: torch.dtype,
        of_node: int = NODE) -> Config:
    """The configuration with shard and shard_group, micro_batch and checkpoint_activations chosen,
    where they are open.

    Activation checkpointing is chosen only where fewer than 16 images would fit otherwise, and of a
    sharded run, in which larger micro-batches save communication. limit: bytes a rank has.
    of_node: ranks of a node. Raises ValueError where not one image fits.
    """
    if shard_ranks(config.shard_group, ranks, of_node) == 1:
        config = replace(config, shard=False)
    if config.micro_batch and None not in (config.checkpoint_activations, config.shard):
        return choose_shards(None, config, ranks, limit, dtype, of_node)
    counted = cost(config, dtype)
    config = choose_shards(counted, config, ranks, limit, dtype, of_node)
    most = {checkpointing: largest_micro_batch(counted, config, checkpointing, ranks, limit, dtype)
            for checkpointing in (False, True)}
    checkpointing = config.checkpoint_activations
    if checkpointing is None:
        wanted = config.micro_batch or min(16, config.batch_size // ranks)
        checkpointing = config.shard or most[False] < min(wanted, max(most[True], 1))
    micro_batch = config.micro_batch or most[checkpointing]
    if not micro_batch:
        need = sum(memory(counted, config, 1, checkpointing, ranks, dtype).values())
        larger = "a larger --shard-group or " * (1 < shards_of(config, ranks) < ranks)
        raise ValueError(f"{config.arch} needs {need / 1e9:.0f} GB on every device for one image "
                         f"at a time, and {ROOM:.0%} of {limit / 1e9:.0f} GB are there; {larger}a "
                         "smaller --arch fits, or --micro-batch 1 tries all the same")
    return replace(config, micro_batch=micro_batch, checkpoint_activations=checkpointing)


def choose_shards(cost: Cost | None, config: Config, ranks: int, limit: float, dtype: torch.dtype,
                  of_node: int = NODE) -> Config:
    """The configuration with shard and shard_group decided: sharded as asked for, else where not
    one image fits otherwise. Raises ValueError for what a sharded run cannot do."""
    group, shard = shard_ranks(config.shard_group, ranks, of_node), config.shard
    if group == 1:
        return replace(config, shard=False)
    if shard is None:
        given = config.checkpoint_activations
        shard = config.method == "swav" and ROOM * limit < min(
            sum(memory(cost, config, 1, checkpointing, ranks, dtype).values())
            for checkpointing in ((False, True) if given is None else (given,)))
    config = replace(config, shard=shard, shard_group=group if shard else config.shard_group)
    check_shards(config)
    return config


def shard_text(asked: Config, config: Config, ranks: int) -> str:
    """What was decided about shards, in a sentence, or "". asked: before choose_shards."""
    if not config.shard:
        return "--shard does nothing: a group has one rank" * bool(asked.shard)
    replicas = ranks // config.shard_group
    return (f"weights, gradients and momentum in shards over {config.shard_group} ranks"
            + f", {replicas} replicas" * (replicas > 1)
            + ", for whole ones have no room (--shard)" * (not asked.shard))


def fit_ranks(config: Config, device: torch.device, dtype: torch.dtype) -> Config:
    """fit, for the ranks that there are: the smallest memory of all counts. A collective."""
    limit, ranks = min(gather_lists([memory_of(device)])), rank_and_world()[1]
    of_node = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    fitted = fit(replace(config, device=device.type), ranks, limit, dtype, of_node)
    if is_main() and (text := shard_text(config, fitted, ranks)):
        print(text, flush=True)
    return replace(fitted, device=config.device)


def plan(config: Config, num_images: int | None = None, gpus: int = 8, gpu_memory: float = 80.0,
         gpu: Gpu = Gpu()) -> str:
    """What a run takes, in words; gpu_memory in GB.

    Raises ValueError for a machine of nothing, and where a given --micro-batch does not divide.
    """
    if not all(0 < x < math.inf for x in (gpus, gpu_memory, *gpu)):
        raise ValueError("--gpus, --gpu-memory and the rates of a GPU must be above 0")
    if config.method != "swav":
        raise ValueError(f"--plan counts SwAV's step, not that of {config.method}")
    asked, dtype = config, PRECISIONS.get(config.precision, torch.bfloat16)
    counted, passed = cost(config, dtype), passes(config, dtype)
    config = choose_shards(counted, with_length(config, num_images or IMAGENET), gpus,
                           gpu_memory * 1e9, dtype)
    columns = {"checkpointing" if checkpointing else "no checkpointing":
               column(counted, passed, config, checkpointing, gpus, gpu_memory, gpu)
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
        f"{gpu_memory:g} GB; times are predicted, at the least: {gpu.tflops:g} TFLOP/s, "
        f"{gpu.bandwidth:g} GB/s of memory, {gpu.nvlink:g} in a node, {gpu.network:g} to others",
        *filter(None, [shard_text(asked, config, gpus)]),
        "", " " * 42 + "".join(f"{name:>18}" for name in columns), *lines])


def plan_of(given: dict, machine: dict, images=None) -> str:
    """--plan: given options, --gpus and the like -> the plan in words. images: of --data, or None.
    Without a recipe, an arch or data it is SEER's 256GF."""
    if images is None and "recipe" not in given:
        given = {"arch": Config.arch} | given
    gpus, gpu_memory, *rates = machine.values()
    config = configure({"device": "cuda"} | given, max(1, gpus), images)
    return plan(config, None if images is None else len(images), gpus, gpu_memory, Gpu(*rates))


def expected_time(config: Config, dtype: torch.dtype, world: int) -> str:
    """Of the whole run, in words, were its GPUs those of Gpu()."""
    step = step_time(cost(config, dtype), passes(config, dtype), config, config.micro_batch,
                     bool(config.checkpoint_activations), world)
    return (f"at least {duration(config.steps * step.total)}, as predicted for an H100 a process "
            f"({step.utilisation:.0%} of {Gpu().tflops:g} TFLOP/s)")


def column(counted: Cost, passed: Passes, config: Config, checkpointing: bool, gpus: int,
           gpu_memory: float, gpu: Gpu) -> dict[str, str]:
    """A column of the plan: its rows' names and values."""
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
    step = step_time(counted, passed, config, micro_batch, checkpointing, gpus, gpu)
    rate = config.batch_size / step.total
    sent = traffic(counted, config, micro_batch, checkpointing, gpus)
    sent_ahead = "gathers and scatters" if config.shard else "gradients' all-reduce"
    return rows | {
        "batch = GPUs x micro-batches x images": f"{gpus} x {micro_batches} x {micro_batch}",
        "TFLOP an image, all passes": f"{work(counted, checkpointing, micro_batches > 1):.3f}",
        **{f"GB sent a step: {name}": f"{size / 1e9:.3f}" for name, size in sent.items()},
        **{f"ms a step: {name}": f"{1e3 * part:,.1f}" for name, part in step.seconds.items()},
        "ms a step, sum": f"{1e3 * step.total:,.1f}",
        f"ms of {sent_ahead}, hidden": f"{1e3 * step.reduction:.1f}, {1e3 * step.hidden:.1f}",
        "utilisation: share of the TFLOP/s": f"{step.utilisation:.0%}",
        "images/s": f"{rate:,.0f}",
        "days": f"{config.steps * step.total / 86400:,.1f}",
        **{f"cores a GPU for images of {name}": short(rate / gpus * ms / 1e3)
           for name, ms in DECODING.items()}}


def short(x: float) -> str:
    """Two digits, or the whole number."""
    return f"{x:.2g}" if x < 99.5 else f"{x:,.0f}"
