"""Speed and memory, measured beside the baseline: standard PyTorch and torchvision.

    python -m bench step --arch regnety_400mf --crops 2x96+4x64 --micro-batch 32
    python -m bench trunk --arch regnety_8gf --crops 1x128 --micro-batch 4    # and torchvision's
    python -m bench compile            # the step compiled and not
    python -m bench start              # from the command to the first step
    python -m bench sinkhorn           # against the textbook loop
    python -m bench optimizer          # LARC, against the plain loop and against its floor
    python -m bench save               # how long a step waits, beside torch.save in the step
    python -m bench growth             # cost against batch, prototypes, crops, ranks and images
    python -m bench features           # evaluate.py's, beside trunk alone and input alone
    python -m bench input              # encoded images to crops, on one core
    python -m bench cache              # large JPEGs, with data/cache.py and without
    python -m bench run                # train.py as a whole, beside lightly's SwAV
    python -m bench order              # position to image, among a billion
    python -m bench detect             # Mask R-CNN, beside torchvision's with the same trunk
    python -m bench rates              # matrix product, convolution and copy: for --plan
    python -m bench layouts            # the trunk by memory layout, padding and cudnn.benchmark
    python -m bench gpu                # all that has to be known of a GPU, in under 25 minutes

How the times are taken is in timing.py, what they are compared with in baseline.py.
"""
import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from bench.detect import bench_detect
from bench.gpu import bench_gpu
from bench.growth import bench_growth
from bench.input import bench_cache, bench_features, bench_input, bench_order
from bench.layouts import bench_layouts
from bench.parts import bench_optimizer, bench_sinkhorn, bench_trunk
from bench.run import bench_run
from bench.save import bench_save
from bench.step import bench_compile, bench_start, bench_step
from bench.timing import bench_rates, read_results, write_results
from distributed.hardware import memory_of, pick_device, pick_precision
from methods.build import TRUNKS
from multicrop import parse_crops
from recipes.command_line import configure, hyphens
from recipes.config import unknown
from training.cost import cost, memory
from weights.terminal import Text, number_in, one_sentence


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench", usage="python -m bench WHAT [--arch ARCH] [--crops CROPS] [more: see "
        "--help]", description="Measure speed beside the baseline.", allow_abbrev=False)
    parser.add_argument("what", choices=["step", "compile", "trunk", "start", "sinkhorn",
                                         "optimizer", "save", "growth", "features", "input",
                                         "cache", "run", "order", "detect", "rates", "layouts",
                                         "gpu"])
    parser.add_argument("--arch", default="regnety_400mf",
                        help="of step, compile, layouts, trunk, start, optimizer, save, features, "
                        "detect and run")
    parser.add_argument("--crops", default="2x160+4x96",
                        help="of step, compile, layouts, input, cache and run; of trunk and detect "
                        "the first size")
    parser.add_argument("--micro-batch", type=number_in(int, 1, 100_000), default=16,
                        help="images of step, compile, layouts, trunk and detect")
    parser.add_argument("--checkpoint-activations", action="store_true",
                        help="in step and compile")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--device", action=Text, default="",
                        help="cuda, mps or cpu; none: the best one here")
    parser.add_argument("--repeats", type=number_in(int, 1, 10_000), help="(5; of sinkhorn 15)")
    parser.add_argument("--out", action=Text, default="runs/bench.json",
                        help="where results are added")
    return parser.parse_args(hyphens(argv))


def measure(args: argparse.Namespace) -> dict:
    """What args.what asks for. Raises ValueError for what cannot be measured."""
    if args.arch not in TRUNKS:
        raise ValueError(unknown("arch", args.arch, TRUNKS))
    first, *_ = parse_crops(args.crops)
    read_results(Path(args.out))        # or minutes of measuring would be lost
    device, repeats = pick_device(args.device), args.repeats or 5
    dtype = pick_precision(args.precision, device)

    def of_network(bench: Callable, *how) -> dict:
        config = configure({"arch": args.arch, "crops": args.crops,
                            "batch_size": max(2, args.micro_batch)})
        config = replace(config, batch_size=args.micro_batch, micro_batch=args.micro_batch)
        need = sum(memory(cost(config, dtype), config, args.micro_batch,
                          args.checkpoint_activations, 1, dtype).values())
        if need > 2 * memory_of(device):
            raise ValueError(f"{args.arch} needs {need / 1e9:.0f} GB for --micro-batch "
                             f"{args.micro_batch}, more than there is")
        return bench(config, device, *how, repeats)

    return {
        "step": lambda: of_network(bench_step, dtype, args.checkpoint_activations),
        "compile": lambda: of_network(bench_compile, dtype, args.checkpoint_activations),
        "optimizer": lambda: of_network(bench_optimizer),
        "save": lambda: of_network(bench_save),
        "trunk": lambda: bench_trunk(args.arch, args.micro_batch, first.size,
                                     device, dtype, repeats),
        "start": lambda: bench_start(args.arch),
        "sinkhorn": lambda: bench_sinkhorn(args.repeats or 15),
        "growth": lambda: bench_growth(dtype, repeats),
        "features": lambda: bench_features(args.arch, device, repeats),
        "input": lambda: bench_input(args.crops, repeats),
        "cache": lambda: bench_cache(args.crops, repeats),
        "run": lambda: bench_run(args.arch, args.crops, repeats),
        "order": lambda: bench_order(repeats),
        "detect": lambda: bench_detect(args.arch, args.micro_batch, first.size, device, dtype,
                                       repeats),
        "rates": lambda: bench_rates(device, dtype),
        "layouts": lambda: of_network(bench_layouts, dtype),
        "gpu": lambda: bench_gpu(device.type, Path(args.out).with_suffix(".md"))}[args.what]()


def main(argv: list[str] | None = None) -> None:
    with one_sentence("python -m bench"):
        args = parse_arguments(sys.argv[1:] if argv is None else argv)
        try:
            write_results(Path(args.out), args.what, measure(args))
        except torch.OutOfMemoryError:
            raise RuntimeError("the device has no room for this step: try a smaller --micro-batch "
                               "or --checkpoint-activations") from None


if __name__ == "__main__":
    main()
