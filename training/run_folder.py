"""A run's folder: one run at a time, the same run each time, and a log without lines of lost steps.

    held = lock(Path("runs/mine"))              # as long as the file is open
    state = resume(config, len(images), out)    # None: from the start
    log = Log(out / "log.jsonl", state["step"])

It holds config.json, log.jsonl, the checkpoints (checkpoint.py), trunk.pt and pictures (report.py).
"""
import dataclasses
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Collection
from pathlib import Path

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None

import torch

import checkpoint
from recipes import Config

MAX_NAMED = 100_000         # pictures
# what may change between the parts of one run
FREE = ("out", "device", "workers", "log_every", "save_every", "keep", "keep_every",
        "max_bad_steps", "micro_batch", "checkpoint_activations", "compile", "probe", "probe_every")


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


def resume(config: Config, num_images: int, out: Path,
           given: Collection[str] | None = None) -> tuple[dict | None, Config]:
    """The state to go on from, or None; and the run's configuration.

    given: names of the options that somebody asks for, which must be those of the run; all others
    stay as the run began with. None: all. state["last"] says whether it is that of checkpoint.pt.
    Raises ValueError where the folder holds another run.
    """
    paths, state, faults = checkpoint.newest(out), None, []
    if not paths:
        if (out / "trunk.pt").exists() and not (out / "config.json").exists():
            raise ValueError(f"{out} holds a trunk.pt of something else; choose another --out")
        return None, config
    for path in paths:
        try:
            state = checkpoint.load(path)
            break
        except ValueError as error:
            faults.append(str(error))
    if state is None:
        raise ValueError("; ".join(faults))
    version = state.get("version") if isinstance(state, dict) else None
    if version != checkpoint.VERSION:
        raise ValueError(f"{path} is not a checkpoint of this program's version: its version is "
                         f"{version}, the program's {checkpoint.VERSION}; finish the run with the "
                         "program that began it, or start another from its trunk.pt (--init)")
    if faults and int(os.environ.get("RANK", 0)) == 0:
        print(f"{'; '.join(faults)}: going on from {path}", file=sys.stderr)
    new = dataclasses.asdict(config)
    old = dataclasses.asdict(Config()) | state["config"]
    if state["num_images"] != num_images and old["data"] == config.data:
        raise ValueError(f"{out} was trained on {state['num_images']} pictures and {config.data} "
                         f"now holds {num_images}; restore them or choose another --out")
    changed = [name for name, value in new.items() if name not in FREE and old[name] != value]
    refused = [f"{name} was {old[name]}, not {new[name]}" for name in changed
               if given is None or name in given]
    if refused:
        raise ValueError(f"{out} holds another run ({'; '.join(refused)}); choose another --out")
    return (state | {"last": path.name == "checkpoint.pt"},
            dataclasses.replace(config, **{name: old[name] for name in changed}))


def write_config(config: Config, out: Path) -> None:
    environment = {"python": platform.python_version(), "torch": torch.__version__,
                   "platform": platform.platform(), "world": int(os.environ.get("WORLD_SIZE", 1))}
    text = json.dumps({"config": dataclasses.asdict(config), "version": checkpoint.VERSION,
                       "environment": environment}, indent=2)
    write_whole(out / "config.json", text + "\n")


def write_whole(path: Path, text: str) -> None:
    """All or nothing: a crash leaves the old file or the new one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)


class Log:
    """log.jsonl, after step `start`: lines of steps that were lost with a crash are dropped.

    A picture that had to be replaced is named once a run, in the first line that has it, and
    counted by its fault each time; of very many only the first MAX_NAMED are named.
    """

    def __init__(self, path: Path, start: int):
        kept, self.named, self.waiting = [], set(), b""
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
                if entry["step"] <= start:
                    kept.append(line + "\n")
                    self.named |= {bad["name"] for bad in entry["bad"]}
            except (ValueError, KeyError, TypeError):       # cut off by a crash, or not ours
                continue
        write_whole(path, "".join(kept))
        self.file = open(path, "a")

    def write(self, entry: dict, faults: list) -> None:
        """One line; faults: of the pictures replaced since the last one, images.Fault each."""
        entry["replaced"] = dict(sorted(Counter(cause for _, cause, _ in faults).items()))
        entry["bad"] = []
        for name, cause, detail in faults:
            if name not in self.named and len(self.named) < MAX_NAMED:
                self.named.add(name)
                entry["bad"].append({"name": name, "cause": cause, "detail": detail})
        self.waiting += (json.dumps(entry) + "\n").encode()
        try:
            while self.waiting:
                self.waiting = self.waiting[os.write(self.file.fileno(), self.waiting):]
            os.fsync(self.file.fileno())
        except OSError as error:                    # a full disk: with the next line
            print(f"warning: {self.file.name} could not be written: {error}", file=sys.stderr)
