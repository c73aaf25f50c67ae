"""Layouts: the trunk's forward and backward pass in each memory layout, with odd widths padded or
not, and with cuDNN's search for the fastest kernels or not; as a run measures it at its start.

    result = bench_layouts(config, device, torch.bfloat16)
"""
import itertools
import math
import time

import torch

from bench.timing import bf16_peak
from distributed.padding import odd_widths
from recipes.config import Config
from recipes.machine import Variant, images_of, measure
from recipes.medium import training_flops
from regnet import ARCHS


def bench_layouts(config: Config, device: torch.device, dtype: torch.dtype, _: int = 0) -> dict:
    """Milliseconds of a micro-batch by variant, one network after the other, as there may be room
    for one alone; a variant that does not run is None. The fastest of recipes.machine.PASSES."""
    rows, before = {}, torch.backends.cudnn.benchmark
    odd = config.arch in ARCHS and bool(odd_widths(ARCHS[config.arch]))
    try:
        for way in itertools.product((False, True), (False, True)[:1 + odd],
                                     (False, True)[:1 + (device.type == "cuda")]):
            name = str(Variant(*way))
            seconds = measure(config, device, dtype, Variant(*way), time.perf_counter, math.inf)
            rows[name] = 1e3 * seconds if seconds < math.inf else None
            print(f"{name:<42}" + (f"{rows[name]:>10.1f} ms" if rows[name] else "  does not run"))
    finally:
        torch.backends.cudnn.benchmark = before
    measured = {name: ms for name, ms in rows.items() if ms}
    best = min(measured, key=measured.get, default=None)
    spent = images_of(config, device) * training_flops(config.arch, config.crops) / 1e12
    share = best and spent / (measured[best] / 1e3) / bf16_peak(device)
    print(f"{config.arch}, {config.text('crops')}, {images_of(config, device)} images: fastest "
          f"{best}" + (f", {share:.0%} of the peak of a bf16 matrix product" if best else ""))
    return {"arch": config.arch, "crops": config.text("crops"),
            "images": images_of(config, device), "precision": str(dtype).removeprefix("torch."),
            "ms": rows, "fastest": best, "share of bf16 peak": share}
