"""Low-shot evaluation: linear SVMs on a few images of each class, drawn several times (VISSL).

    scores, costs = svm_scores(features, targets, queries)      # (M, K), (K,)
    chosen = draw_shots(targets, shots=4, seed=0)               # numbers of the images
    python evaluate.py lowshot runs/mine --data flowers/ --shots 1,2,4 --draws 5

The SVMs are liblinear's (squared hinge loss), deterministic; each class chooses its cost by a
cross-validation on its own training images.

Shapes: N training images, M queries, C features, K classes.
"""
import sys
from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from data.labelled import Labelled
from data.stream import mix
from evaluation.linear import linear, minimise
from evaluation.metrics import average_precision, mean_average_precision, per_cent
from evaluation.task import EvalTask, counts

COSTS = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)    # of SVMs (VISSL's)
FOLDS = 3                                # of the cross-validation that chooses among them (VISSL)
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)     # images a class (VISSL's low-shot SVMs)


def fit_svm(features: Tensor, targets: Tensor, costs: Tensor, start: Tensor | None = None,
            tolerance: float = 1e-6, used: Tensor | None = None) -> Tensor:
    """One class against the others: minimise |w|^2 / 2 + cost * sum of max(0, 1 - y score)^2, the
    bias being the weight of one more feature, 1, as in liblinear.

    features: (N, C) float64.  targets: bool (N, K).  costs: (K,).  used: bool (N, K), which images
    count for which class; None: all.  Returns (C + 1, K).
    """
    signs = torch.where(targets, 1.0, -1.0).to(features)
    weight = 1.0 if used is None else used.to(features)
    scale = 1 / costs.to(features)      # the same minimum, of a function that is of order N
    if start is None:
        start = torch.zeros(features.shape[1] + 1, targets.shape[1]).to(features)

    def objective(weights: Tensor) -> Tensor:
        hinge = (1 - signs * linear(features, weights)).clamp(min=0)
        return (weights.square().sum(0) * scale / 2).sum() + (hinge.square() * weight).sum()

    return minimise(objective, start, tolerance, 2000)


def svm_scores(features: Tensor, targets: Tensor, queries: Tensor,
               costs: Sequence[float] = COSTS) -> tuple[Tensor, Tensor]:
    """Scores of the queries (M, K) by linear SVMs, one a class, and their costs (K,).

    Features are scaled to unit norm. Each class' cost is the one with the best average precision in
    a cross-validation of three folds; 1 where a class has fewer than three images. Differs from
    VISSL's: positive images weigh as much as others (there twice), and none is left out of a test.
    """
    x, queries = (F.normalize(rows.double(), dim=1) for rows in (features, queries))
    if len(x) < x.shape[1]:             # the weights lie in the span of the images
        _, _, basis = torch.linalg.svd(x, full_matrices=False)
        x, queries = x @ basis.t(), queries @ basis.t()
    best = torch.ones(targets.shape[1], dtype=torch.float64)
    best_precision = torch.full_like(best, -1.0)
    enough = targets.sum(0) >= FOLDS
    if enough.any():
        starts, folds = [None] * FOLDS, _folds(targets)
        for cost in sorted(costs):
            precision = torch.zeros_like(best)
            for fold in range(FOLDS):
                inside = folds != fold                                   # (N, K)
                starts[fold] = fit_svm(x, targets, torch.full_like(best, cost), starts[fold],
                                       tolerance=1e-4, used=inside)
                held_out = linear(x, starts[fold])
                precision += torch.stack([
                    average_precision(held_out[~inside[:, k], k], targets[~inside[:, k], k])
                    for k in range(targets.shape[1])]) / FOLDS
            better = (precision > best_precision) & enough
            best = torch.where(better, cost, best)
            best_precision = torch.where(better, precision, best_precision)
    return linear(queries, fit_svm(x, targets, best)), best


def _folds(targets: Tensor) -> Tensor:
    """Each image's fold, for each class (N, K): each fold has its share of the class."""
    # position of an image among those of the class, or among the others
    position = torch.where(targets, targets.cumsum(0), (~targets).cumsum(0)) - 1
    return position % FOLDS


def draw_shots(targets: Tensor, shots: int, seed: int) -> Tensor:
    """Numbers of `shots` images of each class, drawn at random."""
    generator = torch.Generator().manual_seed(seed % 2 ** 63)
    order, chosen = torch.randperm(len(targets), generator=generator), set()
    for k in range(targets.shape[1]):
        chosen |= set(order[targets[order, k]][:shots].tolist())
    return torch.tensor(sorted(chosen))


def run(task: EvalTask) -> dict:
    """Mean and deviation over the draws of top-1 (or mean average precision), for each number of
    shots and depth; first those of the most shots."""
    options = task.options
    train, val = task.extract_splits(options.depths, multilabel=True)
    what, rows = "map" if train.labelled.multilabel else "top1", []
    smallest = int(train.labelled.targets.sum(0).min())
    skipped = [shots for shots in options.shots if shots > smallest]
    if skipped:
        print(f"without {skipped} images a class: the smallest has {smallest}", file=sys.stderr)
    for depth, features, queries in zip(options.depths, train.outputs, val.outputs):
        for shots in options.shots:
            if shots in skipped:
                continue
            values = torch.tensor([
                few_shots(features, train.labelled.targets, queries, val.labelled, shots,
                          mix(options.seed, shots, draw)) for draw in range(options.draws)],
                dtype=torch.float64)
            rows.append({"depth": depth, "shots": shots, what: round(values.mean().item(), 2),
                         "deviation": round(values.std(unbiased=False).item(), 2)})
            print(f"{depth}, {shots} a class: {rows[-1][what]:.2f} +- {rows[-1]['deviation']:.2f}",
                  file=sys.stderr)
    if not rows:
        raise ValueError(f"the smallest class has {smallest} images, fewer than --shots")
    best = max(rows, key=lambda row: (row["shots"], row[what]))
    return best | counts(train, val) | {"draws": options.draws, "skipped": skipped, "all": rows}


def few_shots(features: Tensor, targets: Tensor, queries: Tensor, truth: Labelled, shots: int,
              seed: int) -> float:
    """Top-1, or mean average precision, of one draw, per cent.  truth: of the queries."""
    chosen = draw_shots(targets, shots, seed)
    scores, _ = svm_scores(features[chosen], targets[chosen], queries)
    return (mean_average_precision(scores, truth.targets) if truth.multilabel else
            per_cent(scores.argmax(1), truth.labels))
