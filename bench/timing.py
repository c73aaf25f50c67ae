"""Timing: how long a function takes, what the device can do, and the file that keeps the results.

    ms = in_turn({"ours": ours, "baseline": baseline}, repeats=5)       # medians
    clock = Clock(device); clock.timed("forward", network)(images)      # clock.ms["forward"]

Times of two functions are compared by medians taken in turn (ours, baseline, ours, baseline, ...),
so a machine whose speed drifts slows both. Each function is called twice and the second call is
timed, as in a loop that does nothing else.
"""
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch.nn import functional as F

from distributed.hardware import layout, pick_precision
from weights.atomic import write_whole


class Clock:
    """ms: milliseconds by name; the device is waited for before and after.

    The time of a function is without those of the functions that it calls and that are timed too,
    so the values of ms add up to the whole.
    """

    def __init__(self, device: torch.device):
        self.device, self.ms = device, {}

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, of which each call adds to ms[name]."""
        def call(*args, **kwargs):
            wait_for(self.device)
            inside, start = sum(self.ms.values()), time.perf_counter()
            result = function(*args, **kwargs)
            wait_for(self.device)
            ms = (time.perf_counter() - start) * 1e3
            inside = sum(self.ms.values()) - inside
            self.ms[name] = self.ms.get(name, 0.0) + ms - inside
            return result
        return call


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()


def in_turn(functions: dict[str, Callable], repeats: int,
            device=torch.device("cpu")) -> dict[str, float]:
    """Median milliseconds of each function's second call, the functions taken in turn."""
    def timed(function):
        return lambda clock: clock.timed("", function)()

    clocks = steps_in_turn({name: timed(f) for name, f in functions.items()}, repeats, device)
    return {name: statistics.median(ms[""] for ms in measured) for name, measured in clocks.items()}


def steps_in_turn(steps: dict[str, Callable], repeats: int,
                  device: torch.device) -> dict[str, list[dict[str, float]]]:
    """steps: step(clock) times its parts with the clock. Returns, for each repeat, the milliseconds
    by part of each step's second call, the steps taken in turn."""
    clocks = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            step(Clock(device))
            clock = Clock(device)
            step(clock)
            clocks[name].append(clock.ms)
    return clocks


# ------------------------------------------------------------------------ what the device can do
def fastest(function: Callable, device: torch.device) -> float:
    """Seconds: the best of ten calls, after two."""
    times = []
    for _ in range(12):
        clock = Clock(device)
        clock.timed("", function)()
        times.append(clock.ms[""])
    return min(times[2:]) / 1e3


def bench_rates(device: torch.device, dtype: torch.dtype) -> dict:
    """What --plan takes as --tflops and --bandwidth, measured; and a convolution's rate."""
    result = {"bf16_tflops": bf16_peak(device),
              "convolution_tflops": convolution_rate(device, dtype) / 1e12,
              "copy_gb_s": bandwidth(device) / 1e9}
    for name, value in result.items():
        print(f"{name:<20}{value:>10.4g}")
    return result


def bf16_peak(device: torch.device) -> float:
    """TFLOP/s of a large product of bf16 matrices; of a small one, where the device has no
    instructions for bf16 and a large one would take a minute."""
    native = pick_precision("auto", device) == torch.bfloat16
    n = 8192 if device.type == "cuda" else 2048 if native else 512
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / fastest(lambda: a @ b, device) / 1e12


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a dense 3x3 convolution, 256 -> 256 channels on maps of 28 pixels, forward."""
    count = 128 if device.type == "cuda" else 8
    maps, kernels = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout(device))
                     for shape in ((count, 256, 28, 28), (256, 256, 3, 3)))
    return 2 * maps.numel() * 256 * 9 / fastest(lambda: F.conv2d(maps, kernels, padding=1), device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    source = torch.ones(2 ** 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


# -------------------------------------------------------------------------- the file of results
def read_results(path: Path) -> list:
    """[] where there is no file. Raises ValueError for a file that is no list of results."""
    try:
        results = json.loads(path.read_text()) if path.exists() else []
    except (ValueError, OSError):
        results = None
    if not isinstance(results, list):
        raise ValueError(f"--out {path} is no file of results; name another")
    return results


def about_machine() -> dict:
    """The date, the machine and the versions that something is measured with."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    there = torch.cuda.is_available()
    return {"date": datetime.date.today().isoformat(),
            "machine": names[0] if names else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if there else None,
            "python": platform.python_version(), "torch": torch.__version__,
            "torchvision": torchvision.__version__, "cuda": torch.version.cuda if there else None,
            "cudnn": torch.backends.cudnn.version() if there else None}


def write_results(path: Path, what: str, result: dict) -> None:
    """One more result, with what it was measured with."""
    results = [*read_results(path), {"what": what, **result, **about_machine()}]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(results, indent=1) + "\n")
