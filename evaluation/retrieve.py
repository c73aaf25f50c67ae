"""Retrieval: each query is searched among the images of a database, by the trunk's features.

    python evaluate.py retrieve runs/mine --data copydays/ --depths res4 --distractors photos/
    python evaluate.py retrieve runs/mine --data roxford5k/ --depths res4,res5 --whiten rparis6k/
    python evaluate.py retrieve runs/mine --data photos/ --attack --sheet failures.png

    from evaluation.retrieve import attacked, measure
    benchmark = attacked(images, count=100, seed=0)     # or data.retrieval.open_benchmark
    measure(database, queries, benchmark.protocols)     # descriptors (N, C), (M, C) -> Outcome

Published layouts are in data/retrieval.py, pooling and whitening in pooling.py, the search and the
average precision in search.py. --attack needs no labels and no benchmark: some images of a folder
are attacked (attacks.py), and each attacked one is searched among all images of the folder.

Papers: arXiv 1511.05879 (R-MAC), 1803.11285 (revisited Oxford and Paris), 2103.01988, 4.3 (SEER).

Shapes: N images of the database, M queries, C numbers of a descriptor.
"""
import functools
import itertools
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from data.images import open_images
from data.retrieval import Benchmark, Joined, Truth, open_benchmark
from data.stream import permute
from distributed.ranks import is_main
from evaluation.attacks import ATTACKS, Attacked
from evaluation.features import WholeImages, extract
from evaluation.pooling import COMPONENTS, Descriptors, Regions, fit_whitening
from evaluation.search import average_precision, ranks, similarities
from evaluation.task import EvalTask
from figures.sheets import Row, Tile, sheet

SIZES = {"copydays": 224, "revisited": 1024}     # pixels of the longer side, as SEER and VISSL
HEADLINE = ("strong", "medium")          # the protocol that is spoken of; else the mean of all


class Outcome(NamedTuple):
    """Of a protocol: its queries that could be read, and how each was answered."""
    queries: list[int]
    precisions: list[float]              # average precision, 0 to 1
    first: list[int]                     # rank of the first right image, from 0

    def summary(self) -> dict:
        """Mean average precision and recall at 1, the share of queries whose first image is right,
        per cent."""
        count = len(self.queries)
        return {"map": round(100 * sum(self.precisions) / count, 2),
                "recall_at_1": round(100 * sum(rank == 0 for rank in self.first) / count, 2),
                "queries": count}


def attacked(images, count: int, seed: int) -> Benchmark:
    """`count` of the images, drawn at random, under each attack; all images are the database. A
    protocol for each attack."""
    chosen = [permute(i, len(images), seed) for i in range(min(count, len(images)))]
    queries = Attacked(images, chosen, seed)
    return Benchmark(queries, images, {
        name: [Truth([queries.source(i)]) if queries.attack(i) == name else Truth()
               for i in range(len(queries))] for name in ATTACKS})


def measure(database: Tensor, queries: Tensor, protocols: dict[str, list[Truth]],
            readable: Tensor | None = None, found: Tensor | None = None) -> dict[str, Outcome]:
    """Descriptors (N, C), (M, C), of unit norm -> the outcome of each protocol that has a query.

    readable, found: bool (N,), (M,), which images and which queries could be read; None: all. Where
    none of a query's right images could be read, it is left out.
    """
    lost = [] if readable is None else (~readable).nonzero()[:, 0].tolist()
    unread = set(lost)
    outcomes = {name: Outcome([], [], []) for name in protocols}
    for start, block in similarities(database, queries):
        for i, similarity in enumerate(block, start):
            for name, truths in protocols.items():
                positives = [p for p in truths[i].positives if p not in unread]
                if positives and (found is None or found[i]):
                    where = ranks(similarity, torch.tensor(positives),
                                  torch.tensor(truths[i].junk + lost, dtype=torch.long))
                    for numbers, value in zip(outcomes[name], (
                            i, average_precision(where), int(where[0]))):
                        numbers.append(value)
    return {name: outcome for name, outcome in outcomes.items() if outcome.queries}


def headline(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    """The protocols of the first number."""
    return {name: outcomes[name] for name in HEADLINE if name in outcomes} or outcomes


def run(task: EvalTask) -> dict:
    """Mean average precision and recall at 1 of each protocol; with several depths first those of
    the best one."""
    options, preprocessing = task.options, task.preprocessing
    if options.crop_ratio is not None and not options.attack:
        raise ValueError("--crop-ratio is of --attack: the published sets' images are shown whole")
    if options.components != COMPONENTS and not options.whiten:
        raise ValueError("--components is of --whiten: retrieve does not whiten without it")
    if options.attack:
        benchmark = attacked(task.images(), options.queries, options.seed)
        crops, extra, shape = preprocessing.center_crops, {}, {}
    else:
        benchmark = open_benchmark(options.data)
        size = options.size or SIZES["revisited" if "medium" in benchmark.protocols else "copydays"]
        crops = functools.partial(WholeImages, size=size, bicubic=preprocessing.bicubic)
        extra, shape = {"batch": 1}, {"size": size, "crop_ratio": None}
    if options.distractors:
        benchmark = benchmark._replace(
            database=Joined([benchmark.database, open_images(options.distractors)]))
    network = open_descriptors(task, crops, extra)
    (database, readable), (queries, found) = (
        extract(network, crops(images), **task.extract_options(), **extra)
        for images in (benchmark.database, benchmark.queries))
    rows, results = [], []
    for depth, x, q in zip(options.depths, database, queries):
        x, q = x.to(task.device), q.to(task.device)
        outcomes = measure(x, q, benchmark.protocols, readable, found)
        if not outcomes:
            raise ValueError(f"{options.data} has no query that can be read, with its right image")
        shown = [outcome.summary() for outcome in headline(outcomes).values()]
        rows.append({"depth": depth, "components": x.shape[1], **{
            key: round(sum(row[key] for row in shown) / len(shown), 2)
            for key in ("map", "recall_at_1")},
            "protocols": {name: outcome.summary() for name, outcome in outcomes.items()}})
        results.append((outcomes, x, q))
        for name, row in rows[-1]["protocols"].items():
            print(f"{depth}, {name}: mAP {row['map']:.1f}, recall at 1 {row['recall_at_1']:.1f}",
                  file=sys.stderr)
    best = max(range(len(rows)), key=lambda i: rows[i]["map"])
    if options.sheet and is_main():
        draw(task, benchmark, *results[best], readable)
    lost, unread = ((~ok).nonzero()[:, 0].tolist() for ok in (readable, found))
    if options.attack:                   # an attacked image that cannot be read is one of these
        unread = {benchmark.queries.source(i) for i in unread} - {*lost}
    return rows[best] | {
        "pool": options.pool, "whiten": options.whiten, "queries": int(found.sum()),
        "database": int(readable.sum()), "left_out": len(lost) + len(unread),
        **shape} | ({"all": rows} if len(rows) > 1 else {})


def open_descriptors(task: EvalTask, crops=None, extra: dict | None = None) -> Descriptors:
    """The trunk with --depths, --pool and, of --whiten's images, whitening.

    crops: images -> what `extract` takes; None: of the task's preprocessing.  extra: options of
    `extract` beside the task's.
    """
    options, whitenings = task.options, []
    if options.whiten:
        network = Regions(task.trunk, options.depths, options.pool)
        crops = crops or task.preprocessing.center_crops
        whitenings = fit_whitening(network, crops(open_images(options.whiten)), options.components,
                                   **task.extract_options(), **extra or {})
    return Descriptors(task.trunk, options.depths, options.pool, whitenings)


def draw(task: EvalTask, benchmark: Benchmark, outcomes: dict[str, Outcome], database: Tensor,
         queries: Tensor, readable: Tensor) -> None:
    """--sheet: queries whose first image is wrong, of each protocol in turn those whose right image
    comes last: a row has the query, the right image, and what came first."""
    options, outcomes = task.options, headline(outcomes)
    failed = [[(name, i, rank) for rank, i in sorted(zip(outcome.first, outcome.queries),
                                                     reverse=True) if rank]
              for name, outcome in outcomes.items()]
    turns = itertools.zip_longest(*failed)
    chosen = [failure for turn in turns for failure in turn if failure][:options.rows]
    if not chosen:
        print("no query failed: no sheet", file=sys.stderr)
        return
    chosen.sort(key=lambda failure: list(outcomes).index(failure[0]))
    rows = []
    for name, i, rank in chosen:
        truth = benchmark.protocols[name][i]
        similarity = (database @ queries[i]).cpu().masked_fill(~readable, -torch.inf)
        wrong = similarity.clone()
        wrong[truth.positives + truth.junk] = -torch.inf
        best, found = wrong.topk(min(options.columns, int(wrong.isfinite().sum())))
        right = max(truth.positives, key=lambda p: similarity[p])
        rows.append(Row(name.replace(", ", ",\n"), [
            Tile(task.tile(benchmark.queries, i),
                 [benchmark.queries.name(i).removesuffix(f" ({name})")]),
            Tile(task.tile(benchmark.database, right), [f"rank {rank + 1:,}",
                                                        f"{similarity[right]:.3f}"], True), None,
            *(Tile(task.tile(benchmark.database, j), [benchmark.database.name(j), f"{cosine:.3f}"],
                   False) for j, cosine in zip(found.tolist(), best.tolist()))]))
    most = max(len(row.tiles) for row in rows) - 3
    heads = ["query", "right", "", *(f"wrong {n + 1}" for n in range(most))]
    asked = sum(len(outcome.queries) for outcome in outcomes.values())
    sheet(options.sheet, caption(sum(map(len, failed)), asked, int(readable.sum())), rows, heads)


def caption(failed: int, queries: int, images: int) -> str:
    """Of the sheet."""
    return (f"Retrieval: of {queries:,} queries, searched among {images:,} images, {failed:,} do "
            "not find a right image first. A row each for some of them: the query; the right "
            "image, with its rank and its cosine similarity to the query; and the wrong images "
            "that are nearest, with theirs.")
