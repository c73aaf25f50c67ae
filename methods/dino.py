"""DINO: a student predicts, from any crop, what a slowly moving teacher makes of the large ones.

Paper: arXiv 2104.14294, section 3.1. This file needs torch alone.

    import torch
    import torchvision
    from methods.dino import DINO
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    model = DINO(trunk, head=(512, 512, 64), prototypes=300, counts=(2, 6), steps=1000)
    outputs = model([torch.randn(2 * 4, 3, 64, 64), torch.randn(6 * 4, 3, 32, 32)])  # of 4 images
    targets = model.targets(outputs, step=0)                    # (2, 4, 300)
    model.loss(outputs, targets).backward()
    model.before_step(0)                                        # the optimizer's step, then:
    model.after_step(0)                                         # teacher and centre follow

With student s, teacher t, centre c, the two large crops x1 and x2, and V all crops:

    P_s = softmax(s(x) / tau_s),   P_t = softmax((t(x) - c) / tau_t)                        (eq. 1)
    loss = mean over x in {x1, x2}, x' in V other than x, of  -P_t(x) log P_s(x')           (eq. 3)
    then  theta_t <- lambda theta_t + (1 - lambda) theta_s,  lambda rising to 1 by a cosine,
    and   c <- m c + (1 - m) mean of t(x), of the whole batch                               (eq. 4)

The centre keeps one output from taking all, a small tau_t all from becoming equal.

Differs from the reference (facebookresearch/dino): tau_t rises by steps, not epochs; heads of any
width begin with the gain of 2048's; what follows is float32 or better whatever autocast does.

Shapes: B images, V crops, C features, D bottleneck, K outputs. Rows are crop-major.
"""
import math
from copy import deepcopy
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class DINO(nn.Module):
    """Student, teacher and centre; targets and loss of their outputs.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    head, prototypes, head_bn: widths, K, and BatchNorm of the head, as in Head.
    momentum: lambda at step 0; it is 1 after `steps`, the whole run.
    teacher_temperature: tau_t at step 0, and from step `warmup` on; linear between.
    frozen_steps: of the last layer, at first.  counts: crops of each size; x1, x2 are the first.
    Raises ValueError for a trunk without num_features, and fewer crops than x1 and x2."""
    joint = False               # each micro-batch has targets of its own

    def __init__(self, trunk: nn.Module, head: Sequence[int] = (2048, 2048, 256),
                 prototypes: int = 65536, head_bn: bool = False, *, momentum: float = 0.996,
                 teacher_temperature: tuple[float, float] = (0.04, 0.07), warmup: int = 0,
                 frozen_steps: int = 0, steps: int, counts: Sequence[int] = (2, 8),
                 student_temperature: float = 0.1):
        super().__init__()
        if not isinstance(getattr(trunk, "num_features", None), int) or counts[0] < 2:
            raise ValueError("DINO needs trunk.num_features, and two crops of the first size")
        self.trunk, self.head = trunk, Head([trunk.num_features, *head], prototypes, head_bn)
        self.teacher = deepcopy(nn.Sequential(self.trunk, self.head)).requires_grad_(False)
        self.register_buffer("center", torch.zeros(prototypes))          # (K,)
        self.momentum, self.steps, self.frozen_steps = momentum, steps, frozen_steps
        self.warmup, self.temperatures = warmup, (student_temperature, *teacher_temperature)
        self.counts, self.collected, self.latest = list(counts), [], []  # lists of mean t(x), (K,)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """crops, one (count * B, 3, s, s) per size -> the student's bottleneck (V*B, D) and outputs
        (V*B, K), the teacher's outputs (2*B, K)."""
        crops = list(crops)         # a lazy sequence may compute a crop each time it is asked for
        embeddings, student = self.head(torch.cat([self.trunk(images) for images in crops]))
        with torch.no_grad():
            large = crops[0][:2 * len(crops[0]) // self.counts[0]]       # (2*B, 3, s, s)
            return embeddings, student, self.teacher(large)[1]           # (2*B, K)

    def targets(self, outputs: tuple[Tensor, ...], step: int) -> Tensor:
        """(t(x) - c) / tau_t of x1 and x2, (2, B, K); t(x) is collected for the centre."""
        self.collected.append(outputs[2].mean(0))
        _, first, last = self.temperatures
        tau = first + (last - first) * step / self.warmup if step < self.warmup else last
        return ((outputs[2] - self.center) / tau).unflatten(0, (2, -1))

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """outputs: of forward.  targets: (2, B, K), of the same images."""
        return dino_loss(outputs[1], targets.flatten(0, 1), torch.zeros_like(self.center),
                         sum(self.counts), self.temperatures[0], teacher_temperature=1.0)

    def before_step(self, step: int) -> None:
        """Between backward and the optimizer's step; what a skipped step collected is dropped."""
        self.latest, self.collected = self.collected, []
        if step < self.frozen_steps:
            self.head.last.weight.grad = None       # dropped, not turned off: DDP expects it

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After the optimizer's step; not called where a step is skipped. A collective."""
        student = [*self.trunk.parameters(), *self.head.parameters()]
        fall = (1 + math.cos(math.pi * min(step / self.steps, 1))) / 2   # from 1 to 0
        torch._foreach_lerp_(list(self.teacher.parameters()), student, (1 - self.momentum) * fall)
        mean = torch.stack(self.latest).mean(0)                          # (K,)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.center.lerp_(mean, 0.1)                                     # eq. 4, m 0.9

    @torch.no_grad()
    def statistics(self, outputs: tuple[Tensor, ...], loss: Tensor) -> dict[str, float]:
        """Waits for the device. loss_over_ln_k: 1 when nothing is predicted. mean_entropy: of the
        mean P_t (at the last tau_t), over ln K; 1 is uniform, 0 one output. outputs_used: share of
        the outputs, of at most N, that are some row's largest."""
        logits = (outputs[2] - self.center) / self.temperatures[2]     # (N, K)
        p, ln_k = torch.softmax(logits, dim=1).mean(0), math.log(logits.shape[1])
        return {"loss_over_ln_k": loss.item() / ln_k,
                "mean_entropy": -torch.xlogy(p, p).sum().item() / ln_k,
                "outputs_used": logits.argmax(1).unique().numel() / min(logits.shape)}


class Head(nn.Module):
    """Linear layers, (BatchNorm and) GELU between; a bottleneck of unit length; a weight-normed
    last layer, norms fixed at 1. Features (N, C) -> bottleneck (N, D), outputs (N, K): cosines."""

    def __init__(self, widths: Sequence[int], prototypes: int, bn: bool):
        super().__init__()
        self.mlp, self.last = nn.Sequential(), nn.Linear(widths[-1], prototypes, bias=False)
        for i, (w_in, w_out) in enumerate(zip(widths, widths[1:])):
            self.mlp.extend(([nn.BatchNorm1d(w_in)] if bn else []) + [nn.GELU()] if i else [])
            self.mlp.append(nn.Linear(w_in, w_out))
            nn.init.trunc_normal_(self.mlp[-1].weight, std=0.02 * (2048 / w_in) ** 0.5)
            nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.mlp(features)
        with torch.autocast(projected.device.type, enabled=False):
            wide = projected.to(torch.promote_types(projected.dtype, torch.float32))
            embeddings = F.normalize(wide, dim=1)                        # (N, D)
            return embeddings, F.linear(embeddings, F.normalize(self.last.weight, dim=1))


def dino_loss(student: Tensor, teacher: Tensor, center: Tensor, num_crops: int,
              student_temperature: float = 0.1, teacher_temperature: float = 0.04) -> Tensor:
    """Eq. 3, of s(x) (V*B, K), t(x) (2*B, K) of crops 0 and 1, c (K,) and V; no gradient to t(x).
    Raises ValueError for shapes that do not fit."""
    shapes, b, k = [(*x.shape,) for x in (student, teacher)], len(teacher) // 2, center.shape
    if num_crops < 2 or shapes != [(num_crops * b, *k), (2 * b, *k)]:
        raise ValueError(f"{shapes}, {(*k,)} do not fit {num_crops} crops, the teacher's being 2")
    wide = torch.promote_types(student.dtype, torch.float32)
    p = torch.softmax((teacher.detach().to(wide) - center) / teacher_temperature, dim=1)
    log_p = F.log_softmax(student.to(wide) / student_temperature, 1).unflatten(0, (num_crops, -1))
    of_others = (log_p.sum(0) - log_p[:2]).flatten(0, 1)                 # (2*B, K)
    return -(p * of_others).sum(1).mean() / (num_crops - 1)
