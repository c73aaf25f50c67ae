"""What the tests of methods with a cached gradient share: a trunk, batches, steps, two ranks.

    step(method, batch(8), micro_batches=2)     # through train.step_gradients -> loss, gradients
    on_two_ranks(tmp_path, "simclr", "SimCLR")  # the same on two gloo ranks, in DDP

Float64, without BatchNorm in the trunk: micro-batches equal the joined batch to 1e-10.
"""
import importlib

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import run_ranks
from tests.methods.loop import step_of


class Trunk(nn.Module):
    num_features = 12

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 4 * 4, 12)

    def forward(self, images):
        return self.linear(images.flatten(1)).tanh()


class Plain(nn.Module):
    """A trunk without weights, for speed."""
    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))


def batch(count, views=2, seed=0):
    """(views, count, 3, 4, 4), float64; the views of an image resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 4, 4, generator=generator, dtype=torch.float64)
    noise = torch.randn(views, count, 3, 4, 4, generator=generator, dtype=torch.float64)
    return images + noise


def make(module, name, **options):
    torch.manual_seed(0)
    return getattr(importlib.import_module(f"methods.{module}"), name)(Trunk(), **options).double()


def step(method, images, micro_batches=1, rank=0, world=1, wrapped=None):
    """Loss and gradients of a rank's share of a batch, as a training loop computes them."""
    method.zero_grad()
    share = images.chunk(world, 1)[rank].chunk(micro_batches, 1)
    loss, outputs = step_of(method, [[part.flatten(0, 1)] for part in share], wrapped=wrapped)
    return loss, {name: p.grad.clone() for name, p in method.named_parameters()}, outputs


def rank_step(rank, module, name, options, images, micro_batches):
    method = make(module, name, **options)
    wrapped = DistributedDataParallel(method)
    return [step(method, images, n, rank, 2, wrapped)[:2] for n in micro_batches]


def on_two_ranks(tmp_path, module, name, images, micro_batches=(1, 2), **options):
    """Of each number of micro-batches the loss, mean over the ranks, and the ranks' gradients."""
    results = run_ranks(rank_step, tmp_path, module, name, options, images, micro_batches)
    return [(sum(loss for loss, _ in ranks) / len(ranks), [grads for _, grads in ranks])
            for ranks in zip(*results)]


def assert_equal(gradients, expected, tolerance=1e-10):
    """To the tolerance, relative to all of them; and none of them is zero."""
    assert gradients.keys() == expected.keys()
    norm = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert value.norm() > 1e-3 * norm, name
        assert (gradients[name] - value).norm() <= tolerance * norm, name


def assert_ranks_and_micro_batches_are_the_joined_batch(tmp_path, method, options, images, joined):
    """joined: loss and gradients of the images."""
    expected, gradients = joined
    for loss, ranks in on_two_ranks(tmp_path, *method, images, (1, 2, 4), **options):
        torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
        for made in ranks:
            assert_equal(made, gradients)


def assert_rows_agree(method):
    """Of forward, also where the views are of two sizes, of assigned, and of targets."""
    images = batch(5)
    outputs = method([images.flatten(0, 1)])
    apart = method([images[0], images[1]])
    assigned = method.assigned([images.flatten(0, 1)])
    assert method.joint and outputs[0].shape == (10, 6) and assigned[0].shape == (2, 5, 6)
    for other in (apart[0], assigned[0].flatten(0, 1)):
        torch.testing.assert_close(other, outputs[0])
    targets = method.targets(outputs, 0)
    assert targets.shape == (2, 5, 6) and not targets.requires_grad
    torch.testing.assert_close(method.targets(assigned, 0), targets)
    with torch.no_grad():                       # the loop may have turned gradients off
        torch.testing.assert_close(method.targets(assigned, 0), targets)


def assert_the_state_is_weights_alone(method, other):
    """A skipped step leaves no trace, and the state dict says all. Two of the same weights."""
    before = {name: value.clone() for name, value in method.state_dict().items()}
    step(method, batch(6, seed=1))
    method.before_step(0)                       # and no after_step
    state = method.state_dict()
    assert {name.split(".")[0] for name in state} == {"trunk", "head"}
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    loss, made, _ = step(method, batch(6, seed=2), 2)
    method.before_step(1)
    method.after_step(1)
    again, expected, _ = step(other, batch(6, seed=2), 2)
    assert loss == again and all(torch.equal(made[name], expected[name]) for name in made)
    with torch.no_grad():
        other.head[0].weight.mul_(torch.rand(len(other.head[0].weight), 1))
    assert step(other, batch(6, seed=2), 2)[0] != loss
    other.load_state_dict(state)
    assert step(other, batch(6, seed=2), 2)[0] == loss
