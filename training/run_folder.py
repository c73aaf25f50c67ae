"""Run folder: nobody else's files, and a log without lines of lost steps.

    refuse_foreign(out)                                 # of a folder without a checkpoint
    log = Log(out / "log.jsonl", state["step"] if state else 0)

A folder holds config.json, log.jsonl, checkpoints (checkpoint.py), trunk.pt and pictures.
"""
import json
import os
import platform
import sys
from collections import Counter
from pathlib import Path

import torch

from recipes.config import Config
from training.checkpoint import VERSION
from weights.atomic import write_whole

MAX_NAMED = 100_000         # images
PRODUCTS = ("trunk.pt", "prototypes.png", "neighbours.png", "results.json")     # of a finished run
FILES = ("config.json", "log.jsonl", "views.png", "loss.png", *PRODUCTS)


def refuse_foreign(out: Path) -> None:
    """Of a folder without a checkpoint. Raises ValueError where a new run would replace a finished
    one's product, or a file that no run has written."""
    try:
        ours = {"config", "version"} <= json.loads((out / "config.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        ours = False
    there = [name for name in (PRODUCTS if ours else FILES) if os.path.lexists(out / name)]
    there += [path.name for path in out.glob("trunk-*.pt")]
    if "trunk.pt" in there and ours:
        raise ValueError(f"{out} holds a trunk.pt, and no checkpoint to go on from: choose another "
                         f"--out (--init {out}/trunk.pt starts from it), or move the folder")
    if there:
        raise ValueError(f"{out} holds a {there[0]}, " + (
            "and no checkpoint to go on from" if ours else "and no run that wrote it")
            + ": choose another --out, or move it")


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
        entry["replaced"] = dict(sorted(Counter(cause for _, cause, *_ in faults).items()))
        entry["bad"] = []
        for name, cause, detail, *_ in faults:
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
