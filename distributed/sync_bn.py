"""SyncBatchNorm: BatchNorm over the joined batch of a group of ranks, without waiting for the host.

    from sync_bn import convert
    convert(model, dist.new_subgroups(32)[0])       # replaces every BatchNorm; names stay
    y = model(x)                                    # as of one process with all ranks' x

Paper: BatchNorm (arXiv 1502.03167); SEER (2103.01988) takes statistics over groups of ranks. This
file needs torch alone.

Forward, each rank has the mean, the variance and the count of its own values; one all-gather makes
them known to all, and they are combined exactly (Chan et al. 1979). Backward, with n values in all
and z = (x - mean) / sqrt(var + eps),

    dx = weight / sqrt(var + eps) * (dy - sum(dy) / n - z * sum(dy * z) / n)

and one all-reduce makes the two sums those of all ranks.

Differs from torch.nn.SyncBatchNorm: works on a CPU (gloo) too; nothing is read by the host, where
that one reads a mask of ranks without values (so here each rank has at least one); torch.compile
makes one graph of it, with the collectives inside (functional collectives, pytorch issue 161302).
Statistics, sums and what is computed from them are float32 or better. No second derivatives.

Shapes: x (N, C) or (N, C, ...), W ranks.
"""
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """num_features: C.  group: of ranks that share their statistics, this rank's own.
    Others: as of nn.BatchNorm2d; in eval mode it is one."""

    def __init__(self, num_features: int, group: dist.ProcessGroup, eps: float = 1e-5,
                 momentum: float | None = 0.1, affine: bool = True,
                 track_running_stats: bool = True, device=None, dtype=None):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.group_name, self.ranks = group.group_name, group.size()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and self.running_mean is not None:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                                eps=self.eps)
        y, mean, var, count = Normalise.apply(x, self.weight, self.bias, self.eps, self.group_name,
                                              self.ranks)
        if self.training and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                new = self.momentum
                if new is None:                                     # the mean of all batches
                    new = 1 / self.num_batches_tracked.to(mean.dtype)
                unbiased = var * (count / (count - 1))
                self.running_mean.mul_(1 - new).add_(new * mean)
                self.running_var.mul_(1 - new).add_(new * unbiased)
        return y


class Normalise(torch.autograd.Function):
    """x (N, C, ...), weight and bias (C,) or None -> y like x; mean and biased variance (C,) of all
    ranks, and the count of values they are of (scalar)."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, group_name, ranks):
        x = dense(x)
        of_rank = torch.cat(statistics(x, eps))                                 # (2C + 1,)
        of_ranks = all_gather(of_rank, ranks, group_name).view(ranks, -1)       # (W, 2C + 1)
        means, variances, counts = of_ranks.split([x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        inverse = (var + eps).rsqrt()
        if weight is None:
            weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
        ctx.save_for_backward(x, weight, mean, inverse, counts)
        ctx.group_name = group_name
        ctx.mark_non_differentiable(mean, var, count)
        if has_kernels(x):
            y = torch.batch_norm_elemt(x, weight, bias, mean, inverse, eps)
        else:
            y = (x - along(mean, x)) * along(weight * inverse, x) + along(bias, x)
        return y.to(x.dtype), mean, var, count

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, inverse, counts = ctx.saved_tensors
        kernels = has_kernels(x)
        dy = dense(dy)
        if kernels:
            of_rank = torch.batch_norm_backward_reduce(dy, x, mean, inverse, weight, True, False,
                                                       False)[:2]
        else:
            centred, dims = x - along(mean, x), [0, *range(2, x.dim())]
            wide = dy.to(mean.dtype)
            of_rank = wide.sum(dims), (wide * centred).sum(dims)
        sums = all_reduce(torch.cat(of_rank), ctx.group_name)                   # (2C,)
        sum_dy, sum_dy_x = sums.chunk(2)
        dx = None
        if ctx.needs_input_grad[0]:
            if kernels:
                dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse, weight, sum_dy,
                                                     sum_dy_x, counts.flatten().int())
            else:
                count = counts.sum()
                slope = inverse.square() * sum_dy_x / count
                dx = along(weight * inverse, x) * (wide - along(sum_dy / count, x)
                                                   - centred * along(slope, x))
            dx = dx.to(x.dtype)
        # of this rank's values: whoever sums gradients over ranks has those of all
        need_weight, need_bias = ctx.needs_input_grad[1:3]
        return (dx, of_rank[1] * inverse if need_weight else None,
                of_rank[0] if need_bias else None, None, None, None)


def statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count (1,) of x, float32 or better."""
    if has_kernels(x):
        mean, inverse = torch.batch_norm_stats(x, eps)
        var = inverse.square().reciprocal() - eps
    else:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(wide, [0, *range(2, x.dim())], correction=0)
    return mean, var, mean.new_full((1,), x.numel() // x.shape[1])


def has_kernels(x: Tensor) -> bool:
    """Whether PyTorch's own passes over x are used: on CUDA, unless a compiler makes them."""
    return x.is_cuda and not torch.compiler.is_compiling()


def dense(x: Tensor) -> Tensor:
    """As the kernels need it: contiguous, or channels-last."""
    if x.is_contiguous() or x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def along(values: Tensor, x: Tensor) -> Tensor:
    """values (C,), in the shape that is broadcast along x's channels."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def all_gather(x: Tensor, ranks: int, group_name: str) -> Tensor:
    functional = torch.ops._c10d_functional         # in place of dist.all_gather: can be compiled
    return functional.wait_tensor(functional.all_gather_into_tensor(x, ranks, group_name))


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(x, "sum", group_name))


def convert(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Every BatchNorm inside a module becomes a SyncBatchNorm over group, with its parameters and
    buffers under their names. Returns the module, or what replaces it."""
    if isinstance(module, _BatchNorm):
        sync = SyncBatchNorm(module.num_features, group, module.eps, module.momentum, module.affine,
                             module.track_running_stats, device="meta")
        sync._parameters, sync._buffers = module._parameters, module._buffers
        return sync.train(module.training)
    for name, child in module.named_children():
        setattr(module, name, convert(child, group))
    return module
