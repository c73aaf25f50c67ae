"""What several tests use: images on disk, small runs, and two processes joined by gloo.

    write_pictures(tmp_path / "photos", 12)                 # 12 different PNGs
    run(photos, tmp_path / "out", "--steps=2")              # train.py, small, in this process
    results = run_ranks(worker, tmp_path, *arguments)       # one result per rank

A worker is a top-level function worker(rank, *arguments) of a test module. The processes meet over
a file, so no port is needed; what a failed one wrote to stderr is in the error.
"""
import importlib
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from PIL import Image

ROOT = Path(__file__).parents[1]
ORACLES = ROOT / "tests" / "oracles"
SMALL = ["--arch=regnety_100mf", "--recipe=demo", "--crops=2x32+2x16", "--head=32-16",
         "--prototypes=12", "--batch-size=4", "--workers=0", "--log-every=1", "--precision=fp32",
         "--device=cpu", "--channels-last", "--threads=1"]


def write_pictures(folder, count, suffix=".png", size=(24, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = numpy.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=numpy.uint8)).save(
            folder / f"{i:04}{suffix}")


def equal(a, b):
    """Bitwise, through dicts, lists and tuples."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def run(photos, out, *options):
    """train.py with SMALL settings, in this process."""
    import train
    train.main([f"--data={photos}", f"--out={out}", *SMALL, *options])


def log_of(out):
    """The lines of a run's log.jsonl, without what depends on the machine's speed."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items()
             if k not in ("images_per_second", "waited", "memory_gb")} for line in lines]


def refuse(capsys, *argv):
    """The one sentence with which train.py turns a command line down."""
    import train
    with pytest.raises(SystemExit) as stop:
        train.main(list(argv))
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "Traceback" not in error and "[-h]" not in error
    return error.splitlines()[-1]


def environment(**more):
    """Of a child process: the project is importable, one thread."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def torchrun(*arguments, timeout=300):
    """train.py, or evaluate.py where that is the first argument, on two ranks."""
    program = arguments if arguments[0].endswith(".py") else ("train.py", *arguments)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / program[0]), *program[1:]]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout,
                          env=environment())


@contextmanager
def group_of_one(tmp_path: Path):
    """A process group whose only rank is this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0,
                            world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_ranks(worker, tmp_path: Path, *arguments, world: int = 2, timeout: float = 120) -> list:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    torch.save(arguments, folder / "arguments.pt")
    command = [sys.executable, "-m", "tests.helpers", worker.__module__, worker.__name__,
               str(folder), str(world)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment(), text=True, cwd=ROOT,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                 for rank in range(world)]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}:\n{error}"
              for rank, (process, error) in enumerate(zip(processes, errors)) if process.returncode]
    assert not failed, "\n".join(failed)
    return [torch.load(folder / f"result{rank}.pt") for rank in range(world)]


if __name__ == "__main__":
    module, name, folder, world, rank = sys.argv[1:]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous",
                            rank=int(rank), world_size=int(world))
    try:
        function = getattr(importlib.import_module(module), name)
        result = function(int(rank), *torch.load(f"{folder}/arguments.pt"))
        torch.save(result, f"{folder}/result{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
    sys.stderr.flush()
    os._exit(0)     # a thread of gloo that wants the GIL while Python is finalized ends the process
