"""MoCo v2: find the other view of an image among a queue of earlier images' views.

Papers: MoCo (arXiv 1911.05722, section 3), MoCo v2 (arXiv 2003.04297). This file needs torch alone.

    import torch
    import torchvision
    from methods.mocov2 import MoCo
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    model = MoCo(trunk, head=(512, 64), queue=256)
    outputs = model([torch.randn(2 * 4, 3, 64, 64)])            # two views of 4 images
    targets = model.targets(outputs, step=0)                    # (1, 4, 64)
    model.loss(outputs, targets).backward()
    model.before_step(0)                                        # the optimizer's step, then:
    model.after_step(0)                                         # key encoder and queue go on

View 1 goes through the query encoder, view 2 through the key encoder; queries q and keys k are unit
vectors. The queue holds the keys of the last L images. Of each query, with its own key k+,

    L = -log( exp(q.k+ / tau) / (exp(q.k+ / tau) + sum over the queue of exp(q.k / tau)) )  (eq. 1)

and after each step the key encoder follows, theta_k <- m theta_k + (1 - m) theta_q (eq. 2), and the
batch's keys, of all ranks, take the place of the oldest in the queue. v2 is v1 with a projection
head of two layers, tau 0.2 instead of 0.07, and blur.

Differs from the reference (facebookresearch/moco):
- keys are not shuffled over GPUs, so that BatchNorm cannot tell whose they are: SyncBatchNorm,
  applied from outside, stands for it; on one process there is no shuffling;
- the queue is newest first, so a batch need not divide its length; it is pushed once a step, and
  the key encoder follows, after the optimizer's step;
- queries, keys, similarities and loss are float32 or better whatever autocast does.

Shapes: B images, C features, D embedding, L queue length.
"""
import math
from copy import deepcopy
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class MoCo(nn.Module):
    """Query encoder, key encoder and queue; the loss of their outputs.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    head: widths of the projection's linear layers, ReLU between; the last one is D.
    queue: L, of all ranks together.  momentum: m.  temperature: tau.
    Raises ValueError for a trunk without num_features, and a head or queue of nothing.
    """
    joint = False               # each micro-batch has targets of its own

    def __init__(self, trunk: nn.Module, head: Sequence[int] = (2048, 128), queue: int = 65536,
                 momentum: float = 0.999, temperature: float = 0.2):
        super().__init__()
        if not head or min(*head, queue) < 1:
            raise ValueError(f"MoCo needs a head of at least one width and a queue of at least one "
                             f"key, not {tuple(head)} and {queue}")
        if not isinstance(getattr(trunk, "num_features", None), int):
            raise ValueError("MoCo's trunk returns features (N, C), and has C as num_features")
        self.trunk, self.head = trunk, nn.Sequential()
        for i, (w_in, w_out) in enumerate(zip([trunk.num_features, *head], head)):
            self.head.extend([nn.ReLU(inplace=True)] if i else [])
            self.head.append(nn.Linear(w_in, w_out))
        self.key = deepcopy(nn.Sequential(self.trunk, self.head)).requires_grad_(False)
        # random at first, as in the reference, and of one seed: the same on all ranks
        self.register_buffer("queue", F.normalize(torch.randn(queue, head[-1]), dim=1))  # (L, D)
        self.momentum, self.temperature = momentum, temperature
        self.collected, self.latest = [], []        # keys of this step's micro-batches, (B, D) each

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """crops: [(2B, 3, s, s)] -> queries (B, D), keys (B, D), of unit length, and similarities
        (B, 1 + L). Raises ValueError where crops are of more than one size."""
        crops = list(crops)         # a lazy sequence may compute a crop each time it is asked for
        if len(crops) != 1 or len(crops[0]) % 2:
            raise ValueError(f"MoCo takes two views of one size, not {list(map(len, crops))} crops")
        first, second = crops[0].chunk(2)                                # (B, 3, s, s)
        queries = unit(self.head(self.trunk(first)))                     # (B, D)
        with torch.no_grad():
            keys = unit(self.key(second))                                # (B, D)
        return queries, keys, similarities(queries, keys, self.queue)

    def targets(self, outputs: tuple[Tensor, ...], step: int) -> Tensor:
        """The keys (1, B, D), which are collected for the queue. outputs: of forward."""
        self.collected.append(outputs[1])
        return outputs[1][None]

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Eq. 1. outputs: of forward, whose similarities are to the targets, (1, B, D), already."""
        return contrast(outputs[2], self.temperature)

    def before_step(self, step: int) -> None:
        """Between backward and the optimizer's step; the keys of a skipped step are dropped."""
        self.latest, self.collected = self.collected, []

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After the optimizer's step; not called where a step is skipped. A collective."""
        query = [*self.trunk.parameters(), *self.head.parameters()]
        torch._foreach_lerp_(list(self.key.parameters()), query, 1 - self.momentum)
        keys = of_all_ranks(torch.cat(self.latest)).to(self.queue)       # (ranks * B, D)
        self.queue.copy_(torch.cat([keys, self.queue])[:len(self.queue)])

    @torch.no_grad()
    def statistics(self, outputs: tuple[Tensor, ...], loss: Tensor) -> dict[str, float]:
        """outputs: of forward. Waits for the device.

        loss_over_ln_keys: loss / ln(L + 1); 1 when a key is as good as any other.
        own_key_nearest: share of the queries whose own key is nearer than all of the queue.
        """
        own, others = outputs[2][:, 0], outputs[2][:, 1:].amax(1)
        return {"loss_over_ln_keys": loss.item() / math.log(len(self.queue) + 1),
                "own_key_nearest": (own > others).double().mean().item()}


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """Eq. 1, a mean. queries, keys: (B, D).  queue: (L, D).  Of any norm: normalised here. Keys and
    queue get no gradient. Raises ValueError for other shapes."""
    if queries.dim() != 2 or queries.shape != keys.shape or queries.shape[1:] != queue.shape[1:]:
        raise ValueError(f"queries and keys (B, D), a queue (L, D), not {tuple(queries.shape)}, "
                         f"{tuple(keys.shape)} and {tuple(queue.shape)}")
    return contrast(similarities(*map(unit, (queries, keys.detach(), queue.detach()))), temperature)


def similarities(queries: Tensor, keys: Tensor, queue: Tensor) -> Tensor:
    """Unit vectors (B, D), (B, D), (L, D) -> cosines (B, 1 + L): own key first, then the queue."""
    with torch.autocast(queries.device.type, enabled=False):
        own = (queries * keys).sum(1, keepdim=True)                      # (B, 1)
        return torch.cat([own, queries @ queue.to(queries).t()], dim=1)


def contrast(scores: Tensor, temperature: float) -> Tensor:
    """scores: (B, 1 + L), own key first -> mean cross-entropy."""
    return -F.log_softmax(scores / temperature, dim=1)[:, 0].mean()


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, float32 or better."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=1)


def of_all_ranks(rows: Tensor) -> Tensor:
    """(B, D) of each rank -> (ranks * B, D), in the ranks' order."""
    if not (dist.is_available() and dist.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
