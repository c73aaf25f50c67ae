"""kNN: each image gets the label that its nearest neighbours among the training images vote for.

    import torch
    from evaluation.knn import knn, knn_top1
    features, labels = torch.randn(100, 8), torch.arange(100) % 4       # of the training images
    queries, truth = torch.randn(20, 8), torch.arange(20) % 4
    predicted = knn(features, labels, queries, k=20)            # (20)
    top1 = knn_top1(features, labels, queries, truth)           # per cent
    python evaluate.py knn runs/mine --data flowers/ --k 10,20 --temperature 0.07,0.1

Paper: arXiv 1805.01978, section 3.4.

Shapes: N training images, M queries, C features.
"""
import torch
from torch import Tensor
from torch.nn import functional as F

from data.labelled import Labelled
from data.stream import permute
from distributed.ranks import is_main
from evaluation.metrics import per_cent
from evaluation.search import nearest
from evaluation.task import EvalTask, counts
from figures.sheets import Row, Tile, sheet


def neighbours(features: Tensor, queries: Tensor, k: int,
               chunk: int = 0) -> tuple[Tensor, Tensor]:
    """The k nearest rows of features in cosine similarity: similarities, indices, each (M, k),
    nearest first. chunk: queries at once; 0: as many as make 2^26 similarities."""
    return nearest(F.normalize(features, dim=1), F.normalize(queries, dim=1), k, chunk)


def vote(similarity: Tensor, labels: Tensor, temperature: float, classes: int) -> Tensor:
    """Neighbours' similarities, nearest first, and labels, each (M, k) -> predicted labels (M,), by
    votes of exp(similarity / temperature)."""
    votes = torch.zeros(len(labels), classes, dtype=similarity.dtype)
    weights = ((similarity - similarity[:, :1]) / temperature).exp()       # the nearest has 1
    return votes.scatter_add_(1, labels, weights).argmax(1)


def knn(features: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.1,
        chunk: int = 0) -> Tensor:
    """(N, C), (N,), (M, C) -> predicted labels (M,)."""
    similarity, found = neighbours(features, queries, k, chunk)
    return vote(similarity, labels[found], temperature, int(labels.max()) + 1)


def knn_top1(features: Tensor, labels: Tensor, queries: Tensor, truth: Tensor, k: int = 20,
             temperature: float = 0.1) -> float:
    """Per cent of the queries whose predicted label is the true one (M,)."""
    return per_cent(knn(features, labels, queries, k, temperature), truth)


def run(task: EvalTask) -> dict:
    """Top-1 for each k and temperature; all have the neighbours of the largest k in common."""
    options = task.options
    train, val = task.extract_splits(["avgpool"])
    labels, truth = train.labelled.labels, val.labelled.labels
    similarity, nearest = neighbours(train.outputs[0], val.outputs[0], max(options.k))
    rows, predictions = [], []
    for k in options.k:
        for temperature in options.temperature:
            predictions.append(vote(similarity[:, :k], labels[nearest[:, :k]], temperature,
                                    len(train.labelled.classes)))
            rows.append({"k": k, "temperature": temperature,
                         "top1": per_cent(predictions[-1], truth)})
    if options.sheet and is_main():
        draw(task, train.labelled, val.labelled, similarity, nearest, predictions[0], rows[0])
    return rows[0] | counts(train, val) | ({"all": rows} if len(rows) > 1 else {})


def draw(task: EvalTask, train: Labelled, val: Labelled, similarity: Tensor, nearest: Tensor,
         predicted: Tensor, result: dict) -> None:
    """--sheet: a row a query, drawn at random: the query, a gap, its nearest neighbours.

    similarity, nearest: (M, k).  predicted: (M,).  result: its k, temperature and top1.
    """
    options, labels, truth, names = task.options, train.labels, val.labels, val.classes

    def neighbour(j: int, cosine: float, label: int) -> Tile:
        return Tile(task.tile(train.images, j), [names[labels[j]], f"{cosine:.3f}"],
                    bool(labels[j] == label))

    chosen = [permute(i, len(truth), 0) for i in range(min(options.rows, len(truth)))]
    rows = [Row("", [
        Tile(task.tile(val.images, i), [names[truth[i]], f"vote: {names[predicted[i]]}"],
             bool(predicted[i] == truth[i])), None,
        *(neighbour(j, cosine, truth[i]) for j, cosine in zip(
            nearest[i, :options.columns].tolist(), similarity[i].tolist()))]) for i in chosen]
    most = max(len(row.tiles) for row in rows) - 2
    heads = ["query", "", *(f"neighbour {n + 1}" for n in range(most))]
    sheet(options.sheet, caption(result, len(truth), len(labels)), rows, heads)


def caption(result: dict, queries: int, images: int) -> str:
    """Of the sheet. result: k, temperature and top1 of the votes."""
    return (f"kNN with k = {result['k']} and temperature {result['temperature']:g}: top-1 "
            f"{result['top1']:.1f} % on {queries:,} held-out images.\nUnder a query, drawn at "
            "random from these: its class, and the class for which its neighbours vote. Under a "
            f"neighbour, one of {images:,} training images: its class, and its cosine similarity "
            "to the query.\nTick and solid frame: of the query's class, or the vote is right. "
            "Cross and dashed frame: of another class, or the vote is wrong.")
