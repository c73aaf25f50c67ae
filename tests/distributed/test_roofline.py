"""distributed/roofline.py: its FLOP against the plan's multiply-adds, its bytes by hand."""
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import step
from distributed.roofline import (
    Gpu,
    Operation,
    count_operations,
    roofline,
    without_elementwise,
)
from methods.build import build_trunk
from multicrop import parse_crops
from recipes.command_line import configure
from tests.helpers import ROOT
from training.cost import cost, work
from training.step_time import passes


def test_the_operations_of_a_small_network_by_hand():
    """A convolution, BatchNorm, ReLU in place and a mean, of maps of 4 bytes a number."""
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3, padding=1, groups=3, bias=False)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return self.norm(self.conv(x)).relu_().mean((2, 3))

    with torch.device("meta"):
        operations = count_operations(Small(), (3, 8, 8), torch.float32)
    image, maps, weights = 4 * 3 * 64, 4 * 6 * 64, 4 * 6 * 9
    products = [Operation("product", 2 * 6 * 64 * 9, image + maps, weights, backward)
                for backward in (False, True)]              # no gradient of the images
    assert [o for o in operations if o.kind == "product"] == products
    norms = [Operation("norm", 0, passes * maps, 0, backward)
             for passes, backward in ((3, False), (5, True))]
    assert [o for o in operations if o.kind == "norm"] == norms
    other = {backward: sum(o.maps for o in operations
                           if o.kind == "other" and o.backward == backward)
             for backward in (False, True)}
    mean = 4 * 6
    # ReLU reads and writes, the mean reads; back, the mean's gradient is written, then ReLU's reads
    # it and the map and writes
    assert other[False] == pytest.approx(3 * maps + mean, abs=20)       # and a counter of batches
    assert other[True] == 4 * maps + mean
    assert without_elementwise(operations) == [o for o in operations if o.kind != "other"]


def test_linear_layers_by_hand():
    """Forward, gradient of the features, of the weights; widths may be as small as the count."""
    with torch.device("meta"):
        operations = count_operations(nn.Linear(6, 4), (6,), torch.bfloat16)
        narrow = count_operations(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), (2,),
                                  torch.bfloat16)
    products = [o for o in operations if o.kind == "product"]
    assert [o[1:4] for o in products] == [(2 * 24, 2 * (6 + 4), 2 * 24)] * 3
    assert [o.backward for o in products] == [False, True, True]
    assert [o.flops for o in narrow if o.kind == "product"] == [2 * 4] * 6


@pytest.mark.parametrize("arch, eager, compiled", [
    pytest.param(*row, marks=pytest.mark.long) for row in (
        ("16gf", 29, 45), ("32gf", 40, 58), ("128gf", 53, 71), ("256gf", 61, 77))])
def test_the_bounds_of_the_docs(arch, eager, compiled):
    """Shares of the peak that memory leaves to the trunk, SEER's crops, a micro-batch of 32."""
    page, gpu, bounds = (ROOT / "docs" / "scale.md").read_text(), Gpu(), []
    with torch.device("meta"):
        trunk = build_trunk(f"regnety_{arch}")
    crops = {spec: count_operations(trunk, (3, spec.size, spec.size), torch.bfloat16)
             for spec in parse_crops("2x224+4x96")}
    for part in (list, without_elementwise):
        times = [sum(roofline(part(operations), 32 * spec.count, gpu.tflops * 1e12, memory)
                     for spec, operations in crops.items())
                 for memory in (math.inf, gpu.bandwidth * 1e9)]
        bounds.append(round(100 * times[0] / times[1]))
    assert bounds == [eager, compiled]
    for bound in bounds:
        assert f"{bound} % at {arch.upper()}" in " ".join(page.split())


def test_the_roofline_is_arithmetic_or_memory(monkeypatch):
    """With endless bandwidth it is the plan's multiply-adds, less the gradient of the images. With
    endless arithmetic, the weights are what does not grow with the batch: read twice and their
    gradients written, in bf16, the trunk's for each crop size."""
    config = replace(configure({"arch": "regnetx_200mf", "crops": "2x64+3x32", "batch_size": 4}),
                     micro_batch=4)
    of, rates, passed = cost(config), [math.inf, math.inf], passes(config)
    monkeypatch.setattr(step, "passes", lambda *_: passed)
    monkeypatch.setattr(step, "convolution_rate", lambda *_: rates[0])
    monkeypatch.setattr(step, "bandwidth", lambda *_: rates[1])

    def least(flops: float, memory: float, **changes) -> float:
        rates[:] = flops, memory
        return step.least_ms(replace(config, **changes), None, torch.bfloat16) / 1e3

    stem = 2 * 4 * 32 * 27 * (2 * 32 ** 2 + 3 * 16 ** 2) / 1e12
    assert least(1e12, math.inf) == pytest.approx(4 * work(of) - stem, rel=1e-6)
    moved = least(math.inf, 1.0)
    weights = 2 * moved - least(math.inf, 1.0, micro_batch=8)
    trunk = of.trunk_params - 2 * sum(of.norms)
    head = of.params - of.trunk_params - 2 * sum(of.head_norms)
    counted = 2 * (2 * (3 * trunk - 32 * 27) + 3 * head)
    assert 0.98 * counted < weights <= counted                      # biases are not counted
    both = least(2e11, 1e10)                                        # some layers bound by either
    sums = moved / 1e10 + 20 * work(of)
    assert max(moved / 1e10, 20 * work(of)) < 0.99 * both < 0.98 * sums


def test_what_is_counted_is_what_pytorch_calls():
    """The arithmetic is that of three forward passes, whatever the number of groups, as PyTorch's
    own counter has it for one."""
    with torch.device("meta"):
        network = nn.Conv2d(16, 32, 3, groups=4, bias=False)
    rows = count_operations(network, (16, 10, 10), torch.bfloat16)
    assert [o.flops for o in rows] == [2 * 32 * 64 * 4 * 9] * 3
    assert roofline(rows, 5, 1.0, math.inf) == 5 * sum(o.flops for o in rows)
