"""Sinkhorn-Knopp: assign samples to prototypes so that every prototype gets an equal share.

Paper: SwAV (arXiv 2006.09882, section 3.1 and appendix A.1); the iteration is Cuturi's
(arXiv 1306.0895). The codes are Q = diag(u) exp(scores / epsilon) diag(v), with u and v found by
making the columns (prototypes) and the rows (samples) sum to equal shares, in turn.

    import torch
    from torch.nn.functional import normalize
    from sinkhorn import sinkhorn
    scores = normalize(torch.randn(64, 32)) @ normalize(torch.randn(300, 32)).T      # cosines
    codes = sinkhorn(scores, epsilon=0.05, iterations=3)        # (64, 300), every row sums to 1

The same call works on one process and in a process group: there, the samples of all ranks are one
problem, and only the sums over prototypes travel, `iterations` times (K numbers a problem).

Differs from the textbook loop, which divides the whole matrix twice an iteration:
- the matrix is exponentiated once and read once an iteration; only u and v change;
- no constant (number of samples, of prototypes, of ranks) is needed: each step cancels it;
- scores are cosines, so |scores / epsilon| <= 1 / epsilon is known beforehand. From epsilon = 0.03
  up, exp and its products stay inside float32; below, logarithms in float64 are used. The choice
  hangs on epsilon alone, never on data: nothing waits for the device.

Shapes: A problems, B samples on this process, K prototypes.
"""
import math

import torch
import torch.distributed as dist
from torch import Tensor

# u and v stay within K * exp(2 / epsilon): 1.5e33 at 0.03 and K = 16,000; float32 ends at 3.4e38.
SAFE_EPSILON = 0.03
BLOCK = 2 ** 19              # numbers in a block of rows on a CPU: 2 MiB of float32


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3,
             group: dist.ProcessGroup | None = None, hard: bool = False,
             check: bool = False) -> Tensor:
    """Equal-partition assignment of samples to prototypes.

    scores: cosines, (B, K), or (A, B, K) for A problems solved at once with the same collectives.
        Any float type; the arithmetic is float32 or better whatever autocast does. Other scores,
        as products of vectors that are not of unit norm, overflow and give NaN.
    epsilon: the smaller, the closer to a one-to-one assignment; 0.05 (SwAV), 0.03 (SEER-10B).
    iterations: 3 (SwAV) or 10 (SEER).
    group: the processes that share the problem; None: the default group if there is one.
    hard: one-hot codes, the largest entry of each row.
    check: whether this process' scores are looked at first, which waits for the device.

    Returns codes in the shape of scores, float32 (float64 for float64), rows sum to 1.
    Raises ValueError for a wrong number of dimensions, epsilon <= 0 or iterations < 1; with check,
    for scores that are not cosines.
    """
    if scores.dim() not in (2, 3) or epsilon <= 0 or iterations < 1:
        raise ValueError(f"sinkhorn takes (B, K) or (A, B, K) scores, epsilon > 0 and iterations "
                         f">= 1, not {tuple(scores.shape)}, {epsilon} and {iterations}")
    if check and not scores.abs().max() <= 1.01:             # bf16 rounds 1 to at most 1.008
        raise ValueError("sinkhorn takes cosines, from -1 to 1, and the scores go from "
                         f"{scores.min():g} to {scores.max():g}: normalise both vectors")
    problems = scores if scores.dim() == 3 else scores[None]             # (A, B, K)
    solve = _scaling if epsilon >= SAFE_EPSILON else _log_domain
    with torch.autocast(scores.device.type, enabled=False):
        codes = solve(problems, epsilon, iterations, group)
    if hard:
        codes = torch.zeros_like(codes).scatter_(-1, codes.argmax(-1, keepdim=True), 1.0)
    return codes.view(scores.shape)


def _scaling(scores: Tensor, epsilon: float, iterations: int, group) -> Tensor:
    """Scale rows and columns of exp(scores / epsilon), a block of rows at a time.

    A block stays in the processor's cache while its u is found and its share of the next columns'
    sums is taken, so an iteration reads the matrix once. exp2 is a cheaper instruction than exp.
    """
    problems, rows, prototypes = scores.shape
    wide = torch.promote_types(scores.dtype, torch.float32)
    matrix = torch.empty(scores.shape, dtype=wide, device=scores.device)            # (A, B, K)
    height = max(1, BLOCK // prototypes) if scores.device.type == "cpu" else rows
    blocks = [(a, scores[a, start:start + height], matrix[a, start:start + height])
              for a in range(problems) for start in range(0, rows, height)]
    columns = matrix.new_zeros(problems, prototypes)                     # (A, K)
    ones = matrix.new_ones(height)
    for a, source, block in blocks:
        torch.mul(source.to(wide), math.log2(math.e) / epsilon, out=block).exp2_()
        columns[a].addmv_(block.t(), ones[:len(block)])                  # u = 1
    for _ in range(iterations - 1):
        v = rows / (prototypes * _sum_over_ranks(columns, group))
        columns = torch.zeros_like(v)
        for a, _, block in blocks:
            u = block.mv(v[a]).reciprocal_()                             # (height,)
            columns[a].addmv_(block.t(), u)
    v = rows / (prototypes * _sum_over_ranks(columns, group))
    for a, _, block in blocks:
        block *= v[a]
        block *= block.sum(1, keepdim=True).reciprocal_()                # the last u
    return matrix


def _log_domain(scores: Tensor, epsilon: float, iterations: int, group) -> Tensor:
    """The same iteration on logarithms, in float64: exact where exp(1 / epsilon) overflows."""
    device = scores.device if scores.device.type != "mps" else "cpu"     # MPS has no float64
    logits = scores.to(device, torch.float64) / epsilon                  # (A, B, K)
    log_u = logits.new_zeros(logits.shape[:2])                           # (A, B)
    for _ in range(iterations):
        columns = torch.logsumexp(logits + log_u[..., None], dim=1)      # (A, K)
        largest = _max_over_ranks(columns, group)
        log_v = -largest - _sum_over_ranks((columns - largest).exp(), group).log()
        log_u = -torch.logsumexp(logits + log_v[:, None], dim=2)
    codes = torch.softmax(logits + log_v[:, None], dim=2)
    return codes.to(scores.device, torch.promote_types(scores.dtype, torch.float32))


def _sum_over_ranks(x: Tensor, group) -> Tensor:
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, group=group)
    return x


def _max_over_ranks(x: Tensor, group) -> Tensor:
    x = x.clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, dist.ReduceOp.MAX, group=group)
    return x
