"""Speed and memory, measured side by side with the ordinary way.

    python bench.py step --arch regnety_400mf --crops 2x96+4x64 --micro-batch 32
    python bench.py trunk --arch regnety_8gf --crops 1x128 --micro-batch 4    # and torchvision's
    python bench.py compile            # the step compiled and not
    python bench.py start              # from the command to the first step
    python bench.py sinkhorn           # against the textbook loop
    python bench.py optimizer          # LARC, against the plain loop and against its floor
    python bench.py growth             # cost against batch, prototypes, crops, ranks and pictures
    python bench.py features           # evaluate.py's, beside trunk alone and input alone
    python bench.py input              # pictures to crops, on one core
    python bench.py order              # position to picture, among a billion

Measured rows are ratios of medians taken in turn (ours, theirs, ours, theirs, ...), so a machine
whose speed drifts slows both; each is called twice and the second call is timed, as in a loop that
does nothing else. The ordinary way is in ordinary.py.

Shapes: B pictures, V crops, D embedding, K prototypes.
"""
import argparse
import datetime
import io
import itertools
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Callable

import numpy
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from images import Positions, Stream, collate, mix, permute
from labelled import BATCH, Centred, in_batches
from larc import LARC
from multicrop import MultiCrop, Photometric, parse_crops, random_box
from ordinary import (ordinary_crops, ordinary_precision, ordinary_step, ordinary_trunk,
                      plain_larc, textbook_sinkhorn)
from plan import cost, memory, peak_memory, roofline, work
from recipes import Config, configure, hyphens, parse_head
from scale import (ASSIGNED, build_model, build_trunk, check_compiler, layout, pick_device,
                   pick_precision, swav_backward, wrap)
from sinkhorn import sinkhorn
from swav import swav_codes


# ------------------------------------------------------------------------------------ the step
class Clock:
    """Milliseconds by name; the device is waited for before and after."""

    def __init__(self, device: torch.device):
        self.device, self.ms = device, {}

    def timed(self, name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            wait_for(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait_for(self.device)
            self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - start) * 1e3
            return result
        return call


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        (torch.cuda if device.type == "cuda" else torch.mps).synchronize()


def fastest(function: Callable, device: torch.device) -> float:
    """Seconds: the best of ten calls, after two."""
    times = []
    for _ in range(12):
        clock = Clock(device)
        clock.timed("", function)()
        times.append(clock.ms[""])
    return min(times[2:]) / 1e3


def bf16_peak(device: torch.device) -> float:
    """TFLOP/s of a large product of bf16 matrices."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n ** 3 / fastest(lambda: a @ b, device) / 1e12


def convolution_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a dense 3x3 convolution, 256 -> 256 channels on maps of 28 pixels, forward."""
    pictures = 128 if device.type == "cuda" else 8
    maps, kernels = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=layout(device))
                     for shape in ((pictures, 256, 28, 28), (256, 256, 3, 3)))
    return 2 * maps.numel() * 256 * 9 / fastest(lambda: F.conv2d(maps, kernels, padding=1), device)


def bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy of 256 MiB."""
    source = torch.ones(2 ** 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source), device)


def our_step(config: Config, device: torch.device, dtype: torch.dtype,
             recompute: bool = False, compiled: bool = False) -> Callable:
    """One step of train.py's on pictures that are there; step(clock) fills the clock."""
    specs, pieces = parse_crops(config.crops), config.batch_size // config.micro_batch
    model = build_model(config.arch, parse_head(config.head), config.prototypes, config.head_bn,
                        device=device)
    network = wrap(model, device, checkpoint_activations=recompute, compiled=compiled)
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    photometric, draw = Photometric().to(device), MultiCrop(specs).draw
    rng = random.Random(0)
    crops, params = random_crops(config, device), [
        torch.tensor([draw(rng) for _ in range(spec.count * config.micro_batch)]) for spec in specs]

    def distort(crops):
        return [photometric(c, p).to(memory_format=layout(device)) for c, p in zip(crops, params)]

    def codes_of(embeddings, scores, num_crops):
        return swav_codes(scores, num_crops, epsilon=config.epsilon,
                          iterations=config.sinkhorn_iterations)

    def update():
        optimizer.step()
        model.normalize_prototypes()

    def step(clock: Clock) -> None:
        optimizer.zero_grad(set_to_none=True)
        whole = clock.timed("forward, codes, backward", swav_backward)
        whole(model, clock.timed("forward", network), [crops] * pieces,
              [spec.count for spec in specs], clock.timed("Sinkhorn", codes_of),
              config.temperature, dtype, prepare=clock.timed("distortion", distort))
        clock.timed("optimizer", update)()
        ms = clock.ms
        ms["backward"] = ms.pop("forward, codes, backward") - sum(
            ms[name] for name in ("distortion", "forward", "Sinkhorn"))

    return step


def random_crops(config: Config, device: torch.device) -> list[Tensor]:
    return [torch.randint(0, 256, (spec.count * config.micro_batch, 3, spec.size, spec.size),
                          dtype=torch.uint8, device=device) for spec in parse_crops(config.crops)]


def bench_step(config: Config, device: torch.device, dtype: torch.dtype, recompute: bool,
               repeats: int) -> dict:
    """One process, one micro-batch. Medians of several repeats; the two ways taken in turn. The
    step is what the network takes: without distortion, which the ordinary way leaves to workers."""
    torch.manual_seed(0)
    before = peak_memory(device)
    steps = {"ours": our_step(config, device, dtype, recompute)}
    for _ in range(2):
        steps["ours"](Clock(device))
    taken = peak_memory(device) - before            # before the other network is there
    try:
        steps["ordinary"] = ordinary_step(config, random_crops(config, device))
        steps["ordinary"](Clock(device))
    except torch.OutOfMemoryError:
        steps.pop("ordinary", None)
        print("the ordinary way has no room on this device")
    clocks = steps_in_turn(steps, repeats, device)
    of = cost(config, dtype)
    planned = sum(memory(of, config, config.micro_batch, recompute, 1, dtype).values())
    peak, rows = bf16_peak(device), {}
    floors = {name: roofline(config, its, convolution_rate(device, its), bandwidth(device))
              for name, its in (("ours", dtype), ("ordinary", ordinary_precision(device)))}
    for name, measured in clocks.items():
        for part in measured[0]:
            ms = statistics.median(each[part] for each in measured)
            rows.setdefault(f"{part}, ms", {})[name] = ms
        whole = statistics.median(map(without_distortion, measured))
        rows.setdefault("step, ms", {})[name] = whole
        rate = config.micro_batch / whole * 1e3
        rows.setdefault("images/s", {})[name] = rate
        rows.setdefault("share of bf16 peak", {})[name] = rate * work(of) / peak
        both = rows["forward, ms"][name] + rows["backward, ms"][name]
        rows.setdefault("share of roofline", {})[name] = floors[name] * 1e3 / both
    result = {"arch": config.arch, "crops": config.crops, "micro_batch": config.micro_batch,
              "precision": str(dtype).removeprefix("torch."), "checkpoint_activations": recompute,
              "repeats": repeats, "bf16_tflops": peak, "peak_gb": taken / 1e9,
              "planned_gb": planned / 1e9, **rows}
    print(f"{config.arch}, crops {config.crops}, micro-batch {config.micro_batch}, "
          f"{result['precision']}{', blocks computed again' * recompute}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}\n\n"
          + " " * 20 + "".join(f"{name:>12}" for name in steps))
    for row, values in rows.items():
        print(f"{row:<20}" + "".join(f"{values[name]:>12.4g}" if name in values else f"{'-':>12}"
                                     for name in steps))
    if "ordinary" in steps:
        result["ratio"] = rows["step, ms"]["ordinary"] / rows["step, ms"]["ours"]
        print(f"{'ratio':<20}{result['ratio']:>12.2f}")
    print(f"\npeak memory {taken / 1e9:.2f} GB, the plan says {planned / 1e9:.2f}; a bf16 matrix "
          f"product reaches {peak:.3g} TFLOP/s")
    return result


def steps_in_turn(steps: dict[str, Callable], repeats: int,
                  device: torch.device) -> dict[str, list[dict[str, float]]]:
    """Milliseconds by part of each step's second call, the steps taken in turn."""
    clocks = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            step(Clock(device))
            clock = Clock(device)
            step(clock)
            clocks[name].append(clock.ms)
    return clocks


def without_distortion(ms: dict[str, float]) -> float:
    return sum(ms.values()) - ms.get("distortion", 0.0)


def bench_compile(config: Config, device: torch.device, dtype: torch.dtype, recompute: bool,
                  repeats: int) -> dict:
    """The step as it is and with the trunk compiled, without distortion; what the first step takes
    where nothing was compiled before; graphs, and their breaks."""
    counters, clock, steps = torch._dynamo.utils.counters, Clock(device), {}
    check_compiler(device)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in ("eager", "compiled"):
            torch.manual_seed(0)
            steps[name] = our_step(config, device, dtype, recompute, name == "compiled")
            counters.clear()
            clock.timed(name, steps[name])(Clock(device))
        graphs = counters["stats"]["unique_graphs"]
        ms = {name: statistics.median(map(without_distortion, measured))
              for name, measured in steps_in_turn(steps, repeats, device).items()}
    result = {"arch": config.arch, "crops": config.crops, "micro_batch": config.micro_batch,
              "precision": str(dtype).removeprefix("torch."), "checkpoint_activations": recompute,
              "repeats": repeats, "step, ms": ms, "ratio": ms["eager"] / ms["compiled"],
              "first step, s": clock.ms["compiled"] / 1e3, "graphs": graphs,
              "graphs made later": counters["stats"]["unique_graphs"] - graphs,
              "graph breaks": sum(counters["graph_break"].values())}
    for name, value in result.items():
        print(f"{name:<24}{value}")
    return result


def bench_start(arch: str) -> dict:
    """Seconds from the command to the end of the first step of 8 pictures, and of one process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).with_name("train.py")), "--arch", arch,
                   "--batch-size=8", "--steps=100", "--log-every=1", "--device=cpu",
                   f"--out={folder}/run"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = next((line for line in process.stdout if line.startswith("step 1/")), "")
            seconds = time.perf_counter() - start
            process.terminate()
            process.communicate()       # or its last words would find nobody
    if not line:
        raise RuntimeError(f"{' '.join(command)} did not reach its first step")
    print(f"{arch}: {seconds:.1f} s from the command to the end of the first step, 8 pictures")
    return {"arch": arch, "seconds": round(seconds, 2)}


# ----------------------------------------------------------------------------------- the trunk
def bench_trunk(arch: str, pictures: int, size: int, device: torch.device, dtype: torch.dtype,
                repeats: int) -> dict:
    """Forward, and forward and backward: in either memory layout, and torchvision's network (NCHW).
    Widths are rounded as torchvision does, so that both are the same network."""
    nets = {"torchvision": ordinary_trunk(arch), "NCHW": build_trunk(arch, "torchvision"),
            "channels-last": build_trunk(arch, "torchvision")}
    nets["torchvision"].fc = nn.Identity()
    layouts = dict.fromkeys(nets, torch.contiguous_format) | {"channels-last": torch.channels_last}
    images = torch.randn(pictures, 3, size, size, device=device)
    images = {name: images.to(memory_format=layouts[name]) for name in nets}
    nets = {name: net.to(device, memory_format=layouts[name]) for name, net in nets.items()}

    def features(name):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return nets[name](images[name])

    def step(name):
        nets[name].zero_grad(set_to_none=True)
        features(name).float().square().mean().backward()

    rows = {row: in_turn({name: partial(function, name) for name in nets}, repeats, device)
            for row, function in (("forward, ms", torch.no_grad()(features)), ("step, ms", step))}
    chosen = "channels-last" if layout(device) is torch.channels_last else "NCHW"
    precision = str(dtype).removeprefix("torch.")
    print(f"{arch}, {pictures} pictures of {size} pixels, {precision}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}; "
          f"train.py takes {chosen}\n"
          f"{'':<12}" + "".join(f"{name:>15}" for name in nets) + f"{'ratio':>8}")
    for row, ms in rows.items():
        ms["ratio"] = ms["torchvision"] / ms[chosen]
        print(f"{row:<12}" + "".join(f"{ms[name]:>15.1f}" for name in nets)
              + f"{ms['ratio']:>8.2f}")
    return {"arch": arch, "pictures": pictures, "size": size, "repeats": repeats, "layout": chosen,
            "precision": precision, **rows}


def in_turn(functions: dict, repeats: int, device=torch.device("cpu")) -> dict[str, float]:
    """Median milliseconds of each function's second call, the functions taken in turn."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            clock = Clock(device)
            clock.timed("", function)()
            times[name].append(clock.ms[""])
    return {name: statistics.median(t) for name, t in times.items()}


# ------------------------------------------------------------------------------------ sinkhorn
PROBLEMS = ((64, 3000, 3), (512, 3000, 3), (4096, 3000, 3), (512, 16000, 3), (4096, 16000, 3),
            (8192, 16000, 10))          # pictures, prototypes, iterations; the last: SEER's


def bench_sinkhorn(repeats: int) -> dict:
    print(f"Sinkhorn, epsilon 0.05, fp32, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, median of {repeats} in turn\n{'B':>6} {'K':>6} {'iterations':>10} "
          f"{'textbook ms':>12} {'sinkhorn.py ms':>15} {'ratio':>6}")
    rows = []
    for pictures, prototypes, iterations in PROBLEMS:
        torch.manual_seed(0)
        scores = (F.normalize(torch.randn(pictures, 128), dim=1)
                  @ F.normalize(torch.randn(prototypes, 128), dim=1).t())
        ms = in_turn({"textbook": lambda: textbook_sinkhorn(scores, 0.05, iterations),
                      "ours": lambda: sinkhorn(scores, 0.05, iterations)}, repeats)
        rows.append({"B": pictures, "K": prototypes, "iterations": iterations, **ms,
                     "ratio": ms["textbook"] / ms["ours"]})
        print(f"{pictures:>6} {prototypes:>6} {iterations:>10} {ms['textbook']:>12.2f} "
              f"{ms['ours']:>15.2f} {rows[-1]['ratio']:>6.2f}")
    scores = scores[:64].repeat(ASSIGNED, 1)
    together = collectives(lambda: swav_codes(scores, ASSIGNED, iterations=10))
    apart = collectives(lambda: [sinkhorn(some, iterations=10) for some in scores.chunk(ASSIGNED)])
    median = statistics.median(row["ratio"] for row in rows)
    print(f"median ratio {median:.2f}\ncollectives a step of {ASSIGNED} assigned crops, "
          f"10 iterations: {together}; with one call per crop {apart}")
    return {"repeats": repeats, "rows": rows, "collectives": together, "one call per crop": apart}


def collectives(function: Callable) -> int:
    """How often a function calls dist.all_reduce, in a process group of one."""
    calls, plain = [], dist.all_reduce
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
        dist.all_reduce = lambda *args, **options: calls.append(1) or plain(*args, **options)
        try:
            function()
        finally:
            dist.all_reduce = plain
            dist.destroy_process_group()
    return len(calls)


# ----------------------------------------------------------------------------------- optimizer
def bench_optimizer(config: Config, device: torch.device, repeats: int) -> dict:
    """LARC's step; beside the plain loop, and beside seven passes over the parameters' bytes at the
    rate of a copy: norms read p and g, the update reads p, g and v and writes p and v."""
    model = build_model(config.arch, parse_head(config.head), config.prototypes, config.head_bn,
                        device=device)
    params = list(model.to(memory_format=layout(device)).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    ours = LARC(params, 1e-3, config.momentum, config.weight_decay)
    theirs = torch.optim.SGD(params, 1e-3, config.momentum)
    size = sum(p.numel() * p.element_size() for p in params)
    source = torch.ones(max(size // 4, 2 ** 26), device=device)
    target = torch.empty_like(source)
    ms = in_turn({"ordinary": partial(plain_larc, params, theirs, config.weight_decay),
                  "ours": ours.step, "copy": partial(target.copy_, source)}, repeats, device)
    floor = 7 * size * ms.pop("copy") / (2 * source.nbytes)
    result = {"arch": config.arch, "parameters": size // 4, "repeats": repeats, **ms,
              "floor": floor,
              "ratio": ms["ordinary"] / ms["ours"], "of floor": ms["ours"] / floor}
    print(f"LARC, {config.arch} with head, {size / 4e6:.1f} M parameters; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats} in "
          f"turn\nplain loop {ms['ordinary']:.1f} ms, larc.py {ms['ours']:.1f} ms, ratio "
          f"{result['ratio']:.2f}; 7 passes over memory {floor:.1f} ms, larc.py "
          f"{result['of floor']:.2f} times that")
    return result


# -------------------------------------------------------------------------------------- growth
def bench_growth(dtype: torch.dtype, repeats: int) -> dict:
    """On a CPU, a RegNetY-100MF on small crops: what a step costs, without distortion, as one thing
    grows. The exponent is that of the growth from first row to last: 0 is flat, 1 is linear.
    Where only a part of the step grows, what each one more adds to the first row's says more."""
    def config(batch=16, **changes):
        given = configure({"arch": "regnety_100mf", "crops": "2x64+4x32", "head": "256-64",
                           "prototypes": 1000, "batch_size": batch, **changes})
        return replace(given, micro_batch=16)

    def steps(configs: dict) -> dict:
        cpu, first = torch.device("cpu"), min(configs)
        ours = {x: our_step(c, cpu, dtype) for x, c in configs.items()}
        taken = steps_in_turn(ours, repeats, cpu)
        ms = {x: statistics.median(map(without_distortion, each)) for x, each in taken.items()}
        return {x: {"step, ms": ms[x], "one more, ms": (ms[x] - ms[first]) / max(1, x - first)}
                for x in ms}

    tables = {}

    def table(name: str, grown: dict) -> None:
        """grown: size -> the columns of a row."""
        first, *_, last = sizes = list(grown)
        column = next(iter(grown[first]))
        exponent = math.log(grown[last][column] / grown[first][column]) / math.log(last / first)
        print(f"\n{name}\n" + " " * 15 + "".join(f"{column:>22}" for column in grown[first]))
        for size in sizes:
            print(f"{size:>15,}" + "".join(f"{value:>22.4g}" for value in grown[size].values()))
        print(f"{'exponent':>15}{exponent:>22.2f}", flush=True)
        tables[name] = {"rows": grown, "exponent": exponent}

    table("pictures of the batch, in micro-batches of 16", steps(
        {batch: config(batch) for batch in (32, 64, 128, 256)}))
    table("prototypes", steps({k: config(prototypes=k) for k in (1000, 16000, 64000, 128000)}))
    table("small crops, beside two large ones", steps(
        {count: config(crops=f"2x64+{count}x32") for count in (2, 4, 8, 16)}))
    table("ranks of 16 pictures each, one thread a rank (gloo)", {
        world: {"step, ms": of_ranks(world, config(), dtype, repeats)} for world in (1, 2)})
    table("pictures of the set, a position", {
        count: {"order, microseconds": bench_order(repeats, count)["microseconds"]}
        for count in (1_000, 1_000_000, 1_000_000_000)})
    return {"repeats": repeats, "tables": tables}


def of_ranks(world: int, config: Config, dtype: torch.dtype, repeats: int) -> float:
    """Median milliseconds of a step of so many processes, each with a batch of its own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (world, folder, config, dtype, repeats), world)
        return float(Path(folder, "ms").read_text())


def one_rank(rank: int, world: int, folder: str, config: Config, dtype: torch.dtype,
             repeats: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank,
                            world_size=world)
    try:
        step, cpu = our_step(config, torch.device("cpu"), dtype), torch.device("cpu")
        taken = steps_in_turn({"": step}, repeats, cpu)[""]
        ms = statistics.median(map(without_distortion, taken))
        if rank == 0:
            Path(folder, "ms").write_text(str(ms))
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------- input
def jpeg(width: int, height: int, seed: int, quality: int = 93) -> bytes:
    """A picture of clouds at all scales and some grain; 75 kB at 500 x 375."""
    rng, total = numpy.random.default_rng(seed), 0.0
    for octave in range(2, 8):
        small = rng.random((height // 2 ** octave + 2, width // 2 ** octave + 2, 3)) * 255
        cloud = Image.fromarray(small.astype(numpy.uint8)).resize((width, height), Image.BICUBIC)
        total = total + numpy.asarray(cloud, numpy.float32) * 2 ** (octave / 2)
    total = (total - total.min()) * (255 / (total.max() - total.min()))
    grainy = total + rng.standard_normal(total.shape, numpy.float32) * 8
    buffer = io.BytesIO()
    Image.fromarray(grainy.clip(0, 255).astype(numpy.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Encoded:
    """Encoded pictures, over and over: a dataset, as images.py's are."""

    def __init__(self, pictures: list[bytes]):
        self.pictures = pictures

    def __len__(self) -> int:
        return 10 ** 6

    def name(self, i: int) -> str:
        return str(i)

    def __getitem__(self, i: int) -> bytes:
        return self.pictures[i % len(self.pictures)]


def bench_input(crops: str, repeats: int) -> dict:
    """Milliseconds a picture on one core: (a) decoding alone, for large pictures also at the scale
    that is chosen; (b) what a worker does; (c) the ordinary way; (d) worker and distortion."""
    torch.set_num_threads(1)
    specs = parse_crops(crops)
    worker, photometric, seeds = MultiCrop(specs), Photometric(), itertools.count()
    result = {"crops": crops, "repeats": repeats}
    print(f"{crops}, one core, ms a picture, median of {repeats} in turn")
    for width, height, count in ((500, 375, 32), (4000, 3000, 4)):
        pictures = [jpeg(width, height, seed) for seed in range(count)]
        scales = []

        def decoding(data, shrink=1):
            image = Image.open(io.BytesIO(data))
            if shrink > 1:
                image.draft(None, (width // shrink, height // shrink))
            image.load()

        def chosen(data):           # the scales that the worker chooses, in turn
            rng = random.Random(next(seeds))
            boxes = [[random_box(width, height, spec.scale, rng) for _ in range(spec.count)]
                     for spec in specs]
            scales.append(worker.shrink(boxes))
            decoding(data, scales[-1])

        def both(data):
            return [photometric(x, p) for x, p in zip(*worker(data, next(seeds)))]

        ways = {"(a) decoding": decoding, "(a') at the chosen scale": chosen,
                "(b) worker": lambda data: worker(data, next(seeds)),
                "(c) ordinary": ordinary_crops(specs), "(d) worker, distortion": both}
        ms = in_turn({name: partial(lambda way: [way(data) for data in pictures], way)
                      for name, way in ways.items()}, repeats)
        ms = {name: time / count for name, time in ms.items()}
        size = sum(map(len, pictures)) / count / 1e3
        print(f"\n{width} x {height}, {size:.0f} kB, scales chosen "
              f"{dict(sorted(Counter(scales).items()))}")
        for name, time_ in ms.items():
            print(f"{name:<26}{time_:>9.2f}")
        ratios = {"c / b": ms["(c) ordinary"] / ms["(b) worker"],
                  "c / d": ms["(c) ordinary"] / ms["(d) worker, distortion"],
                  "b / a": ms["(b) worker"] / ms["(a) decoding"],
                  "b / a'": ms["(b) worker"] / ms["(a') at the chosen scale"]}
        print("   ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
        result[f"{width}x{height}"] = ms | ratios

    pictures = [jpeg(500, 375, seed) for seed in range(32)]
    stream = Stream(Encoded(pictures), worker, seed=0)
    per_picture = []
    for _ in range(repeats):
        loader = iter(DataLoader(stream, batch_sampler=Positions(0, 40, 32), collate_fn=collate,
                                 num_workers=1))
        for _ in range(4):          # those that were made while nobody looked
            next(loader)
        start = time.perf_counter()
        read = sum(1 for _ in loader)
        per_picture.append((time.perf_counter() - start) / read / 32 * 1e3)
    result["loader"] = statistics.median(per_picture)
    alone = in_turn({"": lambda: [stream[p] for p in range(64)]}, repeats)[""] / 64
    result["loader / stream"] = result["loader"] / alone
    print(f"\nthe whole loader, one worker process: {result['loader']:.2f} ms a picture, "
          f"{result['loader / stream']:.2f} times the stream alone ({alone:.2f})")
    return result


def bench_features(arch: str, device: torch.device, repeats: int) -> dict:
    """Seconds of evaluate.py's features of JPEGs of 500 x 375 pixels, at 224, with one worker; of
    the trunk alone, on as many black pictures, also as it usually is; and of the input alone. With
    all threads the worker takes some of their time; with one fewer it has a processor to itself."""
    batches = 6

    class Some(Encoded):
        def __len__(self) -> int:
            return batches * BATCH

    centred = Centred(Some([jpeg(500, 375, seed) for seed in range(16)]), 224)
    trunk, plain = build_trunk(arch), build_trunk(arch).eval().to(device)
    black = torch.zeros(3, 224, 224, dtype=torch.uint8), True
    options, images = {"device": device, "desc": ""}, torch.zeros(BATCH, 3, 224, 224, device=device)
    ways = {"together": lambda: list(in_batches(trunk, centred, workers=1, **options)),
            "trunk": lambda: list(in_batches(trunk, [black] * len(centred), **options)),
            "trunk, NCHW": torch.no_grad()(lambda: [plain(images) for _ in range(batches)]),
            "input": lambda: list(DataLoader(centred, BATCH, num_workers=1))}
    result = {"arch": arch, "pictures": len(centred), "repeats": repeats}
    print(f"features of {len(centred)} pictures, {arch}, 224 pixels, one worker; {device}, torch "
          f"{torch.__version__}, median of {repeats} in turn, seconds")
    all_of_them = torch.get_num_threads()
    for threads in sorted({all_of_them, max(1, all_of_them - 1)}):
        torch.set_num_threads(threads)
        ms = in_turn(ways, repeats, device)
        ratio = ms["together"] / max(ms["trunk"], ms["input"])
        result[f"{threads} threads"] = ms | {"ratio": ratio}
        print(f"{threads} threads: " + "  ".join(f"{name} {ms[name] / 1e3:.2f}" for name in ms)
              + f"; together {ratio:.2f} times the larger of trunk and input")
    return result


def bench_order(repeats: int, count: int = 1_000_000_000) -> dict:
    """Microseconds from a position of the stream to its picture."""
    positions = [mix(i) % count for i in range(10_000)]
    ms = in_turn({"order": lambda: [permute(p, count, 7) for p in positions]}, repeats)
    us = ms["order"] / len(positions) * 1e3
    print(f"{us:.2f} microseconds a position, of {count:,}; median of {repeats}")
    return {"pictures": count, "microseconds": us, "repeats": repeats}


# -------------------------------------------------------------------------------- small print
def read_results(path: Path) -> list:
    """Raises ValueError for a file that is no list of results."""
    try:
        results = json.loads(path.read_text()) if path.exists() else []
    except (ValueError, OSError):
        results = None
    if not isinstance(results, list):
        raise ValueError(f"--out {path} is no file of results; name another")
    return results


def write_results(path: Path, what: str, result: dict) -> None:
    """One more result, with what it was measured on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    results = [*read_results(path), {
        "what": what, "date": datetime.date.today().isoformat(), **result,
        "machine": names[0] if names else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(), "torch": torch.__version__,
        "torchvision": torchvision.__version__}]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(aside, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure speed beside the ordinary way.")
    parser.add_argument("what", choices=["step", "compile", "trunk", "start", "sinkhorn",
                                         "optimizer", "growth", "features", "input", "order"])
    parser.add_argument("--arch", default="regnety_400mf", help="of step, trunk and start")
    parser.add_argument("--crops", default="2x160+4x96",
                        help="of step and input; of trunk the first size")
    parser.add_argument("--micro-batch", type=int, default=16, help="pictures of step and trunk")
    parser.add_argument("--checkpoint-activations", action="store_true", help="in step")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--device", default="", help="cuda, mps or cpu; none: the best one here")
    parser.add_argument("--repeats", type=int, default=0, help="(5; of sinkhorn 15)")
    parser.add_argument("--out", default="runs/bench.json", help="where results are added")
    args = parser.parse_args(hyphens(sys.argv[1:] if argv is None else argv))
    try:
        if args.micro_batch < 1 or args.repeats < 0:
            raise ValueError("--micro-batch must be at least 1, and --repeats not below 0")
        out = Path(args.out)
        read_results(out)               # or minutes of measuring would be lost
        device, repeats = pick_device(args.device), args.repeats or 5
        dtype = pick_precision(args.precision, device)

        def of_network(measure: Callable, *how) -> dict:
            config = configure({"arch": args.arch, "crops": args.crops,
                                "batch_size": max(2, args.micro_batch)})
            config = replace(config, batch_size=args.micro_batch, micro_batch=args.micro_batch)
            return measure(config, device, *how, repeats)

        result = {
            "step": lambda: of_network(bench_step, dtype, args.checkpoint_activations),
            "compile": lambda: of_network(bench_compile, dtype, args.checkpoint_activations),
            "optimizer": lambda: of_network(bench_optimizer),
            "trunk": lambda: bench_trunk(args.arch, args.micro_batch,
                                         parse_crops(args.crops)[0].size, device, dtype, repeats),
            "start": lambda: bench_start(args.arch),
            "sinkhorn": lambda: bench_sinkhorn(args.repeats or 15),
            "growth": lambda: bench_growth(dtype, repeats),
            "features": lambda: bench_features(args.arch, device, repeats),
            "input": lambda: bench_input(args.crops, repeats),
            "order": lambda: bench_order(repeats)}[args.what]()
        write_results(out, args.what, result)
    except torch.OutOfMemoryError:
        fail("the device has no room for this step: try a smaller --micro-batch or "
             "--checkpoint-activations")
    except (ValueError, RuntimeError, OSError) as error:
        fail(str(error))


def fail(sentence: str) -> None:
    print(f"bench.py: error: {sentence}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
