"""Write swav_loss.pt: codes, loss and gradients of SwAV's loss, six cases.

    python -m tests.oracles.make_swav_loss

Float64, from the definition (Caron et al., arXiv 2006.09882, section 3 and appendix A; the loops
of facebookresearch/swav). E: embeddings (V*B, D), crop-major. P: prototypes (K, D).

    S = E P^T                                   S_v = rows of crop v
    for a in crops_for_assign:
        X = S_a, with a queue S_a and the queue's scores together: N rows
        Q = exp(X / epsilon);  Q = Q / sum(Q)
        repeat iterations:  Q = Q / (column sums) / K;   Q = Q / (row sums) / N
        q_a = N * Q, rows of S_a only           (constant, no gradient)
        l_a = 1/(V-1) * sum over v != a of mean_b( - sum_k q_a[b,k] * log_softmax(S_v / t)[b,k] )
    loss = mean over a of l_a

loss_vissl and loss_vissl_float32 follow VISSL's criterion: codes cast to float32, and everything in
float32, where 1e-12 is added once a prototype's sum is zero. With epsilon 0.01 (stress_eps001) the
latter is a wrong loss: prototypes far from every image underflow.
"""
from pathlib import Path

import numpy
import torch

# name: B, V, K, D, crops_for_assign, epsilon, iterations, temperature
CASES = {"multicrop_2x6": (16, 8, 40, 32, [0, 1], 0.05, 3, 0.1),
         "seer_eps003_it10": (12, 6, 64, 24, [0, 1], 0.03, 10, 0.1),
         "two_crops_k200": (8, 2, 200, 32, [0, 1], 0.05, 3, 0.1),
         "with_queue": (8, 4, 50, 32, [0, 1], 0.05, 3, 0.1),
         "stress_eps001": (12, 3, 30, 16, [0, 1], 0.01, 5, 0.1),
         "assign_1_3": (10, 5, 36, 20, [1, 3], 0.05, 3, 0.2)}
QUEUE = 24                                      # embeddings per assigned crop


def unit(rows: numpy.ndarray) -> torch.Tensor:
    return torch.tensor(rows / numpy.linalg.norm(rows, axis=-1, keepdims=True), dtype=torch.float32)


def inputs(name: str, seed: int) -> dict:
    """Embeddings, the crops of one image near one another, and prototypes: all of unit norm."""
    b, v, k, d, assign, epsilon, iterations, temperature = CASES[name]
    rng = numpy.random.default_rng(seed)
    images, prototypes, noise = rng.standard_normal((b, d)), rng.standard_normal((k, d)), 0.7
    if name == "stress_eps001":         # two groups of images, every third prototype opposite both
        groups, noise = rng.standard_normal((2, d)), 0.2
        images = groups[numpy.arange(b) % 2] + 0.3 * images
        prototypes[:2] = images[:2]
        prototypes[::3] = -groups[0] - groups[1] + 0.3 * prototypes[::3]
    crops = images + noise * rng.standard_normal((v, b, d))
    case = {"name": name, "embedding": unit(crops.reshape(v * b, d)),
            "prototypes": unit(prototypes), "num_crops": v, "crops_for_assign": assign,
            "epsilon": epsilon, "iterations": iterations, "temperature": temperature}
    if name == "with_queue":
        case["queue"] = unit(rng.standard_normal((len(assign), QUEUE, d)))
    return case


def sinkhorn(scores: torch.Tensor, epsilon: float, iterations: int) -> torch.Tensor:
    n, k = scores.shape
    q = torch.exp((scores - scores.max()) / epsilon)        # the maximum cancels in the next line
    q = q / q.sum()
    for _ in range(iterations):
        if (q.sum(0) == 0).any():                           # happens in float32 alone
            q = q + 1e-12
        q = q / q.sum(0) / k
        q = q / q.sum(1, keepdim=True) / n
    return n * q


def codes_of(case: dict, scores: torch.Tensor) -> list[torch.Tensor]:
    crops, codes = scores.detach().chunk(case["num_crops"]), []
    for i, a in enumerate(case["crops_for_assign"]):
        x = crops[a]
        if "queue" in case:
            x = torch.cat([x, case["queue"][i].double() @ case["prototypes"].double().T])
        codes.append(sinkhorn(x, case["epsilon"], case["iterations"])[:len(crops[a])].clone())
    return codes


def loss_of(case: dict, scores: torch.Tensor, codes: list[torch.Tensor]) -> torch.Tensor:
    log_p = (scores / case["temperature"]).log_softmax(1).chunk(case["num_crops"])
    terms = [-(q * log_p[v]).sum(1).mean() for a, q in zip(case["crops_for_assign"], codes)
             for v in range(case["num_crops"]) if v != a]
    return sum(terms) / len(terms)


def expected(case: dict) -> dict:
    e = case["embedding"].double().requires_grad_()
    p = case["prototypes"].double().requires_grad_()
    scores = e @ p.T
    codes = codes_of(case, scores)
    loss = loss_of(case, scores, codes)
    loss.backward()
    result = {"codes": codes, "loss": loss.item(), "grad_embedding": e.grad,
              "grad_prototypes": p.grad}
    if "queue" in case:                                     # newest entries first
        rows = case["embedding"].chunk(case["num_crops"])
        assigned = zip(case["crops_for_assign"], case["queue"])
        return result | {"queue_after": torch.stack([
            torch.cat([rows[a], queue])[:len(queue)] for a, queue in assigned])}
    single = scores.float()
    return result | {"loss_vissl": loss_of(case, scores, [q.float() for q in codes]).item(),
                     "loss_vissl_float32": loss_of(case, single, codes_of(case, single)).item()}


def make() -> dict:
    cases = [inputs(name, seed) for seed, name in enumerate(CASES)]
    return {"cases": [case | expected(case) for case in cases]}


if __name__ == "__main__":
    torch.save(make(), Path(__file__).with_name("swav_loss.pt"))
