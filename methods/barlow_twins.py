"""Barlow Twins: two views' embeddings agree in each dimension, and no two dimensions say the same.

Paper: "Barlow Twins: Self-Supervised Learning via Redundancy Reduction" (arXiv 2103.03230, section
2.1, eq. 1 and 2); gradient accumulation is GradCache's (arXiv 2101.06983). Needs torch alone.

    import torch
    import torchvision
    from methods.barlow_twins import BarlowTwins
    trunk = torchvision.models.resnet18()
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()     # a trunk ends at its features
    model = BarlowTwins(trunk, head=(256, 256))
    outputs = model([torch.randn(2 * 4, 3, 64, 64)])            # two views of 4 images
    gradient = model.targets(outputs, step=0)                   # (2, 4, 256)
    model.loss(outputs, gradient).backward()

Of z and z', the views' embeddings, each dimension minus its mean, over the B images of all ranks:

    C_ij = sum_b z_bi z'_bj / ( sqrt(sum_b z_bi^2) sqrt(sum_b z'_bj^2) )                    (eq. 2)
    loss = sum_i (1 - C_ii)^2 + lambda sum_i sum_{j != i} C_ij^2                            (eq. 1)

So a batch's loss is not the mean of its micro-batches' losses. `targets` computes it from the
embeddings of the whole batch, without their graph, and returns the gradient. `loss` has this value,
and gives each micro-batch its rows of this gradient. A training loop calls `before_step` and
`after_step` too, and `assigned` for several micro-batches.

Differs from the reference (facebookresearch/barlowtwins):
- both views go through trunk and head as one batch, and BatchNorm sees them together;
- the gradient is the joined batch's; there it is 1 / W of that, by an all-reduce without gradient;
- instead of a scale, it has 0.024 of the learning rate for what LARS leaves alone.
As there, embeddings are standardised like BatchNorm: by the biased variance, plus 1e-5.

Shapes: B images on this rank, C features, D embedding, W ranks. Rows are view-major.
"""
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class BarlowTwins(nn.Module):
    """Trunk and projection head; redundancy reduction of their outputs.

    trunk: images (N, 3, s, s) -> features (N, C), with C in trunk.num_features.
    head: widths of the projection's linear layers, BatchNorm and ReLU between; the last one is D.
        No biases, for a mean is subtracted after each.  off_diagonal, scale: as in barlow_loss.
    Raises ValueError for a trunk without num_features and a head of nothing."""
    joint = True             # targets are of the whole batch

    def __init__(self, trunk: nn.Module, head: Sequence[int] = (8192, 8192, 8192),
                 off_diagonal: float = 0.0051, scale: float = 0.024):
        super().__init__()
        if not hasattr(trunk, "num_features") or min(head, default=0) < 1:
            raise ValueError("BarlowTwins needs a trunk with num_features and a head of one width "
                             f"or more, not {type(trunk)} and {tuple(head)}")
        self.trunk, self.head = trunk, nn.Sequential()
        for w_in, w_out in zip([trunk.num_features, *head], head):
            if len(self.head):
                self.head.extend([nn.BatchNorm1d(w_in), nn.ReLU(inplace=True)])
            self.head.append(nn.Linear(w_in, w_out, bias=False))
        self.off_diagonal, self.scale = off_diagonal, scale
        self.whole = None    # loss and number of images of the latest targets

    def forward(self, crops: Sequence[Tensor]) -> tuple[Tensor]:
        """crops, one (count * B, 3, s, s) per size -> embeddings (2B, D), not normalised."""
        embeddings = self.head(torch.cat([self.trunk(images) for images in crops]))
        return (embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)),)

    def assigned(self, crops: Sequence[Tensor], all_crops: bool = False) -> tuple[Tensor]:
        """Embeddings (2, B, D): both views have targets, whatever all_crops is."""
        return tuple(x.unflatten(0, (2, -1)) for x in self(crops))

    @torch.enable_grad()
    def targets(self, outputs: tuple[Tensor], step: int) -> Tensor:
        """Gradient (2, B, D) of the whole batch's loss, summed over ranks, with respect to this
        rank's embeddings. outputs: of all images of this rank, of forward or assigned."""
        views = outputs[0].detach().flatten(0, -2).unflatten(0, (2, -1)).requires_grad_()
        loss = barlow_loss(*views, self.off_diagonal, self.scale)
        self.whole = loss.detach(), views.shape[1]
        return torch.autograd.grad(loss, views)[0]

    def loss(self, outputs: tuple[Tensor], targets: Tensor) -> Tensor:
        """The latest targets' loss; its gradient is the mean's over micro-batches of equal size.
        outputs: of forward.  targets: (2, B, D), of the same images."""
        value, images = self.whole
        linear = (outputs[0] * targets.flatten(0, 1)).sum()
        return value + images / targets.shape[1] * (linear - linear.detach())

    def before_step(self, step: int) -> None:
        """Before the optimizer's step, and after it: nothing."""

    after_step = before_step

    @torch.no_grad()
    def statistics(self, outputs: tuple[Tensor], loss: Tensor) -> dict[str, float]:
        """Of C on this rank. outputs: of all its images, of forward or assigned. Waits for the
        device. correlation_diagonal: mean; 1 when the views agree.  correlation_off_diagonal: root
        mean square; 1 / sqrt(B) by chance, 1 when all dimensions say the same."""
        c = cross_correlation(outputs[0].flatten(0, -2).unflatten(0, (2, -1)))
        return {"correlation_diagonal": c.diagonal().mean().item(), "correlation_off_diagonal":
                c.fill_diagonal_(0).norm().item() / max(1, c.numel() - len(c)) ** 0.5}


def barlow_loss(first: Tensor, second: Tensor, off_diagonal: float = 0.0051, scale: float = 1.0,
                group=None) -> Tensor:
    """scale * (sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2), eq. 1.

    first, second: (B, D), the embeddings of two views of the same images; every rank has as many.
    group: the ranks that share the batch; None: the default group if there is one.
    Returns a scalar, float32 or better: the joined batch's loss, on every rank. DDP's mean of
    gradients is its gradient, where all ranks go backward alike. At most four matrices (D, D) exist
    at a time. Raises ValueError for other shapes."""
    if first.dim() != 2 or first.shape != second.shape:
        raise ValueError(f"two views (B, D), not {tuple(first.shape)} and {tuple(second.shape)}")
    alone = not (dist.is_available() and dist.is_initialized())
    with torch.autocast(first.device.type, enabled=False):
        views = torch.stack([first, second]).to(torch.promote_types(first.dtype, torch.float32))
        c = cross_correlation(views, 1 if alone else dist.get_world_size(group), group)
        invariance = (1 - c.diagonal()).square().sum()
        redundancy = c.fill_diagonal_(0).square().sum()      # of 8192 dimensions C takes 268 MB
        return scale * (invariance + off_diagonal * redundancy)


def cross_correlation(views: Tensor, ranks: int = 1, group=None) -> Tensor:
    """(2, B, D) -> C (D, D) over the images of so many ranks (eq. 2); of 1, this one alone."""
    def total(x: Tensor, alike: bool = False) -> Tensor:
        return SumOverRanks.apply(x, group, ranks, alike) if ranks > 1 else x

    images = ranks * views.shape[1]
    centred = views - total(views.sum(1, keepdim=True)) / images
    var = total(centred.square().sum(1, keepdim=True)) / images          # (2, 1, D)
    first, second = centred * (var + 1e-5).rsqrt()                     # BatchNorm's eps
    return total(first.t() @ (second / images), alike=True)


class SumOverRanks(torch.autograd.Function):
    """In place. Backward the same sum of gradients, of which none is sent if all are alike."""
    @staticmethod
    def forward(ctx, x: Tensor, group, ranks: int, alike: bool) -> Tensor:
        ctx.group, ctx.ranks, ctx.alike = group, ranks, alike
        dist.all_reduce(x, group=group)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = (gradient * (ctx.ranks if ctx.alike else 1)).contiguous()
        if not ctx.alike:
            dist.all_reduce(gradient, group=ctx.group)
        return gradient, None, None, None
