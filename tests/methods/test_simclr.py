"""methods/simclr.py against eq. 1 in loops, lightly's loss, closed forms and the joined batch."""
import math

import pytest
import torch
import torchvision
from torch import nn

from methods.simclr import SimCLR, nt_xent
from tests.helpers import ORACLES, group_of_one, run_ranks
from tests.methods.joint import (
    Plain,
    assert_equal,
    assert_ranks_and_micro_batches_are_the_joined_batch,
    assert_rows_agree,
    assert_the_state_is_weights_alone,
    batch,
    make,
    step,
)

CASES = torch.load(ORACLES / "lightly_pairs.pt", weights_only=True)["nt_xent"]
METHOD = ("simclr", "SimCLR")
SMALL = dict(head=(10, 6), temperature=0.5)


def rows(count, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64)


def naive(embeddings, temperature, views=2):
    """Eq. 1 by its letters, the mean over all rows and their positives."""
    z, images, losses = embeddings.double(), len(embeddings) // views, []
    for i in range(len(z)):
        scores = [torch.dot(z[i], z[k]) / z[i].norm() / z[k].norm() / temperature
                  for k in range(len(z))]
        below = sum(score.exp() for k, score in enumerate(scores) if k != i)
        losses += [-(scores[j].exp() / below).log()
                   for j in range(len(z)) if j != i and j % images == i % images]
    return sum(losses) / len(losses)


# --------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("count, views, temperature", [
    (8, 2, 0.1), (8, 2, 1.0), (2, 2, 0.3), (9, 3, 0.2), (12, 6, 0.5)])
def test_the_loss_and_its_gradient_are_those_of_eq_1_in_loops(count, views, temperature):
    z = rows(count, 5).requires_grad_()
    expected = naive(z, temperature, views)
    gradient, = torch.autograd.grad(expected, z)
    loss = nt_xent(z, temperature, None, views)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], gradient, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: nt_xent(x, temperature, None, views), z)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['option']}")
def test_the_loss_and_its_gradient_are_lightlys(case):
    z = torch.cat([case["first"], case["second"]]).requires_grad_()
    loss = nt_xent(z, case["option"])
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    torch.testing.assert_close(z.grad, torch.cat(case["gradients"]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_closed_forms(temperature):
    """Collapsed: all 2B - 1 others are alike. Orthogonal images, equal views: one exponential of
    1 / t and 2B - 2 ones. Antipodes of two images: the positive at 1, both negatives at -1."""
    collapsed = nt_xent(torch.ones(10, 4).double(), temperature)
    assert collapsed.item() == pytest.approx(math.log(9), rel=1e-12)
    e = math.exp(1 / temperature)
    orthogonal = nt_xent(7 * torch.eye(5).double().repeat(2, 1), temperature)
    assert orthogonal.item() == pytest.approx(math.log((e + 8) / e), rel=1e-10)
    antipodes = nt_xent(torch.tensor([[2.0], [-1.0], [3.0], [-9.0]]).double(), temperature)
    assert antipodes.item() == pytest.approx(math.log1p(2 / e ** 2), rel=1e-6)


def test_rows_are_view_major_and_their_length_is_of_no_effect():
    z = rows(8, 5)
    order = torch.tensor([2, 0, 3, 1])
    together = torch.cat([order, order + 4])
    torch.testing.assert_close(nt_xent(z[together] * rows(8, 1).abs()), nt_xent(z))
    pairs = z[torch.cat([order, torch.arange(4, 8)])]       # others
    assert nt_xent(pairs).item() != pytest.approx(nt_xent(z).item(), rel=0.01)


def test_the_temperature_is_a_tenth_and_rows_that_do_not_fit_are_refused():
    z = rows(8, 5)
    assert nt_xent(z) == nt_xent(z, 0.1) != nt_xent(z, 0.2)
    for shape, views in (((7, 5), 2), ((0, 5), 2), ((2, 4, 5), 2), ((8, 5), 1), ((8, 5), 3)):
        with pytest.raises(ValueError, match=rf"\({shape[0]}, .*views"):
            nt_xent(torch.zeros(shape), views=views)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_and_loss_stay_float32_under_autocast(dtype):
    model = SimCLR(Plain(), (8, 4))
    with torch.autocast("cpu", dtype):
        outputs = model([torch.randn(6, 3, 4, 4)])
        inside, targets = nt_xent(outputs[0]), model.targets(outputs, 0)
        loss = model.loss(outputs, targets)
    assert {x.dtype for x in (*outputs, inside, targets, loss)} == {torch.float32}
    assert inside == nt_xent(outputs[0]) == loss
    assert nt_xent(outputs[0].to(dtype)).dtype == torch.float32


def test_a_group_of_one_is_this_process(tmp_path):
    z = rows(8, 5).requires_grad_()
    with group_of_one(tmp_path):
        loss = nt_xent(z)
    assert loss == nt_xent(z)


def losses_on_this_rank(rank, *batches):
    results = []
    for z in batches:                           # (V, B, D)
        z = z.chunk(2, 1)[rank].contiguous().requires_grad_()
        loss = nt_xent(z.flatten(0, 1), 0.2, None, len(z))
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0] / 2))    # DDP's mean
    return results


@pytest.mark.long
def test_on_two_ranks_it_is_that_of_the_joined_batch(tmp_path):
    batches = [rows(8, 5).unflatten(0, (2, 4)), rows(18, 5).unflatten(0, (3, 6))]
    of_ranks = run_ranks(losses_on_this_rank, tmp_path, *batches)
    for z, (first, second) in zip(batches, zip(*of_ranks)):
        expected = nt_xent(z.requires_grad_().flatten(0, 1), 0.2, None, len(z))
        gradient, = torch.autograd.grad(expected, z)
        assert (first[0] + second[0]).item() / 2 == pytest.approx(expected.item(), rel=1e-12)
        joined = torch.cat([first[1], second[1]], 1)
        torch.testing.assert_close(joined, gradient, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------- the contract
def plain_step(method, images):
    """The joined batch, without contract: forward, eq. 1, backward."""
    method.zero_grad()
    embeddings, = method([images.flatten(0, 1)])
    loss = naive(embeddings, method.temperature, method.views)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in method.named_parameters()}


@pytest.mark.parametrize("micro_batches, views", [(1, 2), (2, 2), (3, 2), (6, 2), (2, 3)])
def test_micro_batches_are_the_joined_batch(micro_batches, views):
    method, images = make(*METHOD, **SMALL, views=views), batch(6, views)
    expected, gradients = plain_step(method, images)
    loss, made, outputs = step(method, images, micro_batches)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_equal(made, gradients)
    assert outputs[0].numel() == views * 6 * 6
    if micro_batches == 2:                      # it could fail: of parts alone they are others
        parts = [plain_step(method, part)[1] for part in images.chunk(2, 1)]
        with pytest.raises(AssertionError):
            assert_equal({name: sum(p[name] for p in parts) / 2 for name in made}, gradients, 0.01)


@pytest.mark.long
def test_two_ranks_and_micro_batches_are_the_joined_batch(tmp_path):
    images = batch(8)
    joined = plain_step(make(*METHOD, **SMALL), images)
    assert_ranks_and_micro_batches_are_the_joined_batch(tmp_path, METHOD, SMALL, images, joined)


def test_forward_assigned_and_targets_agree_on_rows():
    method = make(*METHOD, **SMALL)
    assert_rows_agree(method)
    z = method([batch(5).flatten(0, 1)])[0]
    assert not torch.allclose(z.norm(dim=1), torch.ones(10, dtype=torch.float64))


def test_a_skipped_step_leaves_no_trace_and_the_state_is_weights_alone():
    assert_the_state_is_weights_alone(make(*METHOD, **SMALL), make(*METHOD, **SMALL))


@pytest.mark.parametrize("head_bn, kinds", [
    (False, [nn.Linear, nn.ReLU, nn.Linear]), (True, [nn.Linear, nn.BatchNorm1d, nn.ReLU,
                                                      nn.Linear])])
def test_the_head_is_2048_2048_128(head_bn, kinds):
    trunk = torchvision.models.resnet18()
    with pytest.raises(ValueError, match="num_features"):
        SimCLR(trunk)
    with torch.device("meta"):
        trunk = Plain()
        trunk.num_features = 2048
        model = SimCLR(trunk, head_bn=head_bn)
    assert [type(layer) for layer in model.head] == kinds
    widths = [tuple(layer.weight.shape) for layer in model.head if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 2048), (128, 2048)] and model.temperature == 0.1
    for options in (dict(head=()), dict(head=(8, 0)), dict(views=1)):
        with pytest.raises(ValueError, match="one width or more, two views or more"):
            SimCLR(Plain(), **options)


def test_a_few_steps_lower_the_loss():
    method = make(*METHOD, **SMALL)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.5)
    losses = []
    for i in range(12):
        losses.append(step(method, batch(6), 1 + i % 2)[0].item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# --------------------------------------------------------------------------------- the statistics
def test_statistics_of_collapsed_of_paired_and_of_mistaken_embeddings():
    model = SimCLR(Plain(), temperature=0.1)
    point = torch.ones(16, 4)
    collapsed = model.statistics((point,), nt_xent(point))
    assert collapsed["loss_over_ln_candidates"] == pytest.approx(1)
    assert collapsed["contrastive_accuracy"] <= 2 / 16
    pairs = torch.eye(8).repeat(2, 1)
    healthy = model.statistics((pairs,), nt_xent(pairs))
    assert healthy["contrastive_accuracy"] == 1 and healthy["loss_over_ln_candidates"] < 0.01
    assert model.statistics((pairs.unflatten(0, (2, 8)),), nt_xent(pairs)) == healthy
    # of 4 images, the second view of two is swapped: their four rows find another image
    swapped = torch.cat([torch.eye(4), torch.eye(4)[[1, 0, 2, 3]]])
    assert model.statistics((swapped,), nt_xent(swapped))["contrastive_accuracy"] == 0.5
    thrice = torch.eye(4).repeat(3, 1)
    model.views = 3
    assert model.statistics((thrice,), nt_xent(thrice, views=3))["contrastive_accuracy"] == 1
