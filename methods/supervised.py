"""Supervised: learn the labels, as a yardstick for the methods that have none.

    import torch
    import torchvision
    from methods.supervised import Supervised
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    labels = torch.tensor([0, 1, 2, 0, 1, 2])                   # of all images of the set
    model = Supervised(trunk, labels, classes=3, counts=(1,))
    model.images_of = lambda step: torch.tensor([5, 0, 3, 1])   # the images of a step
    outputs = features, scores = model([torch.randn(1 * 4, 3, 64, 64)])
    targets = model.targets(outputs, step=0)                    # (1, 4)
    loss = model.loss(outputs, targets)
    loss.backward()

Cross-entropy of a linear layer on the trunk's features, usually of one crop an image (ResNet: arXiv
1512.03385; RegNet: 2003.13678).

A training loop sets images_of: step -> int64 (n*B,), the numbers (0 .. N-1) of the images that this
rank's n micro-batches show. It calls targets for each micro-batch in order, loss, before_step and
after_step. There is no state but the weights.

Differs from the reference (torchvision's training):
- the last layer and the loss are float32 or better whatever autocast does.

Shapes: N images, B of a micro-batch, V crops, C features. Rows are crop-major.
"""
import math
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Supervised(nn.Module):
    """Trunk and a linear layer `fc`, initialised as that of torchvision's RegNets.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    labels: int64 (N,), of all images, from 0 to classes - 1; they stay on the host.
    counts: number of crops of each size.
    Raises ValueError for labels of another type or shape, or outside the classes.
    """
    joint = False                       # targets are of a micro-batch
    images_of = None                    # set by the training loop

    def __init__(self, trunk: nn.Module, labels: Tensor, classes: int,
                 counts: Sequence[int] = (1,)):
        super().__init__()
        if labels.dtype != torch.int64 or labels.dim() != 1 or not len(labels):
            raise ValueError(f"labels are int64 (N,), not {labels.dtype} {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"{classes} classes have labels from 0 to {classes - 1}, not from "
                             f"{labels.min()} to {labels.max()}")
        self.trunk, self.fc = trunk, nn.Linear(trunk.num_features, classes)
        nn.init.normal_(self.fc.weight, 0.0, 0.01)
        nn.init.zeros_(self.fc.bias)
        self.labels, self.crops = labels.cpu(), sum(counts)
        self.step, self.shown, self.latest = -1, 0, None                 # latest targets (1, B)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """crops, one (count * B, 3, s, s) per size -> features (V*B, C), scores (V*B, classes)."""
        features = torch.cat([self.trunk(images) for images in crops])
        with torch.autocast(features.device.type, enabled=False):
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            return features, self.fc(features)

    def targets(self, outputs: tuple[Tensor, Tensor], step: int) -> Tensor:
        """Labels (1, B) of the step's next B images. outputs: of forward."""
        images, batch = self.images_of(step), len(outputs[0]) // self.crops
        if step != self.step or self.shown >= len(images):
            self.step, self.shown = step, 0
        rows = images[self.shown:self.shown + batch]
        self.shown += batch
        self.latest = self.labels[rows].to(outputs[0].device)[None]
        return self.latest

    def loss(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """Mean cross-entropy over all crops. targets: (1, B), of the same images."""
        return F.cross_entropy(outputs[1], targets[0].repeat(self.crops))

    def before_step(self, step: int) -> None:
        """Nothing."""

    def after_step(self, step: int) -> None:
        """Nothing."""

    def statistics(self, outputs: tuple[Tensor, Tensor], loss: Tensor) -> dict[str, float]:
        """top1: share of the crops whose highest score is their label's. outputs: of forward, of
        the latest micro-batch. loss_over_ln_k: 1 when the predictions say nothing, falling."""
        right = outputs[1].argmax(1) == self.latest[0].repeat(self.crops)
        return {"loss_over_ln_k": loss.item() / math.log(max(self.fc.out_features, 2)),
                "top1": right.double().mean().item()}
