"""SwAV: learn features by predicting the cluster of one view of an image from another view.

Paper: "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (arXiv
2006.09882); SEER (arXiv 2103.01988) is the same method on RegNets with 16,000 prototypes.

    import torch
    import torchvision
    from swav import SwAV, swav_codes, swav_loss
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    model = SwAV(trunk, head=(512, 128), prototypes=300, head_bn=True)
    large, small = torch.randn(2 * 4, 3, 64, 64), torch.randn(6 * 4, 3, 32, 32)      # of 4 images
    embeddings, scores = model([large, small])                  # crops: one tensor per size
    codes = swav_codes(scores, num_crops=8, epsilon=0.05, iterations=3)              # (2, 4, 300)
    loss = swav_loss(scores, codes, num_crops=8)
    loss.backward()                                             # the optimizer's step, then:
    model.normalize_prototypes()

An image's crops are embedded on the unit sphere and compared with K prototypes, also unit vectors:
the scores. Sinkhorn turns the scores of the assigned crops (the first two, which are large) into
codes, under the constraint that the batch uses all prototypes equally. Then every *other* crop has
to predict that code from its own scores (the "swapped" prediction, eq. 2).

A training loop calls `targets`, `loss`, `before_step` and `after_step`; of a batch in several
micro-batches also `assigned`.

Differs from the reference (facebookresearch/swav):
- prototypes have unit norm from the start, and again after each step, instead of before each use;
- normalisation, scores, codes and loss are float32 or better whatever autocast does;
- the queue enters the codes when it is full, not at a given epoch.

Shapes: B images, V crops, C features, D embedding, K prototypes, A assigned crops, L queue length.
Rows are crop-major: rows i*B .. (i+1)*B belong to crop i.
"""
import math
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sinkhorn import sinkhorn

ASSIGNED = 2                 # crops of an image that get codes: the first two, which are large


class SwAV(nn.Module):
    """Trunk, projection head and prototypes; codes and loss of their outputs.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    head: widths of the projection's linear layers, ReLU between; the last one is D.
    prototypes: K.  head_bn: BatchNorm before each ReLU of the head (SwAV, and SEER up to 32GF).
    counts: number of crops of each size.  epsilon, iterations, hard: of the codes, as in sinkhorn.
    temperature: of the predictions.
    queue: L on this process, 0 for none; used from step queue_start on, once it is full.
    frozen_steps: first steps, in which the prototypes stay as they began.
    Raises ValueError for a trunk without num_features, and a head or prototypes of nothing.
    """
    joint = True             # codes are of the whole batch, however it is computed

    def __init__(self, trunk: nn.Module, head: Sequence[int] = (8192, 8192, 256),
                 prototypes: int = 16000, head_bn: bool = False, *, counts: Sequence[int] = (2, 4),
                 epsilon: float = 0.05, iterations: int = 3, hard: bool = False,
                 temperature: float = 0.1, queue: int = 0, queue_start: int = 0,
                 frozen_steps: int = 0):
        super().__init__()
        if not head or min(*head, prototypes) < 1:
            raise ValueError(f"SwAV needs a head of at least one width and at least one prototype, "
                             f"not {tuple(head)} and {prototypes}")
        if not isinstance(getattr(trunk, "num_features", None), int):
            raise ValueError("SwAV's trunk is a module that returns features (B, num_features) and "
                             "has that number as num_features; of torchvision's ResNet-50: "
                             "trunk.num_features, trunk.fc = 2048, torch.nn.Identity()")
        self.trunk = trunk
        self.head = nn.Sequential()
        widths = [trunk.num_features, *head]
        for i, (w_in, w_out) in enumerate(zip(widths, widths[1:])):
            self.head.append(nn.Linear(w_in, w_out))
            if i < len(head) - 1:
                self.head.extend([nn.BatchNorm1d(w_out)] if head_bn else [])
                self.head.append(nn.ReLU(inplace=True))
        self.prototypes = nn.Linear(head[-1], prototypes, bias=False)    # weight (K, D)
        self.normalize_prototypes()
        self.counts, self.temperature, self.frozen_steps = list(counts), temperature, frozen_steps
        self.partition = dict(epsilon=epsilon, iterations=iterations, hard=hard)
        self.queue = Queue(queue, head[-1]) if queue else None
        self.queue_start, self.latest = queue_start, None                # latest (A, B, D)

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """crops, one (count * B, 3, s, s) per size -> embeddings (V*B, D), scores (V*B, K)."""
        # all sizes go through the head together, so a head's BatchNorm sees every crop
        return self.project(torch.cat([self.trunk(images) for images in crops]))

    def project(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's features (V*B, C) -> embeddings (V*B, D), scores (V*B, K)."""
        projected = self.head(features)                                  # (V*B, D)
        with torch.autocast(projected.device.type, enabled=False):
            wide = torch.promote_types(projected.dtype, torch.float32)
            embeddings = F.normalize(projected.to(wide), dim=1)
            return embeddings, self.prototypes(embeddings)

    def targets(self, outputs: tuple[Tensor, Tensor], step: int) -> Tensor:
        """Codes (A, B, K) of the assigned crops. outputs: of forward, or of assigned."""
        crops = sum(self.counts)
        embeddings, scores = (x if x.dim() == 3 else x.unflatten(0, (crops, -1))[:ASSIGNED]
                              for x in outputs)                          # (A, B, D), (A, B, K)
        history = None
        if self.queue:
            self.latest = embeddings.detach()
            if step >= self.queue_start:
                history = self.queue.scores(self.prototypes.weight)      # (A, L, K), or None
        return swav_codes(scores.flatten(0, 1), ASSIGNED, queue_scores=history, **self.partition)

    def loss(self, outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
        """outputs: of forward.  targets: (A, B, K), of the same images."""
        return swav_loss(outputs[1], targets, sum(self.counts), temperature=self.temperature)

    def before_step(self, step: int) -> None:
        """Between backward and the optimizer's step."""
        if step < self.frozen_steps:
            self.freeze_prototypes()

    def after_step(self, step: int) -> None:
        """After the optimizer's step; not called where a step is skipped."""
        self.normalize_prototypes()
        if self.queue:
            self.queue.push(self.latest)

    def assigned(self, crops: Sequence[Tensor],
                 all_crops: bool = False) -> tuple[Tensor, Tensor]:
        """Embeddings (A, B, D), scores (A, B, K) of the assigned crops alone. crops: as forward's;
        those sizes that hold no assigned crop are computed only where all_crops asks for it, so
        that a head's BatchNorm has the statistics that it has in forward."""
        sizes = len(self.counts) if all_crops else assigned_sizes(self.counts)
        computed = sum(self.counts[:sizes])
        return tuple(x.unflatten(0, (computed, -1))[:ASSIGNED].clone() for x in self(crops[:sizes]))

    def statistics(self, outputs: tuple[Tensor, Tensor], loss: Tensor) -> dict[str, float]:
        """outputs: of forward, or of assigned. See collapse_statistics."""
        embeddings, scores = (x.detach().flatten(0, -2) for x in outputs)
        return collapse_statistics(embeddings, scores, loss, self.temperature)

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Back onto the unit sphere: to be called after each optimizer step."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))

    def freeze_prototypes(self) -> None:
        """Keep the prototypes still for this step: to be called between backward and step.

        The gradient is dropped, not turned off: the graph, and what DDP expects of it, is the
        same at every step, and an optimizer skips a parameter without gradient.
        """
        self.prototypes.weight.grad = None


def assigned_sizes(counts: Sequence[int]) -> int:
    """How many of the crop sizes, with so many crops each, hold the assigned crops."""
    return next(i for i in range(1, len(counts) + 1) if sum(counts[:i]) >= ASSIGNED)


def swav_codes(scores: Tensor, num_crops: int, assign: Sequence[int] = (0, 1),
               epsilon: float = 0.05, iterations: int = 3, queue_scores: Tensor | None = None,
               group=None, hard: bool = False) -> Tensor:
    """Codes of the assigned crops, without gradient (section 3.1).

    scores: (V*B, K).  queue_scores: None or (A, L, K), samples that take part in the partition
    and whose codes are thrown away (section 4.1's queue).  Returns (A, B, K), rows sum to 1.
    """
    crops = scores.detach().unflatten(0, (num_crops, -1))                # (V, B, K)
    problems = crops[list(assign)]                                       # (A, B, K)
    if queue_scores is not None:
        problems = torch.cat([problems, queue_scores], dim=1)            # (A, B + L, K)
    codes = sinkhorn(problems, epsilon, iterations, group, hard)
    return codes[:, :crops.shape[1]]


def swav_loss(scores: Tensor, codes: Tensor, num_crops: int, assign: Sequence[int] = (0, 1),
              temperature: float = 0.1) -> Tensor:
    """Swapped prediction: each assigned crop's code is predicted from every other crop (eq. 2).

    scores: (V*B, K).  codes: (A, B, K), of the crops named in assign.  Returns a scalar: the mean
    cross-entropy over assigned crops, other crops and images; ln K where nothing is predicted.
    """
    if num_crops < 2 or len(scores) % num_crops or len(codes) != len(assign):
        raise ValueError(f"{len(scores)} rows of scores and codes of {len(codes)} crops do not "
                         f"fit {num_crops} crops, at least 2, of which {len(assign)} are assigned")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    log_p = F.log_softmax(scores / temperature, dim=1).unflatten(0, (num_crops, -1))    # (V, B, K)
    log_p_all_crops = log_p.sum(0)                                       # (B, K)
    loss = 0.0
    for code, crop in zip(codes, assign):
        loss = loss - (code * (log_p_all_crops - log_p[crop])).sum(1).mean()
    return loss / (len(assign) * (num_crops - 1))


class Queue:
    """The last L embeddings of each assigned crop, newest first (section 4.1: small batches).

    A queue is `full` once L embeddings have gone in; until then it should not be used, for its
    remaining rows are zeros. embeddings: (A, L, D), on the device of what was pushed last.
    """

    def __init__(self, length: int, dim: int, crops: int = ASSIGNED):
        self.embeddings, self.filled = torch.zeros(crops, length, dim), 0

    @property
    def full(self) -> bool:
        return self.filled >= self.embeddings.shape[1]

    @torch.no_grad()
    def push(self, embeddings: Tensor) -> None:
        """embeddings: (A, B, D), of the assigned crops."""
        kept, length = self.embeddings.to(embeddings.device), self.embeddings.shape[1]
        joined = torch.cat([embeddings.to(kept.dtype), kept], dim=1)
        self.embeddings = joined[:, :length].contiguous()
        self.filled = min(length, self.filled + embeddings.shape[1])

    @torch.no_grad()
    def scores(self, prototypes: Tensor) -> Tensor | None:
        """(A, L, K) under today's prototypes (K, D), or None while the queue is not full."""
        if not self.full:
            return None
        with torch.autocast(self.embeddings.device.type, enabled=False):
            return self.embeddings @ prototypes.to(self.embeddings.dtype).t()


@torch.no_grad()
def collapse_statistics(embeddings: Tensor, scores: Tensor, loss: Tensor,
                        temperature: float = 0.1) -> dict[str, float]:
    """Numbers that tell learning from collapse. Waits for the device: for log steps only.

    embeddings: (N, D).  scores: (N, K).  loss: scalar.

    loss_over_ln_k: 1 when the predictions say nothing (SwAV's usual failure), falling as it learns.
    prototypes_used: share of the prototypes, of at most N, that are nearest to some row.
    assignment_entropy: mean entropy of softmax(scores / temperature) over ln K; 1 is uniform.
    spread: sqrt(1 - |mean embedding|^2); 0 when all embeddings are one point, 1 when centred.
    effective_rank: exp of the entropy of the embeddings' singular values (Roy & Vetterli 2007);
        1 when all lie on a line, at most D.
    """
    n, k = scores.shape
    p = torch.softmax(scores.float() / temperature, dim=1)
    entropy = -torch.xlogy(p, p).sum(1).mean()
    return {
        "loss_over_ln_k": loss.item() / math.log(max(k, 2)),
        "prototypes_used": scores.argmax(1).unique().numel() / min(n, k),
        "assignment_entropy": entropy.item() / math.log(max(k, 2)),
        **geometry(embeddings),
    }


@torch.no_grad()
def geometry(embeddings: Tensor) -> dict[str, float]:
    """spread and effective_rank of unit vectors (N, D), as in collapse_statistics."""
    z = embeddings.cpu().double()        # a host copy: MPS has no float64, CUDA a slow svd
    singular = torch.linalg.svdvals(z)
    share = singular / singular.sum()
    return {
        "spread": (1 - z.mean(0).square().sum()).clamp(min=0).sqrt().item(),
        "effective_rank": torch.xlogy(share, share).sum().neg().exp().item(),
    }
