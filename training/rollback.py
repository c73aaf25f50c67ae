"""Guard: a bad step leaves no trace, a signal ends a run between two steps, a restart finds no ghosts.

    with Signals() as signals:
        for step in steps:
            undo.remember()
            ...                                    # forward, backward
            stop, bad = agree([signals.seen is not None, not all(sound(...))], device)
            if bad:
                undo.undo()

All of it is the same on every rank: what one has seen, `agree` tells the others.
"""
import ctypes
import datetime
import os
import signal
import sys
import threading
import time
import uuid

import torch
import torch.distributed as dist
from torch import Tensor, nn

INTERRUPTED = 75            # exit status of a run that a signal has ended (sysexits: try again)
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")
GRACE = 5.0
PR_SET_PDEATHSIG = 1        # of Linux' prctl: the signal that comes when the parent dies


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 are noted in `seen`, to be looked at between steps; a second one
    does what it would do without. Under torchrun only after GRACE seconds: a scheduler may signal
    it and its ranks, and it passes on what it gets. If torchrun dies, that is a SIGTERM (Linux)."""

    def __init__(self):
        self.seen, self.before, self.when = None, {}, 0.0
        self.grace = GRACE if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():       # elsewhere it is an error
            if self.grace and sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            for name in NAMES:
                if number := getattr(signal, name, None):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number, frame) -> None:
        if self.seen is None:
            self.seen, self.when = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self.when >= self.grace:
            self.__exit__()
            os.kill(os.getpid(), number)


def leave_signals_to_the_parent(worker: int) -> None:
    """worker_init_fn of a DataLoader: a signal to the whole group must not take the workers from a
    run that wants to finish its step."""
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class Undo:
    """The state that a forward pass changes: BatchNorm's buffers and the queue."""

    def __init__(self, model: nn.Module, queue=None):
        self.buffers, self.queue = list(model.buffers()), queue
        self.copies = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def remember(self) -> None:
        for copy, buffer in zip(self.copies, self.buffers):
            copy.copy_(buffer)
        if self.queue:                  # `push` makes new tensors
            self.queue_before = self.queue.embeddings, self.queue.filled

    @torch.no_grad()
    def undo(self) -> None:
        for copy, buffer in zip(self.copies, self.buffers):
            buffer.copy_(copy)
        if self.queue:
            self.queue.embeddings, self.queue.filled = self.queue_before


def sound(loss: Tensor, embeddings: Tensor, model: nn.Module) -> list[bool]:
    """Whether a step's loss, embeddings and gradients are finite. note: a sync point."""
    grads = torch.stack(torch._foreach_norm([p.grad for p in model.parameters()
                                             if p.grad is not None]))
    return torch.stack([x.isfinite().all() for x in (loss, embeddings, grads)]).tolist()


def agree(values: list[float], device) -> list[float]:
    """The largest of each value over all ranks: a collective."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    largest = torch.tensor([float(value) for value in values], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def join(backend: str, timeout: datetime.timedelta) -> None:
    """The process group of torchrun's ranks; one that waits longer for the others gives up.

    Its store goes by a name that the processes of this start alone share, for torchrun keeps one store
    over its restarts, and in it the addresses of ranks that have died: new ones that looked them up
    hung, or failed, in every second restart (gloo, torch 2.14). So rank 0 makes up a name, and the
    others believe it only beside a word of their own, which nobody could have known before.
    """
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    mine, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    words = [f"word/{other}" for other in range(world)]
    store.set(words[rank], mine)
    name, met = None, False
    while not met:
        if time.monotonic() > deadline:
            raise ValueError(f"not all of the {world} ranks have come within {timeout}")
        if rank == 0:
            name = mine
            store.set("names", b" ".join(store.multi_get(words)))
            met = world == 1 or store.check([f"{name}/{other}" for other in range(1, world)])
        elif mine in (names := store.get("names").decode().split()):
            name, met = names[0], True
            store.set(f"{name}/{rank}", "here")
        time.sleep(0 if met else 0.05)
    dist.init_process_group(backend, store=dist.PrefixStore(name, store), rank=rank,
                            world_size=world, timeout=timeout)
