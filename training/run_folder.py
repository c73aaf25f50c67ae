"""Run folder: one run at a time, the same run each time, and a log without lines of lost steps.

    held, state, config = open_folder(config, len(images), given)       # state None: a new run
    log = Log(out / "log.jsonl", state["step"] if state else 0)

A folder holds config.json, log.jsonl, checkpoints (checkpoint.py), trunk.pt and pictures.
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

from distributed.ranks import fail_together, gather_lists, rank_and_world
from recipes.config import Config, check_ranks
from training.checkpoint import VERSION, newest
from weights.atomic import load, write_whole

MAX_NAMED = 100_000         # images
# what may change between the parts of one run
FREE = ("cache", "out", "device", "workers", "log_every", "save_every", "keep", "keep_every",
        "max_bad_steps", "micro_batch", "checkpoint_activations", "compile", "probe", "probe_every")


def open_folder(config: Config, num_images: int, given: Collection[str] | None = None):
    """Lock the folder where it is there, and find out what it holds -> the lock, or None; the state
    to go on from, or None; the run's configuration.

    given: as in resume. Raises ValueError where the run cannot go on, on all ranks alike.
    """
    rank, world = rank_and_world()
    out, held = Path(config.out), None
    with fail_together():           # the lock first: what the folder holds must not change any more
        if rank == 0 and out.exists():
            held = lock(out)
    state, config = resume(config, num_images, out, given)
    check_ranks(config, world)
    if len(set(gather_lists([(config, state["step"] if state else 0)]))) > 1:
        raise ValueError(f"the ranks do not see the same images, or not the same "
                         f"{out}/checkpoint.pt; both must be shared")
    return held, state, config


def lock(folder: Path):
    """Keep a second run out of a folder, as long as the returned file is open; the lock ends with
    the process. Raises ValueError where another process has it."""
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

    given: names of the options that were asked for, which must be those of the run; all others stay
    as the run began with. None: all. state["last"]: whether the state is that of checkpoint.pt.
    Raises ValueError where the folder holds another run.
    """
    state, path = newest_state(out)
    if state is None:
        return None, config
    known = {field.name for field in dataclasses.fields(Config)}
    old = Config(**{name: value for name, value in state["config"].items() if name in known})
    if state["num_images"] != num_images and old.data == config.data:
        raise ValueError(f"{out} was trained on {state['num_images']} images and {config.data} "
                         f"now holds {num_images}; restore them or choose another --out")
    changed = [name for name in known if name not in FREE
               and getattr(old, name) != getattr(config, name)]
    refused = [f"{name} was {old.text(name)}, not {config.text(name)}" for name in sorted(changed)
               if given is None or name in given]
    if refused:
        raise ValueError(f"{out} holds another run ({'; '.join(refused)}); choose another --out")
    return (state | {"last": path.name == "checkpoint.pt"},
            dataclasses.replace(config, **{name: getattr(old, name) for name in changed}))


def newest_state(out: Path) -> tuple[dict | None, Path | None]:
    """The newest checkpoint that is not damaged, and its file; None where there is none. Raises
    ValueError where all are damaged, or of another version."""
    faults = []
    for path in newest(out):
        try:
            state = load(path)
            break
        except ValueError as error:
            faults.append(str(error))
    else:
        if faults:
            raise ValueError("; ".join(faults))
        if (out / "trunk.pt").exists() and not (out / "config.json").exists():
            raise ValueError(f"{out} holds a trunk.pt of something else; choose another --out")
        return None, None
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} is not a checkpoint of this program's version: its version is "
                         f"{version}, the program's {VERSION}; finish the run with the "
                         "program that began it, or start another from its trunk.pt (--init)")
    if faults and int(os.environ.get("RANK", 0)) == 0:
        print(f"{'; '.join(faults)}: going on from {path}", file=sys.stderr)
    return state, path


def write_config(config: Config, out: Path) -> None:
    environment = {"python": platform.python_version(), "torch": torch.__version__,
                   "platform": platform.platform(), "world": int(os.environ.get("WORLD_SIZE", 1))}
    text = json.dumps({"config": config.as_dict(), "version": VERSION,
                       "environment": environment}, indent=2)
    write_whole(out / "config.json", text + "\n")


class Log:
    """log.jsonl, after step `start`: lines of steps that were lost with a crash are dropped.

    An image that had to be replaced is named once a run, in the first line that has it, and counted
    by its fault each time; of very many only the first MAX_NAMED are named.
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
        """One line; faults: of the images replaced since the last one, stream.Fault each."""
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
