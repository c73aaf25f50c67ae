"""mocov2.py against lightly's loss, closed forms and the equations by hand."""
import math

import pytest
import torch
from torch import nn

from methods.mocov2 import MoCo, info_nce
from tests.helpers import ORACLES
from tests.methods import momentum
from tests.methods.momentum import Trunk, double, images, run_steps, sgd, split, take_step

LIGHTLY = torch.load(ORACLES / "lightly_momentum.pt", weights_only=True)["moco"]
OPTIONS = dict(head=(10, 6), queue=14, momentum=0.9)


# --------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("case", LIGHTLY)
def test_loss_and_gradient_are_lightlys(case):
    queries = case["queries"].clone().requires_grad_()
    loss = info_nce(queries, case["keys"], case["queue"], case["temperature"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-12)
    torch.testing.assert_close(queries.grad, case["gradient"], rtol=0, atol=1e-12)


def test_the_loss_by_hand():
    torch.manual_seed(0)
    q, k, queue = torch.randn(4, 5).double(), torch.randn(4, 5).double(), torch.randn(7, 5).double()
    total = 0.0
    for x, own in zip(q, k):
        p = [math.exp(x @ y / x.norm() / y.norm() / 0.3) for y in (own, *queue)]
        total -= math.log(p[0] / sum(p)) / 4
    assert info_nce(q, k, queue, 0.3).item() == pytest.approx(total, abs=1e-12)
    assert info_nce(5 * q, k / 3, 2 * queue, 0.3).item() == pytest.approx(total, abs=1e-12)
    assert info_nce(q, k, queue).item() == info_nce(q, k, queue, 0.2).item()
    assert torch.autograd.gradcheck(info_nce, (q.requires_grad_(), k, queue, 0.3))
    info_nce(q, k.requires_grad_(), queue.requires_grad_()).backward()
    assert k.grad is queue.grad is None                             # the key encoder is fixed
    for keys, others in (k[:1], queue), (k, queue[:, :1]):
        with pytest.raises(ValueError, match="queries and keys"):
            info_nce(q, keys, others)


def test_the_loss_of_a_collapsed_and_of_a_perfect_embedding():
    point = torch.ones(1, 8)
    loss = info_nce(point.expand(4, 8), point.expand(4, 8), point.expand(30, 8))
    assert loss.item() == pytest.approx(math.log(31), abs=1e-5)
    own, others = torch.eye(8)[:4], torch.eye(8)[4:].repeat(5, 1)
    loss = info_nce(own, own, others)                       # orthogonal to all of the queue
    assert loss.item() == pytest.approx(math.log(1 + 20 * math.exp(-5)), abs=1e-6)


# -------------------------------------------------------------------------------------- the model
def test_head_and_queue_are_as_published():
    model = MoCo(Trunk(), head=(10, 6), queue=7)
    assert [type(layer) for layer in model.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [model.head[0].weight.shape, model.head[2].weight.shape] == [(10, 12), (6, 10)]
    published = MoCo(Trunk())
    assert published.queue.shape == (65536, 128) and published.head[0].out_features == 2048
    assert (published.momentum, published.temperature) == (0.999, 0.2)
    torch.testing.assert_close(published.queue.norm(dim=1), torch.ones(65536))
    assert published.queue.mean(0).abs().max() < 0.01       # in all directions
    assert torch.equal(double(MoCo, **OPTIONS).queue, double(MoCo, **OPTIONS).queue)


def test_queries_are_of_view_1_and_keys_of_view_2_by_the_key_encoder():
    model, [crops] = double(MoCo, **OPTIONS), images((2,), 4)
    for ours, theirs in zip(model.head.parameters(), model.key[1].parameters()):
        assert torch.equal(ours, theirs) and ours is not theirs
    with torch.no_grad():
        for p in model.key.parameters():
            p.add_(torch.randn_like(p))
    queries, keys, similarities = model([crops])
    for rows, expected in ((queries, model.head(model.trunk(crops[:4]))),
                           (keys, model.key[1](model.key[0](crops[4:])))):
        torch.testing.assert_close(rows, expected / expected.norm(dim=1, keepdim=True))
    for i in range(4):
        row = torch.stack([queries[i] @ x for x in (keys[i], *model.queue)])
        torch.testing.assert_close(similarities[i], row)
    assert not torch.allclose(keys, model.head(model.trunk(crops[4:])), atol=0.1)
    assert queries.requires_grad and not keys.requires_grad and model.key.training


def test_no_gradient_reaches_the_key_encoder_and_all_of_the_query_encoder_has_one():
    model = double(MoCo, **OPTIONS)
    outputs = model(images((2,), 4))
    model.loss(outputs, model.targets(outputs, 0)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("key."), name


def test_loss_queue_and_key_encoder_by_hand():
    """Of steps of 4 images in two micro-batches, some of which are skipped: the loss is that of the
    queue as it was; 14 keys stay, the newest first, of which 4 is no divisor."""
    model = double(MoCo, temperature=0.3, **OPTIONS)
    model.queue.copy_(nn.functional.normalize(model.queue, dim=1))      # to the last digit
    queue, kept = model.queue.clone(), [p.detach().clone() for p in model.key.parameters()]
    optimizer, buffer = sgd(model), model.queue.data_ptr()
    for step in range(6):
        parts = split(images((2,), 4, step), (2,), 2)
        with torch.no_grad():
            queries, keys, _ = (torch.cat(same) for same in zip(*map(model, parts)))
        loss, _ = take_step(model, optimizer, parts, step, skipped=step in (1, 4))
        assert loss.item() == pytest.approx(info_nce(queries, keys, queue, 0.3).item(), abs=1e-12)
        if step not in (1, 4):
            queue = torch.cat([keys, queue])[:14]
            online = [*model.trunk.parameters(), *model.head.parameters()]
            kept = [0.9 * x + 0.1 * y.detach() for x, y in zip(kept, online)]
        torch.testing.assert_close(model.queue, queue, rtol=0, atol=1e-12)
        for p, expected in zip(model.key.parameters(), kept):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
    assert model.queue.data_ptr() == buffer     # in place: whoever keeps the buffer sees it


def test_a_batch_larger_than_the_queue():
    model = double(MoCo, head=(6,), queue=3)
    model.targets(model(images((2,), 5)), 0)
    keys = model.collected[0]
    model.before_step(0)
    model.after_step(0)
    assert torch.equal(model.queue, keys[:3])


@pytest.mark.parametrize("head, queue", [((), 8), ((10, 0), 8), ((10, 6), 0)])
def test_a_head_or_queue_of_no_size_is_refused(head, queue):
    with pytest.raises(ValueError, match="at least one"):
        MoCo(Trunk(), head, queue)


def test_a_trunk_without_num_features_and_crops_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="num_features"):
        MoCo(nn.Flatten())
    for crops in (images((2, 2), 3), images((3,), 1)):
        with pytest.raises(ValueError, match="two views of one size"):
            double(MoCo, **OPTIONS)(crops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_loss_stay_float32_under_autocast(dtype):
    model, crops = double(MoCo, **OPTIONS).float(), [images((2,), 4)[0].float()]
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(crops)
        targets = model.targets(outputs, 0)
        loss, function = model.loss(outputs, targets), info_nce(*outputs[:2], model.queue)
    assert {x.dtype for x in (*outputs, targets, loss, function)} == {torch.float32}
    assert loss.item() == pytest.approx(info_nce(*outputs[:2], model.queue).item(), abs=1e-6)
    assert function.item() == info_nce(*outputs[:2], model.queue).item()
    assert info_nce(*(x.to(dtype) for x in outputs[:2]), model.queue).dtype == torch.float32


def test_statistics_of_collapsed_healthy_and_mixed_queries():
    model = double(MoCo, head=(10, 8), queue=30)
    assert model.statistics((None, None, torch.ones(4, 31)), torch.tensor(math.log(31))) == (
        pytest.approx({"loss_over_ln_keys": 1, "own_key_nearest": 0}))
    scores = torch.zeros(4, 31)
    scores[:3, 0], scores[3, 17] = 0.5, 0.1
    assert model.statistics((None, None, scores), torch.tensor(0.5)) == (
        pytest.approx({"loss_over_ln_keys": 0.5 / math.log(31), "own_key_nearest": 0.75}))
    outputs = model(images((2,), 5))
    queries, keys, _ = (x.detach() for x in outputs)
    nearest = [(model.queue @ q).max() < k @ q for q, k in zip(queries, keys)]
    loss, _ = take_step(model, sgd(model), [images((2,), 5)], 0)    # its own keys are queued now
    assert model.statistics(outputs, loss)["own_key_nearest"] == pytest.approx(sum(nearest) / 5)


# --------------------------------------------------------------------------------------- the loop
def test_micro_batches_equal_the_joined_batch():
    joined, parts = (double(MoCo, **OPTIONS) for _ in range(2))
    torch.testing.assert_close(run_steps(parts, (2,), 6, micro_batches=3),
                               run_steps(joined, (2,), 6), rtol=0, atol=1e-10)
    momentum.assert_same_state(parts, joined.state_dict())


@pytest.mark.long
def test_it_learns():
    last = []
    for lr in (0, 0.05):                        # the queue fills with real keys all the same
        model = double(MoCo, head=(10, 6), queue=16, momentum=0.9)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        last.append([take_step(model, optimizer, [images((2,), 8, step)], step)[0]
                     for step in range(100)][-5:])
    assert sum(last[1]) / 5 < sum(last[0]) / 5 - 0.5 and sum(last[0]) / 5 < math.log(17)


def test_a_skipped_step_leaves_no_trace():
    momentum.assert_a_skipped_step_leaves_no_trace(MoCo, OPTIONS, (2,))


def test_its_state_goes_on():
    momentum.assert_state_goes_on(MoCo, OPTIONS, (2,))
    names = {name.split(".")[0] for name in double(MoCo, **OPTIONS).state_dict()}
    assert names == {"trunk", "head", "key", "queue"}


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.measured),
                                           pytest.param(3, marks=pytest.mark.long)])
def test_two_ranks_equal_the_joined_batch(tmp_path, micro_batches):
    momentum.assert_ranks_equal_the_joined_batch(MoCo, OPTIONS, (2,), 6, tmp_path, micro_batches)
