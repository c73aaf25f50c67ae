"""Ranks: what the processes of a run tell one another. Each works in one process too.

    init_process_group(device)                      # torchrun's ranks
    with fail_together():                                   # a ValueError of one is all ranks'
        images = open_images("photos/")
    stop, = all_reduce_max([stop], device)

All functions but is_main, my_share and rank_and_world are collectives: every rank calls them.
"""
import os
import sys
import time
import traceback
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from weights.terminal import reason

PATIENCE = timedelta(minutes=30)        # longer than the longest save, and than loader.STUCK


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    return rank_and_world()[0] == 0


def my_share(count: int) -> range:
    """Of `count` things, those of this rank: consecutive ones."""
    rank, world = rank_and_world()
    each = -(-count // world)
    return range(min(rank * each, count), min((rank + 1) * each, count))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_lists(items: list) -> list:
    """The lists of all ranks, one after the other."""
    if not dist.is_initialized():
        return items
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for one in lists for item in one]


@contextmanager
def fail_together(*kinds: type[Exception]):
    """An error of these kinds (by default ValueError and OSError) in the block of one rank is a
    ValueError on all ranks, with the sentence of the first: none waits for one that has left."""
    errors = []
    try:
        yield
    except kinds or (ValueError, OSError) as error:
        errors = [reason(error)]
    if errors := gather_lists(errors):
        raise ValueError(errors[0])


def mean_over_ranks(x: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def all_reduce_max(values: list[Tensor | float], device) -> list[float]:
    """The largest of each value over all ranks, by one all-reduce. Values on the device are read by
    the host in one go, the only time it waits."""
    largest = torch.stack([value.float() if isinstance(value, Tensor) else
                           torch.full((), value, dtype=torch.float32, device=device)
                           for value in values])
    if dist.is_initialized():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def on_any_rank(flag: bool) -> bool:
    """Whether it is so on a rank. The hosts tell one another, and wait for no device."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor(flag, dtype=torch.int8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def init_process_group(device: torch.device, timeout: timedelta = PATIENCE) -> None:
    """The process group of torchrun's ranks; a rank waits no longer than timeout for the others.

    On CUDA, tensors of the GPU go by NCCL; what the hosts tell one another goes by gloo, so that
    they do not wait for their GPUs.

    After an elastic restart the ranks rendezvous afresh, under a name that the processes of this
    start alone share. torchrun keeps one store over its restarts, with the addresses of ranks that
    have died; new ranks that looked these up hung, or failed, in every second restart (gloo, torch
    2.14). So rank 0 makes up a name, and the others accept it only beside a word of their own,
    which no earlier process could know.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    words = [f"word/{other}" for other in range(world)]
    store.set(words[rank], word)
    name, met = None, False
    while not met:
        if time.monotonic() > deadline:
            raise ValueError(f"not all of the {world} ranks have come within {timeout}")
        if rank == 0:
            name = word
            store.set("names", b" ".join(store.multi_get(words)))
            met = world == 1 or store.check([f"{name}/{other}" for other in range(1, world)])
        elif word in (names := store.get("names").decode().split()):
            name, met = names[0], True
            store.set(f"{name}/{rank}", "here")
        time.sleep(0 if met else 0.05)
    cuda = device.type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", rank=rank, world_size=world,
                            store=dist.PrefixStore(name, store), timeout=timeout,
                            device_id=device if cuda else None)


@contextmanager
def leave_together():
    """At the end of the block the ranks wait for one another, and leave the process group. One that
    has an error does not wait. On CUDA its process ends at once: NCCL would wait for the others,
    which wait for this rank, and neither torchrun nor a person would learn of the error."""
    try:
        yield
        barrier()               # a rank left behind was seen to hang in gloo
    except BaseException as error:
        if dist.is_initialized() and "nccl" in dist.get_backend_config():
            if not isinstance(error, SystemExit):
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(error.code if isinstance(error, SystemExit) else 1)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
