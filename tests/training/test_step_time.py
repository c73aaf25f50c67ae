"""training/step_time.py: where the time of a step goes, by closed forms and bytes counted."""
import math
import random
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

import multicrop
from distributed.roofline import Counter, Gpu
from recipes.command_line import configure
from sinkhorn import sinkhorn
from tests.training.test_cost import COST
from training import step_time as times
from training.cost import traffic, work

ENDLESS = Gpu(*[math.inf] * 4)


@pytest.fixture(scope="module")
def small():
    config = configure({"recipe": "demo", "arch": "regnety_200mf", "head": "64-32", "prototypes":
                        100, "crops": "2x64+4x32", "batch_size": 512, "sync_bn_group": 8})
    return config, COST(config, torch.bfloat16), times.passes(config)


def step(small, micro_batch, checkpointing, gpus, gpu, **changes):
    config, counted, passed = small
    return times.step_time(counted, passed, replace(config, **changes), micro_batch,
                           checkpointing, gpus, gpu)


@pytest.mark.parametrize("micro_batch", [64, 16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_endless_memory_a_step_is_its_multiply_adds(small, micro_batch, checkpointing,
                                                         monkeypatch):
    """All passes of step_gradients, less the gradient of the images, which nobody computes."""
    monkeypatch.setattr(times, "LATENCY", 0.0)
    of = step(small, micro_batch, checkpointing, 8, ENDLESS._replace(tflops=1e-3))
    spent = 64 * work(small[1], checkpointing, micro_batch < 64)
    stem = 64 * 2 * 32 * 27 * (2 * 32 ** 2 + 4 * 16 ** 2) / 1e12
    assert of.total == pytest.approx(1e3 * (spent - stem), rel=2e-3)    # biases, as multiply-adds
    assert of.utilisation == pytest.approx(spent / (spent - stem), rel=2e-3)


def test_gradients_are_hidden_behind_the_backward_pass_of_one_size(small, monkeypatch):
    """A slow network hides that much and no more; a fast one waits for the last bucket alone. A
    node has eight adapters."""
    monkeypatch.setattr(times, "bucket_size", lambda size: 4 / 2 ** 20)
    params = small[1].params
    slow = step(small, 8, False, 64, ENDLESS._replace(tflops=1e3, network=1e-3))
    assert slow.reduction == pytest.approx(2 * 63 / 64 * 4 * params / 8e6)
    images, passed = 8 * 2, small[2].trunk[small[0].crops[0]]
    backward = sum(o.flops for o in passed if o.backward) * images / 1e15
    assert slow.hidden == pytest.approx(backward)
    assert slow.seconds["gradients, not hidden"] == pytest.approx(slow.reduction - backward)
    fast = step(small, 8, False, 64, ENDLESS._replace(tflops=1e-3, nvlink=9.0, network=2.0))
    assert fast.seconds["gradients, not hidden"] == pytest.approx(fast.reduction / params)
    assert step(small, 64, False, 1, Gpu()).reduction == 0
    inside = step(small, 64, False, 8, ENDLESS._replace(nvlink=1.0))
    assert inside.reduction == pytest.approx(2 * 7 / 8 * 4 * params / 1e9)


def sharded(small, gpu, gpus=64, micro_batch=8, **changes):
    return step(small, micro_batch, False, gpus, gpu, shard=True, sync_bn_group=0, **changes)


def test_a_sharded_step_waits_for_what_takes_longer_than_its_arithmetic(small):
    """All that is gathered and scattered in a node, beside the all-reduce over the replicas."""
    config, counted, _ = small
    name = "gathers, scatters, not hidden"
    sent = traffic(counted, replace(config, shard=True), 8, False, 64)
    whole = sent["all-reduce, not sharded"]
    inside = sent["all-gather, weights"] + sent["reduce-scatter, gradients"]
    slow = sharded(small, ENDLESS._replace(nvlink=1.0))             # arithmetic takes no time
    assert slow.reduction == slow.seconds[name] == pytest.approx((inside + whole) / 1e9)
    # one adapter a GPU; a ring over all GPUs has eight; gathers of forward take no time
    network = sharded(small, ENDLESS._replace(network=1.0))
    assert network.seconds[name] == pytest.approx(
        sent["all-reduce, replicas"] / 1e9 + whole / 8e9)
    fast = sharded(small, ENDLESS._replace(nvlink=1e3, network=1e3, tflops=1e-3))
    assert fast.seconds[name] == pytest.approx(whole / 1e12)        # the rest is hidden
    assert fast.hidden == pytest.approx(fast.reduction - whole / 1e12) and fast.hidden > 0
    assert name not in step(small, 8, False, 64, ENDLESS).seconds


def test_half_of_a_slow_forward_pass_hides_half_of_its_gathers(small):
    """Rates so chosen that of each crop size's forward pass the gather takes longer."""
    config, counted, passed = small
    gpu = ENDLESS._replace(tflops=1.0, nvlink=1.0)
    of, trunk, head = sharded(small, gpu, 8, 64), sum(counted.units[:-1]), counted.units[-1]
    waiting = 2 * 7 / 8 * 4 * (counted.params - sum(counted.units)) / 1e9
    views = sum(spec.count for spec in config.crops)
    for params, operations, rows in (
            *((trunk, passed.trunk[spec], spec.count) for spec in config.crops),
            (head, passed.head, views)):
        for backward, size in ((False, 2), (True, 6)):
            computed = sum(o.flops for o in operations if o.backward == backward) * 64 * rows
            waiting += max(0, size * params * 7 / 8 / 1e9 - computed / 1e12)
    assert of.seconds["gathers, scatters, not hidden"] == pytest.approx(waiting)
    assert 0 < of.hidden < of.reduction


def test_bytes_over_the_weights_of_a_sharded_step(small):
    """One micro-batch: each crop size gathers twice and scatters once, the head too."""
    config, counted, _ = small
    trunk, head = sum(counted.units[:-1]), counted.units[-1]
    gathered, scattered = 4 * trunk + 2 * head, 2 * trunk + head
    kept = (trunk + head) / 8 + counted.params - trunk - head
    expected = gathered * (2 * 3 + 6 / 8) + scattered * (2 + 8 + 12 / 8) + 36 * kept
    assert times.weight_bytes(counted, replace(config, shard=True), 1, False, 8) == pytest.approx(
        expected)


def test_each_synchronised_layer_waits_for_its_group(small):
    """Forward and backward of each layer, of each size; and Sinkhorn's iterations."""
    name, (_, counted, _) = "SyncBatchNorm and Sinkhorn", small
    layers = len(counted.norms) * 2 * 2 + len(counted.head_norms) * 2
    for gpus, latency in ((8, 20e-6), (64, 50e-6)):
        of = step(small, 512 // gpus, False, gpus, ENDLESS)
        assert of.seconds[name] == pytest.approx(layers * 20e-6 + 3 * latency)
    wide = step(small, 8, False, 64, ENDLESS, sync_bn_group=64)
    assert wide.seconds[name] == pytest.approx((layers + 3) * 50e-6)
    assert step(small, 64, False, 8, ENDLESS, sync_bn_group=0).seconds[name] == 3 * 20e-6


def test_compiled_nothing_goes_element_by_element(small):
    eager, compiled = (step(small, 64, False, 8, Gpu(), compile=on) for on in (False, True))
    name = "element by element"
    assert compiled.seconds[name] < 0.02 * eager.seconds[name]          # of the head
    assert compiled.seconds["BatchNorm"] == eager.seconds["BatchNorm"]


@pytest.mark.parametrize("iterations", [3, 10])
def test_sinkhorns_bytes_are_those_that_it_moves(iterations):
    """Of 64 x 300 scores, counted on a CPU, where a block's vectors weigh more than on a GPU."""
    scores = (normalize(torch.randn(64, 32)) @ normalize(torch.randn(300, 32)).T)
    with Counter(64) as counter:
        sinkhorn(scores, 0.05, iterations)
    moved = sum(o.maps for o in counter.operations) / 300
    assert 48 + 8 * iterations == pytest.approx(moved, rel=0.1)


def test_the_augmentations_bytes_are_those_that_it_moves():
    rng, specs = random.Random(0), multicrop.parse_crops("2x96")
    draw = multicrop.MultiCrop(specs).draw
    params = torch.tensor([draw(rng) for _ in range(64)])
    crops = torch.randint(0, 256, (64, 3, 96, 96), dtype=torch.uint8)
    with Counter(64) as counter, torch.no_grad():
        multicrop.augment(crops, params)                    # of all crops at once, as on a GPU
    moved = sum(o.maps for o in counter.operations) / (3 * 96 ** 2)
    assert times.AUGMENTATION == pytest.approx(moved, rel=0.1)
