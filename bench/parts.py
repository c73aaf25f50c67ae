"""Parts of a step, each alone: the trunk, Sinkhorn, the optimizer.

    result = bench_sinkhorn(repeats=15)
    calls = collectives(lambda: swav_codes(scores, num_crops=2))        # all-reduces

Shapes: B images, K prototypes.
"""
import statistics
import tempfile
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from bench.baseline import baseline_trunk, plain_larc, textbook_sinkhorn
from bench.timing import in_turn
from distributed.hardware import autocast, layout
from distributed.wrap import try_update
from larc import LARC
from methods.build import build_method, build_trunk
from recipes.config import Config
from sinkhorn import sinkhorn
from swav import ASSIGNED, swav_codes

PROBLEMS = ((64, 3000, 3), (512, 3000, 3), (4096, 3000, 3), (512, 16000, 3), (4096, 16000, 3),
            (8192, 16000, 10))          # B, K, iterations; the last: SEER's


# ----------------------------------------------------------------------------------- the trunk
def bench_trunk(arch: str, count: int, size: int, device: torch.device, dtype: torch.dtype,
                repeats: int) -> dict:
    """Forward, and forward and backward: in either memory layout, and torchvision's network (NCHW).
    Widths are rounded as torchvision does, so that both are the same network.

    count, size: of the images.
    """
    nets = {"torchvision": baseline_trunk(arch), "NCHW": build_trunk(arch, "torchvision"),
            "channels-last": build_trunk(arch, "torchvision")}
    nets["torchvision"].fc = nn.Identity()
    layouts = dict.fromkeys(nets, torch.contiguous_format) | {"channels-last": torch.channels_last}
    images = torch.randn(count, 3, size, size, device=device)
    images = {name: images.to(memory_format=layouts[name]) for name in nets}
    nets = {name: net.to(device, memory_format=layouts[name]) for name, net in nets.items()}

    def features(name):
        with autocast(device, dtype):
            return nets[name](images[name])

    def step(name):
        nets[name].zero_grad(set_to_none=True)
        features(name).float().square().mean().backward()

    rows = {row: in_turn({name: partial(function, name) for name in nets}, repeats, device)
            for row, function in (("forward, ms", torch.no_grad()(features)), ("step, ms", step))}
    chosen = "channels-last" if layout(device) is torch.channels_last else "NCHW"
    precision = str(dtype).removeprefix("torch.")
    print(f"{arch}, {count} images of {size} pixels, {precision}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}; "
          f"train.py takes {chosen}\n"
          f"{'':<12}" + "".join(f"{name:>15}" for name in nets) + f"{'ratio':>8}")
    for row, ms in rows.items():
        ms["ratio"] = ms["torchvision"] / ms[chosen]
        print(f"{row:<12}" + "".join(f"{ms[name]:>15.1f}" for name in nets)
              + f"{ms['ratio']:>8.2f}")
    return {"arch": arch, "pictures": count, "size": size, "repeats": repeats, "layout": chosen,
            "precision": precision, **rows}


# ------------------------------------------------------------------------------------ Sinkhorn
def bench_sinkhorn(repeats: int) -> dict:
    """sinkhorn.py beside the textbook's loop, for PROBLEMS; and the collectives of a step's codes,
    all assigned crops in one call and one call each."""
    print(f"Sinkhorn, epsilon 0.05, fp32, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, median of {repeats} in turn\n{'B':>6} {'K':>6} {'iterations':>10} "
          f"{'textbook ms':>12} {'sinkhorn.py ms':>15} {'ratio':>6}")
    rows = []
    for images, prototypes, iterations in PROBLEMS:
        torch.manual_seed(0)
        scores = (F.normalize(torch.randn(images, 128), dim=1)
                  @ F.normalize(torch.randn(prototypes, 128), dim=1).t())               # (B, K)
        ms = in_turn({"textbook": lambda: textbook_sinkhorn(scores, 0.05, iterations),
                      "ours": lambda: sinkhorn(scores, 0.05, iterations)}, repeats)
        rows.append({"B": images, "K": prototypes, "iterations": iterations, **ms,
                     "ratio": ms["textbook"] / ms["ours"]})
        print(f"{images:>6} {prototypes:>6} {iterations:>10} {ms['textbook']:>12.2f} "
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
    method = build_method(config, device)
    params = list(method.to(memory_format=layout(device)).parameters())
    for p in params:
        p.grad = torch.randn_like(p)
    ours = LARC(params, 1e-3, config.momentum, config.weight_decay,
                compiled=device.type == "cuda")
    try_update(ours)
    theirs = torch.optim.SGD(params, 1e-3, config.momentum)
    size = sum(p.numel() * p.element_size() for p in params)
    source = torch.ones(max(size // 4, 2 ** 26), device=device)
    target = torch.empty_like(source)
    ms = in_turn({"baseline": partial(plain_larc, params, theirs, config.weight_decay),
                  "ours": ours.step, "copy": partial(target.copy_, source)}, repeats, device)
    floor = 7 * size * ms.pop("copy") / (2 * source.nbytes)
    result = {"arch": config.arch, "parameters": size // 4, "repeats": repeats, **ms,
              "floor": floor,
              "ratio": ms["baseline"] / ms["ours"], "of floor": ms["ours"] / floor}
    print(f"LARC, {config.arch} with head, {size / 4e6:.1f} M parameters; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats} in "
          f"turn\nplain loop {ms['baseline']:.1f} ms, larc.py {ms['ours']:.1f} ms, ratio "
          f"{result['ratio']:.2f}; 7 passes over memory {floor:.1f} ms, larc.py "
          f"{result['of floor']:.2f} times that")
    return result
