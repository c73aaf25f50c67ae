"""Speed, measured side by side with the ordinary way, in one run.

    python bench.py sinkhorn           # against the textbook loop; medians, milliseconds

Each row is a ratio of medians taken in turn (ours, theirs, ours, theirs, ...), so a machine whose
speed drifts slows both; each is called twice and the second call is timed, as in a loop that does
nothing else. The ordinary way is written here, plainly, as one finds it elsewhere.
"""
import argparse
import statistics
import time

import torch
from torch import Tensor
from torch.nn import functional as F

from sinkhorn import sinkhorn


def in_turn(functions: dict, repeats: int) -> dict[str, float]:
    """Median milliseconds of each function's second call, the functions taken in turn."""
    times = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def textbook_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Exponentiate, then divide rows and columns in turn."""
    q = torch.exp(scores / epsilon)                                      # (B, K)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
    return q * q.shape[0]


def bench_sinkhorn(repeats: int) -> None:
    print(f"Sinkhorn, epsilon 0.05, 3 iterations, fp32, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}, median of {repeats} in turn\n"
          f"{'B':>6} {'K':>6} {'textbook ms':>12} {'sinkhorn.py ms':>15} {'ratio':>6}")
    ratios = []
    for rows, prototypes in ((64, 3000), (512, 3000), (4096, 3000), (512, 16000), (4096, 16000)):
        torch.manual_seed(0)
        scores = (F.normalize(torch.randn(rows, 128), dim=1)
                  @ F.normalize(torch.randn(prototypes, 128), dim=1).t())
        ms = in_turn({"textbook": lambda: textbook_sinkhorn(scores, 0.05, 3),
                      "ours": lambda: sinkhorn(scores, 0.05, 3)}, repeats)
        ratios.append(ms["textbook"] / ms["ours"])
        print(f"{rows:>6} {prototypes:>6} {ms['textbook']:>12.2f} {ms['ours']:>15.2f} "
              f"{ratios[-1]:>6.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure speed beside the ordinary way.")
    parser.add_argument("what", choices=["sinkhorn"])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    bench_sinkhorn(args.repeats)
