"""distributed/fsdp.py: shards against DDP on the same ranks, initial values, memory, precision."""
import re
import weakref
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed.fsdp import Sharded, materialise, shard_mesh, shard_ranks
from distributed.wrap import wrap
from larc import LARC
from methods.build import build_method
from recipes.command_line import configure
from regnet import RegNet, RegNetParams
from swav import SwAV
from tests.helpers import run_ranks
from tests.test_step import CPU, SPECS, assert_close, cut, images, run_of
from train import step_gradients
from training.run import build_network

SMALL = RegNetParams(4, 16, 10.0, 2.0, 5)               # groups of 5, which are padded to 8
HEAVY = RegNetParams(12, 256, 0.0, 2.0, 64, None)        # whose weights dominate


def method_of(params: RegNetParams, head: tuple, device, **options) -> SwAV:
    torch.manual_seed(1)
    with torch.device(device):
        return SwAV(RegNet(params), head, 12, counts=[spec.count for spec in SPECS], **options)


def network(build, sharded, group=0, sync=True, dtype=torch.float32, **wrappers):
    """A method, and what is called in its place, on this rank: sharded, or in DDP. sync: BatchNorm
    over all ranks."""
    mesh = shard_mesh(CPU, group) if sharded else None
    model = build("meta" if sharded else CPU)
    wrapped = wrap(model, CPU, sync_bn_group=sync * dist.get_world_size(), channels_last=False,
                   mesh=mesh, dtype=dtype, **wrappers)
    if sharded:
        materialise(model, partial(build, "meta"), CPU)
    return model, wrapped


def whole(tensors) -> dict:
    return {name: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone()
            for name, x in tensors.items()}


def take_steps(model, wrapped, optimizer, rank, steps, micro_batches=1, all_crops=False,
               count=8) -> list[float]:
    """As train.train does, with count images of all ranks; losses."""
    dtype, losses = model.prototypes.weight.dtype, []
    run = run_of(model, wrapped, all_crops=all_crops)
    for step in range(steps):
        joined = [size.to(dtype) for size in images(count, step)]
        optimizer.zero_grad(set_to_none=False)
        loss, _ = step_gradients(run, step, cut(joined, micro_batches, rank, dist.get_world_size()))
        model.before_step(step)
        optimizer.step()
        model.after_step(step)
        losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------ the same training
def trained(rank, precision, steps, micro_batches, group, checkpointing, padded, options):
    """Losses, state and momentum after some steps, in DDP and sharded."""
    torch.set_default_dtype(getattr(torch, precision))
    results = []
    for sharded in (False, True):
        build = partial(method_of, SMALL, (24, 16), **options)
        model, wrapped = network(build, sharded, group, checkpoint_activations=checkpointing,
                                 pad_widths=padded)
        assert sharded == isinstance(wrapped, Sharded)
        assert sharded == isinstance(model.trunk.stem[0].weight, DTensor)
        rate = 0.1 if precision == "float64" else 1e-3          # at which roundings do not grow
        optimizer = LARC(model.parameters(), rate, weight_decay=1e-2)
        losses = take_steps(model, wrapped, optimizer, rank, steps, micro_batches,
                            options.get("head_bn"))
        momenta = {name: optimizer.state[p]["momentum_buffer"]
                   for name, p in model.named_parameters()}
        queue = {"queue": model.queue.embeddings} if model.queue else {}
        results.append((losses, whole(model.state_dict() | queue), whole(momenta)))
    return results


@pytest.mark.parametrize("world, precision, steps, micro_batches, group, checkpointing, padded, "
                         "options", [
    (2, "float64", 2, 1, 0, False, False, {"frozen_steps": 1}),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (2, "float64", 8, 2, 0, True, False, {"head_bn": True, "queue": 8}),
        (2, "float32", 8, 1, 0, False, True, {"frozen_steps": 1}))),
    *(pytest.param(*case, marks=pytest.mark.measured) for case in (
        (4, "float64", 8, 2, 2, True, True, {"head_bn": True, "queue": 8, "frozen_steps": 1}),
        (4, "float64", 8, 2, 0, False, False, {}),
        (4, "float32", 8, 2, 2, True, False, {"queue": 8})))])
def test_steps_are_those_of_ddp(world, precision, steps, micro_batches, group, checkpointing,
                                padded, options, tmp_path):
    """Losses of each rank; weights, statistics, queue and momentum of rank 0."""
    ranks = run_ranks(trained, tmp_path, precision, steps, micro_batches, group, checkpointing,
                      padded, options, world=world)
    tolerance = 1e-9 if precision == "float64" else 1e-5
    for ddp, sharded in ranks:
        assert sharded[0] == pytest.approx(ddp[0], rel=tolerance)
    ddp, sharded = ranks[0]
    for expected, mine in zip(ddp[1:], sharded[1:]):
        assert mine.keys() == expected.keys()
        assert_close(*({name: x.double() for name, x in tensors.items()}        # one counts steps
                       for tensors in (mine, expected)), tolerance)


@pytest.mark.parametrize("wanted, ranks, of_node, group", [
    (0, 64, 8, 8), (0, 8, 8, 8), (0, 1, 1, 1), (4, 8, 8, 4), (5, 8, 8, 4), (99, 8, 8, 8),
    (0, 12, 8, 6)])
def test_ranks_of_a_copy(wanted, ranks, of_node, group):
    assert shard_ranks(wanted, ranks, of_node) == group


# --------------------------------------------------------------------------------- initial values
def started(rank, options):
    """The state of a fresh sharded network, and of the same without shards."""
    config = configure({"recipe": "demo", "crops": "2x48+3x32", "head": "24-17-16",
                        "prototypes": 11, "head_bn": True, "queue": 8, "shard": True} | options, 2)
    model, _ = build_network(config, CPU, torch.float32, 2, images=None)
    assert not any(x.is_meta for x in (*model.state_dict().values(), model.queue.embeddings))
    assert any(isinstance(x, DTensor) for x in model.trunk.state_dict().values())
    expected = build_method(config, "cpu", 2)
    assert torch.equal(model.queue.embeddings, expected.queue.embeddings)
    return whole(model.state_dict()), expected.state_dict()


@pytest.mark.long
@pytest.mark.parametrize("arch", ["regnety_100mf", "resnet50"])
def test_initial_values_are_those_of_the_whole_network(arch, tmp_path):
    """To the bit, on both ranks."""
    for mine, expected in run_ranks(started, tmp_path, {"arch": arch}):
        assert list(mine) == list(expected)
        for name, value in expected.items():
            assert torch.equal(mine[name], value), name


# ----------------------------------------------------------------------------------------- memory
class Alive(TorchDispatchMode):
    """Peak of the bytes of tensors that live at one time, of those that operations inside made or
    read; of those made by `only`, where it is given, its output of that index alone."""

    def __init__(self, only=None, index=0):
        super().__init__()
        self.only, self.index, self.peak = only, index, 0
        self.sizes = weakref.WeakKeyDictionary()        # of the storages that live

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented               # comes again, with this rank's parts
        result = function(*args, **kwargs or {})
        seen = (args, kwargs, result) if self.only is None else (
            result[self.index] if function is self.only else None)
        now = {storage: storage.nbytes() for storage in (
            x.untyped_storage() for x in tree_leaves(seen)
            if isinstance(x, torch.Tensor) and not x.is_meta)}
        if any(self.sizes.get(storage) != size for storage, size in now.items()):
            # FSDP keeps storages whose bytes it has given back, and takes them again
            self.sizes.update({storage: storage.nbytes() for storage in self.sizes} | now)
            self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_alive_counts_what_lives_at_one_time():
    with Alive() as alive:
        for _ in range(3):
            x = torch.ones(1000)
            y = x + 1
            del x, y
        z = torch.ones(1000)
        z.untyped_storage().resize_(0)
        torch.ones(1)
    assert alive.peak == 8000


def peaks(rank):
    """Bytes of the weights; peak of tensors alive from the first weight to the end of two steps, in
    DDP and sharded."""
    peaks = []
    for sharded in (False, True):
        with Alive() as alive:
            build = partial(method_of, HEAVY, (256, 32))
            model, wrapped = network(build, sharded, sync=False,
                                     checkpoint_activations=True)
            optimizer = LARC(model.parameters(), 0.1)
            take_steps(model, wrapped, optimizer, rank, 2, count=4)
        peaks.append(alive.peak)
        size = sum(p.nbytes for p in model.parameters())
    return size, *peaks


@pytest.mark.long
def test_a_rank_of_four_needs_less_than_half_of_the_memory(tmp_path):
    for size, ddp, sharded in run_ranks(peaks, tmp_path, world=4, timeout=300):
        assert ddp > 3 * size, f"weights, gradients and momentum: {ddp} of {size} bytes"
        assert sharded < 0.5 * ddp, f"{sharded} of {ddp} bytes, a share of {sharded / ddp:.3f}"


def pending(rank, cut_features):
    """Bytes of the weights' gradients of convolutions: the most at one time in a backward pass over
    two crop sizes, of two neighbours among the blocks, and of the trunk."""
    if not cut_features:
        Sharded.cut = lambda self, trunk, inputs, features: features
    build = partial(method_of, HEAVY, (256, 32))
    model, wrapped = network(build, True, sync=False)
    units = [sum(p.numel() * p.element_size() for p in block.parameters() if p.dim() == 4)
             for block in model.trunk.blocks()]
    with Alive(torch.ops.aten.convolution_backward.default, 1) as alive:
        take_steps(model, wrapped, LARC(model.parameters(), 0.1), rank, 1, count=2)
    return alive.peak, max(map(sum, zip(units, units[1:]))), sum(units)


@pytest.mark.long
@pytest.mark.parametrize("cut_features", [True, False])
def test_gradients_of_two_blocks_are_whole_at_one_time(cut_features, tmp_path):
    """And of the whole trunk, if backward went through all crop sizes at once."""
    for peak, two_units, trunk in run_ranks(pending, tmp_path, cut_features):
        assert 0 < peak <= two_units if cut_features else peak > 0.9 * trunk, (
            f"{peak} of {trunk} bytes; two neighbours have {two_units}")


class Order(TorchDispatchMode):
    """Gathers (g), and backward passes of convolutions (c), in the order in which they come."""

    def __init__(self):
        super().__init__()
        self.calls = ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        names = {"c10d._allgather_base_": "g", "aten.convolution_backward": "c"}
        self.calls += names.get(str(function).rpartition(".")[0], "")
        return function(*args, **kwargs or {})


def order(rank):
    """In a step over two crop sizes."""
    model, wrapped = network(partial(method_of, SMALL, (24, 16)), True)
    with Order() as order:
        take_steps(model, wrapped, LARC(model.parameters(), 0.1), rank, 1)
    return order.calls, 1 + len(model.trunk.blocks())


@pytest.mark.long
def test_the_next_block_is_gathered_ahead_in_backward_of_each_crop_size(tmp_path):
    for calls, units in run_ranks(order, tmp_path):
        assert calls.count("g") == 2 * len(SPECS) * units + 2    # the head has both sizes at once
        convolutions = calls.count("c") // len(SPECS)
        begin = [[*re.finditer("c", calls)][i * convolutions].start() for i in range(len(SPECS))]
        # the stem, which is the trunk's own unit, the last block, and the one before it
        assert [calls[i - 4:i] for i in begin] == ["gggg", "cggg"]


# -------------------------------------------------------------------------------------- precision
class Collectives(TorchDispatchMode):
    """Types of what is gathered, scattered and reduced inside."""

    def __init__(self):
        super().__init__()
        self.types = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        name = str(function)
        if name.startswith(("c10d.", "_c10d_functional.")):
            self.types.setdefault(name.split(".")[1], set()).update(
                str(x.dtype) for x in tree_leaves(args) if isinstance(x, torch.Tensor))
        return function(*args, **kwargs or {})


def in_bf16(rank, compress):
    """Losses in DDP under autocast, and sharded; types of weights, gradients, collectives, and of
    what goes into modules of the sharded network."""
    losses, seen = [], {}
    for sharded in (False, True):
        model, wrapped = network(partial(method_of, SMALL, (24, 16), head_bn=True), sharded,
                                 dtype=torch.bfloat16, compress_gradients=compress and sharded)
        if sharded:
            block = model.trunk.blocks()[1]
            for name, module in {"conv": block.get_submodule(next(
                    n for n, m in block.named_modules() if isinstance(m, nn.Conv2d))),
                    "norm": model.trunk.stem[1], "prototypes": model.prototypes,
                    "head": model.head[0]}.items():
                module.register_forward_hook(lambda module, inputs, y, name=name: seen.update(
                    {name: [str(inputs[0].dtype), str(module.weight.dtype), str(y.dtype)]}))
        run = run_of(model, wrapped, torch.bfloat16)
        with Collectives() as collectives:
            losses.append(step_gradients(run, 0, cut(images(8), 1, rank, 2))[0].item())
    params = [*model.parameters()]
    return (losses, seen, {kind: sorted(types) for kind, types in collectives.types.items()},
            sorted({str(p.dtype) for p in params} | {str(p.grad.dtype) for p in params}))


@pytest.mark.long
@pytest.mark.parametrize("compress", [False, True])
def test_bf16_computes_and_float32_is_kept(compress, tmp_path):
    for (ddp, sharded), seen, collectives, kept in run_ranks(in_bf16, tmp_path, compress):
        assert sharded == pytest.approx(ddp, rel=1e-2)
        assert kept == ["torch.float32"]                        # weights and gradients, of all
        bf16, fp32 = "torch.bfloat16", "torch.float32"
        # what goes in, weight, what comes out: BatchNorm computes in its weight's type
        assert seen == {"conv": [bf16] * 3, "head": [bf16] * 3, "norm": [bf16, fp32, bf16],
                        "prototypes": [fp32] * 3}
        assert collectives["_allgather_base_"] == [bf16]
        assert collectives["_reduce_scatter_base_"] == [bf16 if compress else fp32]
        assert collectives["allreduce_"] == [fp32]              # of what is whole, and Sinkhorn's
