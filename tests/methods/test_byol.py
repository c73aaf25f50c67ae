"""byol.py against lightly's loss, closed forms and the equations by hand."""
import math

import pytest
import torch
from torch import nn

from methods.byol import BYOL, byol_loss, momentum_at
from tests.helpers import ORACLES
from tests.methods import momentum
from tests.methods.momentum import Trunk, double, images, run_steps, sgd, split, take_step

LIGHTLY = torch.load(ORACLES / "lightly_momentum.pt", weights_only=True)["byol"]
OPTIONS = dict(head=(10, 6), predictor=(8, 6), steps=5, momentum=0.9)


# --------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("case", LIGHTLY)
def test_loss_and_gradient_are_lightlys(case):
    predictions = case["predictions"].clone().requires_grad_()
    loss = byol_loss(predictions, case["targets"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-12)
    torch.testing.assert_close(predictions.grad, case["gradient"], rtol=0, atol=1e-12)


def test_the_loss_is_a_mean_over_rows_by_hand():
    torch.manual_seed(0)
    p, z = torch.randn(2, 5, 7).double()
    rows = [2 - 2 * sum(a * b for a, b in zip(x, y)) / math.sqrt(
        sum(a * a for a in x) * sum(b * b for b in y)) for x, y in zip(p.tolist(), z.tolist())]
    assert byol_loss(p, z).item() == pytest.approx(sum(rows) / 5, abs=1e-12)
    assert torch.autograd.gradcheck(byol_loss, (p.requires_grad_(), z))
    byol_loss(p, z.requires_grad_()).backward()
    assert z.grad is None                                           # the targets' network is fixed
    with pytest.raises(ValueError, match=r"\(5, 7\) and \(1, 7\)"):
        byol_loss(p, z[:1])


@pytest.mark.parametrize("second, expected", [([[3, 0], [0, 5]], 0), ([[0, 2], [1, 0]], 2),
                                              ([[-1, 0], [0, -9]], 4), ([[1, 1], [1, 1]], 0.5858)])
def test_the_loss_of_equal_orthogonal_and_opposite_vectors(second, expected):
    loss = byol_loss(torch.tensor([[2.0, 0], [0, 1]]), torch.tensor(second).float())
    assert loss.item() == pytest.approx(expected, abs=1e-4)


# -------------------------------------------------------------------------------------- the model
def test_the_head_is_as_published():
    model = BYOL(Trunk(), head=(10, 6), predictor=(8, 6), steps=9)
    for part, widths in ((model.head, (12, 10, 6)), (model.predictor, (6, 8, 6))):
        assert [type(layer) for layer in part] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
        assert [part[0].in_features, part[0].out_features, part[3].out_features] == list(widths)
        assert part[0].bias is not None and part[3].bias is None
    published = BYOL(Trunk(), steps=9)
    assert published.head[3].weight.shape == published.predictor[3].weight.shape == (256, 4096)


def test_forward_gives_projections_predictions_and_the_targets_own():
    model, crops = double(BYOL, **OPTIONS), images((2,), 4)
    with torch.no_grad():                       # a target network of its own
        for p in model.target.parameters():
            p.add_(torch.randn_like(p))
    outputs = model(crops)
    assert [x.shape for x in outputs] == [(8, 6)] * 3
    projections = model.head(model.trunk(crops[0]))
    torch.testing.assert_close(outputs[0], projections)
    torch.testing.assert_close(outputs[1], model.predictor(projections))
    torch.testing.assert_close(outputs[2], model.target[1](model.target[0](crops[0])))
    assert not torch.allclose(outputs[2], outputs[0], atol=0.1)
    assert [x.requires_grad for x in outputs] == [True, True, False]
    assert model.target.training and not any(p.requires_grad for p in model.target.parameters())


def test_the_loss_is_the_sum_of_both_ways():
    model, crops = double(BYOL, **OPTIONS), images((2,), 4)
    outputs = model(crops)
    targets = model.targets(outputs, 0)
    assert torch.equal(targets, outputs[2].view(2, 4, 6))
    expected = 0.0
    for i in range(4):
        for view, other in ((0, 1), (1, 0)):
            p, z = outputs[1][4 * view + i], outputs[2][4 * other + i]
            expected += (2 - 2 * p @ z / p.norm() / z.norm()) / 4
    torch.testing.assert_close(model.loss(outputs, targets), expected, rtol=0, atol=1e-12)


def test_no_gradient_reaches_the_target_and_all_of_the_online_network_has_one():
    model = double(BYOL, **OPTIONS)
    outputs = model(images((2,), 4))
    model.loss(outputs, model.targets(outputs, 0)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("target."), name


@pytest.mark.parametrize("step, expected", [(0, 0.9), (5, 0.95), (10, 1), (12, 1), (2, 0.909549)])
def test_the_momentum_rises_to_one_by_a_cosine(step, expected):
    assert momentum_at(step, 10, 0.9) == pytest.approx(expected, abs=1e-6)


def test_the_target_network_follows_by_hand():
    model = double(BYOL, **OPTIONS)
    kept, optimizer = [p.detach().clone() for p in model.target.parameters()], sgd(model)
    buffer = model.target[1][1].weight          # the same tensors all along
    for step in range(7):                       # two more than the run has: the target stays
        take_step(model, optimizer, split(images((2,), 4, step), (2,), 1), step)
        online = [*model.trunk.parameters(), *model.head.parameters()]
        tau = 1 - 0.1 * (math.cos(math.pi * min(step, 5) / 5) + 1) / 2
        before, kept = kept, [tau * x + (1 - tau) * y.detach() for x, y in zip(kept, online)]
        for p, expected in zip(model.target.parameters(), kept):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
        assert (step < 5) == any(not torch.equal(x, y) for x, y in zip(before, kept))
    assert buffer is model.target[1][1].weight


@pytest.mark.parametrize("head, predictor", [((), (8, 6)), ((10, 6), ()), ((10, 6), (8, 5)),
                                             ((0, 6), (8, 6))])
def test_widths_that_do_not_fit_are_refused(head, predictor):
    with pytest.raises(ValueError, match="end at the same width"):
        BYOL(Trunk(), head, predictor, steps=1)


def test_a_trunk_without_num_features_and_crops_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="num_features"):
        BYOL(nn.Flatten(), steps=1)
    for crops in (images((2, 2), 3), images((3,), 1)):
        with pytest.raises(ValueError, match="two views of one size"):
            double(BYOL, **OPTIONS)(crops)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_loss_stay_float32_under_autocast(dtype):
    model, crops = double(BYOL, **OPTIONS).float(), [images((2,), 4)[0].float()]
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(crops)
        targets = model.targets(outputs, 0)
        loss = model.loss(outputs, targets)
    assert {x.dtype for x in (*outputs, targets, loss)} == {torch.float32}
    assert loss.item() == model.loss(outputs, targets).item()
    assert byol_loss(outputs[1].to(dtype), outputs[2]).dtype == torch.float32


def test_the_cosine_of_its_statistics():
    model = double(BYOL, **OPTIONS)
    outputs = tuple(x.detach() for x in model(images((2,), 4)))
    loss = model.loss(outputs, model.targets(outputs, 0))
    assert model.statistics(outputs, loss) == pytest.approx({"cosine": 1 - loss.item() / 4})
    turned = (outputs[0], torch.eye(6).repeat(2, 1), -torch.eye(6).repeat(2, 1))
    assert model.statistics(turned, loss) == pytest.approx({"cosine": -1})
    views = torch.cat([torch.eye(6), -torch.eye(6)])        # the other view's, not its own
    assert model.statistics((outputs[0], views, views), loss) == pytest.approx({"cosine": -1})


# --------------------------------------------------------------------------------------- the loop
def test_micro_batches_equal_the_joined_batch():
    """With BatchNorm in eval mode, for in training it sees one micro-batch at a time."""
    joined, parts = (double(BYOL, **OPTIONS).eval() for _ in range(2))
    torch.testing.assert_close(run_steps(parts, (2,), 6, micro_batches=3),
                               run_steps(joined, (2,), 6), rtol=0, atol=1e-10)
    momentum.assert_same_state(parts, joined.state_dict())


@pytest.mark.long
def test_it_learns_and_does_not_move_without_a_step():
    model = double(BYOL, head=(10, 6), predictor=(8, 6), steps=1000)
    crops = split(images((2,), 8), (2,), 1)
    losses = [take_step(model, torch.optim.SGD(model.parameters(), lr=0.05), crops, step)[0]
              for step in range(30)]
    assert losses[-1] < 0.5 * losses[0]


def test_a_skipped_step_leaves_no_trace():
    momentum.assert_a_skipped_step_leaves_no_trace(BYOL, OPTIONS, (2,), but=["running", "tracked"])


def test_its_state_goes_on():
    momentum.assert_state_goes_on(BYOL, OPTIONS, (2,))
    names = {name.split(".")[0] for name in double(BYOL, **OPTIONS).state_dict()}
    assert names == {"trunk", "head", "predictor", "target"}


@pytest.mark.long
def test_two_ranks_equal_the_joined_batch(tmp_path):
    momentum.assert_ranks_equal_the_joined_batch(BYOL, OPTIONS, (2,), 6, tmp_path)
