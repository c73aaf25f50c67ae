"""A checkpoint is whole or it is not there; complete state in, complete state out.

    save("runs/demo/checkpoint.pt", run_state(step, config, ...))
    state = load("runs/demo/checkpoint.pt")            # tensors, numbers, strings; never code
    load_run_state(state, model, optimizer, scaler, queue)

A file is written aside, flushed to the disk and renamed over the old one: a crash at any instant
leaves the old one or the new one. It is a plain torch file that loads with weights_only=True.

`run_state` is a collective: every rank calls it, since each holds its own part of the queue. The
file holds the queue of all ranks, so a run may go on with another number of them.
"""
import os
import pickle

import torch
import torch.distributed as dist
from torch import nn

VERSION = 2


def save(path: str | os.PathLike, state) -> None:
    """Write state to path, all or nothing."""
    aside = f"{path}.tmp"
    with open(aside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def load(path: str | os.PathLike):
    """Read what `save` wrote, onto the CPU. Raises ValueError for a missing or damaged file, or
    one that holds anything but tensors and plain values."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no such checkpoint: {path}") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged, or not a checkpoint ({reason})") from None


def run_state(step: int, config: dict, num_images: int, model: nn.Module, optimizer, scaler,
              queue) -> dict:
    """All that a run needs to go on after `step` steps. queue: a swav.Queue or None."""
    state = {"version": VERSION, "step": step, "config": config, "num_images": num_images,
             "model": model.state_dict(), "optimizer": optimizer.state_dict(),
             "scaler": scaler.state_dict()}
    if queue is not None:
        parts = [queue.embeddings]
        if dist.is_initialized():
            parts = [torch.empty_like(queue.embeddings) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, queue.embeddings)
        # (A, L, ranks, D) -> (A, L * ranks, D): rows of one age side by side, newest first
        embeddings = torch.stack(parts, 2).flatten(1, 2)
        state["queue"] = {"embeddings": embeddings, "filled": queue.filled * len(parts)}
    return state


def load_run_state(state: dict, model: nn.Module, optimizer, scaler, queue) -> None:
    """The way back from run_state. Raises ValueError where the network is another one."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise ValueError(f"the checkpoint is of another network: {reason}") from None
    optimizer.load_state_dict(state["optimizer"])
    scaler.load_state_dict(state["scaler"])
    if queue is not None:
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        saved, device = state["queue"], queue.embeddings.device
        queue.embeddings = saved["embeddings"][:, rank::world].contiguous().to(device)
        queue.filled = saved["filled"] // world
