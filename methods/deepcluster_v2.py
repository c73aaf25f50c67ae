"""DeepCluster-v2 (arXiv 2006.09882, appendix): predict an image's cluster of the epoch before.

    import torch, torchvision                           # this file needs torch alone
    from methods.deepcluster_v2 import DeepCluster
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()
    model = DeepCluster(trunk, 4, head=(64, 16), prototypes=(4, 3), steps_per_epoch=1)
    model.images_of = lambda step: torch.arange(4)          # all images of the set, every step
    outputs = model([torch.randn(2 * 4, 3, 32, 32), torch.randn(6 * 4, 3, 16, 16)])
    model.loss(outputs, model.targets(outputs, step=0)).backward()
    model.after_step(step=0)                                # after the optimizer's

A memory has the embeddings of each image's first two crops from when it was last seen. After each
epoch it is clustered, P times; in the next one all crops predict their image's P clusters. The loop
sets images_of: step -> int64 (n*B,), the images (0 .. N-1) that this rank's n micro-batches show,
and calls targets for each of these in order. Of a skipped step nothing is remembered.

Differs from the reference (facebookresearch/swav, main_deepclusterv2.py):
- it fills the memory before training; here the first epoch does, with targets -100 and loss 0;
- each rank has, and clusters, the whole memory, so that a run goes on with any number of ranks.

Shapes: N images, B of a micro-batch, V crops, D embedding, P clusterings of K clusters.
"""
import math

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 2 ** 22                     # similarities at once in k-means: 16 MiB of float32


@torch.no_grad()
def spherical_kmeans(embeddings: Tensor, k: int, iterations: int, seed: int):
    """Rows z (N, D), none of zeros -> centroids C (k, D), nearest one (N,). Of unit length both,
    sum_n max_k z_n . C_k rises. Begins at k random rows, the same on all devices. A cluster that is
    empty, or whose members cancel, keeps its centroid. Raises ValueError unless 1 <= k <= N."""
    if not 1 <= k <= len(embeddings):
        raise ValueError(f"{len(embeddings)} rows have from 1 to that many clusters, not {k}")
    rng = torch.Generator("cpu").manual_seed(seed)
    first = torch.randperm(len(embeddings), generator=rng, device="cpu")[:k]
    rows = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
    centroids = rows[first.to(rows.device)]
    for turn in range(iterations + 1):
        with torch.autocast(rows.device.type, enabled=False):
            clusters = torch.cat([(block @ centroids.t()).argmax(1)
                                  for block in rows.split(max(1, BLOCK // k))])
        if turn < iterations:
            sums = torch.zeros_like(centroids).index_add_(0, clusters, rows)
            norms = sums.norm(dim=1, keepdim=True)
            centroids = torch.where(norms > 0, sums / norms, centroids)
    return centroids, clusters


class DeepCluster(nn.Module):
    """trunk: has num_features. head: widths of the projection, the last is D; head_bn: BatchNorm
    before each ReLU. prototypes: K of each clustering; p is of crop p mod 2. counts: crops of each
    size. iterations, seed: of k-means. steps_per_epoch: N / batch, not rounded. Raises ValueError
    for fewer than two crops, or more clusters than images."""
    joint, images_of = False, None

    def __init__(self, trunk: nn.Module, images: int, head=(2048, 128),
                 prototypes=(3000, 3000, 3000), temperature: float = 0.1, counts=(2, 6),
                 iterations: int = 10, *, steps_per_epoch: float, seed: int = 0, head_bn=True):
        super().__init__()
        if sum(counts) < 2 or not 1 <= min(prototypes) <= max(prototypes) <= images:
            raise ValueError(f"DeepCluster needs two crops or more, 1 to {images} clusters, not "
                             f"{sum(counts)}, {max(prototypes)}")
        self.trunk, self.head = trunk, nn.Sequential(nn.Linear(trunk.num_features, head[0]))
        for w_in, w_out in zip(head, head[1:]):
            self.head.extend([nn.BatchNorm1d(w_in)] * head_bn + [nn.ReLU(), nn.Linear(w_in, w_out)])
        self.prototypes = nn.ModuleList(nn.Linear(head[-1], k, bias=False) for k in prototypes)
        self.prototypes.requires_grad_(False)               # weights (K, D), the centroids
        self.register_buffer("memory", torch.zeros(2, images, head[-1]))
        self.register_buffer("assignments", torch.full((len(prototypes), images), -100))
        self.register_buffer("epoch", torch.tensor(0))      # that the assignments are for
        self.register_buffer("moved", torch.ones(len(prototypes)))
        self.crops, self.temperature, self.iterations = sum(counts), temperature, iterations
        self.steps_per_epoch, self.seed, self.sizes = steps_per_epoch, seed, list(prototypes)
        self.step, self.seen = -1, []                       # images (B,), embeddings (B, 2, D)

    def forward(self, crops: list[Tensor]) -> tuple[Tensor, ...]:
        """-> embeddings (V*B, D) of unit length, and of each clustering scores (V*B, K)."""
        projected = self.head(torch.cat([self.trunk(images) for images in crops]))
        with torch.autocast(projected.device.type, enabled=False):
            wide = torch.promote_types(projected.dtype, torch.float32)
            embeddings = F.normalize(projected.to(wide), dim=1)
            return embeddings, *(layer(embeddings) for layer in self.prototypes)

    def targets(self, outputs: tuple[Tensor, ...], step: int) -> Tensor:
        """Clusters (P, B) of the step's next B images, -100 where there is none yet."""
        embeddings = outputs[0].detach().unflatten(0, (self.crops, -1))[:2].transpose(0, 1)
        images, start = self.images_of(step), sum(len(rows) for rows, _ in self.seen)
        if step != self.step or start >= len(images):       # what a skipped step has left is lost
            self.step, self.seen, start = step, [], 0
        rows = images[start:start + len(embeddings)].to(embeddings.device)
        self.seen.append((rows, embeddings.to(self.memory.dtype)))
        return self.assignments[:, rows]

    def loss(self, outputs: tuple[Tensor, ...], targets: Tensor) -> Tensor:
        """Mean of -log softmax(C z / tau)_y over crops' z and clusterings. targets y: (P, B)."""
        return sum(F.cross_entropy(scores / self.temperature, target.repeat(self.crops),
                                   ignore_index=-100, reduction="sum") / len(scores)
                   for scores, target in zip(outputs[1:], targets)) / len(targets)

    def before_step(self, step: int) -> None:
        """Nothing: the prototypes have no gradient."""

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Remember the step's embeddings. At an epoch's end cluster the memory."""
        rows, embeddings = (_of_all_ranks(torch.cat(x)) for x in zip(*self.seen))
        in_order, order = rows.sort(stable=True)            # of an image shown twice the later row
        last = order[torch.searchsorted(in_order, rows, right=True) - 1]
        self.memory[:, rows], self.seen = embeddings[last].transpose(0, 1), []
        epoch = int((step + 1 + 1e-6) / self.steps_per_epoch)           # 1e-6: rounding
        if epoch == int(self.epoch):                        # note: waits for the device
            return
        known = self.memory.any(2).all(0).nonzero()[:, 0]
        if len(known) < max(self.sizes):                     # too many steps were skipped
            return
        for p, (k, layer) in enumerate(zip(self.sizes, self.prototypes)):
            seed, old = self.seed + 1_000_003 * (epoch * len(self.sizes) + p), self.assignments[p]
            found = spherical_kmeans(self.memory[p % 2, known], k, self.iterations, seed)
            for x in found if dist.is_available() and dist.is_initialized() else ():
                dist.broadcast(x, 0)
            centroids, clusters = found
            pairs = torch.bincount(clusters * (k + 1) + old[known].clamp(min=-1) + 1,
                                   minlength=k * (k + 1)).view(k, k + 1)    # new and old clusters
            self.moved[p] = 1 - pairs[:, 1:].amax(1).sum() / len(known)
            layer.weight.copy_(centroids)
            old[known] = clusters
        self.epoch.fill_(epoch)

    def statistics(self, outputs: tuple[Tensor, ...], loss: Tensor) -> dict[str, float]:
        """clusters_used: share of them that have images. images_moved: share of the images whose
        old cluster is not the commonest one of their new cluster; 1 at first."""
        used = [len(a[a >= 0].unique()) / k for a, k in zip(self.assignments, self.sizes)]
        ln_k = sum(math.log(max(k, 2)) for k in self.sizes) / len(used)
        return {"loss_over_ln_k": loss.item() / ln_k, "clusters_used": sum(used) / len(used),
                "images_moved": self.moved.mean().item()}


def _of_all_ranks(x: Tensor) -> Tensor:
    if not (dist.is_available() and dist.is_initialized()):
        return x
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)
