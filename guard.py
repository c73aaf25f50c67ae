"""Guard: a bad step leaves no trace, a signal ends a run between two steps, a folder has one run.

    with Signals() as signals:
        for step in steps:
            undo.remember()
            ...                                    # forward, backward
            stop, bad = agree([signals.seen is not None, not sound(loss, model)], device)
            if bad:
                undo.undo()

All of it is the same on every rank: what one has seen, `agree` tells the others.
"""
import os
import signal
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

INTERRUPTED = 75            # exit status of a run that a signal has ended (sysexits: try again)
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Signals:
    """SIGTERM, SIGINT and SIGUSR1 are noted in `seen`, to be looked at between steps; a second one
    does what it would do without."""

    def __init__(self):
        self.seen, self.before = None, {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():       # elsewhere it is an error
            for name in NAMES:
                if number := getattr(signal, name, None):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number, frame) -> None:
        if self.seen is not None:
            self.__exit__()
            os.kill(os.getpid(), number)
        self.seen = signal.Signals(number).name


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


def sound(loss: Tensor, embeddings: Tensor, model: nn.Module, scaled: bool) -> bool:
    """Whether a step's loss, embeddings and gradients are finite. note: a sync point.

    scaled: by a GradScaler, which looks after the gradients itself, and skips such a step.
    """
    finite = [loss.isfinite(), embeddings.isfinite().all()]
    if not scaled:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        finite.append(torch.stack(torch._foreach_norm(grads)).isfinite().all())
    return bool(torch.stack(finite).all())


def agree(values: list[float], device) -> list[float]:
    """The largest of each value over all ranks: a collective."""
    if not dist.is_initialized():
        return [float(value) for value in values]
    largest = torch.tensor([float(value) for value in values], device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def lock(folder: Path):
    """Keep a second run out of a folder, as long as the returned file is open; a crash opens it.
    Raises ValueError where another process has it."""
    file = open(folder / ".lock", "w")
    if fcntl:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)        # not inherited by workers
        except (BlockingIOError, PermissionError):
            file.close()
            raise ValueError(f"another run is at work in {folder}; wait for it, or choose another "
                             "--out") from None
        except OSError:                 # some network file systems know no locks
            pass
    return file
