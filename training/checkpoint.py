"""A checkpoint is whole or it is not there; complete state in, complete state out.

    save("runs/demo/checkpoint.pt", state)
    state = load("runs/demo/checkpoint.pt")            # tensors, numbers, strings; never code
    writer = Writer("runs/demo", keep=2)               # in the background, with the older ones kept

A file is written aside, flushed to the disk, read back, and renamed over the old one: a crash at
any instant leaves the old one or the new one. It is a plain torch file that loads with
weights_only=True; being a zip archive it may end with a comment, which is the SHA-256 of the rest,
so that a file cut short or with one bit turned is known for what it is.

`run_state` is a collective: every rank calls it, since each holds its own part of the queue. The
file holds the queue of all ranks, so a run may go on with another number of them.
"""
import hashlib
import os
import pickle
import re
import shutil
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

VERSION = 3
_MARK = b"sha256:"


def save(path: str | os.PathLike, state) -> None:
    """Write state to path, all or nothing. Raises OSError where it cannot be written."""
    aside = f"{path}.tmp"
    try:
        with open(aside, "w+b") as file:
            torch.save(state, file)
            file.seek(-2, os.SEEK_END)          # a zip archive ends with its comment's length
            file.write((len(_MARK) + 64).to_bytes(2, "little"))
            mark = _MARK + digest(file, file.tell()).encode()
            file.seek(0, os.SEEK_END)
            file.write(mark)
            file.flush()
            os.fsync(file.fileno())
        if not whole(aside):
            raise OSError(f"{path} was not written as it should be")
        os.replace(aside, path)
        flush_folder(Path(path).parent)
    except (OSError, RuntimeError) as error:    # torch.save raises RuntimeError on a full disk
        Path(aside).unlink(missing_ok=True)
        raise OSError(f"{path} could not be saved: {str(error).splitlines()[0]}") from None


def flush_folder(folder: Path) -> None:
    """Make a renaming outlast a power cut, where folders can be flushed."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def whole(path: str | os.PathLike) -> bool:
    """Whether a file is as `save` wrote it, to the bit."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END) - len(_MARK) - 64
        file.seek(max(0, length))
        mark, written = file.read(len(_MARK)), file.read()
        return mark == _MARK and written.decode("latin-1") == digest(file, length)


def digest(file, length: int) -> str:
    """SHA-256 of the first bytes of a file."""
    file.seek(0)
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, 1 << 24))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def load(path: str | os.PathLike):
    """Read what `save` wrote, onto the CPU. Raises ValueError for a missing or damaged file, or
    one that holds anything but tensors and plain values."""
    try:
        if not whole(path):
            raise ValueError("it is not as it was written")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"no such checkpoint: {path}") from None
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError, KeyError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{path} is damaged, or not a checkpoint ({reason})") from None


def newest(folder: str | os.PathLike) -> list[Path]:
    """A run's checkpoints, the newest first: checkpoint.pt, then those kept by step."""
    kept = {int(match[1]): path for path in Path(folder).glob("checkpoint-*.pt")
            if (match := re.fullmatch(r"checkpoint-(\d+)\.pt", path.name))}
    last = Path(folder, "checkpoint.pt")
    return [last] * last.exists() + [kept[step] for step in sorted(kept, reverse=True)]


class Writer:
    """Saves a run in the background, from a snapshot: training waits for the copy alone.

    trunk.pt, then checkpoint.pt, whose predecessor stays as checkpoint-STEP.pt: of these the last
    `keep` - 1, and every one whose step is a multiple of `keep_every`. A save that fails leaves
    all as it was; `error` says why, until one succeeds, and `errors` all that went wrong.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2, keep_every: int = 0,
                 step: int | None = None):
        """step: that of the checkpoint.pt which is there; None where there is none, or a bad one."""
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self.step, self.error, self.errors, self.thread = step, "", [], None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.wait()

    def save(self, state: dict, trunk: dict) -> None:
        self.wait()
        snapshot = _snapshot(state), _snapshot(trunk)
        self.thread = threading.Thread(target=self._write, args=snapshot)
        self.thread.start()

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None

    def _write(self, state: dict, trunk: dict) -> None:
        last = self.folder / "checkpoint.pt"
        try:
            save(self.folder / "trunk.pt", trunk)
            if self.step is not None and last.exists():
                kept = self.folder / f"checkpoint-{self.step:09d}.pt"
                kept.unlink(missing_ok=True)
                try:
                    os.link(last, kept)
                except OSError:         # not every file system has links
                    shutil.copyfile(last, kept)
            save(last, state)           # last: with it, the step counts
            self.step, self.error = state["step"], ""
            for path in newest(self.folder)[max(1, self.keep):]:
                step = int(path.stem.partition("-")[2])
                if not (self.keep_every and step % self.keep_every == 0):
                    path.unlink()
        except Exception as error:      # a thread's errors are nobody's
            self.error = str(error) or type(error).__name__
            self.errors.append(self.error)


def _snapshot(tree):
    """A copy of all tensors, on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _snapshot(value) for key, value in tree.items()}
    return [_snapshot(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


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
