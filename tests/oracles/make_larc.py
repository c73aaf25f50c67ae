"""Write larc.pt: SGD with LARC, all parameters after each of five steps.

    python -m tests.oracles.make_larc

Float64, from the definition (You et al., arXiv 1708.03888; the variant of apex.parallel.LARC
without clipping). Per step, for a parameter p with gradient g, |.| the L2 norm of the tensor:

    if |p| != 0 and |g| != 0:
        g = (g + weight_decay * p) * trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)
    v = momentum * v + g            v = 0 at the start
    p = p - lr * v

Otherwise g is used as it is: no weight decay and no scaling. bn.bias starts at zero, linear.bias
has a zero gradient at the 2nd and 4th step, frozen.weight at every step.
"""
from pathlib import Path

import numpy
import torch

SETTINGS = {"momentum": 0.9, "trust_coefficient": 0.001, "clip": False, "eps": 1e-8,
            "nesterov": False, "lrs": [0.3, 1.2, 2.4, 2.1, 0.6]}
# name: shape, standard deviation of the start values and of the gradients
TENSORS = {"conv.weight": ((8, 4, 3, 3), 0.2, 0.01), "bn.weight": ((8,), 0.0, 0.002),
           "bn.bias": ((8,), 0.0, 0.005), "linear.weight": ((10, 16), 0.3, 0.03),
           "linear.bias": ((10,), 0.4, 0.02), "frozen.weight": ((6, 5), 0.5, 0.0),
           "scalar": ((1,), 0.5, 0.02)}


def inputs(name: str, weight_decay: float, seed: int) -> dict:
    """Settings, start values and the gradients of every step."""
    rng = numpy.random.default_rng(seed)

    def draw(shape, deviation):
        return torch.tensor(rng.standard_normal(shape) * deviation, dtype=torch.float32)

    params = [draw(shape, deviation) for shape, deviation, _ in TENSORS.values()]
    params[1].fill_(1)
    grads = [[draw(shape, deviation) for shape, _, deviation in TENSORS.values()]
             for _ in SETTINGS["lrs"]]
    grads[1][4].zero_()
    grads[3][4].zero_()
    return {"name": name, "param_names": list(TENSORS), "weight_decay": weight_decay, **SETTINGS,
            "params": params, "grads": grads}


def expected(case: dict) -> list[list[torch.Tensor]]:
    """The parameters after each step, float64."""
    decay, trust = case["weight_decay"], case["trust_coefficient"]
    params = [p.double() for p in case["params"]]
    velocities = [torch.zeros_like(p) for p in params]
    after = []
    for lr, grads in zip(case["lrs"], case["grads"]):
        for i, (p, g) in enumerate(zip(params, grads)):
            g = g.double()
            p_norm, g_norm = p.square().sum().sqrt(), g.square().sum().sqrt()
            if p_norm != 0 and g_norm != 0:
                g = (g + decay * p) * trust * p_norm / (g_norm + decay * p_norm + case["eps"])
            velocities[i] = case["momentum"] * velocities[i] + g
            params[i] = p - lr * velocities[i]
        after.append(list(params))
    return after


def make() -> dict:
    cases = [inputs("wd1e-5", 1e-5, seed=0), inputs("wd1e-2", 1e-2, seed=1)]
    return {"cases": [case | {"expected": expected(case)} for case in cases]}


if __name__ == "__main__":
    torch.save(make(), Path(__file__).with_name("larc.pt"))
