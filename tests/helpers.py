"""Run a function of a test file in two processes joined by gloo.

    results = run_ranks(worker, tmp_path, *arguments)       # one result per rank

The worker is a top-level function worker(rank, *arguments) of a test module. The processes meet
over a file, so no port is needed; what a failed one wrote to stderr is in the error.
"""
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(worker, tmp_path: Path, *arguments, world: int = 2, timeout: float = 120) -> list:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    torch.save(arguments, folder / "arguments.pt")
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}",
                                "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, worker.__module__, worker.__name__, str(folder), str(world)]
    processes = [subprocess.Popen([*command, str(rank)], env=environment, text=True,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                 for rank in range(world)]
    try:
        errors = [process.communicate(timeout=timeout)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [f"rank {rank}:\n{error}" for rank, (process, error) in enumerate(zip(processes, errors))
              if process.returncode]
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
