"""sinkhorn.py against the textbook loop in float64, and stored codes of two ranks."""
import pytest
import torch
from torch.nn import functional as F

from sinkhorn import sinkhorn
from tests.helpers import ORACLES, run_ranks

TWO_RANKS = torch.load(ORACLES / "sinkhorn_2rank.pt", weights_only=True)["cases"]
EPSILONS = [0.01, 0.02, 0.025, 0.0299, 0.03, 0.05, 0.1]


def textbook(scores, epsilon, iterations):
    """Logarithms of the loop in SwAV's appendix: divide columns, then rows, float64."""
    log_q = scores.double() / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(-2, keepdim=True)
        log_q = log_q - log_q.logsumexp(-1, keepdim=True)
    return log_q.exp()


def cosines(kind, rows=96, prototypes=40, dim=16):
    torch.manual_seed(0)
    samples = F.normalize(torch.randn(rows, dim), dim=1)
    centres = F.normalize(torch.randn(prototypes, dim), dim=1)
    if kind == "clustered":                # near one another, and some prototypes far from all
        samples = F.normalize(samples + 4 * centres[torch.arange(rows) % 5], dim=1)
    if kind == "collapsed":                # one point, and its opposite
        signs = torch.tensor([1.0, -1.0]).repeat(rows // 2)[:, None]
        samples = samples[:1].expand(rows, dim) * signs
        centres = samples[:1].expand(prototypes, dim)
    if kind == "signs":                    # no cosines of anything, but the worst that can come
        return torch.randint(0, 2, (rows, prototypes)) * 2.0 - 1
    return samples @ centres.t()


@pytest.mark.parametrize("kind", ["random", "clustered", "collapsed", "signs"])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_agrees_with_float64(kind, epsilon, dtype, iterations):
    scores = cosines(kind).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(scores, epsilon, iterations)
    assert codes.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = textbook(scores, epsilon, iterations)
    torch.testing.assert_close(codes.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(codes.sum(1), torch.ones(len(codes), dtype=codes.dtype))


@pytest.mark.parametrize("kind", ["random", "clustered", "collapsed", "signs"])
@pytest.mark.parametrize("epsilon", [0.001, 0.003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_finite_down_to_a_thousandth(kind, epsilon, dtype):
    codes = sinkhorn(cosines(kind).to(dtype), epsilon, 3)
    assert codes.isfinite().all()
    torch.testing.assert_close(codes.sum(1), torch.ones(len(codes)))


def test_prototypes_get_equal_shares_when_run_to_convergence():
    codes = sinkhorn(cosines("random"), 0.05, 200)
    torch.testing.assert_close(codes.sum(0), torch.full((40,), 96 / 40), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_several_problems_at_once_are_each_problem_alone(epsilon):
    problems = torch.stack([cosines("random"), cosines("clustered"), cosines("signs")])
    together = sinkhorn(problems, epsilon, 3)
    for codes, scores in zip(together, problems):
        torch.testing.assert_close(codes, sinkhorn(scores, epsilon, 3))


def test_hard_codes_mark_the_largest_entry():
    scores = cosines("random")
    hard = sinkhorn(scores, hard=True)
    assert torch.equal(hard.argmax(1), sinkhorn(scores).argmax(1))
    assert torch.equal(hard.sum(1), torch.ones(96)) and set(hard.unique().tolist()) == {0, 1}


def test_leaves_its_input_alone_and_takes_no_gradient():
    scores = cosines("random").requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn(scores).requires_grad and torch.equal(scores.detach(), before)


@pytest.mark.parametrize("wrong", [dict(epsilon=0.0), dict(iterations=0),
                                   dict(scores=torch.ones(3))])
def test_refuses_what_has_no_meaning(wrong):
    with pytest.raises(ValueError):
        sinkhorn(**{"scores": torch.ones(3, 3)} | wrong)


@pytest.mark.parametrize("scores", [100 * cosines("random"), cosines("random") * torch.nan])
def test_scores_that_are_no_cosines_are_refused_where_it_is_asked(scores):
    assert sinkhorn(scores).isnan().any()               # as the docstring says
    with pytest.raises(ValueError, match="takes cosines, from -1 to 1, and the scores go from"):
        sinkhorn(scores, check=True)
    for dtype in (torch.float32, torch.bfloat16):
        unit = cosines("random").to(dtype)
        assert torch.equal(sinkhorn(unit, check=True), sinkhorn(unit))
    sinkhorn(torch.eye(3, dtype=torch.bfloat16) * 1.0078125, check=True)


@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_never_waits_for_the_device(epsilon, monkeypatch):
    """Reading a number back is what makes the host wait; there must be none."""
    def refuse(*_):
        raise AssertionError("a tensor was read on the host")

    for name in ("item", "__bool__", "__float__", "__int__", "tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    sinkhorn(torch.zeros(2, 4, 8), epsilon, 3)
    sinkhorn(torch.zeros(4, 8), epsilon, 3, hard=True)


@pytest.mark.cuda
@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_on_cuda_without_synchronisation(epsilon):
    scores = cosines("clustered").cuda()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.cuda.set_sync_debug_mode("error")
    try:
        codes = sinkhorn(scores, epsilon, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.backends.cuda.matmul.allow_tf32 = False
    expected = textbook(scores.cpu(), epsilon, 3)
    torch.testing.assert_close(codes.double().cpu(), expected, rtol=0, atol=1e-5)


def solve_on_this_rank(rank, cases):
    import torch.distributed as dist
    calls, plain = [0], dist.all_reduce

    def counted(*args, **kwargs):
        calls[0] += 1
        return plain(*args, **kwargs)

    dist.all_reduce, results = counted, []
    for scores, epsilon, iterations in cases:
        calls[0] = 0
        results.append((sinkhorn(scores[rank], epsilon, iterations), calls[0]))
    return results


def test_two_ranks_solve_one_problem(tmp_path):
    cases = [(case["scores"], case["epsilon"], case["iterations"]) for case in TWO_RANKS]
    scores = cosines("random").view(2, 2, 24, 40)          # (ranks, problems, B, K)
    cases += [(list(scores), epsilon, 3) for epsilon in (0.02, 0.05)]
    for rank, results in enumerate(run_ranks(solve_on_this_rank, tmp_path, cases)):
        for (codes, _), case in zip(results, TWO_RANKS):
            torch.testing.assert_close(codes.double(), case["codes"][rank], rtol=0, atol=1e-6)
        new = len(TWO_RANKS)
        for (codes, calls), (_, epsilon, _) in zip(results[new:], cases[new:]):
            joined = sinkhorn(torch.cat(list(scores), dim=1), epsilon, 3)
            part = joined[:, 24 * rank:24 * rank + 24]
            torch.testing.assert_close(codes, part, rtol=0, atol=1e-6)
            assert calls == (3 if epsilon >= 0.03 else 6)  # for all problems together
