"""What the tests of methods with a momentum network share: a trunk, crops, and steps of a loop.

    method = double(BYOL, head=(10, 6), predictor=(10, 6), steps=9)
    crops = images((2, 3), 4, seed=1)                       # of 4 images, one tensor per size
    take_step(method, optimizer, split(crops, (2, 3), 2), 0)    # in two micro-batches
"""
import importlib
from copy import deepcopy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed.sync_bn import convert
from tests.helpers import run_ranks
from tests.methods.loop import step_of


class Trunk(nn.Module):
    """Without BatchNorm: an image's features do not depend on the others."""
    num_features = 12

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 5, 3), nn.Linear(5, 12)

    def forward(self, images):
        return torch.tanh(self.linear(self.conv(images).sigmoid().mean((2, 3))))


def double(cls, seed=0, **options):
    """In float64; its head's BatchNorm, if it has one, as in training."""
    torch.manual_seed(seed)
    return cls(Trunk(), **options).double()


def images(counts, batch, seed=0):
    """Crops of `batch` images, one tensor a size, the second size half as large as the first. The
    crops of an image are of one colour, and noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randn(batch, 3, 1, 1, generator=generator).double()
    return [torch.randn(count * batch, 3, 16 >> i, 16 >> i, generator=generator).double()
            + 2 * colours.repeat(count, 1, 1, 1) for i, count in enumerate(counts)]


def split(crops, counts, n):
    """n micro-batches of the same images, in their order."""
    sizes = [x.unflatten(0, (count, -1)).chunk(n, dim=1) for x, count in zip(crops, counts)]
    return [[part.flatten(0, 1) for part in parts] for parts in zip(*sizes)]


def take_step(method, optimizer, micro_batches, step, skipped=False, wrapped=None):
    optimizer.zero_grad()
    loss, outputs = step_of(method, micro_batches, step, wrapped)
    method.before_step(step)
    if not skipped:
        optimizer.step()
        method.after_step(step)
    return loss, outputs


def sgd(method):
    return torch.optim.SGD(method.parameters(), lr=0.3, momentum=0.9)


def run_steps(method, counts, batch, steps=3, micro_batches=1, skipped=(), start=0):
    """Losses of steps start .. start + steps, each of `batch` images of its own."""
    optimizer = sgd(method)
    return [take_step(method, optimizer, split(images(counts, batch, seed=step), counts,
                                               micro_batches), step, step in skipped)[0]
            for step in range(start, start + steps)]


def assert_same_state(method, other, but=()):
    """Of the names that hold none of `but`, to 1e-10."""
    state, expected = method.state_dict(), dict(other)
    assert state.keys() == expected.keys()
    for name, value in state.items():
        if not any(part in name for part in but):
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10, msg=name)


def two_ranks(rank, module, name, options, counts, batch, micro_batches):
    """A worker: three steps under DDP and SyncBatchNorm, on this rank's share of the images."""
    method = double(getattr(importlib.import_module(module), name), **options)
    convert(method, dist.group.WORLD)
    wrapped = DistributedDataParallel(method, broadcast_buffers=False, gradient_as_bucket_view=True)
    optimizer, losses = sgd(method), []
    for step in range(3):
        mine = split(images(counts, batch, seed=step), counts, dist.get_world_size())[rank]
        loss, _ = take_step(method, optimizer, split(mine, counts, micro_batches), step,
                            wrapped=wrapped)
        losses.append(loss)
    return losses, method.state_dict()


def assert_ranks_equal_the_joined_batch(cls, options, counts, batch, tmp_path, micro_batches=1):
    """Losses, and after three steps all state: weights, momentum network, queue or centre. On
    both ranks the state is the same bit by bit."""
    alone = double(cls, **options)
    expected = run_steps(alone, counts, batch)
    results = run_ranks(two_ranks, tmp_path, cls.__module__, cls.__name__, options, counts, batch,
                        micro_batches, timeout=900)
    for mine, other, loss in zip(results[0][0], results[1][0], expected):
        assert abs(mine - other) > 1e-6                     # the ranks had different images
        torch.testing.assert_close((mine + other) / 2, loss, rtol=0, atol=1e-10)
    assert_same_state(alone, results[0][1], but=["num_batches_tracked"])
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def assert_a_skipped_step_leaves_no_trace(cls, options, counts, but=()):
    """But for BatchNorm's running statistics, which the loop puts back."""
    method, twin = double(cls, **options), double(cls, **options)
    run_steps(method, counts, 4, steps=1)
    run_steps(twin, counts, 4, steps=1)
    before = deepcopy(method.state_dict())
    take_step(method, sgd(method), split(images(counts, 4, seed=9), counts, 2), 1, skipped=True)
    assert_same_state(method, before, but)
    run_steps(method, counts, 4, steps=2, start=1)
    run_steps(twin, counts, 4, steps=2, start=1)
    assert_same_state(method, twin.state_dict(), but)


def assert_state_goes_on(cls, options, counts):
    """A fresh method with the state of another goes on as that one does."""
    method, other = double(cls, **options), double(cls, seed=5, **options)
    run_steps(method, counts, 4)
    other.load_state_dict(method.state_dict())
    losses = [run_steps(x, counts, 4, steps=2, start=3) for x in (method, other)]
    assert torch.equal(*map(torch.stack, losses))
    for name, value in method.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
