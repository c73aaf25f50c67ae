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

Where |p| or |g| is zero, g is used as it is, without weight decay: a bias that starts at zero
moves, and a tensor whose gradient is zero only coasts. A tensor without gradient (None) is skipped.

Differs from the reference (apex): an optimizer, not a wrapper around one; norms and momentum are
taken over all tensors at once (foreach), and no norm ever visits the host. On a CPU the update goes
block by block: p, g and v come into the cache once and p and v leave it once, so with the norms a
step passes over memory seven times, where tensor by tensor it would be thirteen.
"""
import math
from typing import Iterable, Iterator

import torch
from torch import Tensor

BLOCK = 2 ** 19              # numbers that are updated together on a CPU: p, g and v in 6 MiB


class LARC(torch.optim.Optimizer):
    """SGD with layer-wise adaptive rate.

    params: tensors or parameter groups, as for every torch optimizer.  lr: global rate.
    Defaults are SwAV's. Raises ValueError for a number that is negative or not finite.
    """

    def __init__(self, params, lr: float, momentum: float = 0.9, weight_decay: float = 0.0,
                 trust_coefficient: float = 0.001, eps: float = 1e-8):
        numbers = dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                       trust_coefficient=trust_coefficient, eps=eps)
        if not all(0 <= x < math.inf for x in numbers.values()):
            raise ValueError(f"LARC takes finite numbers of at least 0, not {numbers}")
        super().__init__(params, numbers)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step_group(params, group)
        return loss

    def _step_group(self, params: list[Tensor], group: dict) -> None:
        grads = [p.grad for p in params]
        momenta = []
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta.append(self.state[p]["momentum_buffer"])
        # (number of tensors,), on the device: one small vector instead of a scalar a tensor
        wide = torch.promote_types(params[0].dtype, torch.float32)
        p_norm = torch.stack(torch._foreach_norm(params, dtype=wide))
        g_norm = torch.stack(torch._foreach_norm(grads, dtype=wide))
        decay = group["weight_decay"]
        rate = group["trust_coefficient"] * p_norm / (g_norm + decay * p_norm + group["eps"])
        adapted = (p_norm > 0) & (g_norm > 0)
        g_scale = torch.where(adapted, rate, 1.0)
        p_scale = torch.where(adapted, rate * decay, 0.0)

        tensors = zip(params, grads, momenta, g_scale.unbind(), p_scale.unbind())
        for params, grads, momenta, g_scale, p_scale in (
                blocks(tensors) if params[0].is_cpu else [zip(*tensors)]):
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_addcmul_(momenta, grads, g_scale)
            if decay:
                torch._foreach_addcmul_(momenta, params, p_scale)
            torch._foreach_add_(params, momenta, alpha=-group["lr"])


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
