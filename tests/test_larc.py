"""larc.py against stored parameters of five steps (apex' LARC around SGD, float64)."""
import copy

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import larc
from bench.baseline import plain_larc
from larc import LARC
from tests.helpers import ORACLES, run_ranks

CASES = torch.load(ORACLES / "larc.pt", weights_only=True)["cases"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_five_steps(case):
    params = [torch.nn.Parameter(p.clone()) for p in case["params"]]
    optimizer = LARC(params, lr=1.0, momentum=case["momentum"], weight_decay=case["weight_decay"],
                     trust_coefficient=case["trust_coefficient"], eps=case["eps"])
    for lr, grads, expected in zip(case["lrs"], case["grads"], case["expected"]):
        optimizer.param_groups[0]["lr"] = lr
        for p, grad in zip(params, grads):
            p.grad = grad.clone()
        optimizer.step()
        for p, value, grad in zip(params, expected, grads):
            torch.testing.assert_close(p.detach().double(), value, rtol=0, atol=2e-7)
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, grads))


def test_without_a_trust_coefficient_it_is_torchs_sgd():
    """Of a group, beside one that is adapted; also for a tensor of zeros, which SGD decays."""
    torch.manual_seed(0)
    plain = [torch.nn.Parameter(torch.randn(4, dtype=torch.float64)),
             torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))]
    adapted = torch.nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
    theirs = copy.deepcopy(plain)
    sgd = torch.optim.SGD(theirs, lr=0.3, momentum=0.9, weight_decay=0.01)
    ours = LARC([{"params": [adapted]}, {"params": plain, "trust_coefficient": 0.0}], lr=0.3,
                momentum=0.9, weight_decay=0.01)
    for _ in range(4):
        adapted.grad = torch.randn_like(adapted)
        for p, other in zip(plain, theirs):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        before = adapted.detach().clone()
        ours.step()
        sgd.step()
        for p, other in zip(plain, theirs):
            torch.testing.assert_close(p, other, rtol=1e-12, atol=1e-12)
        assert 0 < (adapted - before).norm() < 0.02 * before.norm()


def test_a_parameter_without_gradient_stays_and_keeps_no_state():
    moving, still = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = LARC([moving, still], lr=1.0, weight_decay=0.1)
    moving.grad = torch.ones(3)
    optimizer.step()
    assert (still == 1).all() and (moving < 1).all() and still not in optimizer.state


def test_resumed_from_its_state_it_goes_on_bitwise():
    def steps(p, optimizer, seeds):
        for seed in seeds:
            p.grad = torch.randn(5, generator=torch.Generator().manual_seed(seed))
            optimizer.step()

    whole = torch.nn.Parameter(torch.ones(5))
    optimizer = LARC([whole], lr=2.0, weight_decay=1e-3)
    steps(whole, optimizer, [1, 2])
    part = torch.nn.Parameter(whole.detach().clone())
    resumed = LARC([part], lr=2.0, weight_decay=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(whole, optimizer, [3, 4])
    steps(part, resumed, [3, 4])
    assert torch.equal(whole, part)


def test_float64_parameters():
    case = CASES[0]
    params = [torch.nn.Parameter(p.double()) for p in case["params"]]
    optimizer = LARC(params, lr=case["lrs"][0], weight_decay=case["weight_decay"])
    for p, grad in zip(params, case["grads"][0]):
        p.grad = grad.double()
    optimizer.step()
    for p, value in zip(params, case["expected"][0]):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-12)


def some_tensors(device="cpu"):
    """A vector, a matrix, kernels channels-last, a number, zeros, and one with a gradient of 0."""
    generator = torch.Generator().manual_seed(0)
    shapes = (7,), (40, 33), (24, 8, 3, 3), (), (5,), (6,)
    params = [torch.randn(shape, generator=generator) for shape in shapes]
    params[2] = params[2].to(memory_format=torch.channels_last)
    params[4].zero_()
    params = [torch.nn.Parameter(p.to(device)) for p in params]
    for p in params:
        # contiguous, also that of the kernels
        p.grad = torch.randn(p.shape, generator=generator).to(device)
    params[5].grad.zero_()
    return params


def take_steps(params, optimizer):
    for step in range(3):
        for p in params:
            p.grad.mul_(1 + step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("block", [1, 20, 300, 10 ** 9])
def test_blocks_change_no_bit(block, monkeypatch):
    """Of every tensor each number is updated, once, by its own tensor's rate."""
    params = some_tensors()
    whole = take_steps(params, LARC(params, lr=100.0, weight_decay=1e-2))
    monkeypatch.setattr(larc, "BLOCK", block)
    again = some_tensors()
    assert all(map(torch.equal, whole, take_steps(again, LARC(again, lr=100.0, weight_decay=1e-2))))
    assert (len(list(larc.blocks((p, p, p) for p in again))) > 1) == (block < 10 ** 9)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_plain_loop(device):
    """Also on a GPU, where ours asks the device for nothing."""
    params, others = some_tensors(device), some_tensors(device)
    optimizer = LARC(params, lr=100.0, weight_decay=1e-2)
    plain = torch.optim.SGD(others, lr=100.0, momentum=0.9)
    for step in range(3):
        for p, q in zip(params, others):
            q.grad = p.grad.clone()                                         # the loop changes it
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        plain_larc(others, plain, 1e-2)
        for p, q in zip(params, others):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert not torch.equal(params[0], some_tensors(device)[0])


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "trust_coefficient", "eps"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_settings_that_are_negative_or_not_finite_are_refused(name, value):
    with pytest.raises(ValueError, match=f"finite numbers of at least 0, .*'{name}': {value}"):
        LARC([torch.nn.Parameter(torch.ones(1))], **{"lr": 1.0} | {name: value})


def gradient_norms(params):
    return larc.norms([p.grad for p in params])


def test_norms_that_are_known_are_not_computed_again(monkeypatch):
    """The same bits, also in groups, with a parameter without gradient and through GradScaler."""
    whole, params = some_tensors(), some_tensors()
    whole[1].grad = params[1].grad = None
    kept = [p for p in params if p.grad is not None]
    for tensors, known in ((whole, None), (params, gradient_norms(kept))):
        optimizer = LARC([{"params": tensors[:3]}, {"params": tensors[3:]}], 100.0,
                         weight_decay=1e-2)
        read = []
        monkeypatch.setattr(larc, "norms", lambda tensors, norms=larc.norms: (
            read.extend(tensors) or norms(tensors)))
        torch.amp.GradScaler("cpu", enabled=False).step(optimizer, gradient_norms=known)
        monkeypatch.undo()
        assert len(read) == len(kept) * (2 - (known is not None))
    assert all(map(torch.equal, whole, params))
    with pytest.raises(RuntimeError):
        optimizer.step(gradient_norms=torch.ones(3))


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.long),
                                    pytest.param("cuda", marks=pytest.mark.cuda)])
def test_the_compiled_update_passes_over_memory_five_times(device, monkeypatch):
    """By Inductor's count of the bytes that its kernels read and write: p, g and v in, p and v out.
    With a norm of p, and one of g by whoever checks that it is finite, a step makes seven passes.
    One graph for all steps, whose rates differ; the numbers are those of the plain update."""
    from torch._inductor import compile_fx, metrics
    plain, params = some_tensors(device), some_tensors(device)
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda level: True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    metrics.reset()
    optimizer = LARC(params, 100.0, weight_decay=1e-2, compiled=True)
    other = LARC(plain, 100.0, weight_decay=1e-2)
    with torch._inductor.utils.fresh_cache():
        for step in range(3):
            for p, q in zip(params, plain):
                p.grad.mul_(1 + step)
                q.grad.mul_(1 + step)
            optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = 100.0 / (1 + step)
            optimizer.step(gradient_norms=gradient_norms(params))
            other.step()
    for p, q in zip(params, plain):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    size, scalars = sum(p.nbytes for p in params), 3 * 4 * len(params)
    assert 5 * size <= metrics.num_bytes_accessed <= 5 * size + scalars


# ------------------------------------------------------------------------------- sharded tensors
def shards_on_a_rank(rank, sizes):
    """Norms of tensors, whole and sharded, with the number of collectives that these took; then
    the tensors after three steps."""
    mesh = init_device_mesh("cpu", sizes)
    placements = [Replicate()] * (len(sizes) - 1) + [Shard(0)]

    def sharded(x):                             # a number has no rows
        return distribute_tensor(x, mesh, placements) if x.dim() else x

    params, parts = ([torch.nn.Parameter(p.detach().double()) for p in some_tensors()]
                     for _ in range(2))
    parts = [torch.nn.Parameter(sharded(p.detach().contiguous())) for p in parts]
    for p, part, x in zip(params, parts, some_tensors()):
        p.grad, part.grad = x.grad.double(), sharded(x.grad.double())
    expected, other = larc.norms(params), larc.norms([p.grad for p in params])
    with CommDebugMode() as collectives:
        norms = larc.norms(parts)
    torch.testing.assert_close(norms, expected, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient_norms(parts), other, rtol=1e-14, atol=0)
    whole = take_steps(params, LARC(params, lr=100.0, weight_decay=1e-2))
    take_steps(parts, LARC(parts, lr=100.0, weight_decay=1e-2))
    counts = {str(kind): count for kind, count in collectives.get_comm_counts().items()}
    return whole, [p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
                   for p in parts], counts, min(p.to_local().numel() for p in parts if p.dim())


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 2)])
def test_shards_step_as_whole_tensors_do(sizes, tmp_path):
    """On 4 ranks a tensor of 5 rows leaves one without any. Norms are those of whole tensors, by
    one all-reduce for all of them."""
    ranks = run_ranks(shards_on_a_rank, tmp_path, sizes, world=4 if sizes != (2,) else 2)
    for whole, mine, counts, _ in ranks:
        torch.testing.assert_close(mine, whole, rtol=1e-12, atol=0)
        assert [*counts.values()] == [1] and "all_reduce" in [*counts][0], counts
    assert (min(smallest for *_, smallest in ranks) == 0) == (sizes == (4,))
