"""scale.py: micro-batches against the joined batch, each wrapper on against off, in one process and
in two."""
import random
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

import scale
from multicrop import MultiCrop, Photometric, parse_crops
from regnet import RegNet, RegNetParams
from swav import Queue, SwAV, swav_codes, swav_loss
from train import Distort

CPU = torch.device("cpu")
SPECS = parse_crops("2x48+3x32")


def tiny(arch="regnety_100mf", head_bn=False, device="cpu", seed=0):
    return scale.build_model(arch, (24, 16), 12, head_bn, seed, device)


def pictures(count, seed=0):
    """Crops of `count` pictures, (crops, count, 3, s, s) a size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(spec.count, count, 3, spec.size, spec.size, generator=generator)
            for spec in SPECS]


def cut(joined, pieces, rank=0, world=1):
    """A rank's micro-batches of a joined batch."""
    of_rank = [size.chunk(world, 1)[rank].chunk(pieces, 1) for size in joined]
    return [[crops.flatten(0, 1) for crops in micro_batch] for micro_batch in zip(*of_rank)]


def codes_of(embeddings, scores, num_crops, queue=None, prototypes=None):
    return swav_codes(scores, num_crops, queue_scores=queue and queue.scores(prototypes))


def backward(model, wrapped, micro_batches, codes_of=codes_of, **options):
    return scale.swav_backward(model, wrapped, micro_batches, [spec.count for spec in SPECS],
                               codes_of, **options)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def plain_step(model, joined, codes_of=codes_of):
    """Forward, codes, loss, backward of the joined batch, as in README's "Train on your own terms"."""
    embeddings, scores = model([size.flatten(0, 1) for size in joined])
    loss = swav_loss(scores, codes_of(embeddings, scores, 5), 5)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(mine, expected, tolerance=1e-5):
    """By tensor, relative to its norm; a bias under a BatchNorm has none but rounding."""
    for name, value in expected.items():
        assert (mine[name] - value).norm() <= tolerance * (value.norm() + 1e-4), name


# --------------------------------------------------------------------------------- accumulation
@pytest.mark.parametrize("with_queue", [False, True])
@pytest.mark.parametrize("head_bn", [False, True])
@pytest.mark.parametrize("pieces", [1, 2, 4, 8])
def test_micro_batches_have_the_gradient_of_the_joined_batch(pieces, head_bn, with_queue):
    model, joined = tiny(head_bn=head_bn).eval(), pictures(8)
    assign = codes_of
    if with_queue:
        queue = Queue(10, 16)
        queue.embeddings = nn.functional.normalize(torch.randn(2, 10, 16), dim=2)
        queue.filled = 10
        assign = partial(codes_of, queue=queue, prototypes=model.prototypes.weight.detach())
    loss, expected = plain_step(model, joined, assign)
    model.zero_grad()
    mine, embeddings, scores = backward(model, model, cut(joined, pieces), assign)
    assert mine == pytest.approx(loss.item(), rel=1e-6)
    assert_close(gradients(model), expected, tolerance=1e-4)
    crops = 5 if pieces == 1 else 2
    assert embeddings.shape == (crops * 8, 16) and scores.shape == (crops * 8, 12)
    with torch.no_grad():                       # rows in the order of the joined batch
        torch.testing.assert_close(scores, model([c.flatten(0, 1) for c in joined])[1][:len(scores)])


def test_codes_of_each_micro_batch_alone_would_differ():
    """The reason for the first pass; and a check that the test above can fail."""
    model, joined = tiny().eval(), pictures(8)
    _, expected = plain_step(model, joined)
    model.zero_grad()
    for micro_batch in cut(joined, 4):
        plain_step(model, [c.unflatten(0, (spec.count, -1)) for c, spec in zip(micro_batch, SPECS)])
    apart = gradients(model)
    with pytest.raises(AssertionError):
        assert_close({name: grad / 4 for name, grad in apart.items()}, expected, tolerance=0.01)


def test_the_first_pass_touches_no_buffer_and_the_second_each_once():
    model, other, joined = tiny(head_bn=True), tiny(head_bn=True), pictures(8)
    backward(model, model, cut(joined, 4))
    for micro_batch in cut(joined, 4):
        other(micro_batch)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), other.named_buffers()):
        assert torch.equal(buffer, expected), name
    assert model.trunk.stem[1].num_batches_tracked == 4 * len(SPECS)
    assert model.head[1].num_batches_tracked == 4
    assert model.trunk.stem[1].momentum == 0.1


def test_both_passes_see_the_same_distorted_crops():
    crop, generator = MultiCrop(SPECS), torch.Generator().manual_seed(0)
    rng = random.Random(0)
    micro_batches = [[(torch.randint(0, 256, (spec.count * 2, 3, spec.size, spec.size),
                                     generator=generator, dtype=torch.uint8),
                       torch.tensor([crop.draw(rng) for _ in range(spec.count * 2)]))
                      for spec in SPECS] for _ in range(3)]
    distort, seen = Distort(Photometric()), []

    def prepare(pairs):
        seen.append(distort(pairs))
        return seen[-1]

    model = tiny().eval()
    loss, _, _ = backward(model, model, micro_batches, prepare=prepare)
    assert [len(crops) for crops in seen] == [1, 1, 1, 2, 2, 2]         # assigned crops; all
    for first, second in zip(seen[:3], seen[3:]):
        assert torch.equal(first[0], second[0])
    joined = [torch.cat([c.unflatten(0, (spec.count, 2)) for c in crops], 1)
              for spec, crops in zip(SPECS, zip(*seen[3:]))]
    assert plain_step(model, joined)[0].item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("counts, sizes", [([2, 4], 1), ([6], 1), ([1, 1, 4], 2), ([1, 5], 2)])
def test_the_sizes_that_hold_the_assigned_crops(counts, sizes):
    assert scale.assigned_sizes(counts) == sizes


# ------------------------------------------------------------------------------------ two ranks
def steps_on_a_rank(rank, world, pieces, recompute):
    """Losses and gradients of steps on this rank's part, the times DDP communicated, and the
    memory that the gradients lie in."""
    model = tiny().eval()
    wrapped = scale.wrap(model, CPU, sync_bn_group=8, checkpoint_activations=recompute)
    calls = []

    def count(_, bucket):
        calls.append(bucket.index())
        return dist.all_reduce(bucket.buffer() / world, async_op=True).get_future().then(
            lambda future: future.value()[0])

    if world > 1:
        wrapped.register_comm_hook(None, count)
    results = []
    for seed in range(3):
        model.zero_grad(set_to_none=False)
        calls.clear()
        loss, _, _ = backward(model, wrapped, cut(pictures(8, seed), pieces, rank, world))
        buckets = {g.untyped_storage().data_ptr() for g in gradients(model).values()}
        results.append((loss, {n: g.clone() for n, g in gradients(model).items()}, len(calls),
                        buckets))
    return results


@pytest.mark.parametrize("pieces, recompute", [(1, False), (4, True)])
def test_two_ranks_have_the_gradient_of_the_joined_batch(tmp_path, pieces, recompute):
    expected = [plain_step(tiny().eval(), pictures(8, seed)) for seed in range(3)]
    ranks = run_ranks(steps_on_a_rank, tmp_path, 2, pieces, recompute)
    for step, (loss, plain) in enumerate(expected):
        losses, grads, calls, _ = zip(*(rank[step] for rank in ranks))
        assert sum(losses).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
        for mine in grads:
            assert_close(mine, plain, tolerance=1e-4)
        assert max(calls) <= 2, "the buckets of one backward pass, however many micro-batches"
    for rank in ranks:
        _, (*_, before), (*_, after) = rank
        assert before == after and len(after) <= 2, "gradients lie in DDP's buckets, nowhere else"


# ------------------------------------------------------------------------------------- wrappers
def wrap(model, inductor=False, **options):
    """scale.wrap, compiling by Inductor on a GPU; on a CPU with all but its kernels."""
    device = model.prototypes.weight.device
    backend = "inductor" if inductor or device.type == "cuda" else "aot_eager_decomp_partition"
    torch._dynamo.reset()
    with mock.patch.object(scale, "compile_trunk", partial(scale.compile_trunk, backend=backend)):
        return scale.wrap(model, device, **options)


def two_steps(device, recompute, compiled=False, arch="regnety_100mf", rank=0, world=1, pieces=1):
    """Losses, gradients and running statistics of two steps, each over two resolutions."""
    model = tiny(arch, head_bn=True, device=device)
    wrapped = wrap(model, sync_bn_group=world, checkpoint_activations=recompute, compiled=compiled)
    batches = [[size.to(device) for size in pictures(4, seed)] for seed in range(2)]
    losses = [backward(model, wrapped, cut(batch, pieces, rank, world))[0].item()
              for batch in batches]
    return losses, *({name: value.cpu() for name, value in values.items()}
                     for values in (gradients(model), dict(model.named_buffers())))


@pytest.mark.parametrize("arch, compiled", [("regnety_100mf", False), ("regnetx_200mf", False),
                                            ("resnet50", False), pytest.param(
                                                "regnety_100mf", True, marks=pytest.mark.long)])
def test_checkpointing_changes_no_bit(arch, compiled):
    plain, again = (two_steps("cpu", recompute, compiled, arch=arch) for recompute in (False, True))
    assert plain[0] == again[0]
    for expected, mine in zip(plain[1:], again[1:]):
        for name, value in expected.items():
            assert torch.equal(value, mine[name]), name


@pytest.mark.parametrize("recompute, pieces, ranks, device", [
    (True, 1, 1, "cpu"), (False, 2, 1, "cpu"), pytest.param(True, 2, 2, "cpu", marks=pytest.mark.long),
    pytest.param(False, 1, 1, "inductor", marks=pytest.mark.long),
    pytest.param(False, 1, 1, "cuda", marks=pytest.mark.cuda),
    pytest.param(True, 2, 1, "cuda", marks=pytest.mark.cuda)])
def test_one_graph_per_crop_size(recompute, pieces, ranks, device, tmp_path):
    """And, of several micro-batches, one for the pass without gradient; none is made after the first step.
    Losses, gradients and running statistics are those of the trunk as it is."""
    graphs, breaks, *compiled = compiled_steps(0, recompute, pieces, device) if ranks == 1 else run_ranks(
        compiled_steps, tmp_path, recompute, pieces, device)[0]
    assert graphs == [3 + (pieces > 1)] * 3 and not breaks
    if ranks == 1:
        eager_graphs, _, *eager = compiled_steps(0, recompute, pieces, device, compiled=False)
        assert eager_graphs == [0] * 3 and compiled[0] == pytest.approx(eager[0], rel=1e-4)
        assert_close(compiled[1], eager[1], tolerance=1e-3)
        torch.testing.assert_close(compiled[2], eager[2], rtol=1e-3, atol=1e-5)


def compiled_steps(rank, recompute, pieces, device, compiled=True):
    """Of three steps over three sizes: graphs so far, graph breaks, losses; gradients, running statistics."""
    counters, sizes = torch._dynamo.utils.counters, ((2, 48), (2, 32), (1, 40))
    world = dist.get_world_size() if dist.is_initialized() else 1
    torch.manual_seed(0)
    model = SwAV(RegNet(RegNetParams(5, 16, 16.0, 2.0, 8, se_ratio=0.25)), (24, 16), 12)
    model.to("cpu" if device == "inductor" else device)
    wrapped = wrap(model, device == "inductor", checkpoint_activations=recompute, compiled=compiled)
    device, graphs, losses = model.prototypes.weight.device, [], []
    counters.clear()
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        joined = [torch.randn(count, 4 * world, 3, size, size, generator=generator).to(device)
                  for count, size in sizes]
        loss, _, _ = scale.swav_backward(model, wrapped, cut(joined, pieces, rank, world),
                                         [count for count, _ in sizes], codes_of)
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
        scale.check_compiler(CPU, missing)


def test_checkpointing_keeps_only_the_inputs_of_blocks():
    kept = {}
    for recompute in (False, True):
        model, total = tiny(), []
        scale.wrap(model, CPU, checkpoint_activations=recompute)

        def keep(tensor):
            total.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.trunk(torch.randn(4, 3, 64, 64))
        kept[recompute] = sum(total)
    assert kept[True] < 0.3 * kept[False]
    assert {type(stage) for stage in model.trunk.trunk_output} == {scale.Recomputed}


def test_no_wrapper_renames_a_parameter():
    model = tiny(head_bn=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scale.wrap(model, CPU, sync_bn_group=8, checkpoint_activations=True)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_each_wrapper_on_against_off(recompute, pieces, channels_last):
    plain = tiny().eval()
    loss, expected = plain_step(plain, pictures(4))
    model = tiny().eval()
    wrapped = scale.wrap(model, CPU, checkpoint_activations=recompute)
    if not channels_last:
        model.to(memory_format=torch.contiguous_format)
    mine, _, _ = backward(model, wrapped, cut(pictures(4), pieces))
    assert mine == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradients(model), expected, tolerance=1e-4)


@pytest.mark.parametrize("wanted, ranks, group", [(64, 8, 8), (64, 128, 64), (8, 12, 6), (0, 8, 1),
                                                  (32, 1, 1), (1, 8, 1)])
def test_groups_of_synchronised_batchnorm(wanted, ranks, group):
    assert scale.sync_group(wanted, ranks, torch.device("cuda")) == group
    assert scale.sync_group(wanted, ranks, CPU) == 1


def test_unknown_trunks_are_refused():
    with pytest.raises(ValueError, match="unknown arch 'resnet51'"):
        scale.build_trunk("resnet51")


def test_a_network_may_be_built_without_memory():
    model = scale.build_model("regnety_10b", (8192, 8192, 256), 16000, device="meta")
    assert sum(p.numel() for p in model.trunk.parameters()) == pytest.approx(9323.9e6, rel=1e-4)
    assert {p.device.type for p in model.parameters()} == {"meta"}


# ----------------------------------------------------------------------- on a CUDA machine only
@pytest.mark.cuda
@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointing_on_a_gpu(compiled):
    plain, again = (two_steps("cuda", recompute, compiled) for recompute in (False, True))
    for expected, mine in zip(plain, again):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
    tracked = [value for name, value in again[2].items() if "stem.1.num_batches" in name]
    assert tracked == [2 * len(SPECS)]


def synchronised_steps(rank, world, pieces, recompute, compiled):
    return two_steps("cuda", recompute, compiled, rank=rank, world=world, pieces=pieces)


@pytest.mark.cuda
@pytest.mark.parametrize("recompute, compiled", [(False, False), (True, False), (True, True)])
def test_synchronised_statistics_are_the_joined_batchs(tmp_path, recompute, compiled):
    """Two ranks on one GPU, joined by gloo, BatchNorm in training: losses, gradients and running
    statistics of one process on the joined batch."""
    losses, grads, buffers = two_steps("cuda", False)
    ranks = run_ranks(synchronised_steps, tmp_path, 2, 1, recompute, compiled, timeout=300)
    for step, loss in enumerate(losses):
        assert sum(rank[0][step] for rank in ranks) / 2 == pytest.approx(loss, rel=1e-4)
    for _, mine, statistics in ranks:
        assert_close(mine, grads, tolerance=1e-3)
        torch.testing.assert_close(statistics, buffers, rtol=1e-3, atol=1e-5)
    # and of several micro-batches the first pass, though it synchronises, leaves no trace
    plain, again = (run_ranks(synchronised_steps, tmp_path, 2, 2, redo, False, timeout=300)
                    for redo in (False, True))
    for expected, mine in zip(plain, again):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)
        assert mine[2]["trunk.stem.1.num_batches_tracked"] == 2 * 2 * len(SPECS)


@pytest.mark.cuda
def test_half_precision_accumulates_on_a_gpu():
    device = torch.device("cuda")
    joined = [c.to(device) for c in pictures(8)]
    results = {}
    for pieces in (1, 4):
        model = tiny(device=device).eval()
        wrapped = scale.wrap(model, device, checkpoint_activations=True)
        results[pieces] = backward(model, wrapped, cut(joined, pieces), dtype=torch.bfloat16)[0]
    assert results[1].item() == pytest.approx(results[4].item(), rel=1e-2)
