"""Hardware: which device, which precision, how much memory, how many processors.

    device = pick_device("", local_rank=0)          # "": the best one here
    dtype = pick_precision("auto", device)          # bf16 where the device computes in it
    workers = count_workers(-1, device.type)        # decoding processes of this rank

Environment variables are torchrun's: LOCAL_WORLD_SIZE, the ranks on this machine.
"""
import math
import os
import socket
import sys
from collections import Counter

import torch

try:
    import resource
except ImportError:                      # Windows
    resource = None

DEVICES = ("cuda", "mps", "cpu")
_share = None                # processors of this rank, once share_machine was called
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def check_device(name: str) -> None:
    """Raises ValueError for a kind of device on which nothing can be computed, as meta."""
    if name.partition(":")[0] not in ("", *DEVICES):
        raise ValueError(f"--device {name} cannot be used here: needs {', '.join(DEVICES)}")


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """name: cuda, cuda:1, mps or cpu; "": the best one here. Raises ValueError."""
    check_device(name)
    if not name:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """name: a key of PRECISIONS, or auto: bf16 where the device has instructions for it."""
    if name == "auto":
        if device.type == "cpu":            # not every build for a CPU has oneDNN
            native = (torch.backends.mkldnn.is_available()
                      and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        else:
            native = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if native else "fp32"
    return PRECISIONS[name]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for a forward pass; float32 turns it off."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def layout(device: torch.device, channels_last: bool | None = None) -> torch.memory_format:
    """None: channels-last on a CPU, where it is 1.2 to 1.4 times as fast; a run measures which is
    the faster one (recipes/machine.py)."""
    if channels_last is None:
        channels_last = device.type == "cpu"
    return torch.channels_last if channels_last else torch.contiguous_format


def memory_of(device: torch.device) -> float:
    """Bytes this rank may plan with: a GPU's; of a CPU's machine half, shared by its ranks."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):             # Windows does not say
        whole = 16e9
    return whole / 2 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: torch.device) -> float:
    """Bytes, so far: of the allocator on a GPU; of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps" or resource is None:
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def affinity() -> tuple[str, set[int]]:
    """This machine's name, and its processors that this process may use."""
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    return socket.gethostname(), set(mine)


def share_machine(affinities: list[tuple[str, set[int]]]) -> None:
    """Tell `processors` who else is here. affinities: of all ranks."""
    global _share
    _share = share_of(affinity(), affinities)


def share_of(mine: tuple[str, set[int]], affinities: list[tuple[str, set[int]]]) -> int:
    """Number of processors of a rank; one that n ranks may use counts 1/n for each of them. So a
    machine is divided once, whether or not ranks are bound to parts of it (torchrun
    --numa-binding, SLURM, taskset)."""
    machine, usable = mine
    users = Counter(one for name, others in affinities if name == machine for one in others)
    return max(1, int(sum(1 / users[one] for one in usable) + 1e-6))


def processors() -> int:
    """Those this rank may use: its share of the machine's."""
    return _share or max(1, len(affinity()[1]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def count_workers(workers: int, device_type: str) -> int:
    """Number of decoding processes of this rank; workers: -1, or the number asked for."""
    if workers >= 0:
        return workers
    return max(1, processors() // 4) if device_type == "cpu" else processors()
