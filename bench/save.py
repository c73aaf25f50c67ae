"""A save: how long the step waits for it, how long the write takes, and torch.save in the step.

    result = bench_save(config, device, repeats=5)

Measured is the Writer of training/checkpoint.py, on a checkpoint of network, head and momentum, in
the folder for temporary files (TMPDIR).
"""
import statistics
import tempfile
from pathlib import Path

import torch

from bench.timing import Clock
from distributed.hardware import layout
from larc import LARC
from methods.build import build_method
from recipes.config import Config
from training.writer import Writer


def bench_save(config: Config, device: torch.device, repeats: int) -> dict:
    """Medians, the two ways in turn; the device is waited for, so a stall counts the copy whole.
    The first stall, which allocates the memory of the snapshot, stands by itself."""
    method = build_method(config, device).to(memory_format=layout(device))
    optimizer = LARC(method.parameters(), 0.0)
    for p in method.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    state = {"step": 1, "model": method.state_dict(), "optimizer": optimizer.state_dict()}
    clocks = [Clock(device) for _ in range(repeats + 1)]
    with tempfile.TemporaryDirectory() as folder, Writer(folder, keep=1) as writer:
        for clock in clocks:
            clock.timed("stall", writer.save)(state)
            clock.timed("write", writer.wait)()
            clock.timed("torch.save", torch.save)(state, Path(folder, "plain.pt"))
            if writer.error:
                raise OSError(writer.error)
        size = Path(folder, "checkpoint.pt").stat().st_size
    ms = {name: statistics.median(clock.ms[name] for clock in clocks[1:]) for name in clocks[1].ms}
    first = clocks[0].ms["stall"]
    result = {"arch": config.arch, "bytes": size, "repeats": repeats, "first stall": first, **ms,
              "ratio": ms["torch.save"] / ms["stall"]}
    print(f"a save of {config.arch} with head and momentum, {size / 1e6:.0f} MB; {device}, torch "
          f"{torch.__version__}, median of {repeats} in turn\nthe step waits {ms['stall']:.0f} ms "
          f"(the first time {first:.0f}), the write goes on for {ms['write']:.0f} ms beside it; "
          f"torch.save in the step {ms['torch.save']:.0f} ms, {result['ratio']:.1f} times the wait")
    return result
