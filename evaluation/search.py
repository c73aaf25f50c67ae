"""Exact search: the rows of a matrix nearest to others by dot product, in blocks.

    import torch
    from torch.nn import functional as F
    from evaluation.search import average_precision, nearest, ranks, similarities
    features, queries = (F.normalize(torch.randn(n, 64), dim=1) for n in (1000, 50))
    similarity, found = nearest(features, queries, k=10)        # (50, 10), the nearest first
    for start, block in similarities(features, queries):        # (Q, 1000): queries start, ...
        where = ranks(block[0], torch.tensor([3, 14]))          # of two rows, from 0
        average_precision(where)                                # of the first query, 0 to 1

Matrix products of float32, in memory of SIMILARITIES numbers (256 MB) beside the features and the
result; a million features of 1,024 numbers are 4.1 GB. Where they lie, on a CPU or a GPU, the
search is done. `faiss` (optional: pip install faiss-cpu) searches exactly, too; on the machine of
docs/look.md it took four times as long on one thread, so it is used where it is asked for alone.

Paper of the average precision: Philbin et al., CVPR 2007 (Oxford buildings' compute_ap).

Shapes: N features, M queries, Q of them in a block, C numbers each, P positives of a query.
"""
from typing import Iterator

import torch
from torch import Tensor

SIMILARITIES = 2 ** 26                   # numbers at once


def similarities(features: Tensor, queries: Tensor,
                 chunk: int = 0) -> Iterator[tuple[int, Tensor]]:
    """(N, C), (M, C) -> dot products, some queries at a time: the number of the first, and (Q, N).

    chunk: queries at once; 0: as many as make 2^26 numbers.
    """
    chunk = chunk or max(1, SIMILARITIES // max(1, len(features)))
    for start in range(0, len(queries), chunk):
        yield start, queries[start:start + chunk] @ features.t()


def nearest(features: Tensor, queries: Tensor, k: int, chunk: int = 0,
            use_faiss: bool = False) -> tuple[Tensor, Tensor]:
    """(N, C), (M, C) -> the k largest dot products of each query, and whose they are, each (M, k),
    the largest first; all, where there are fewer than k.

    chunk: as of similarities.  use_faiss: search on the CPU with that library; raises ValueError
    where it is not installed.
    """
    k = min(k, len(features))
    if not len(queries):
        return features.new_empty(0, k), features.new_empty(0, k, dtype=torch.long)
    if not use_faiss:
        parts = [block.topk(k) for _, block in similarities(features, queries, chunk)]
        similarity, found = zip(*parts)
        return torch.cat(similarity), torch.cat(found)
    try:
        import faiss
    except ImportError:
        raise ValueError("--faiss needs that library: pip install faiss-cpu, or leave it out: the "
                         "result is the same") from None
    similarity, found = faiss.knn(*(x.float().cpu().contiguous().numpy()
                                    for x in (queries, features)), k,
                                  metric=faiss.METRIC_INNER_PRODUCT)
    return torch.from_numpy(similarity), torch.from_numpy(found)


def ranks(similarity: Tensor, positives: Tensor, junk: Tensor | None = None) -> Tensor:
    """Similarities of a query (N,), numbers (P,) -> at which ranks, from 0, these are, in order.

    junk: numbers of those that are removed from the ranking. Of equal similarities that with the
    smaller number comes first. Where the positives are few it is much faster than to sort.
    """
    if junk is not None and len(junk):
        similarity = similarity.clone()
        similarity[junk] = -torch.inf
    before = [(similarity > similarity[p]).sum() + (similarity[:p] == similarity[p]).sum()
              for p in positives]
    return torch.stack(before).sort().values.cpu()


def average_precision(where: Tensor) -> float:
    """Ranks (P,) of all positives of a query, from 0 and in order -> the area below precision over
    recall by trapezoids, 0 to 1; of the Oxford buildings, of Holidays and of CopyDays.

    Each positive has 1 / P of the recall. The precision left of it is that of the images before
    it, 1 where it is the first. evaluation.metrics has another: without the trapezoids.
    """
    where, hits = where.double(), torch.arange(len(where), dtype=torch.float64)
    left = torch.where(where > 0, hits / where.clamp(min=1), 1.0)
    return ((left + (hits + 1) / (where + 1)) / 2).mean().item()
