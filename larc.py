"""LARC: SGD whose step is, for each tensor, a fixed share of that tensor's norm.

Paper: "Large Batch Training of Convolutional Networks" (arXiv 1708.03888), in the form SwAV and
SEER used (apex' LARC with clip=False around SGD with momentum).

    import torch
    from larc import LARC
    model = torch.nn.Linear(3, 2)
    optimizer = LARC(model.parameters(), lr=4.8, weight_decay=1e-6)
    model(torch.randn(8, 3)).square().mean().backward()
    optimizer.step()

For each tensor p with gradient g:

    g = (g + weight_decay p) * trust_coefficient |p| / (|g| + weight_decay |p| + eps)
    v = momentum v + g;    p = p - lr v

With trust_coefficient 0, of all or of a group of parameters, the rule is plain SGD's: the factor
is 1. Where |p| or |g| is zero, g is used as it is, without weight decay: a bias that starts at zero
moves, and a tensor whose gradient is zero only coasts. A tensor without gradient (None) is skipped.

Differs from the reference (apex): an optimizer, not a wrapper around one; norms and momentum are
taken over all tensors at once (foreach), and no norm ever visits the host.

A step needs seven passes over the parameters' bytes: the norms read p and g; the update reads p, g
and v, and writes p and v. Operation by operation it would be thirteen. On a CPU the update goes
block by block, each of which comes into the cache once; `compiled` makes one kernel of it, for a
GPU. Norms of g that are known already (`gradient_norms`) save a pass.

Tensors may be sharded (DTensors): norms are those of whole tensors, by one all-reduce over the
ranks that share them; the update is of each rank's part.
"""
import math
from typing import Iterable, Iterator, Sequence

import torch
from torch import Tensor

BLOCK = 2 ** 19              # numbers that are updated together on a CPU: p, g and v in 6 MiB


class LARC(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rate.

    params: tensors or parameter groups, as for every torch optimizer.  lr: global rate.
    compiled: the update by torch.compile, which must work for the tensors' device; the first step
    compiles it.
    Defaults are SwAV's. Raises ValueError for a number that is negative or not finite.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust_coefficient: float = 0.001, eps: float = 1e-8, compiled: bool = False):
        numbers = dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                       trust_coefficient=trust_coefficient, eps=eps)
        if not all(0 <= x < math.inf for x in numbers.values()):
            raise ValueError(f"LARC takes finite numbers of at least 0, not {numbers}")
        super().__init__(params, numbers)
        self.compiled = compiled
        self.update = torch.compile(update, dynamic=False) if compiled else update

    @torch.no_grad()
    def step(self, closure=None, gradient_norms: Tensor | None = None):
        """gradient_norms: what norms() gives of the gradients that are there, in the order of the
        groups; None: computed here."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        known = [None] * len(groups) if gradient_norms is None else gradient_norms.split(
            [len(params) for params in groups])
        for group, params, g_norm in zip(self.param_groups, groups, known):
            if params:
                self._step_group(group, params, g_norm)
        return loss

    def _step_group(self, group: dict, params: list[Tensor], g_norm: Tensor | None) -> None:
        grads = [p.grad for p in params]
        momenta = []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(self.state[p]["momentum_buffer"])
        p_norm, g_norm = norms(params), norms(grads) if g_norm is None else g_norm
        decay = group["weight_decay"]
        rate = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
        adapted = (p_norm > 0) & (g_norm > 0)
        if not group["trust_coefficient"]:
            rate, adapted = torch.ones_like(rate), torch.ones_like(adapted)
        g_scale = torch.where(adapted, rate, 1.0)
        p_scale = torch.where(adapted, rate * decay, 0.0)
        step_size = torch.full_like(rate, -group["lr"])     # a tensor: no new graph for a new rate

        scales = (x.unbind() for x in (g_scale, p_scale, step_size))
        tensors = zip(*map(local, (params, grads, momenta)), *scales)
        one_by_one = params[0].is_cpu and not self.compiled
        for some in blocks(tensors) if one_by_one else [zip(*tensors)]:
            self.update(*map(list, some), group["momentum"])


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """(number of tensors,), float32 or better, on their device."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    found = torch._foreach_norm(local(tensors), dtype=wide)
    sharded = [tensor for tensor in tensors if is_sharded(tensor)]
    if sharded:
        from torch.distributed.tensor import DTensor, Partial
        # parts of a tensor: their squares add up, over the ranks that have a part each
        mesh, placements = sharded[0].device_mesh, sharded[0].placements
        squares = torch.stack([x for x, of in zip(found, tensors) if is_sharded(of)]).square()
        sums = DTensor.from_local(squares, mesh, [
            Partial() if placement.is_shard() else placement for placement in placements])
        whole = iter(sums.full_tensor().sqrt().unbind())
        found = [next(whole) if is_sharded(of) else x for x, of in zip(found, tensors)]
    return torch.stack(found)


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this rank has a part."""
    return hasattr(tensor, "to_local")


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Of sharded tensors this rank's parts."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def update(params: list[Tensor], grads: list[Tensor], momenta: list[Tensor], g_scale: list[Tensor],
           p_scale: list[Tensor], step_size: list[Tensor], momentum: float) -> None:
    """The scales are 0-d tensors, one for each of the others."""
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_addcmul_(momenta, grads, g_scale)
    torch._foreach_addcmul_(momenta, params, p_scale)
    torch._foreach_addcmul_(params, momenta, step_size)


def blocks(tensors: Iterable[tuple[Tensor, ...]]) -> Iterator[Iterable[tuple[Tensor, ...]]]:
    """(p, g, v, scales...) of each tensor -> the same of pieces of them, some at a time: at least
    BLOCK numbers, at most twice as many and a row."""
    some, count = [], 0
    for p, g, v, *scales in tensors:
        rows = max(1, BLOCK * len(p) // p.numel()) if p.numel() > BLOCK else None
        for piece in zip(*(x.split(rows) for x in (p, g, v))) if rows else [(p, g, v)]:
            some.append((*piece, *scales))
            count += piece[0].numel()
            if count >= BLOCK:
                yield zip(*some)
                some, count = [], 0
    if some:
        yield zip(*some)
