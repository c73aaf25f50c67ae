"""methods/supervised.py against loops in float64, and micro-batches and ranks against one batch."""
import math

import pytest
import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from methods.supervised import Supervised
from tests.helpers import equal, run_ranks
from tests.methods.loop import step_of

LABELS = torch.tensor([0, 2, 1, 1, 0, 2, 2, 1, 0, 0])       # of ten images


class Trunk(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, images):
        return self.conv(images).tanh().mean((2, 3))


def build(counts=(1,), batch=6):
    torch.manual_seed(0)
    model = Supervised(Trunk(), LABELS, 3, counts).double()
    model.images_of = lambda step: torch.arange(step * batch, (step + 1) * batch) % 10
    return model


def crops_of(counts, batch=6, seed=0):
    """(count, B, 3, s, s) a size."""
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(count, batch, 3, 8 >> s, 8 >> s, generator=rng, dtype=torch.float64)
            for s, count in enumerate(counts)]


def play(model, crops, step, micro_batches=1, wrapped=None):
    """A step of the loop -> loss, gradients."""
    model.zero_grad()
    total, _ = step_of(model, [[part.flatten(0, 1) for part in parts] for parts in zip(
        *[size.chunk(micro_batches, 1) for size in crops])], step, wrapped)
    model.before_step(step)
    model.after_step(step)
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("counts", [(1,), (2, 1)])
def test_loss_and_gradient_are_the_loop_in_float64(counts):
    """Step 1 shows the images 6, 7, 8, 9, 0 and 1."""
    model, crops = build(counts), [c.flatten(0, 1) for c in crops_of(counts)]
    outputs = features, scores = model(crops)
    assert features.shape == (sum(counts) * 6, 6) and scores.shape == (sum(counts) * 6, 3)
    targets = model.targets(outputs, 1)
    assert targets.tolist() == [[2, 1, 0, 0, 0, 2]]
    expected = 0.0
    for i, row in enumerate(features):
        logits = [sum(w * x for w, x in zip(weight, row)) + b
                  for weight, b in zip(model.fc.weight, model.fc.bias)]
        label = [2, 1, 0, 0, 0, 2][i % 6]
        expected = expected - (logits[label].exp() / sum(x.exp() for x in logits)).log()
    expected = expected / len(features)
    loss = model.loss(outputs, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    weights = list(model.parameters())
    ours, theirs = (torch.autograd.grad(x, weights, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("counts", [(1,), (2, 1)])
@pytest.mark.parametrize("micro_batches", [2, 3, 6])
def test_micro_batches_are_the_joined_batch_step_after_step(micro_batches, counts):
    model, other = build(counts), build(counts)
    for step in (0, 1, 1, 4):                           # also where a step is played again
        crops = crops_of(counts, seed=step)
        ours, joined = play(model, crops, step, micro_batches), play(other, crops, step)
        torch.testing.assert_close(ours, joined, rtol=0, atol=1e-10)


def test_a_step_that_was_dropped_halfway_leaves_no_trace():
    model, crops = build(), crops_of((1,))
    model.targets(model([crops[0][0, :2]]), 0)
    torch.testing.assert_close(play(model, crops, 1), play(build(), crops, 1))


def test_the_last_layer_begins_as_that_of_torchvisions_regnets():
    torch.manual_seed(0)
    trunk = Trunk()
    trunk.num_features = 400
    fc, theirs = Supervised(trunk, LABELS, 1000).fc, torchvision.models.regnet_y_400mf().fc
    assert fc.weight.std().item() == pytest.approx(theirs.weight.std().item(), rel=0.01)
    assert fc.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert fc.weight.shape == (1000, 400) and fc.bias.count_nonzero() == 0
    assert equal(fc.bias.detach(), theirs.bias.detach())


def test_statistics_are_of_the_latest_micro_batch():
    model = build((2,), batch=4)
    labels = model.targets((torch.zeros(4, 6),), 0), model.targets((torch.zeros(4, 6),), 0)
    assert [x.tolist() for x in labels] == [[[0, 2]], [[1, 1]]]
    scores = torch.eye(3)[[1, 0, 2, 1]]                 # two of the four crops are right
    got = model.statistics((torch.zeros(4, 6), scores), torch.tensor(0.5))
    assert got == {"loss_over_ln_k": 0.5 / math.log(3), "top1": 0.5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_scores_and_loss_are_float32_under_autocast(dtype):
    model = build().float()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model([crops_of((1,))[0][0].float()])
        loss = model.loss(outputs, model.targets(outputs, 0))
    assert {x.dtype for x in (*outputs, loss)} == {torch.float32}
    torch.testing.assert_close(model.fc(outputs[0]), outputs[1])
    assert loss == model.loss(outputs, model.latest)


@pytest.mark.parametrize("labels, said", [
    (LABELS.float(), "int64"), (LABELS[None], "int64"), (LABELS[:0], "int64"),
    (LABELS + 1, "from 1 to 3"), (LABELS - 1, "from -1 to 1")])
def test_labels_that_cannot_be_are_refused(labels, said):
    with pytest.raises(ValueError, match=said):
        Supervised(Trunk(), labels, 3)


def test_its_state_is_its_weights():
    names = build().state_dict()
    assert list(names) == ["trunk.conv.weight", "trunk.conv.bias", "fc.weight", "fc.bias"]
    other = build()
    nn.init.ones_(other.fc.weight)
    other.load_state_dict(names)
    crops = crops_of((1,))
    assert equal(play(other, crops, 0), play(build(), crops, 0))


def on_a_rank(rank, micro_batches):
    """Losses and gradients of two steps, on this rank's three of six images."""
    model, results = build((2, 1)), []
    whole = model.images_of
    model.images_of = lambda step: whole(step)[3 * rank:3 * rank + 3]
    wrapped = DistributedDataParallel(model)
    for step in range(2):
        crops = [size[:, 3 * rank:3 * rank + 3] for size in crops_of((2, 1), seed=step)]
        loss, gradients = play(model, crops, step, micro_batches, wrapped)
        dist.all_reduce(loss)
        results.append((loss / 2, gradients))
    return results


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.measured),
                                           pytest.param(3, marks=pytest.mark.long)])
def test_two_ranks_are_the_joined_batch(micro_batches, tmp_path):
    first, second = run_ranks(on_a_rank, tmp_path, micro_batches)
    model = build((2, 1))
    for step, (one, two) in enumerate(zip(first, second)):
        assert equal(one, two)
        expected = play(model, crops_of((2, 1), seed=step), step)
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-10)
