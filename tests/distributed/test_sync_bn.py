"""distributed/sync_bn.py: two ranks against one process with the joined batch, in training mode."""
import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from distributed.sync_bn import SyncBatchNorm, convert
from tests.distributed.test_wrap import two_steps
from tests.helpers import run_ranks
from tests.test_step import SPECS, assert_close

LAYERS = [(nn.BatchNorm2d(6), (5, 6, 4, 3)), (nn.BatchNorm1d(6, affine=False), (5, 6)),
          (nn.BatchNorm2d(6, momentum=None, eps=1e-2), (7, 6, 2, 1)),
          (nn.BatchNorm1d(6, track_running_stats=False), (3, 6, 2))]
FIRST = 2                                           # rows of rank 0; rank 1 has the others


def two_passes(norm, x):
    """Outputs, and gradients of a sum of squares' cubes; weights that are not all one."""
    if norm.affine:
        with torch.no_grad():
            norm.weight.copy_(torch.linspace(0.5, 2, 6))
            norm.bias.copy_(torch.linspace(-1, 1, 6))
    results = []
    for scale in (1.0, 3.0):
        x.grad = None
        y = norm(x * scale)
        y.pow(3).sum().backward()
        results.append((y.detach(), x.grad, [p.grad.clone() for p in norm.parameters()]))
    return results, {name: b.clone() for name, b in norm.named_buffers()}, norm.eval()(x).detach()


def leaf(shape, device="cpu", dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (10 + x).to(device, dtype).requires_grad_()      # a mean that is large beside the spread


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads from tensors."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default,
                                   torch.ops.aten.nonzero.default)
        return function(*args, **(kwargs or {}))


def layers_on_a_rank(rank):
    results = []
    for norm, shape in LAYERS:
        x = leaf(shape).detach()
        part = (x[:FIRST] if rank == 0 else x[FIRST:]).clone().requires_grad_()
        norm = convert(copy.deepcopy(norm).double(), dist.group.WORLD)
        assert isinstance(norm, SyncBatchNorm)
        with Reads() as reads:
            results.append(two_passes(norm, part))
    assert reads.count == 0, "the host waits"
    return results


@pytest.mark.long
def test_two_ranks_normalise_the_joined_batch(tmp_path):
    ranks = run_ranks(layers_on_a_rank, tmp_path)
    for (norm, shape), first, second in zip(LAYERS, *ranks):
        expected, buffers, evaluated = two_passes(copy.deepcopy(norm).double(), leaf(shape))
        for (y, dx, dp), mine, other in zip(expected, first[0], second[0]):
            torch.testing.assert_close(torch.cat([mine[0], other[0]]), y)
            torch.testing.assert_close(torch.cat([mine[1], other[1]]), dx)
            torch.testing.assert_close([a + b for a, b in zip(mine[2], other[2])], dp)
        assert list(first[1]) == list(buffers)
        for rank in (first, second):
            torch.testing.assert_close(rank[1], buffers)
        torch.testing.assert_close(torch.cat([first[2], second[2]]), evaluated)


def test_reads_are_counted():
    with Reads() as reads:
        torch.ones(1).item()
    assert reads.count == 1


def steps_on_a_rank(rank, checkpointing, micro_batches):
    return two_steps("cpu", checkpointing, rank=rank, world=2, micro_batches=micro_batches,
                     dtype=torch.float64)


@pytest.mark.parametrize("checkpointing, micro_batches", [
    pytest.param(*case, marks=pytest.mark.long)
    for case in ((False, 1), (True, 1), (False, 2), (True, 2))])
def test_two_ranks_equal_the_joined_batch_in_training_mode(tmp_path, checkpointing, micro_batches):
    """Trunk and head: losses, gradients and running statistics. The micro-batches of one process
    are those of both ranks, joined."""
    order = torch.arange(4).view(2, micro_batches, -1).transpose(0, 1).flatten()
    losses, grads, buffers = two_steps("cpu", False, micro_batches=micro_batches,
                                       dtype=torch.float64, order=order)
    ranks = run_ranks(steps_on_a_rank, tmp_path, checkpointing, micro_batches)
    for step, loss in enumerate(losses):
        assert sum(rank[0][step] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-9)
    for _, mine, statistics in ranks:
        assert_close(mine, grads, tolerance=1e-9)
        torch.testing.assert_close(statistics, buffers, rtol=1e-9, atol=1e-12)
    assert buffers["trunk.stem.1.num_batches_tracked"] == 2 * micro_batches * len(SPECS)


# ----------------------------------------------------------------------- on a CUDA machine only
def on_a_gpu(rank, dtype, memory_format):
    """Ours and torch.nn.SyncBatchNorm on this rank's part; both ranks share a GPU, over gloo."""
    results = []
    for kind in (convert, nn.SyncBatchNorm.convert_sync_batchnorm):
        x = leaf((8, 6, 5, 4), "cuda", dtype).detach().chunk(2)[rank]
        x = x.to(memory_format=memory_format).clone().requires_grad_()
        results.append(two_passes(kind(nn.BatchNorm2d(6), dist.group.WORLD).cuda(), x))
    return results


@pytest.mark.cuda
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_equal_to_pytorchs_on_a_gpu(tmp_path, dtype, tolerance, memory_format):
    for ours, theirs in run_ranks(on_a_gpu, tmp_path, dtype, memory_format):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.cuda
def test_the_host_does_not_wait_on_a_gpu():
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        norm = convert(nn.BatchNorm2d(6), dist.group.WORLD).cuda()
        x = torch.randn(8, 6, 5, 4, device="cuda", requires_grad=True)
        norm(x).sum().backward()                        # what is set up once
        torch.cuda.set_sync_debug_mode("error")
        norm(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
