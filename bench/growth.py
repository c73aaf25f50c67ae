"""Growth: how the cost of a step grows with batch, prototypes, crops and ranks, and that of the
order with the number of images.

    result = bench_growth(torch.float32, repeats=5)
"""
import math
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from bench.input import bench_order
from bench.step import product_step, without_augmentation
from bench.timing import steps_in_turn
from recipes.command_line import configure
from recipes.config import Config

CPU = torch.device("cpu")


def bench_growth(dtype: torch.dtype, repeats: int) -> dict:
    """On a CPU, a RegNetY-100MF on small crops: what a step costs, without augmentation, as one
    thing grows. The exponent is that of the growth from first row to last: 0 is flat, 1 is linear.
    Where only a part of the step grows, what each one more adds to the first row's says more."""
    def grow(configs: dict[int, Config]) -> dict:
        return step_columns(configs, dtype, repeats)

    return {"repeats": repeats, "tables": dict((
        table("pictures of the batch, in micro-batches of 16",
              grow({batch: small_run(batch) for batch in (32, 64, 128, 256)})),
        table("prototypes",
              grow({k: small_run(prototypes=k) for k in (1000, 16000, 64000, 128000)})),
        table("small crops, beside two large ones",
              grow({count: small_run(crops=f"2x64+{count}x32") for count in (2, 4, 8, 16)})),
        table("ranks of 16 pictures each, one thread a rank (gloo)",
              {world: {"step, ms": step_of_ranks(world, small_run(), dtype, repeats)}
               for world in (1, 2)}),
        table("pictures of the set, a position",
              {count: {"order, microseconds": bench_order(repeats, count)["microseconds"]}
               for count in (1_000, 1_000_000, 1_000_000_000)})))}


def small_run(batch: int = 16, **changes) -> Config:
    config = configure({"arch": "regnety_100mf", "crops": "2x64+4x32", "head": "256-64",
                        "prototypes": 1000, "batch_size": batch, **changes})
    return replace(config, micro_batch=16)


def step_columns(configs: dict[int, Config], dtype: torch.dtype, repeats: int) -> dict:
    """configs: of each size. Returns size -> the columns of its row."""
    steps = {size: product_step(config, CPU, dtype) for size, config in configs.items()}
    ms = {size: statistics.median(map(without_augmentation, measured))
          for size, measured in steps_in_turn(steps, repeats, CPU).items()}
    first = min(ms)
    return {size: {"step, ms": ms[size],
                   "one more, ms": (ms[size] - ms[first]) / max(1, size - first)} for size in ms}


def table(name: str, rows: dict[int, dict[str, float]]) -> tuple[str, dict]:
    """Print rows, size -> columns, with the exponent of the first column; its name and contents."""
    first, *_, last = sizes = list(rows)
    column = next(iter(rows[first]))
    exponent = math.log(rows[last][column] / rows[first][column]) / math.log(last / first)
    print(f"\n{name}\n" + " " * 15 + "".join(f"{column:>22}" for column in rows[first]))
    for size in sizes:
        print(f"{size:>15,}" + "".join(f"{value:>22.4g}" for value in rows[size].values()))
    print(f"{'exponent':>15}{exponent:>22.2f}", flush=True)
    return name, {"rows": rows, "exponent": exponent}


def step_of_ranks(world: int, config: Config, dtype: torch.dtype, repeats: int) -> float:
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
        measured = steps_in_turn({"": product_step(config, CPU, dtype)}, repeats, CPU)[""]
        if rank == 0:
            ms = statistics.median(map(without_augmentation, measured))
            Path(folder, "ms").write_text(str(ms))
    finally:
        dist.destroy_process_group()
