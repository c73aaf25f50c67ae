"""BYOL: each view of an image predicts what a slowly moving copy of the network makes of the other.

Paper: "Bootstrap your own latent" (arXiv 2006.07733, section 3.1). This file needs torch alone.

    import torch
    import torchvision
    from methods.byol import BYOL
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    model = BYOL(trunk, head=(512, 64), predictor=(512, 64), steps=1000)
    outputs = model([torch.randn(2 * 4, 3, 64, 64)])            # two views of 4 images
    targets = model.targets(outputs, step=0)                    # (2, 4, 64)
    model.loss(outputs, targets).backward()
    model.before_step(0)                                        # the optimizer's step, then:
    model.after_step(0)                                         # the target network follows

The online network is trunk f, projection g and predictor q, with weights theta; the target network,
with weights xi, is f and g again. Of views v and v', with q = q(g(f(v))) and z' = g_xi(f_xi(v')),

    L = |q / |q| - z' / |z'||^2 = 2 - 2 cos(q, z')                                          (eq. 2)

plus the same with v and v' exchanged: the sum of both, not the mean, here and in the reference.
After each step k of K,

    xi <- tau xi + (1 - tau) theta                                                          (eq. 1)
    tau = 1 - (1 - tau_base) (cos(pi k / K) + 1) / 2                                 (section 3.3)

A training loop calls `forward`, `targets`, `loss`, `before_step` and `after_step`.

Differs from the reference (google-deepmind/deepmind-research, byol):
- both views go through each network together, so that BatchNorm normalises them as one batch;
- the target network begins as a copy of the online one, not with random weights of its own;
- projections, predictions and loss are float32 or better whatever autocast does.
BatchNorm over all ranks, which the reference has, is applied from outside (SyncBatchNorm).

Shapes: B images, C features, D embedding. Rows 0 .. B are of view 1, rows B .. 2B of view 2.
"""
import math
from copy import deepcopy
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BYOL(nn.Module):
    """Online network, target network; the loss of their outputs.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    head: widths of the projection, BatchNorm and ReLU between; the last one is D.
    predictor: widths of the predictor, likewise; it ends at D.
    momentum: tau at the first step; it rises to 1.  steps: of the whole run.
    Raises ValueError for a trunk without num_features, and for widths that do not fit.
    """
    joint = False               # each micro-batch has targets of its own

    def __init__(self, trunk: nn.Module, head: Sequence[int] = (4096, 256),
                 predictor: Sequence[int] = (4096, 256), *, momentum: float = 0.996, steps: int):
        super().__init__()
        if not head or not predictor or min(*head, *predictor) < 1 or head[-1] != predictor[-1]:
            raise ValueError(f"BYOL's projection and predictor end at the same width, not as "
                             f"{tuple(head)} and {tuple(predictor)} do")
        if not isinstance(getattr(trunk, "num_features", None), int):
            raise ValueError("BYOL's trunk returns features (N, C), and has C as num_features")
        self.trunk = trunk
        self.head = perceptron([trunk.num_features, *head])
        self.predictor = perceptron([head[-1], *predictor])
        # note: in training mode, as in the reference; its running statistics are of its own batches
        self.target = deepcopy(nn.Sequential(self.trunk, self.head)).requires_grad_(False)
        self.momentum, self.steps = momentum, steps

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """crops: [(2B, 3, s, s)] -> projections, predictions, the target's projections (2B, D).
        Raises ValueError where crops are of more than one size."""
        crops = list(crops)         # a lazy sequence may compute a crop each time it is asked for
        if len(crops) != 1 or len(crops[0]) % 2:
            raise ValueError(f"BYOL takes two views of one size, not {list(map(len, crops))} crops")
        projections = self.head(self.trunk(crops[0]))                    # (2B, D)
        predictions = self.predictor(projections)                        # (2B, D)
        with torch.no_grad():
            targets = self.target(crops[0])                              # (2B, D)
        return wide(projections), wide(predictions), wide(targets)

    def targets(self, outputs: tuple[Tensor, ...], step: int) -> Tensor:
        """The target's projections of both views, (2, B, D). outputs: of forward."""
        return outputs[2].detach().unflatten(0, (2, -1))

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Eq. 2, both ways. outputs: of forward.  targets: (2, B, D), of the same images."""
        first, second = outputs[1].chunk(2)                              # (B, D), of a view each
        return byol_loss(first, targets[1]) + byol_loss(second, targets[0])

    def before_step(self, step: int) -> None:
        """Between backward and the optimizer's step: nothing."""

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After the optimizer's step; not called where a step is skipped. Eq. 1."""
        online = [*self.trunk.parameters(), *self.head.parameters()]
        tau = momentum_at(step, self.steps, self.momentum)
        torch._foreach_lerp_(list(self.target.parameters()), online, 1 - tau)

    @torch.no_grad()
    def statistics(self, outputs: tuple[Tensor, ...], loss: Tensor) -> dict[str, float]:
        """outputs: of forward. Waits for the device: for log steps only.

        cosine: mean cosine of predictions and targets, 1 - loss / 4. It rises as the network
            learns; at once to 1 where it collapses.
        """
        other_views = outputs[2].roll(len(outputs[2]) // 2, dims=0)
        return {"cosine": F.cosine_similarity(outputs[1], other_views).mean().item()}


def byol_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean of 2 - 2 cos(prediction, target), eq. 2. predictions, targets: (B, D) -> scalar. Targets
    get no gradient. Raises ValueError for other shapes."""
    if predictions.dim() != 2 or predictions.shape != targets.shape:
        raise ValueError(f"predictions and targets (B, D), not {tuple(predictions.shape)} and "
                         f"{tuple(targets.shape)}")
    predictions, targets = (F.normalize(wide(x), dim=1) for x in (predictions, targets.detach()))
    return (2 - 2 * (predictions * targets).sum(1)).mean()


def momentum_at(step: int, steps: int, start: float) -> float:
    """tau: `start` at step 0, rising to 1 at `steps` by half a cosine (section 3.3)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(step / steps, 1))) / 2


def perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear layers, BatchNorm and ReLU between; the last one has no bias, as the reference's."""
    layers = nn.Sequential()
    for w_in, w_out in zip(widths, widths[1:-1]):
        layers.extend([nn.Linear(w_in, w_out), nn.BatchNorm1d(w_out), nn.ReLU(inplace=True)])
    return layers.append(nn.Linear(*widths[-2:], bias=False))


def wide(x: Tensor) -> Tensor:
    """float32 or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
