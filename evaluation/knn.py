"""Classifiers on features that were computed once: neighbours, logistic regression, linear SVMs.

    predicted = knn(features, labels, queries, k=20)
    predicted, decay = linear_probe(features, labels, queries)
    scores = svm_scores(features, is_of_class, queries)          # (M, K); then average_precision

Each is deterministic, and takes no setting that its own training pictures cannot choose.

Shapes: N training pictures, M queries, C features, K classes.
"""
from typing import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

WEIGHT_DECAYS = [10.0 ** exponent for exponent in range(0, -7, -1)]      # of the linear probe
COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)    # of SVMs (VISSL's)
FOLDS = 3                                # of the cross-validation that chooses among them (VISSL)
SIMILARITIES = 2 ** 26                   # numbers at once


def per_cent(predicted: Tensor, labels: Tensor) -> float:
    return round(100 * (predicted == labels).double().mean().item(), 2)


# ----------------------------------------------------------------------------------- neighbours
def neighbours(features: Tensor, queries: Tensor, k: int,
               chunk: int = 0) -> tuple[Tensor, Tensor]:
    """The k nearest rows of features in cosine similarity: similarities, indices, each (M, k),
    nearest first. chunk: queries at once; 0: as many as make 2^26 similarities."""
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    chunk = chunk or max(1, SIMILARITIES // len(features))
    parts = [(some @ features.t()).topk(min(k, len(features))) for some in queries.split(chunk)]
    similarity, nearest = zip(*parts)
    return torch.cat(similarity), torch.cat(nearest)


def vote(similarity: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Neighbours' similarities, nearest first, and labels, each (M, k) -> predicted labels (M,), by
    votes of exp(similarity / temperature) (arXiv 1805.01978, section 3.4)."""
    votes = torch.zeros(len(labels), classes, dtype=similarity.dtype)
    weights = ((similarity - similarity[:, :1]) / temperature).exp()       # the nearest has 1
    return votes.scatter_add_(1, labels, weights).argmax(1)


def knn(features: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.1,
        chunk: int = 0) -> Tensor:
    """Both: (N, C), (N,), (M, C) -> predicted labels (M,)."""
    similarity, nearest = neighbours(features, queries, k, chunk)
    return vote(similarity, labels[nearest], temperature, int(labels.max()) + 1)


# ------------------------------------------------------------------------- logistic regression
def minimise(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float,
             max_iterations: int = 500) -> Tensor:
    """L-BFGS with a strong Wolfe line search, until no entry of the gradient exceeds tolerance."""
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iterations, tolerance_grad=tolerance,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = objective(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return weights.detach()


def linear(features: Tensor, weights: Tensor) -> Tensor:
    """(N, C), (C + 1, K) -> scores (N, K). The last row of weights are the biases."""
    return torch.addmm(weights[-1], features, weights[:-1])


def fit_linear(features: Tensor, labels: Tensor, classes: int, weight_decay: float,
               start: Tensor | None = None, tolerance: float = 1e-5) -> Tensor:
    """Minimise mean cross-entropy + weight_decay / 2 * |W|^2, in the features' dtype.

    start: weights to begin from.  Returns (C + 1, K): W, and below it the biases, which do not
    decay.
    """
    if start is None:
        start = torch.zeros(features.shape[1] + 1, classes).to(features)
    return minimise(lambda weights: F.cross_entropy(linear(features, weights), labels)
                    + weight_decay / 2 * weights[:-1].square().sum(), start, tolerance)


def linear_probe(features: Tensor, labels: Tensor, queries: Tensor,
                 decays: Sequence[float] = WEIGHT_DECAYS) -> tuple[Tensor, float]:
    """Logistic regression on standardised features: predicted labels (M,), chosen weight decay.

    A fifth of the training pictures, drawn at random, chooses the weight decay (of equals, the
    largest); then all of them are fitted with it. Raises ValueError for fewer than 5 pictures.
    """
    if len(features) < 5:
        raise ValueError(f"linear needs at least 5 training pictures, not {len(features)}")
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)      # a constant feature says nothing
    x, queries = (features - mean) / std, (queries - mean) / std
    classes = int(labels.max()) + 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:len(x) // 5], order[len(x) // 5:]
    part, part_labels, held_out_x = x[rest], labels[rest], x[held_out]
    weights, best = None, (-1.0, 0.0, None)             # of equals the first, the largest decay
    for decay in sorted(decays, reverse=True):          # each fit begins where the last one ended
        weights = fit_linear(part, part_labels, classes, decay, weights)
        top1 = per_cent(linear(held_out_x, weights).argmax(1), labels[held_out])
        best = max(best, (top1, decay, weights), key=lambda entry: entry[0])
    _, decay, weights = best
    return linear(queries, fit_linear(x, labels, classes, decay, weights)).argmax(1), decay


# ------------------------------------------------------------------------------ linear SVMs
def fit_svm(features: Tensor, is_of: Tensor, costs: Tensor, start: Tensor | None = None,
            tolerance: float = 1e-6, used: Tensor | None = None) -> Tensor:
    """One class against the others: minimise |w|^2 / 2 + cost * sum of max(0, 1 - y score)^2, the
    bias being the weight of one more feature, 1, as in liblinear.

    features: (N, C) float64.  is_of: bool (N, K).  costs: (K,).  used: bool (N, K), which pictures
    count for which class; None: all.  Returns (C + 1, K).
    """
    signs = torch.where(is_of, 1.0, -1.0).to(features)
    weight = 1.0 if used is None else used.to(features)
    scale = 1 / costs.to(features)      # the same minimum, of a function that is of order N
    if start is None:
        start = torch.zeros(features.shape[1] + 1, is_of.shape[1]).to(features)
    return minimise(lambda weights: (weights.square().sum(0) * scale / 2).sum()
                    + ((1 - signs * linear(features, weights)).clamp(min=0).square() * weight).sum(),
                    start, tolerance, 2000)


def svm_scores(features: Tensor, is_of: Tensor, queries: Tensor,
               costs: Sequence[float] = COSTS) -> tuple[Tensor, Tensor]:
    """Scores of the queries (M, K) by linear SVMs, one a class, and their costs (K,).

    Features are scaled to unit norm. Each class' cost is the one with the best average precision in
    a cross-validation of three folds; 1 where a class has fewer than three pictures. Differs from
    VISSL's: positive pictures weigh as much as others (there twice), and none is left out of a test.
    """
    x, queries = (F.normalize(some.double(), dim=1) for some in (features, queries))
    if len(x) < x.shape[1]:             # the weights lie in the span of the pictures
        _, _, basis = torch.linalg.svd(x, full_matrices=False)
        x, queries = x @ basis.t(), queries @ basis.t()
    best = torch.ones(is_of.shape[1], dtype=torch.float64)
    best_precision = torch.full_like(best, -1.0)
    enough = is_of.sum(0) >= FOLDS
    if enough.any():
        starts, folds = [None] * FOLDS, _folds(is_of)
        for cost in sorted(costs):
            precision = torch.zeros_like(best)
            for fold in range(FOLDS):
                inside = folds != fold                                   # (N, K)
                starts[fold] = fit_svm(x, is_of, torch.full_like(best, cost), starts[fold],
                                       tolerance=1e-4, used=inside)
                held_out = linear(x, starts[fold])
                precision += torch.stack([
                    average_precision(held_out[~inside[:, k], k], is_of[~inside[:, k], k])
                    for k in range(is_of.shape[1])]) / FOLDS
            better = (precision > best_precision) & enough
            best = torch.where(better, cost, best)
            best_precision = torch.where(better, precision, best_precision)
    return linear(queries, fit_svm(x, is_of, best)), best


def _folds(is_of: Tensor) -> Tensor:
    """Each picture's fold, for each class (N, K): each fold has its share of the class."""
    rank = torch.where(is_of, is_of.cumsum(0), (~is_of).cumsum(0)) - 1      # among its like
    return rank % FOLDS


def average_precision(scores: Tensor, relevant: Tensor) -> Tensor:
    """(M,), bool (M,) -> the mean, over the relevant ones, of the share of relevant ones among
    those with at least their score; NaN where none is relevant."""
    scores, order = scores.sort(descending=True)
    relevant = relevant[order].double()
    hits, seen = relevant.cumsum(0), torch.arange(1, len(scores) + 1)
    # of equal scores all have the precision of the last
    last = torch.searchsorted(-scores.contiguous(), -scores.contiguous(), right=True) - 1
    return (relevant * hits[last] / seen[last]).sum() / relevant.sum()


def mean_precision(scores: Tensor, is_of: Tensor) -> float:
    """Mean average precision over the classes that have a picture, per cent."""
    values = [average_precision(scores[:, k], is_of[:, k]) for k in range(is_of.shape[1])
              if is_of[:, k].any()]
    return round(100 * torch.stack(values).mean().item(), 2)
