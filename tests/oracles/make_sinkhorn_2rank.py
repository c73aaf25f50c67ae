"""Write sinkhorn_2rank.pt: codes of two ranks that solve one problem together, two cases.

    python -m tests.oracles.make_sinkhorn_2rank

Float64, by the loop of make_swav_loss.py on the rows of both ranks in one matrix. The images of a
rank lie around a point of its own: a rank that solves alone is wrong by more than 0.2.
"""
from pathlib import Path

import numpy
import torch

from tests.oracles.make_swav_loss import sinkhorn, unit

# name: images per rank, prototypes, epsilon, iterations
CASES = {"eps005_it3": (12, 20, 0.05, 3), "eps003_it10": (10, 48, 0.03, 10)}


def inputs(name: str, seed: int) -> dict:
    b, k, epsilon, iterations = CASES[name]
    rng = numpy.random.default_rng(seed)
    images = unit(rng.standard_normal((2, 1, 16)) + rng.standard_normal((2, b, 16))).double()
    prototypes = unit(rng.standard_normal((k, 16))).double()
    return {"name": name, "epsilon": epsilon, "iterations": iterations,
            "scores": [(rows @ prototypes.T).float() for rows in images]}


def expected(case: dict) -> list[torch.Tensor]:
    """The codes of each rank, (B, K)."""
    codes = sinkhorn(torch.cat(case["scores"]).double(), case["epsilon"], case["iterations"])
    codes = [rows.clone() for rows in codes.chunk(2)]
    for scores, joint in zip(case["scores"], codes):
        alone = sinkhorn(scores.double(), case["epsilon"], case["iterations"])
        assert (alone - joint).abs().max() > 0.2, "the case does not tell joint from alone"
    return codes


def make() -> dict:
    cases = [inputs(name, seed) for seed, name in enumerate(CASES)]
    return {"cases": [case | {"codes": expected(case)} for case in cases]}


if __name__ == "__main__":
    torch.save(make(), Path(__file__).with_name("sinkhorn_2rank.pt"))
