"""Checkpoints of a run: complete state in, complete state out; writer.py writes them.

    saver = Saver(run)
    saver.step(done, force=saver.due())                 # saves where the configuration says so
    saver.finish(done)
    load_run_state(run, state)

`run_state` is a collective: every rank calls it, since each holds its own part of a method's queue.
The file holds the queue of all ranks, so a run may go on with another number of them.

Shapes: A assigned crops, L queue length of a rank, D embedding.
"""
import os
import time

import torch
import torch.distributed as dist
from torch import nn

from distributed.agreement import disagreement
from distributed.ranks import barrier, fail_together, gather_lists
from larc import norms
from methods.build import build_method
from swav import Queue
from training.rollback import NotFinite
from training.run import Run
from training.signals import Stop
from training.writer import ShardedWriter, Writer, newest, trunk_of
from weights.atomic import load, save
from weights.files import Loaded, read
from weights.load import load_weights
from weights.names import part_of
from weights.official import OFFICIAL
from weights.sharded import load_whole, restore

VERSION = 4


class Saver:
    """Saves a run where its configuration says so."""

    def __init__(self, run: Run):
        self.run, self.saved, self.clock = run, run.start, time.monotonic()
        kind = ShardedWriter if run.config.shard else Writer
        self.writer = kind(run.out, run.config.keep, run.config.keep_every, run.saved)

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *_) -> None:
        self.writer.wait()

    def due(self) -> bool:
        """Whether save_minutes have passed since the last save, by rank 0's clock."""
        minutes = (time.monotonic() - self.clock) / 60
        return self.run.rank == 0 and minutes >= self.run.config.save_minutes > 0

    def step(self, done: int, force: bool = False) -> None:
        """Save after so many steps if it is their turn, or by force. Raises Stop, on all ranks
        alike and before anything is written, where these hold different weights, or a weight is not
        finite."""
        run = self.run
        if not (done % run.config.save_every == 0 or force):
            return
        if difference := disagreement(run.method):
            raise Stop(f"{difference} at step {done}; they were not saved: the same command goes "
                       "on from what was saved before")
        if not norms(list(run.method.parameters())).isfinite().all():
            raise NotFinite(f"the weights are not finite at step {done}", run.out)
        state, self.saved, self.clock = run_state(run, done), done, time.monotonic()
        if run.rank == 0 or run.config.shard:
            self.writer.save(state)

    def finish(self, done: int) -> None:
        """Save what is not saved yet, and wait until it is on the disk, on all ranks. Raises Stop
        where that failed."""
        if done > self.saved:
            self.step(done, force=True)
        self.writer.wait()
        if self.writer.error:
            raise Stop(f"{self.writer.error}; {self.run.out} holds the run as it was before")
        barrier()


def run_state(run: Run, step: int) -> dict:
    """All that a run needs to go on after `step` steps: a collective.

    A method's `queue`, where it is a swav.Queue, stands outside its state dict: each rank
    holds a part of it, and a run may go on with another number of ranks.
    """
    state = {"version": VERSION, "step": step, "config": run.config.as_dict(),
             "num_images": len(run.stream.images), "fingerprint": run.stream.images.fingerprint,
             "sizes": run.stream.images.sizes, "place": os.path.realpath(run.config.data),
             "model": run.method.state_dict(),
             "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict()}
    if queue := queue_of(run.method):
        parts = [queue.embeddings]
        if dist.is_initialized():
            parts = [torch.empty_like(queue.embeddings) for _ in range(run.world)]
            dist.all_gather(parts, queue.embeddings)
        # (A, L, ranks, D) -> (A, L * ranks, D): rows of one age side by side, newest first
        embeddings = torch.stack(parts, 2).flatten(1, 2)
        state["queue"] = {"embeddings": embeddings, "filled": queue.filled * run.world}
    bad = list(map(tuple, gather_lists(run.pending["bad"])))
    return state | {"pending": run.pending | {"bad": bad}}


def queue_of(method: nn.Module) -> Queue | None:
    queue = getattr(method, "queue", None)
    return queue if isinstance(queue, Queue) else None


def load_run_state(run: Run, state: dict) -> None:
    """The way back from run_state, whether run and state are sharded or not. state["path"]: where
    it is from; state["last"]: whether it is the last checkpoint. Raises ValueError where the
    network is another one."""
    restore(run.method, run.optimizer, state, state["path"],
            dist.group.WORLD if dist.is_initialized() else None)
    run.scaler.load_state_dict(state["scaler"])
    if queue := queue_of(run.method):
        embeddings = state["queue"]["embeddings"][:, run.rank::run.world].contiguous()
        queue.embeddings = embeddings.to(run.device)
        queue.filled = state["queue"]["filled"] // run.world
    run.start, run.saved = state["step"], state["step"] if state["last"] else None
    run.pending |= state["pending"] | {"events": state["events"]}
    if run.rank:
        run.pending["bad"] = []


def keep_products(run: Run, state: dict) -> None:
    """Of a run that goes on: a trunk.pt that is gone is written again; of a finished run that is
    extended, the weights stay in trunk-STEP.pt. On one rank. Raises ValueError where another file
    has that name."""
    names = ["trunk.pt"] * (not (run.out / "trunk.pt").exists())
    if run.config.extended_at == run.start:
        names.append(f"trunk-{run.start}.pt")
    if names and state["path"].is_dir():
        state = load_whole(state["path"], "model/trunk.")
    weights = trunk_of(state) if names else {}
    for name in names:
        path = run.out / name
        if not os.path.lexists(path):
            save(path, weights)
        elif not same(weights, load(path)):
            raise ValueError(f"{path} is there, and holds other weights: move it")


def same(one: dict, other: dict) -> bool:
    """Tensors by name, in any order, to the bit."""
    return one.keys() == other.keys() and all(
        torch.equal(value.cpu(), other[name]) for name, value in one.items())


def whole_method(run: Run) -> nn.Module:
    """Of a finished run, from its checkpoint: its method whole, on this rank's device."""
    method = build_method(run.config, "meta")
    load_weights(method, newest(run.out)[0])
    return method.to(run.device)


def start_from(source: str, method: nn.Module, rank: int, name: str = "") -> None:
    """--init: weights of another file. name: the method's. A download is left to one rank of a
    machine; the others wait for it. Raises ValueError, on all ranks alike."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    for turn in (first, not first):
        with fail_together(Exception):      # whatever it is, the other ranks must not wait
            if turn:
                loaded = load_weights(method, init_weights(source, name, rank > 0),
                                      quiet=rank > 0)
    if rank == 0:
        print(f"starts from {source}: the " + ", ".join(sorted(loaded.loaded, key="trunk".__ne__))
              + f"; new: {', '.join(loaded.untouched)}" * bool(loaded.untouched)
              + f"; left: {', '.join(loaded.unused)}" * bool(loaded.unused))


def init_weights(source: str, name: str, quiet: bool) -> str | Loaded:
    """What load_weights takes. Of a run's folder it is the checkpoint, and of a run of another
    method than `name` the trunk alone."""
    if source in OFFICIAL and "://" in OFFICIAL[source].url:     # arch first, then a download
        return source
    loaded = read(next(iter(newest(source)), source), quiet=quiet)
    if loaded.config and name not in ("", loaded.config.get("method", "swav")):
        loaded = loaded._replace(tensors={key: tensor for key, tensor in loaded.tensors.items()
                                          if part_of(key) == "trunk"})
    return loaded
