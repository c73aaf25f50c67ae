"""Runs: several of train.py, side by side, each measured when it has ended.

    log = Path("runs/emoji/swav-0.txt")
    commands = {("swav", 0): (command(options, data="sets/emoji/train", seed=0, out=...), log)}
    for key, cell in measured([("swav", 0)], commands, {}, measure, jobs=2):
        write_cell(out, cell)                           # evaluation/cells.py
    until_interrupted(fill, jobs=2)                     # Ctrl-C: they save and end, and exit 75

A key is that of a cell of compare.py or scaling.py, whose table it fills.
"""
import argparse
import contextlib
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from distributed.hardware import pick_device, processors
from weights.terminal import reason

TRAIN = Path(__file__).parents[1] / "train.py"
INTERRUPTED = 75            # exit status of a program that a signal has ended, as train.py's
# Ctrl-C reaches the runs from here alone: a second signal would end them before they have saved
APART = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def command(options: argparse.Namespace, **given) -> list[str]:
    """A run of train.py with these options. With several side by side each has its share of the
    processors.

    options: of evaluate.py: device, precision, jobs.
    """
    if options.device:
        given["device"] = options.device
    if options.precision != "auto":
        given["precision"] = options.precision
    if options.jobs > 1:
        cpu = pick_device(options.device).type == "cpu"
        given |= {"threads": share(options.jobs), "workers": 0 if cpu else share(options.jobs)}
    words = []
    for name, value in given.items():
        name = name.replace("_", "-")
        words += ([f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else
                  [f"--{name}", str(value)])
    return [sys.executable, str(TRAIN), *words]


def share(jobs: int) -> int:
    """Processors of a run."""
    return max(1, processors() // jobs)


def side_by_side(commands: Mapping[object, tuple[list[str], Path]],
                 jobs: int) -> Iterator[tuple[object, int]]:
    """Runs them, `jobs` at once: the key of each that has ended, with its exit status. When the
    caller leaves, those at work are told to save and end, and waited for.

    commands: key -> the command, and the file to which its output is added.
    """
    waiting, running = deque(commands.items()), {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                key, (words, log) = waiting.popleft()
                with open(log, "a") as file:
                    running[key] = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file,
                                                    stderr=subprocess.STDOUT, **APART)
            ended = [key for key, process in running.items() if process.poll() is not None]
            for key in ended:
                yield key, running.pop(key).returncode
            if not ended:
                time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def fault(log: Path, status: int) -> str:
    """Why a run has ended: the last line of its output."""
    lines = log.read_text(errors="replace").split("\n")
    last = next((line for line in reversed(lines) if line.strip()), "no output")
    return f"exit status {status}: {last.removeprefix('train.py: ').removeprefix('error: ')}"


def measured(keys: Sequence[tuple], commands: Mapping[tuple, tuple[list[str], Path]],
             faults: Mapping[tuple, str], measure: Callable[..., dict],
             jobs: int) -> Iterator[tuple[tuple, dict]]:
    """Each key, with what measure(*key) gives, or {"failed": why}: first of those that need no run.

    commands: the runs, as of side_by_side.  faults: why others, which need one, have none. Their
    measurement is done in this process, one after the other, while other runs go on.
    """
    def cell(key: tuple, failed: str) -> tuple[tuple, dict]:
        try:
            return key, {"failed": failed} if failed else measure(*key)
        except (ValueError, OSError, RuntimeError) as error:
            return key, {"failed": reason(error)}

    for key in keys:
        if key not in commands:
            yield cell(key, faults.get(key, ""))
    with contextlib.closing(side_by_side(commands, jobs)) as ended:
        for key, status in ended:
            yield cell(key, fault(commands[key][1], status) if status else "")


def until_interrupted(fill: Callable[[], None], jobs: int) -> None:
    """Call it with this process' share of the processors. Ctrl-C, SIGTERM and SIGHUP end it, and
    the program."""
    for name in ("SIGTERM", "SIGHUP"):                  # as Ctrl-C; under nohup, SIGHUP is ignored
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    if jobs > 1:
        torch.set_num_threads(share(jobs))
    try:
        fill()
    except KeyboardInterrupt:
        print("evaluate.py: interrupted: runs are saved, and the same command goes on",
              file=sys.stderr)
        sys.exit(INTERRUPTED)
