"""Write lightly_pairs.pt: NT-Xent and Barlow Twins of lightly 1.6, losses and gradients.

    python -m tests.oracles.make_lightly_pairs          # needs lightly 1.6

Float64, random embeddings with a mean; second views near first ones.
"""
from pathlib import Path

import torch

# B, D, the temperature or the weight of what is off the diagonal
NT_XENT = [(6, 5, 0.1), (3, 8, 0.5), (9, 4, 0.07)]
BARLOW = [(7, 5, 0.0051), (4, 9, 0.1), (12, 3, 1.0)]


def embeddings(count: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    first, second, mean = (torch.randn(shape, generator=generator, dtype=torch.float64)
                           for shape in ((count, dim), (count, dim), (1, dim)))
    return first + mean, 3 * (first + 0.5 * second) - mean


def make() -> dict:
    from lightly.loss import BarlowTwinsLoss, NTXentLoss
    made = {"nt_xent": [], "barlow": []}
    for name, cases, criterion in (("nt_xent", NT_XENT, NTXentLoss),
                                   ("barlow", BARLOW, BarlowTwinsLoss)):
        for seed, (count, dim, option) in enumerate(cases):
            first, second = (x.requires_grad_() for x in embeddings(count, dim, seed))
            loss = criterion(option)(first, second)
            loss.backward()
            made[name].append({"first": first.detach(), "second": second.detach(), "option": option,
                               "loss": loss.item(), "gradients": [first.grad, second.grad]})
    return made


if __name__ == "__main__":
    torch.save(make(), Path(__file__).with_name("lightly_pairs.pt"))
