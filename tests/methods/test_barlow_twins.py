"""methods/barlow_twins.py against eq. 1 and 2 in loops, lightly's loss, closed forms and the joined
batch."""
import pytest
import torch
from torch import nn

from methods.barlow_twins import BarlowTwins, barlow_loss
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

CASES = torch.load(ORACLES / "lightly_pairs.pt", weights_only=True)["barlow"]
METHOD = ("barlow_twins", "BarlowTwins")
SMALL = dict(head=(6,), off_diagonal=0.1, scale=0.3)


def views(count, dim, seed=0):
    """(2, count, dim), float64, with means and deviations of their own."""
    generator = torch.Generator().manual_seed(seed)
    first, second, mean, length = torch.randn(4, count, dim, generator=generator,
                                              dtype=torch.float64)
    return torch.stack([3 * first + mean[0], (first + second) * (1 + length[0].abs())])


def naive(first, second, off_diagonal, scale):
    """Eq. 1 and 2 by their letters, with BatchNorm's biased variance and 1e-5."""
    standard = []
    for z in (first, second):
        mean = sum(z) / len(z)
        var = sum((row - mean) ** 2 for row in z) / len(z)
        standard.append([(row - mean) / (var + 1e-5) ** 0.5 for row in z])
    loss = 0.0
    for i in range(first.shape[1]):
        for j in range(first.shape[1]):
            c = sum(a[i] * b[j] for a, b in zip(*standard)) / len(first)
            loss = loss + ((1 - c) ** 2 if i == j else off_diagonal * c ** 2)
    return scale * loss


# --------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("count, dim, options", [
    (7, 5, (0.0051, 1.0)), (4, 6, (0.5, 0.024)), (2, 3, (1.0, 2.0)), (9, 1, (0.1, 1.0))])
def test_the_loss_and_its_gradient_are_those_of_eq_1_and_2_in_loops(count, dim, options):
    z = views(count, dim).requires_grad_()
    expected = naive(*z, *options)
    gradient, = torch.autograd.grad(expected, z)
    loss = barlow_loss(*z, *options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], gradient, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: barlow_loss(*x, *options), z)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['option']}")
def test_the_loss_and_its_gradient_are_lightlys(case):
    first, second = (case[name].requires_grad_() for name in ("first", "second"))
    loss = barlow_loss(first, second, case["option"])
    assert loss.item() == pytest.approx(case["loss"], rel=1e-12)
    gradients = torch.autograd.grad(loss, (first, second))
    torch.testing.assert_close(list(gradients), case["gradients"], rtol=1e-10, atol=1e-12)


def test_closed_forms():
    """Columns of a Hadamard matrix: no correlation, unit variance. C is 1 / (1 + 1e-5) at most."""
    one = 1 / (1 + 1e-5)
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    z = torch.kron(torch.kron(two, two), two)[:, 1:]                     # (8, 7)
    assert barlow_loss(z, z + 5).item() == pytest.approx(7 * (1 - one) ** 2, rel=1e-6)
    assert barlow_loss(z, -z).item() == pytest.approx(7 * (1 + one) ** 2)
    # every dimension predicted by its neighbour: nothing on the diagonal, seven ones off it
    shifted = barlow_loss(z, z.roll(1, 1), 0.25)
    assert shifted.item() == pytest.approx(7 + 0.25 * 7 * one ** 2)
    repeated = barlow_loss(*z[:, :1].expand(2, 8, 7), 0.25)
    assert repeated.item() == pytest.approx(0.25 * 42 * one ** 2, rel=1e-6)
    assert barlow_loss(torch.ones(8, 7), torch.ones(8, 7)).item() == pytest.approx(7)  # collapsed


def test_defaults_scale_and_views_that_do_not_fit():
    z = views(6, 4)
    loss = barlow_loss(*z)
    assert loss == barlow_loss(*z, 0.0051, 1.0) != barlow_loss(*z, 0.0052)
    assert barlow_loss(*z, scale=0.024).item() == pytest.approx(0.024 * loss.item(), rel=1e-12)
    for first, second in ((z[0], z[1, :5]), (z[0], z[1, :, :3]), (z, z)):
        with pytest.raises(ValueError, match=r"two views \(B, D\), not \("):
            barlow_loss(first, second)


@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_float32_is_near_float64_also_with_a_large_mean(mean):
    z = views(32, 16) / 3 + mean
    single = z.float().requires_grad_()
    double = single.detach().double().requires_grad_()
    losses = [barlow_loss(*x) for x in (single, double)]
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(*pair)[0] for pair in zip(losses, (single, double))]
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_and_loss_stay_float32_under_autocast(dtype):
    model = BarlowTwins(Plain(), (8, 4), scale=1.0)
    with torch.autocast("cpu", dtype):
        outputs = model([torch.randn(6, 3, 4, 4)])
        inside, targets = barlow_loss(*outputs[0].chunk(2)), model.targets(outputs, 0)
        loss = model.loss(outputs, targets)
    assert {x.dtype for x in (*outputs, inside, targets, loss)} == {torch.float32}
    assert inside == barlow_loss(*outputs[0].chunk(2)) == loss
    assert barlow_loss(*outputs[0].to(dtype).chunk(2)).dtype == torch.float32


def test_a_group_of_one_is_this_process(tmp_path):
    z = views(6, 4)
    with group_of_one(tmp_path):
        loss = barlow_loss(*z)
    assert loss == barlow_loss(*z)


def losses_on_this_rank(rank, *batches):
    results = []
    for z in batches:                           # (2, B, D)
        z = z.chunk(2, 1)[rank].contiguous().requires_grad_()
        loss = barlow_loss(*z, 0.1)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0] / 2))    # DDP's mean
    return results


@pytest.mark.long
def test_on_two_ranks_it_is_that_of_the_joined_batch(tmp_path):
    batches = [views(8, 5), views(2, 3), views(10, 12)]
    of_ranks = run_ranks(losses_on_this_rank, tmp_path, *batches)
    for z, (first, second) in zip(batches, zip(*of_ranks)):
        expected = barlow_loss(*z.requires_grad_(), 0.1)
        gradient, = torch.autograd.grad(expected, z)
        assert first[0] == second[0]
        assert first[0].item() == pytest.approx(expected.item(), rel=1e-12)
        joined = torch.cat([first[1], second[1]], 1)
        torch.testing.assert_close(joined, gradient, rtol=1e-10, atol=1e-12)


# ----------------------------------------------------------------------------------- the contract
def plain_step(method, images):
    """The joined batch, without contract: forward, eq. 1, backward."""
    method.zero_grad()
    embeddings, = method([images.flatten(0, 1)])
    loss = naive(*embeddings.chunk(2), method.off_diagonal, method.scale)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in method.named_parameters()}


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 6])
def test_micro_batches_are_the_joined_batch(micro_batches):
    method, images = make(*METHOD, **SMALL), batch(6)
    expected, gradients = plain_step(method, images)
    loss, made, outputs = step(method, images, micro_batches)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert_equal(made, gradients)
    assert outputs[0].numel() == 2 * 6 * 6
    if micro_batches == 2:                      # it could fail: of parts alone they are others
        parts = [plain_step(method, part)[1] for part in images.chunk(2, 1)]
        with pytest.raises(AssertionError):
            assert_equal({name: sum(p[name] for p in parts) / 2 for name in made}, gradients, 0.01)


def test_the_cached_gradient_is_exact_through_the_heads_batchnorm_too():
    method, images = make(*METHOD, **(SMALL | dict(head=(10, 6)))), batch(6)
    expected, gradients = plain_step(method, images)
    loss, made, _ = step(method, images)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-10)
    assert all(torch.allclose(made[name], gradients[name], rtol=1e-8, atol=1e-12) for name in made)


@pytest.mark.long
def test_two_ranks_and_micro_batches_are_the_joined_batch(tmp_path):
    images = batch(8)
    joined = plain_step(make(*METHOD, **SMALL), images)
    assert_ranks_and_micro_batches_are_the_joined_batch(tmp_path, METHOD, SMALL, images, joined)


def test_forward_assigned_and_targets_agree_on_rows():
    method = make(*METHOD, **SMALL)
    assert_rows_agree(method)


def test_a_skipped_step_leaves_no_trace_and_the_state_is_weights_alone():
    assert_the_state_is_weights_alone(make(*METHOD, **SMALL), make(*METHOD, **SMALL))


def test_the_head_is_8192_thrice_without_biases():
    with torch.device("meta"):
        model = BarlowTwins(Plain())
    assert [type(layer) for layer in model.head] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    linears = [layer for layer in model.head if isinstance(layer, nn.Linear)]
    assert [tuple(x.weight.shape) for x in linears] == [(8192, 3), (8192, 8192), (8192, 8192)]
    assert all(x.bias is None for x in linears)
    assert (model.off_diagonal, model.scale) == (0.0051, 0.024)
    for trunk, head in ((nn.Identity(), (8,)), (Plain(), ()), (Plain(), (8, 0))):
        with pytest.raises(ValueError, match="num_features and a head of one width or more"):
            BarlowTwins(trunk, head)


def test_a_few_steps_lower_the_loss():
    method = make(*METHOD, **(SMALL | dict(scale=1.0)))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.02)
    losses = []
    for i in range(12):
        losses.append(step(method, batch(6), 1 + i % 2)[0].item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


# --------------------------------------------------------------------------------- the statistics
def test_statistics_are_of_the_cross_correlation():
    model, z = BarlowTwins(Plain(), (5,)), views(16, 5)
    joined = torch.corrcoef(z.transpose(1, 2).flatten(0, 1))[:5, 5:]     # numpy's definition
    diagonal = joined.diagonal().clone()
    expected = {"correlation_diagonal": diagonal.mean().item(),
                "correlation_off_diagonal": joined.fill_diagonal_(0).square().sum().item() ** 0.5
                / 20 ** 0.5}
    for outputs in ((z,), (z.flatten(0, 1).requires_grad_(),)):
        assert model.statistics(outputs, barlow_loss(*z)) == pytest.approx(expected, rel=1e-4)
    same = torch.randn(64, 1).expand(2, 64, 8)
    assert model.statistics((same,), None) == pytest.approx(dict.fromkeys(expected, 1), rel=1e-3)
    point = model.statistics((torch.ones(2, 64, 8),), None)
    assert point == dict.fromkeys(expected, 0)


def test_statistics_of_one_dimension_have_nothing_off_the_diagonal():
    z = torch.randn(8, 1).expand(2, 8, 1)
    assert BarlowTwins(Plain(), (1,)).statistics((z,), None)["correlation_off_diagonal"] == 0
