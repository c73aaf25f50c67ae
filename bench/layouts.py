"""Layouts: the trunk's forward and backward pass in each memory layout, with odd widths padded or
not, and with cuDNN's search for the fastest kernels or not.

    result = bench_layouts(config, device, torch.bfloat16, repeats=5)
"""
import inspect
import itertools

import torch

from bench.timing import bf16_peak, in_turn
from distributed.hardware import autocast
from distributed.wrap import wrap
from methods.build import build_method
from recipes.config import Config
from recipes.medium import training_flops

# padding is a part of wrap in newer versions
PADDING = {"pad_widths", "channels_last"} <= set(inspect.signature(wrap).parameters)


def bench_layouts(config: Config, device: torch.device, dtype: torch.dtype, repeats: int) -> dict:
    """Milliseconds of a micro-batch by variant, one network after the other, as there may be room
    for one alone; a variant without room is None. Median of repeats, each the second of two calls.
    """
    rows, before = {}, torch.backends.cudnn.benchmark
    try:
        for channels_last, padded, search in itertools.product(
                (False, True), (False, True)[:1 + PADDING], (False, True)):
            if search and device.type != "cuda":
                continue
            name = ", ".join(["channels-last" if channels_last else "contiguous",
                              *["padded"] * padded, *["cudnn.benchmark"] * search])
            torch.backends.cudnn.benchmark = search
            try:
                step = trunk_step(config, device, dtype, channels_last, padded)
                rows[name] = in_turn({"": step}, repeats, device)[""]
            except torch.OutOfMemoryError:
                rows[name] = None
            print(f"{name:<42}" + (f"{rows[name]:>10.1f} ms" if rows[name] else "   no room"))
            step = None                                     # its memory is the next one's
    finally:
        torch.backends.cudnn.benchmark = before
    measured = {name: ms for name, ms in rows.items() if ms}
    best = min(measured, key=measured.get, default=None)
    spent = config.micro_batch * training_flops(config.arch, config.crops) / 1e12
    share = best and spent / (measured[best] / 1e3) / bf16_peak(device)
    print(f"{config.arch}, {config.text('crops')}, micro-batch {config.micro_batch}: fastest "
          f"{best}" + (f", {share:.0%} of the peak of a bf16 matrix product" if best else ""))
    return {"arch": config.arch, "crops": config.text("crops"), "micro_batch": config.micro_batch,
            "precision": str(dtype).removeprefix("torch."), "repeats": repeats, "ms": rows,
            "fastest": best, "share of bf16 peak": share}


def trunk_step(config: Config, device: torch.device, dtype: torch.dtype, channels_last: bool,
               padded: bool):
    """A function that takes all crops forward and backward through the trunk."""
    method = build_method(config, device)
    options = {"pad_widths": padded, "channels_last": channels_last} if PADDING else {}
    wrap(method, device, **options)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    if not PADDING:
        method.to(memory_format=layout)
    crops = [torch.randn(spec.count * config.micro_batch, 3, spec.size, spec.size,
                         device=device).to(memory_format=layout) for spec in config.crops]

    def step() -> None:
        method.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            features = [method.trunk(images) for images in crops]
        sum(x.float().square().mean() for x in features).backward()

    return step
