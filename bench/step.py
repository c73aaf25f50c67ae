"""A training step: train.py's own beside the baseline, compiled beside not, and a run's first one.

    result = bench_step(config, device, torch.bfloat16, checkpoint_activations=False, repeats=5)

What is measured as ours is train.step_gradients, the optimizer and the method's after_step, on
random crops that are on the device already.
"""
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from bench.baseline import baseline_precision, baseline_step
from bench.timing import Clock, bandwidth, bf16_peak, convolution_rate, steps_in_turn
from data.loader import Augment, AugmentedCrops
from distributed.hardware import layout, peak_memory
from distributed.ranks import rank_and_world
from distributed.roofline import roofline, without_elementwise
from distributed.wrap import check_compiler, try_update, wrap
from larc import LARC
from methods.build import build_method
from multicrop import MultiCrop, Photometric
from recipes.config import Config
from recipes.machine import choose
from train import Run, step_gradients
from training.cost import cost, memory, work
from training.step_time import passes

PARTS = ("augmentation", "forward", "Sinkhorn", "backward", "optimizer")


def random_crops(config: Config, device: torch.device) -> list[Tensor]:
    """Of a micro-batch: uint8 (count * B, 3, s, s) per size."""
    return [torch.randint(0, 256, (spec.count * config.micro_batch, 3, spec.size, spec.size),
                          dtype=torch.uint8, device=device) for spec in config.crops]


def random_params(config: Config) -> list[Tensor]:
    """Parameters of random_crops' augmentation: (count * B, P) per size."""
    draw, rng = MultiCrop(config.crops).draw, random.Random(0)
    return [torch.tensor([draw(rng) for _ in range(spec.count * config.micro_batch)])
            for spec in config.crops]


def product_step(config: Config, device: torch.device, dtype: torch.dtype,
                 checkpoint_activations: bool = False, compiled: bool = False) -> Callable:
    """A step of train.py on random crops. Returns step(clock), which times PARTS: forward is
    without the augmentation of its crops, backward is all else of step_gradients."""
    method = build_method(config, device, rank_and_world()[1])
    wrapped = wrap(method, device, config.sync_bn_group, checkpoint_activations, compiled,
                   config.channels_last, bool(config.pad_widths))
    optimizer = LARC(method.parameters(), config.peak_lr(), config.momentum, config.weight_decay,
                     config.trust_coefficient, compiled=device.type == "cuda")
    try_update(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(method, wrapped, device, dtype, scaler)
    crops, params = random_crops(config, device), random_params(config)
    augment = Augment(Photometric().to(device), layout(device, config.channels_last))
    forward, targets = wrapped.forward, method.targets

    def update():
        optimizer.step()
        method.after_step(0)

    def step(clock: Clock) -> None:
        torch.backends.cudnn.benchmark = bool(config.cudnn_benchmark)
        optimizer.zero_grad(set_to_none=run.world == 1)
        wrapped.forward = clock.timed("forward", forward)
        method.targets = clock.timed("Sinkhorn", targets)
        augmented = AugmentedCrops(crops, params, clock.timed("augmentation", augment))
        micro_batches = [augmented] * (config.batch_size // config.micro_batch)
        clock.timed("backward", step_gradients)(run, 0, micro_batches)
        clock.timed("optimizer", update)()
        torch.backends.cudnn.benchmark = False              # as the baseline has it

    return step


def without_augmentation(ms: dict[str, float]) -> float:
    """Milliseconds of a step from its parts."""
    return sum(ms.values()) - ms.get("augmentation", 0.0)


# ------------------------------------------------------------------------- beside the baseline
def bench_step(config: Config, device: torch.device, dtype: torch.dtype,
               checkpoint_activations: bool, repeats: int) -> dict:
    """One process, one micro-batch. Medians of several repeats, the two steps taken in turn. A step
    is counted without augmentation, which the baseline leaves to the workers."""
    config = replace(config, checkpoint_activations=checkpoint_activations,
                     threads=torch.get_num_threads())
    config, chosen = choose(config, device, dtype)              # as a run does
    print(chosen)
    torch.manual_seed(0)
    before = peak_memory(device)
    steps = {"ours": product_step(config, device, dtype, checkpoint_activations)}
    for _ in range(2):
        steps["ours"](Clock(device))
    taken = peak_memory(device) - before            # before the other network is there
    try:
        steps["baseline"] = baseline_step(config, random_crops(config, device))
        steps["baseline"](Clock(device))
    except torch.OutOfMemoryError:
        steps.pop("baseline", None)
        print("the baseline has no room on this device")
    clocks = steps_in_turn(steps, repeats, device)
    counted = cost(config, dtype)
    planned = sum(memory(counted, config, config.micro_batch, checkpoint_activations, 1,
                         dtype).values())
    peak = bf16_peak(device)
    floors = {name: least_ms(config, device, its)
              for name, its in (("ours", dtype), ("baseline", baseline_precision(device)))}
    rows = step_rows(clocks, floors, config.micro_batch, work(counted) / peak)
    result = about(config, dtype, checkpoint_activations, repeats) | {
        "bf16_tflops": peak, "peak_gb": taken / 1e9, "planned_gb": planned / 1e9, **rows}
    if "baseline" in steps:
        result["ratio"] = rows["step, ms"]["baseline"] / rows["step, ms"]["ours"]
    print_step(result, rows, list(steps), device)
    return result


def least_ms(config: Config, device: torch.device, dtype: torch.dtype) -> float:
    """Milliseconds that forward and backward of a micro-batch take at the least: the roofline of
    convolutions, linear layers and BatchNorm, at rates that are measured here."""
    counted = passes(config, dtype)
    rates = convolution_rate(device, dtype), bandwidth(device)
    rows = [(counted.head, sum(spec.count for spec in config.crops)),
            *((counted.trunk[spec], spec.count) for spec in config.crops)]
    return 1e3 * sum(roofline(without_elementwise(operations), count * config.micro_batch, *rates)
                     for operations, count in rows)


def about(config: Config, dtype: torch.dtype, checkpoint_activations: bool, repeats: int) -> dict:
    """What a result was measured with."""
    return {"arch": config.arch, "crops": config.text("crops"), "micro_batch": config.micro_batch,
            "channels_last": config.channels_last, "pad_widths": config.pad_widths,
            "cudnn_benchmark": config.cudnn_benchmark,
            "precision": str(dtype).removeprefix("torch."),
            "checkpoint_activations": checkpoint_activations, "repeats": repeats}


def step_rows(clocks: dict[str, list[dict[str, float]]], floors: dict[str, float], images: int,
              seconds: float) -> dict[str, dict[str, float]]:
    """Rows of the table, row -> name -> value.

    clocks: of steps_in_turn.  floors: milliseconds of the roofline.  images: of a step.
    seconds: that an image takes at the peak of the device's bf16.
    """
    rows = {}
    for name, measured in clocks.items():
        for part in PARTS:
            if part in measured[0]:
                ms = statistics.median(each[part] for each in measured)
                rows.setdefault(f"{part}, ms", {})[name] = ms
        whole = statistics.median(map(without_augmentation, measured))
        rate = images / whole * 1e3
        both = rows["forward, ms"][name] + rows["backward, ms"][name]
        rows.setdefault("step, ms", {})[name] = whole
        rows.setdefault("images/s", {})[name] = rate
        rows.setdefault("share of bf16 peak", {})[name] = rate * seconds
        rows.setdefault("share of roofline", {})[name] = floors[name] / both
    return rows


def print_step(result: dict, rows: dict[str, dict[str, float]], names: list[str],
               device: torch.device) -> None:
    print(f"{result['arch']}, crops {result['crops']}, micro-batch {result['micro_batch']}, "
          f"{result['precision']}"
          + ", activation checkpointing" * result["checkpoint_activations"]
          + f"; {device}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
          f"median of {result['repeats']}\n\n" + " " * 20 + "".join(f"{n:>12}" for n in names))
    for row, values in rows.items():
        print(f"{row:<20}" + "".join(f"{values[name]:>12.4g}" if name in values else f"{'-':>12}"
                                     for name in names))
    if "ratio" in result:
        print(f"{'ratio':<20}{result['ratio']:>12.2f}")
    print(f"\npeak memory {result['peak_gb']:.2f} GB, the plan says {result['planned_gb']:.2f}; a "
          f"bf16 matrix product reaches {result['bf16_tflops']:.3g} TFLOP/s")


# ------------------------------------------------------------------- compiled; the first of a run
def bench_compile(config: Config, device: torch.device, dtype: torch.dtype,
                  checkpoint_activations: bool, repeats: int) -> dict:
    """The step as it is and with the trunk compiled, without augmentation; what the first step
    takes where nothing was compiled before; graphs, and their breaks."""
    counters, clock, steps = torch._dynamo.utils.counters, Clock(device), {}
    check_compiler(device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in ("eager", "compiled"):
            torch.manual_seed(0)
            steps[name] = product_step(config, device, dtype, checkpoint_activations,
                                       name == "compiled")
            counters.clear()
            clock.timed(name, steps[name])(Clock(device))
        graphs = counters["stats"]["unique_graphs"]
        ms = {name: statistics.median(map(without_augmentation, measured))
              for name, measured in steps_in_turn(steps, repeats, device).items()}
    result = about(config, dtype, checkpoint_activations, repeats) | {
        "step, ms": ms, "ratio": ms["eager"] / ms["compiled"],
        "first step, s": clock.ms["compiled"] / 1e3, "graphs": graphs,
        "graphs made later": counters["stats"]["unique_graphs"] - graphs,
        "graph breaks": sum(counters["graph_break"].values())}
    for name, value in result.items():
        print(f"{name:<24}{value}")
    return result


def bench_start(arch: str) -> dict:
    """Seconds from the command to the end of the first step of 8 images, of one process. Raises
    RuntimeError where that step is not reached."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).parents[1] / "train.py"), "--arch", arch,
                   "--batch-size=8", "--steps=100", "--log-every=1", "--device=cpu",
                   f"--out={folder}/run"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = next((line for line in process.stdout if line.startswith("step 1/")), "")
            seconds = time.perf_counter() - start
            process.terminate()
            process.communicate()       # or what it prints last could not be written
    if not line:
        raise RuntimeError(f"{' '.join(command)} did not reach its first step")
    print(f"{arch}: {seconds:.1f} s from the command to the end of the first step, 8 images")
    return {"arch": arch, "seconds": round(seconds, 2)}
