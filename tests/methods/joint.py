"""What the tests of methods with a cached gradient share: a trunk, batches, steps, two ranks.

    step(method, batch(8), micro_batches=2)     # through train.step_gradients -> loss, gradients
    on_two_ranks(tmp_path, "simclr", "SimCLR")  # the same on two gloo ranks, in DDP

Float64, without BatchNorm in the trunk: micro-batches equal the joined batch to 1e-10.
"""
import ast
import importlib
import importlib.util
import shutil

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers import ROOT, run_ranks
from train import step_gradients
from training.run import Run


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
    run = Run(method, wrapped or method, torch.device("cpu"), torch.float32,
              torch.amp.GradScaler("cpu", enabled=False))
    method.zero_grad()
    share = images.chunk(world, 1)[rank].chunk(micro_batches, 1)
    loss, outputs = step_gradients(run, 0, [[part.flatten(0, 1)] for part in share])
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


def copied_alone(tmp_path, module):
    """The file methods/MODULE.py, copied, as a module; it imports torch and the standard library,
    and has the usage, as tests/test_alone.py runs it."""
    path = ROOT / "methods" / f"{module}.py"
    imports = [node for node in ast.walk(ast.parse(path.read_text()))
               if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {name for node in imports for name in (
        [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names])}
    assert {name.partition(".")[0] for name in names} <= {"torch", "math", "collections"}
    assert len(path.read_text().splitlines()) <= 150
    spec = importlib.util.spec_from_file_location(
        f"copy_of_{module}", shutil.copy(path, tmp_path / "copy.py"))
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
