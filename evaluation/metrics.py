"""Metrics: top-1 in per cent, and mean average precision where an image has several labels.

    import torch
    from evaluation.metrics import average_precision, mean_average_precision, per_cent
    scores, labels = torch.randn(100, 4), torch.arange(100) % 4
    top1 = per_cent(scores.argmax(1), labels)                   # 61.3
    targets = torch.eye(4, dtype=torch.bool)[labels]            # (100, 4)
    precision = average_precision(scores[:, 0], targets[:, 0])  # of one class, a scalar
    mean = mean_average_precision(scores, targets)              # per cent, of all classes

Shapes: M images, K classes.
"""
import torch
from torch import Tensor


def per_cent(predicted: Tensor, labels: Tensor) -> float:
    """Of equal entries; two decimals."""
    return round(100 * (predicted == labels).double().mean().item(), 2)


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """(M,), bool (M,) -> the mean, over the relevant images, of the precision among the images that
    score at least as high; NaN where none is relevant."""
    scores, order = scores.sort(descending=True)
    relevant = relevant[order].double()
    hits, seen = relevant.cumsum(0), torch.arange(1, len(scores) + 1)
    # of equal scores all have the precision of the last
    last = torch.searchsorted(-scores.contiguous(), -scores.contiguous(), right=True) - 1
    return (relevant * hits[last] / seen[last]).sum() / relevant.sum()


def mean_average_precision(scores: Tensor, targets: Tensor) -> float:
    """Over the classes that have an image, per cent.  scores, targets: (M, K)."""
    values = [average_precision(scores[:, k], targets[:, k]) for k in range(targets.shape[1])
              if targets[:, k].any()]
    return round(100 * torch.stack(values).mean().item(), 2)
