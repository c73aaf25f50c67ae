"""distributed/wrap.py: each wrapper on against off; groups of ranks; networks without memory."""
from contextlib import nullcontext
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from distributed import wrap
from distributed.step import sync_gradients
from larc import LARC, update
from methods.build import build_method, build_trunk
from recipes.command_line import configure
from regnet import RegNet, RegNetParams
from swav import SwAV
from tests.helpers import group_of_one, run_ranks
from tests.test_step import CPU, SPECS, assert_close, cut, gradients, images, run_of, tiny
from train import step_gradients


def wrapped_by(model, backend="", **options):
    """wrap, compiling by Inductor on a GPU; on a CPU, if not said, with all but its kernels."""
    device = model.prototypes.weight.device
    backend = backend or ("inductor" if device.type == "cuda" else "aot_eager_decomp_partition")
    torch._dynamo.reset()
    compile_trunk = partial(wrap.compile_trunk, backend=backend)
    with mock.patch.object(wrap, "compile_trunk", compile_trunk):
        return wrap.wrap(model, device, **options)


def two_steps(device, checkpointing, compiled=False, arch="regnety_100mf", rank=0, world=1,
              micro_batches=1, dtype=torch.float32, order=slice(None)):
    """Losses, gradients and running statistics of two steps, each over two resolutions."""
    model = tiny(device, arch=arch, head_bn=True).to(dtype)
    wrapped = wrapped_by(model, sync_bn_group=world, checkpoint_activations=checkpointing,
                         compiled=compiled)
    batches = [[size[:, order].to(device, dtype) for size in images(4, seed)]
               for seed in range(2)]
    run = run_of(model, wrapped)
    losses = [step_gradients(run, 0, cut(batch, micro_batches, rank, world))[0].item()
              for batch in batches]
    return losses, *({name: value.cpu() for name, value in values.items()}
                     for values in (gradients(model), dict(model.named_buffers())))


@pytest.mark.parametrize("arch, compiled", [
    ("regnety_100mf", False),
    pytest.param("regnetx_200mf", False, marks=pytest.mark.long),
    pytest.param("resnet50", False, marks=pytest.mark.long),
    pytest.param("regnety_100mf", True, marks=pytest.mark.measured)])
def test_checkpointing_changes_no_bit(arch, compiled):
    plain, again = (two_steps("cpu", checkpointing, compiled, arch=arch)
                    for checkpointing in (False, True))
    assert plain[0] == again[0]
    for expected, mine in zip(plain[1:], again[1:]):
        for name, value in expected.items():
            assert torch.equal(value, mine[name]), name


def test_compiling_makes_a_graph_per_size_and_leaves_eval_mode_alone():
    trunk = RegNet(RegNetParams(2, 8, 8.0, 2.0, 8, se_ratio=None))
    counters = torch._dynamo.utils.counters
    crops = [torch.randn(2, 3, size, size) for size in (16, 24)]
    expected = [trunk(images) for images in crops]
    torch._dynamo.reset()
    counters.clear()
    wrap.compile_trunk(trunk, backend="eager")
    for x, features in zip(crops, expected):
        torch.testing.assert_close(trunk(x), features)
    trunk.eval()(torch.randn(1, 3, 40, 40))
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.parametrize("checkpointing, micro_batches, ranks, device, backend", [
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (True, 1, 1, "cpu", ""), (False, 2, 1, "cpu", ""))),
    *(pytest.param(*case, marks=pytest.mark.measured) for case in (     # a minute each
        (True, 2, 2, "cpu", ""), (False, 1, 1, "cpu", "inductor"))),
    *(pytest.param(*case, marks=pytest.mark.cuda) for case in (
        (False, 1, 1, "cuda", ""), (True, 2, 1, "cuda", "")))])
def test_one_graph_per_crop_size(checkpointing, micro_batches, ranks, device, backend, tmp_path):
    """And, of several micro-batches, one for the pass without gradient; none is made after the
    first step. Losses, gradients and running statistics are those of the trunk as it is."""
    case = checkpointing, micro_batches, device, backend
    graphs, breaks, *compiled = (compiled_steps(0, *case) if ranks == 1 else
                                 run_ranks(compiled_steps, tmp_path, *case)[0])
    assert graphs == [2 + (micro_batches > 1)] * 3 and not breaks
    if ranks == 1:
        eager_graphs, _, *eager = compiled_steps(0, *case, compiled=False)
        assert eager_graphs == [0] * 3 and compiled[0] == pytest.approx(eager[0], rel=1e-4)
        assert_close(compiled[1], eager[1], tolerance=1e-3)
        torch.testing.assert_close(compiled[2], eager[2], rtol=1e-3, atol=1e-5)


def compiled_steps(rank, checkpointing, micro_batches, device, backend, compiled=True):
    """Of three steps over two sizes: graphs so far, graph breaks, losses; gradients, running
    statistics."""
    counters, sizes = torch._dynamo.utils.counters, ((2, 48), (2, 32))
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    depth = 2 if device == "cpu" else 5                 # Inductor's C++ takes minutes
    model = SwAV(RegNet(RegNetParams(depth, 16, 16.0, 2.0, 8, se_ratio=0.25)), (24, 16), 12,
                 counts=[count for count, _ in sizes])
    model.to(device)
    wrapped = wrapped_by(model, backend, sync_bn_group=world, compiled=compiled,
                         checkpoint_activations=checkpointing)
    device, graphs, losses = model.prototypes.weight.device, [], []
    counters.clear()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        joined = [torch.randn(count, 4 * world, 3, size, size, generator=generator).to(device)
                  for count, size in sizes]
        loss, _ = step_gradients(run_of(model, wrapped), 0, cut(joined, micro_batches, rank, world))
        losses.append(loss.item())
        graphs.append(counters["stats"]["unique_graphs"])
        model.trunk.eval()(torch.randn(1, 3, 56, 56, device=device))           # a probe's
        model.trunk.train()
    return (graphs, dict(counters["graph_break"]), losses, gradients(model),
            {name: value.clone() for name, value in model.named_buffers()})


def test_compiling_without_a_compiler_is_one_sentence():
    def missing(*_):
        raise RuntimeError("no g++ here\nand more")
    with pytest.raises(ValueError, match="^--compile needs a C[+][+] compiler.*: no g[+][+] here$"):
        wrap.check_compiler(CPU, missing)


def test_checkpointing_keeps_only_the_inputs_of_blocks():
    kept = {}
    for checkpointing in (False, True):
        model, total = tiny(), []
        wrap.wrap(model, CPU, checkpoint_activations=checkpointing)

        def keep(tensor):
            total.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.trunk(torch.randn(4, 3, 64, 64))
        kept[checkpointing] = sum(total)
    assert kept[True] < 0.3 * kept[False]
    assert {type(stage) for stage in model.trunk.trunk_output} == {wrap.CheckpointedStage}


def test_no_wrapper_renames_a_parameter():
    model = tiny(head_bn=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    wrap.wrap(model, CPU, sync_bn_group=8, checkpoint_activations=True)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("wanted, ranks, group", [(64, 8, 8), (64, 128, 64), (8, 12, 6), (0, 8, 1),
                                                  (32, 1, 1), (1, 8, 1)])
def test_groups_of_synchronised_batchnorm(wanted, ranks, group):
    assert wrap.sync_group(wanted, ranks) == group


def test_unknown_trunks_are_refused():
    with pytest.raises(ValueError, match="unknown arch 'resnet51'"):
        build_trunk("resnet51")


def test_a_network_may_be_built_without_memory():
    model = build_method(configure({"arch": "regnety_10b"}), "meta")
    assert sum(p.numel() for p in model.trunk.parameters()) == pytest.approx(9323.9e6, rel=1e-4)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# ------------------------------------------------------------------------------------ two ranks
def accumulated(rank, world, device):
    """Where gradients lie before the first pass, after one that is not synchronised, and after one
    that is; where the buckets that were sent lie; their bytes and the parameters'. Then the
    gradients, sent as they are and as bf16."""
    results, sent = [], set()

    def send(_, bucket):
        sent.add(bucket.buffer().untyped_storage().data_ptr())
        return dist.all_reduce(bucket.buffer() / world, async_op=True).get_future().then(
            lambda future: future.value()[0])

    for compress in (False, True):
        model = tiny(device).eval()
        wrapped = wrap.distribute(model, model.prototypes.weight.device, compress)

        def places_now():
            return {p.grad.untyped_storage().data_ptr(): p.grad.untyped_storage().nbytes()
                    for p in model.parameters()}

        if not compress:
            wrapped.register_comm_hook(None, send)
        places = [places_now()]
        for step in range(2):
            wrapped.zero_grad(set_to_none=False)
            for i, crops in enumerate(cut(images(8), 2, rank, world)):
                with sync_gradients(wrapped, now=i == 1):
                    wrapped([c.to(device) for c in crops])[1].square().mean().backward()
                places.append(places_now())
        grads = {name: grad.cpu() for name, grad in gradients(model).items()}
        results.append((places, sent, sum(p.nbytes for p in model.parameters()), grads))
    return results


@pytest.mark.parametrize("world, device", [
    (1, "cpu"), pytest.param(2, "cpu", marks=pytest.mark.long),
    pytest.param(2, "cuda:0", marks=pytest.mark.cuda)])
def test_gradients_exist_once(world, device, tmp_path):
    """In DDP's buckets, from the first pass of the first accumulation on; and sent as bf16 they are
    the same but for its eight bits."""
    with group_of_one(tmp_path) if world == 1 else nullcontext():
        ranks = ([accumulated(0, 1, device)] if world == 1 else
                 run_ranks(accumulated, tmp_path, 2, device))
    for (places, sent, size, grads), (others, _, _, rounded) in ranks:
        assert all(now == places[0] for now in places) and all(now == others[0] for now in others)
        assert sent == {*places[0]} and size <= sum(places[0].values()) <= size + 512 * len(grads)
        for name, grad in grads.items():
            assert (rounded[name] - grad).norm() <= 2 ** -7 * grad.norm() + 1e-12, name
            assert not grad.any() or not torch.equal(rounded[name], grad)


@pytest.mark.parametrize("size, bucket", [(106, 25), (5459, 341.1875)])
def test_buckets_grow_with_the_network(size, bucket):
    """MiB of a RegNetY-400MF's gradients, and of SEER's 256GF."""
    assert wrap.bucket_size(size) == bucket


@pytest.mark.parametrize("works", [True, False])
def test_a_compiled_update_is_tried_before_the_run(works, capsys):
    """By a step that changes nothing; where it fails, the plain update is taken, on all ranks."""
    model = tiny()
    before = [p.clone() for p in model.parameters()]
    optimizer, calls = LARC(model.parameters(), 0.5, compiled=True), []

    def compiled(*tensors):
        calls.append(len(tensors[0]))
        if not works:
            raise RuntimeError("no kernel for it")
        update(*tensors)

    optimizer.update = compiled
    wrap.try_update(optimizer)
    assert calls == [len(before)] and optimizer.compiled == works
    assert all(map(torch.equal, model.parameters(), before))
    assert {p.grad for p in model.parameters()} == {None} and optimizer.param_groups[0]["lr"] == 0.5
    assert ("13 passes over memory, not 7 (" in capsys.readouterr().out) != works
    assert optimizer.update is (compiled if works else update)


# ----------------------------------------------------------------------- on a CUDA machine only
@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_on_a_gpu(compiled):
    plain, again = (two_steps("cuda", checkpointing, compiled) for checkpointing in (False, True))
    for expected, mine in zip(plain, again):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    tracked = [value for name, value in again[2].items() if "stem.1.num_batches" in name]
    assert tracked == [2 * len(SPECS)]
