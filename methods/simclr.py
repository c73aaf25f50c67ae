"""SimCLR: learn features by finding an image's other view among all views of the batch.

Paper: "A Simple Framework for Contrastive Learning of Visual Representations" (arXiv 2002.05709,
section 2.1, eq. 1); gradient accumulation is GradCache's (arXiv 2101.06983). Needs torch alone.

    import torch
    import torchvision
    from methods.simclr import SimCLR
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    model = SimCLR(trunk, head=(512, 128), temperature=0.1)
    outputs = model([torch.randn(2 * 4, 3, 64, 64)])            # two views of 4 images
    gradient = model.targets(outputs, step=0)                   # (2, 4, 128)
    model.loss(outputs, gradient).backward()

Of an embedding z_i, whose image's other view is z_j, among the rows of all ranks:

    l(i, j) = -log( exp(cos(z_i, z_j) / tau) / sum over k != i of exp(cos(z_i, z_k) / tau) ) (eq. 1)

So a batch's loss is not the mean of its micro-batches' losses. `targets` computes it from the
embeddings of the whole batch, without their graph, and returns the gradient. `loss` has this value,
and gives each micro-batch its rows of this gradient. A training loop calls `before_step` and
`after_step` too, and `assigned` for several micro-batches.

Differs from the reference (google-research/simclr, and VISSL's configuration of it):
- a mean over rows, as in the paper and VISSL: half of google-research's;
- the head is VISSL's 2048-2048-128 with biases; head_bn adds BatchNorm before each ReLU, where
  google-research has it after every layer, the last one too, and no biases before it;
- with more than two views, each other view is a positive, and all rows are in the denominator
  (SupCon, arXiv 2004.11362, eq. 2, an image being a class); VISSL leaves other positives out.

Shapes: B images on this rank, V views, C features, D embedding, W ranks. Rows are view-major.
"""
import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class SimCLR(nn.Module):
    """Trunk and projection head; NT-Xent of their outputs.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    head: widths of the projection's linear layers, ReLU between; the last one is D.
    head_bn: BatchNorm before each ReLU.  views: V of each image.
    Raises ValueError for a trunk without num_features, a head of nothing, fewer than 2 views.
    """
    joint = True             # targets are of the whole batch

    def __init__(self, trunk: nn.Module, head: Sequence[int] = (2048, 128), head_bn: bool = False,
                 temperature: float = 0.1, views: int = 2):
        super().__init__()
        if not hasattr(trunk, "num_features") or min(head, default=0) < 1 or views < 2:
            raise ValueError("SimCLR needs a trunk with num_features, a head of one width or more, "
                             f"two views or more, not {type(trunk)}, {tuple(head)}, {views}")
        self.trunk, self.head = trunk, nn.Sequential()
        for w_in, w_out in zip([trunk.num_features, *head], head):
            if len(self.head):
                self.head.extend([nn.BatchNorm1d(w_in)] if head_bn else [])
                self.head.append(nn.ReLU(inplace=True))
            self.head.append(nn.Linear(w_in, w_out))
        self.temperature, self.views = temperature, views
        self.whole = None    # loss and number of images of the latest targets

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor]:
        """crops, one (count * B, 3, s, s) per size -> embeddings (V*B, D), not normalised."""
        embeddings = self.head(torch.cat([self.trunk(images) for images in crops]))
        return (embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)),)

    def assigned(self, crops: Sequence[Tensor], all_crops: bool = False) -> tuple[Tensor]:
        """Embeddings (V, B, D): all views have targets, whatever all_crops is."""
        return tuple(x.unflatten(0, (self.views, -1)) for x in self(crops))

    @torch.enable_grad()
    def targets(self, outputs: tuple[Tensor], step: int) -> Tensor:
        """Gradient (V, B, D) of the whole batch's loss, summed over ranks, with respect to this
        rank's embeddings. outputs: of all images of this rank, of forward or assigned."""
        rows = outputs[0].detach().flatten(0, -2).requires_grad_()       # (V*B, D)
        loss = nt_xent(rows, self.temperature, views=self.views)
        self.whole = loss.detach(), len(rows) // self.views
        return torch.autograd.grad(loss, rows)[0].unflatten(0, (self.views, -1))

    def loss(self, outputs: tuple[Tensor], targets: Tensor) -> Tensor:
        """The latest targets' loss; its gradient is the mean's over micro-batches of equal size.
        outputs: of forward.  targets: (V, B, D), of the same images."""
        value, images = self.whole
        linear = (outputs[0] * targets.flatten(0, 1)).sum()
        return value + images / targets.shape[1] * (linear - linear.detach())

    def before_step(self, step: int) -> None:
        """Before the optimizer's step, and after it: nothing."""

    after_step = before_step

    def statistics(self, outputs: tuple[Tensor], loss: Tensor) -> dict[str, float]:
        """outputs: of all images of this rank, of forward or assigned. Waits for the device.
        contrastive_accuracy: share of rows whose nearest row on this rank is of the same image.
        loss_over_ln_candidates: loss / ln(W*V*B - 1); 1 when all embeddings are one point."""
        z = F.normalize(outputs[0].detach().flatten(0, -2), dim=1)       # (V*B, D)
        nearest = (z @ z.t()).fill_diagonal_(-math.inf).argmax(1)
        off = (nearest - torch.arange(len(z), device=z.device)) % (len(z) // self.views)
        candidates = max(2, rank_and_world()[1] * len(z) - 1)
        return {"contrastive_accuracy": (off == 0).float().mean().item(),
                "loss_over_ln_candidates": loss.item() / math.log(candidates)}


def nt_xent(embeddings: Tensor, temperature: float = 0.1, group=None, views: int = 2) -> Tensor:
    """Normalised temperature-scaled cross-entropy (eq. 1) of this rank's rows among all ranks'.

    embeddings: (2B, D), or (V*B, D), view-major, not normalised; every rank has as many.
    group: the ranks that share the batch; None: the default group if there is one.
    Returns a scalar, float32 or better: the mean over rows and their positives. The mean over ranks
    is the joined batch's loss, and DDP's mean of gradients its gradient. Memory: a few matrices
    (V*B, W*V*B). Raises ValueError for rows that do not fit the views."""
    if embeddings.dim() != 2 or not len(embeddings) or views < 2 or len(embeddings) % views:
        raise ValueError(f"{tuple(embeddings.shape)} are not rows of {views} views, at least 2")
    with torch.autocast(embeddings.device.type, enabled=False):
        z = F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=1)
        rank, world = rank_and_world(group)
        all_ranks = GatherRows.apply(z, group) if world > 1 else z       # (W*V*B, D)
        own = rank * len(z) + torch.arange(len(z), device=z.device)      # each row's own column
        similarity = (z @ all_ranks.t()).scatter_(1, own[:, None], -math.inf)        # (V*B, W*V*B)
        log_p = (similarity / temperature).log_softmax(1)
        positives = torch.stack([own.roll(i * len(z) // views) for i in range(1, views)], dim=1)
        return -log_p.gather(1, positives).mean()


class GatherRows(torch.autograd.Function):
    """Rows (N, D) -> those of all ranks (W*N, D). A row's gradient is the sum of the ranks'."""
    @staticmethod
    def forward(ctx, rows: Tensor, group) -> Tensor:
        ctx.group = group
        of_ranks = rows.new_empty(dist.get_world_size(group), *rows.shape)          # (W, N, D)
        dist.all_gather(list(of_ranks), rows.contiguous(), group=group)
        return of_ranks.flatten(0, 1)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        rank, world = rank_and_world(ctx.group)
        return gradient.chunk(world)[rank], None


def rank_and_world(group=None) -> tuple[int, int]:
    alone = not (dist.is_available() and dist.is_initialized())
    return (0, 1) if alone else (dist.get_rank(group), dist.get_world_size(group))
