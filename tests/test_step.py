"""train.step_gradients: micro-batches against the joined batch, in one process and in two."""
import pytest
import torch
import torch.distributed as dist
from torch import nn

from distributed.hardware import layout
from distributed.wrap import wrap
from methods.build import build_method
from recipes.command_line import configure
from swav import SwAV, swav_codes, swav_loss
from tests.helpers import run_ranks
from train import step_gradients
from training.run import Run

CPU = torch.device("cpu")
CONFIG = configure({"recipe": "demo", "crops": "2x48+3x32", "head": "24-16", "prototypes": 12,
                    "head_bn": False, "epsilon": 0.05})
SPECS = CONFIG.crops


def tiny(device="cpu", **changes) -> SwAV:
    return build_method(configure({"recipe": "demo", "crops": "2x48+3x32", "head": "24-16",
                                   "prototypes": 12, "head_bn": False, "epsilon": 0.05} | changes),
                        device)


def run_of(method, wrapped=None, dtype=torch.float32, all_crops=False) -> Run:
    device = method.prototypes.weight.device
    return Run(method, wrapped or method, device, dtype,
               torch.amp.GradScaler(device.type, enabled=False), all_crops=all_crops)


def images(count, seed=0):
    """Crops of `count` images, (crops, count, 3, s, s) a size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(spec.count, count, 3, spec.size, spec.size, generator=generator)
            for spec in SPECS]


def cut(joined, micro_batches, rank=0, world=1):
    """A rank's micro-batches of a joined batch."""
    of_rank = [size.chunk(world, 1)[rank].chunk(micro_batches, 1) for size in joined]
    return [[crops.flatten(0, 1) for crops in micro_batch] for micro_batch in zip(*of_rank)]


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def plain_step(model, joined, queue_scores=None):
    """Forward, codes, loss, backward of the joined batch, as in the README's example."""
    embeddings, scores = model([size.flatten(0, 1) for size in joined])
    loss = swav_loss(scores, swav_codes(scores, 5, queue_scores=queue_scores), 5)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_close(output, expected, tolerance=1e-5):
    """By tensor, relative to its norm; a bias under a BatchNorm has none but rounding."""
    for name, value in expected.items():
        assert (output[name] - value).norm() <= tolerance * (value.norm() + 1e-4), name


@pytest.mark.parametrize("with_queue, head_bn", [
    (False, True), (True, False), pytest.param(True, True, marks=pytest.mark.long),
    pytest.param(False, False, marks=pytest.mark.long)])
@pytest.mark.parametrize("micro_batches", [1, 4, *(
    pytest.param(n, marks=pytest.mark.long) for n in (2, 8))])
def test_micro_batches_have_the_gradient_of_the_joined_batch(micro_batches, head_bn, with_queue):
    model, joined = tiny(head_bn=head_bn, queue=10 * with_queue).eval(), images(8)
    queue_scores = None
    if with_queue:
        model.queue.embeddings = nn.functional.normalize(torch.randn(2, 10, 16), dim=2)
        model.queue.filled = 10
        queue_scores = model.queue.scores(model.prototypes.weight.detach())
    loss, expected = plain_step(model, joined, queue_scores)
    model.zero_grad()
    total, outputs = step_gradients(run_of(model), 0, cut(joined, micro_batches))
    assert total == pytest.approx(loss.item(), rel=1e-6)
    assert_close(gradients(model), expected, tolerance=1e-4)
    embeddings, scores = (x.flatten(0, -2) for x in outputs)
    crops = 5 if micro_batches == 1 else 2
    assert embeddings.shape == (crops * 8, 16) and scores.shape == (crops * 8, 12)
    with torch.no_grad():                       # rows in the order of the joined batch
        expected = model([c.flatten(0, 1) for c in joined])[1][:len(scores)]
    torch.testing.assert_close(scores, expected)


def test_codes_of_each_micro_batch_alone_would_differ():
    """The reason for the first pass; and a check that the test above can fail."""
    model, joined = tiny().eval(), images(8)
    _, expected = plain_step(model, joined)
    model.zero_grad()
    for micro_batch in cut(joined, 4):
        plain_step(model, [c.unflatten(0, (spec.count, -1)) for c, spec in zip(micro_batch, SPECS)])
    apart = gradients(model)
    with pytest.raises(AssertionError):
        assert_close({name: grad / 4 for name, grad in apart.items()}, expected, tolerance=0.01)


@pytest.mark.parametrize("all_crops, same", [
    (True, True), pytest.param(False, False, marks=pytest.mark.long)])
def test_codes_are_of_the_scores_that_the_loss_sees(all_crops, same):
    """With BatchNorm in training, also in the head. The oracle goes through the micro-batches once,
    makes the codes from these very scores, and goes backward through all. Of the assigned crops
    alone a head's BatchNorm has other statistics, so codes and gradients are others."""
    model, other, joined = tiny(head_bn=True), tiny(head_bn=True), images(12)
    outputs = [other(micro_batch)[1].unflatten(0, (5, -1)) for micro_batch in cut(joined, 3)]
    expected = swav_codes(torch.cat(outputs, 1).flatten(0, 1), 5)           # (2, 12, 12)
    losses = [swav_loss(scores.flatten(0, 1), codes, 5)
              for scores, codes in zip(outputs, expected.chunk(3, 1))]
    (sum(losses) / 3).backward()
    made, targets = [], model.targets
    model.targets = lambda *args: made.append(targets(*args)) or made[0]
    total, _ = step_gradients(run_of(model, all_crops=all_crops), 0, cut(joined, 3))
    if same:
        torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-6)
        assert total == pytest.approx(sum(losses).item() / 3, rel=1e-6)
        assert_close(gradients(model), gradients(other), tolerance=1e-4)
    else:
        assert (made[0] - expected).norm() > 0.1 * expected.norm()
        with pytest.raises(AssertionError):
            assert_close(gradients(model), gradients(other), tolerance=0.01)


@pytest.mark.parametrize("all_crops", [False, pytest.param(True, marks=pytest.mark.long)])
def test_the_first_pass_touches_no_buffer_and_the_second_each_once(all_crops):
    model, other, joined = tiny(head_bn=True), tiny(head_bn=True), images(8)
    step_gradients(run_of(model, all_crops=all_crops), 0, cut(joined, 4))
    for micro_batch in cut(joined, 4):
        other(micro_batch)
    for (name, buffer), (_, expected) in zip(model.named_buffers(), other.named_buffers()):
        assert torch.equal(buffer, expected), name
    assert model.trunk.stem[1].num_batches_tracked == 4 * len(SPECS)
    assert model.head[1].num_batches_tracked == 4
    assert model.trunk.stem[1].momentum == 0.1


@pytest.mark.parametrize("checkpointing, micro_batches, channels_last", [
    (True, 2, False), (False, 1, True), *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (True, 1, True), (True, 1, False), (True, 2, True), (False, 2, True), (False, 2, False),
        (False, 1, False)))])
def test_each_wrapper_on_against_off(checkpointing, micro_batches, channels_last):
    plain = tiny().eval()
    loss, expected = plain_step(plain, images(4))
    model = tiny().eval()
    wrapped = wrap(model, CPU, checkpoint_activations=checkpointing)
    model.to(memory_format=layout(CPU) if channels_last else torch.contiguous_format)
    total, _ = step_gradients(run_of(model, wrapped), 0, cut(images(4), micro_batches))
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert_close(gradients(model), expected, tolerance=1e-4)


# ------------------------------------------------------------------------------------ two ranks
def steps_on_a_rank(rank, world, micro_batches, checkpointing):
    """Losses and gradients of steps on this rank's part, the times DDP communicated, and the
    memory that the gradients lie in."""
    model = tiny().eval()
    wrapped = wrap(model, CPU, sync_bn_group=8, checkpoint_activations=checkpointing)
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
        loss, _ = step_gradients(run_of(model, wrapped), 0,
                                 cut(images(8, seed), micro_batches, rank, world))
        buckets = {g.untyped_storage().data_ptr() for g in gradients(model).values()}
        results.append((loss, {n: g.clone() for n, g in gradients(model).items()}, len(calls),
                        buckets))
    return results


@pytest.mark.parametrize("micro_batches, checkpointing", [
    (4, True), (1, False)])
@pytest.mark.long
def test_two_ranks_have_the_gradient_of_the_joined_batch(tmp_path, micro_batches, checkpointing):
    expected = [plain_step(tiny().eval(), images(8, seed)) for seed in range(3)]
    ranks = run_ranks(steps_on_a_rank, tmp_path, 2, micro_batches, checkpointing)
    for step, (loss, plain) in enumerate(expected):
        losses, grads, calls, _ = zip(*(rank[step] for rank in ranks))
        assert sum(losses).item() / 2 == pytest.approx(loss.item(), rel=1e-5)
        for of_rank in grads:
            assert_close(of_rank, plain, tolerance=1e-4)
        assert max(calls) <= 2, "the buckets of one backward pass, however many micro-batches"
    for rank in ranks:
        _, (*_, before), (*_, after) = rank
        assert before == after and len(after) <= 2, "gradients lie in DDP's buckets, nowhere else"


@pytest.mark.cuda
def test_half_precision_accumulates_on_a_gpu():
    device = torch.device("cuda")
    joined = [c.to(device) for c in images(8)]
    results = {}
    for micro_batches in (1, 4):
        model = tiny(device).eval()
        wrapped = wrap(model, device, checkpoint_activations=True)
        results[micro_batches] = step_gradients(run_of(model, wrapped, torch.bfloat16), 0,
                                                cut(joined, micro_batches))[0]
    assert results[1].item() == pytest.approx(results[4].item(), rel=1e-2)
