"""Linear evaluation: logistic regression on frozen features, or VISSL's layers trained by SGD.

    import torch
    from evaluation.linear import fit_linear, linear_probe
    features, labels, queries = torch.randn(100, 8), torch.arange(100) % 4, torch.randn(20, 8)
    predicted, weight_decay = linear_probe(features, labels, queries)       # (20)
    weights = fit_linear(features, labels, classes=4, weight_decay=1e-3)    # (9, 4)
    python evaluate.py linear runs/mine --data flowers/ --depths res4,res5,avgpool

The regression is deterministic, and takes no setting that its own training images cannot choose.
`--sgd` is VISSL's linear_image_classification: random crops, SGD, a BatchNorm before each layer.

Shapes: B images of a batch, N training images, M queries, C features, K classes.
"""
from typing import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluation.features import Depths
from evaluation.metrics import per_cent
from evaluation.supervised import train_with_labels
from evaluation.task import EvalTask, counts

WEIGHT_DECAYS = [10.0 ** exponent for exponent in range(0, -7, -1)]      # of the linear probe


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


def fit_probe(features: Tensor, labels: Tensor, classes: int,
              decays: Sequence[float] = WEIGHT_DECAYS) -> tuple[Tensor, Tensor, Tensor, float]:
    """Logistic regression on standardised features: their mean and deviation (C,), the weights
    (C + 1, K) of (features - mean) / deviation, the chosen weight decay.

    A fifth of the training images, drawn at random, chooses the weight decay (of equals, the
    largest); then all of them are fitted with it. Raises ValueError for fewer than 5 images.
    """
    if len(features) < 5:
        raise ValueError("a linear probe needs at least 5 training images that can be read, not "
                         f"{len(features)}")
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)      # a constant feature says nothing
    x = (features - mean) / std
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:len(x) // 5], order[len(x) // 5:]
    part, part_labels, held_out_x = x[rest], labels[rest], x[held_out]
    weights, best = None, (-1.0, 0.0, None)             # of equals the first, the largest decay
    for decay in sorted(decays, reverse=True):          # each fit begins where the last one ended
        weights = fit_linear(part, part_labels, classes, decay, weights)
        top1 = per_cent(linear(held_out_x, weights).argmax(1), labels[held_out])
        best = max(best, (top1, decay, weights), key=lambda entry: entry[0])
    _, decay, weights = best
    return mean, std, fit_linear(x, labels, classes, decay, weights), decay


def linear_probe(features: Tensor, labels: Tensor, queries: Tensor,
                 decays: Sequence[float] = WEIGHT_DECAYS) -> tuple[Tensor, float]:
    """`fit_probe`: predicted labels of the queries (M,), chosen weight decay."""
    mean, std, weights, decay = fit_probe(features, labels, int(labels.max()) + 1, decays)
    return linear((queries - mean) / std, weights).argmax(1), decay


class LinearProbes(nn.Module):
    """A frozen trunk with a BatchNorm and a linear layer at each of several depths, trained side by
    side (VISSL's eval_mlp): images -> [scores (B, K), one a depth].

    widths: of the features at each depth.
    """

    def __init__(self, depths: Depths, widths: Sequence[int], classes: int):
        super().__init__()
        self.trunk, self.heads = depths.requires_grad_(False), nn.ModuleList()
        for depth, width in zip(depths.depths, widths):
            cells = 1 if depth == "avgpool" else depths.CELLS[0] * depths.CELLS[1]
            layer = nn.Linear(width, classes)
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
            self.heads.append(nn.Sequential(nn.Unflatten(1, (width // cells, cells)),
                                            nn.BatchNorm1d(width // cells), nn.Flatten(), layer))

    def train(self, mode: bool = True) -> "LinearProbes":
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            features = self.trunk(images)
        return [head(x.float()) for head, x in zip(self.heads, features)]

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of its state dict what best.pt and last.pt hold."""
        return {name.removeprefix("heads."): x for name, x in state.items()
                if name.startswith("heads.")}


def run(task: EvalTask) -> dict:
    """Top-1 at each depth; the best one's first."""
    depths = task.options.depths
    if task.options.sgd:
        return run_sgd(task)
    train, val = task.extract_splits(depths)
    labels, truth, rows = train.labelled.labels, val.labelled.labels, []
    for depth, features, queries in zip(depths, train.outputs, val.outputs):
        predicted, decay = linear_probe(features, labels, queries)
        rows.append({"depth": depth, "top1": per_cent(predicted, truth), "weight_decay": decay})
    best = max(rows, key=lambda row: row["top1"])
    return best | counts(train, val) | ({"all": rows} if len(rows) > 1 else {})


def run_sgd(task: EvalTask) -> dict:
    """The same by VISSL's recipe."""
    options, size, (train, val) = task.options, task.preprocessing.size, task.splits()
    depths = Depths(task.trunk, options.depths)
    with torch.no_grad():
        widths = [x.shape[1] for x in depths(torch.zeros(2, 3, size, size))]
    torch.manual_seed(options.seed)
    model = LinearProbes(depths, widths, len(train.classes))
    last, best, summary = train_with_labels(task, model, train, val, "linear",
                                            {"depths": options.depths})
    rows = [{"depth": depth, "top1": top1, "best": highest}
            for depth, top1, highest in zip(options.depths, last, best)]
    return max(rows, key=lambda row: row["top1"]) | summary | {"all": rows}
