"""bench/roofline.py against the plan's multiply-adds, and its bytes."""
import math
from dataclasses import replace

import pytest
import torch

from bench.roofline import roofline
from recipes.command_line import configure
from training import plan


def test_the_roofline_is_arithmetic_or_memory():
    """With endless bandwidth it is the plan's multiply-adds, less the gradient of the images. With
    endless arithmetic, the weights are what does not grow with the batch: read twice and their
    gradients written, in bf16, the trunk's for each crop size."""
    config = replace(configure({"arch": "regnetx_200mf", "crops": "2x64+3x32", "batch_size": 4}),
                     micro_batch=4)
    cost, dtype = plan.cost(config), torch.bfloat16
    stem = 2 * 4 * 32 * 27 * (2 * 32 ** 2 + 3 * 16 ** 2) / 1e12
    arithmetic = roofline(config, dtype, 1e12, math.inf)
    assert arithmetic == pytest.approx(4 * plan.work(cost) - stem, rel=1e-6)
    moved = roofline(config, dtype, math.inf, 1.0)
    weights = 2 * moved - roofline(replace(config, micro_batch=8), dtype, math.inf, 1.0)
    trunk = cost.trunk_params - 2 * sum(cost.norms)
    head = cost.params - cost.trunk_params - 2 * sum(cost.head_norms)
    counted = 2 * (2 * (3 * trunk - 32 * 27) + 3 * head)
    assert 0.98 * counted < weights <= counted                      # biases are not counted
    both = roofline(config, dtype, 2e11, 1e10)                      # some layers bound by either
    sums = moved / 1e10 + 20 * plan.work(cost)
    assert max(moved / 1e10, 20 * plan.work(cost)) < 0.99 * both < 0.98 * sums
