"""Writer: a run's checkpoints on the disk, written in the background.

    with Writer("runs/mine", keep=2) as writer:         # of a sharded run: ShardedWriter
        writer.save(run_state(run, step))               # training waits for the copy alone
    newest("runs/mine")                                 # [checkpoint.pt, checkpoint-000000500.pt]

A run that is not sharded has checkpoint.pt, a sharded one a folder `checkpoint`, as
weights/sharded.py writes it. A run may change its form, and then keeps older ones of both.
"""
import os
import re
import shutil
import threading
from pathlib import Path

import torch.distributed as dist

from distributed.ranks import PATIENCE, is_main
from training.snapshot import Snapshot
from weights.atomic import save
from weights.sharded import load_whole, remove, save_sharded

LAST = "checkpoint.pt", "checkpoint"


def newest(folder: str | os.PathLike) -> list[Path]:
    """A run's checkpoints, the newest first: the last one, then those kept by step."""
    kept = {(int(match[1]), path.name): path for path in Path(folder).glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d{9,})(\.pt)?", path.name))}
    last = [path for name in LAST if (path := Path(folder, name)).exists()]
    return last + [kept[key] for key in sorted(kept, reverse=True)]


class Writer:
    """Saves in the background, from a snapshot: training waits for the copy alone, and for the save
    before where it is not written yet.

    trunk.pt, what state["model"] has under trunk., and checkpoint.pt, whose predecessor stays as
    checkpoint-STEP.pt: of these the last `keep` - 1, and every one whose step is a multiple of
    `keep_every`. A save that fails leaves all as it was; `error` says why, until one succeeds, and
    `errors` all that went wrong.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 2, keep_every: int = 0,
                 step: int | None = None):
        """step: of the last checkpoint that is there; None where there is none, or a damaged
        one."""
        self.folder, self.keep, self.keep_every = Path(folder), keep, keep_every
        self.step, self.error, self.errors, self.thread = step, "", [], None
        self.snapshot = Snapshot()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.wait()

    def save(self, state: dict) -> None:
        self.wait()
        self.thread = threading.Thread(target=self._write, args=[self.snapshot.take(state)])
        self.thread.start()

    def wait(self) -> None:
        if self.thread:
            self.thread.join()
            self.thread = None

    def take_errors(self) -> list[str]:
        """What went wrong since the last call."""
        taken, self.errors = self.errors, []
        return taken

    def _write(self, state: dict) -> None:
        try:
            self.snapshot.wait()
            self._replace(state)
            self.error = ""
            if is_main():
                self._prune()
        except Exception as error:      # no one else would see a thread's error
            self.error = str(error) or type(error).__name__
            self.errors.append(self.error)

    def _replace(self, state: dict) -> None:
        trunk, first = trunk_of(state), self.step is None
        if not first:                   # else after it: no product is without its checkpoint
            save(self.folder / "trunk.pt", trunk)
        self._keep_last(linked="checkpoint.pt")
        save(self.folder / "checkpoint.pt", state)      # last: with it, the step counts
        self.step = state["step"]
        if first:
            save(self.folder / "trunk.pt", trunk)

    def _keep_last(self, linked: str = "") -> None:
        """The last checkpoint gets the name of its step. linked: one that keeps the other name
        too."""
        for name in LAST:
            last = self.folder / name
            if not last.exists():
                continue
            if self.step is None:               # it is damaged
                if name != linked:
                    remove(last)
                continue
            kept = last.with_name(f"checkpoint-{self.step:09d}{last.suffix}")
            remove(kept)
            if name != linked:
                os.rename(last, kept)
                continue
            try:
                os.link(last, kept)
            except OSError:                     # not every file system has links
                shutil.copyfile(last, kept)

    def _prune(self) -> None:
        for path in newest(self.folder)[max(1, self.keep):]:
            step = int(path.stem.partition("-")[2])
            if not (self.keep_every and step % self.keep_every == 0):
                remove(path)
        for path in self.folder.glob("checkpoint*"):        # of a save that was killed
            if path.suffix in (".tmp", ".old"):
                remove(path)


class ShardedWriter(Writer):
    """Of a sharded run: on every rank, each of which writes its own part. The same error comes on
    all ranks. trunk.pt is put together on rank 0, from what was written."""

    def __init__(self, *args):
        super().__init__(*args)
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)   # of the threads alone

    def _replace(self, state: dict) -> None:
        first, last = self.step is None, self.folder / "checkpoint"
        save_sharded(last, state, self.group, before=self._make_way)
        self.step = state["step"]
        if first and is_main():
            save_trunk(last)

    def _make_way(self, aside: Path) -> None:
        """On rank 0, when all is written. aside: the folder that will be the last checkpoint."""
        if self.step is not None:
            save_trunk(aside)
        self._keep_last()


def trunk_of(state: dict) -> dict:
    """trunk.pt's tensors, of a run's state."""
    return {name.removeprefix("trunk."): value for name, value in state["model"].items()
            if name.startswith("trunk.")}


def save_trunk(checkpoint: Path) -> None:
    """trunk.pt beside a sharded checkpoint."""
    save(checkpoint.parent / "trunk.pt", trunk_of(load_whole(checkpoint, "model/trunk.")))
