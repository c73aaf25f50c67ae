"""The summary of a finished run: its loss, its prototypes and, of the demo, what it has learned.

    look_back(run)                                      # writes into run.out
    rows = {"trained trunk": {"knn": 61.3, "linear": 70.2}}
    table("held-out demo images", rows)               # a line a row

Of a run on the demo images results.json holds, and a table shows, kNN and linear top-1 of raw
pixels, of the untrained and of the trained trunk: but for --method supervised, the only place where
a run's labels are read.

Shapes: N images, D embedding, K prototypes.
"""
import json
import os

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from data.demo import DemoImages
from data.stream import permute
from distributed.hardware import processors
from evaluation.features import CenterCrops, extract
from evaluation.knn import knn_top1
from evaluation.linear import linear_probe
from evaluation.metrics import per_cent
from figures.curves import curves
from figures.sheets import neighbours, prototypes
from methods.build import build_trunk
from weights.atomic import write_whole

SHEET = 2048                # images from which the sheet of prototypes is drawn


def look_back(run) -> None:
    """results.json of a demo, loss.png where there is matplotlib, and a sheet, the last file of
    all: with it, a run is finished. It is prototypes.png of SwAV, else neighbours.png.

    run: .config, a recipes.config.Config; .method; .stream.images; .out; .device.
    """
    config, images = run.config, run.stream.images
    demo = config.recipe == "demo" and not config.data
    workers = min(8, processors()) if config.workers < 0 else config.workers
    torch.set_num_threads(processors())                 # the workers of the run have gone
    decode = {"size": config.crops[0].size, "whole": demo, "workers": workers}
    options = {"device": run.device, "mean": config.mean, "std": config.std}
    decoded = decode_once(images, **decode)
    if demo:
        held_out = DemoImages("val")
        rows = compare_trunks(run, decoded, torch.from_numpy(images.labels),
                              decode_once(held_out, **decode), torch.from_numpy(held_out.labels),
                              **options)
        write_whole(run.out / "results.json", json.dumps(rows, indent=2) + "\n")
        table(f"{len(held_out):,} held-out demo images of {len(held_out.classes)} kinds", rows)
    try:
        curves(run.out / "loss.png", [run.out])
    except ImportError as error:
        print(error)
    shown = [pair for pair in decoded if pair[1]][:SHEET]
    aside = run.out / "sheet.tmp.png"
    if config.method == "swav":
        draw_prototypes(aside, run, shown, **options)
    else:
        (features,), _ = extract(run.method.trunk, shown, **options)             # (N, C)
        neighbours(aside, features, torch.stack([image for image, _ in shown]))
    os.replace(aside, run.out / sheet_name(config))


def sheet_name(config) -> str:
    """The file that is written last of all."""
    return "prototypes.png" if config.method == "swav" else "neighbours.png"


def decode_once(images, size: int, whole: bool, workers: int) -> list[tuple[Tensor, bool]]:
    """Central crops, as `extract` takes them, of all images of a demo, uncut (`whole`), or of a
    sample of others."""
    count = len(images)
    chosen = range(count) if whole else [permute(i, count, 0) for i in range(min(SHEET, count))]
    crops = Subset(CenterCrops(images, size, 1.0 if whole else 0.875), chosen)
    return [pair for batch, ok in DataLoader(crops, 64, num_workers=workers)
            for pair in zip(batch.clone(), ok.tolist())]


def compare_trunks(run, images: list, labels: Tensor, queries: list, truth: Tensor,
                   **options) -> dict[str, dict[str, float]]:
    """Top-1 on the queries by kNN and by a linear probe, of the trained trunk and of two that have
    learned nothing.  options: of features.extract."""
    torch.manual_seed(run.config.seed)                  # an untrained trunk of the same seed
    untrained, rows = build_trunk(run.config.arch), {}
    networks = {"raw pixels, two by two": nn.Sequential(nn.AvgPool2d(2), nn.Flatten()),
                "untrained trunk": untrained, "trained trunk": run.method.trunk}
    for name, network in networks.items():
        (features,), _ = extract(network, images, **options)
        (query_features,), _ = extract(network, queries, **options)
        predicted, _ = linear_probe(features, labels, query_features)
        rows[name] = {"knn": knn_top1(features, labels, query_features, truth),
                      "linear": per_cent(predicted, truth)}
    return rows


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title + ', per cent':<52}{'kNN':>8}{'linear':>8}")
    for name, row in rows.items():
        print(f"{name:<52}{row['knn']:>8.1f}{row['linear']:>8.1f}")


def draw_prototypes(path, run, images: list[tuple[Tensor, bool]], **options) -> None:
    """The images nearest to each of SwAV's prototypes.  options: of features.extract."""
    embed = nn.Sequential(run.method.trunk, run.method.head)
    (embeddings,), _ = extract(embed, images, **options)                         # (N, D)
    scores = F.normalize(embeddings, dim=1) @ run.method.prototypes.weight.detach().cpu().t()
    prototypes(path, scores, torch.stack([image for image, _ in images]))
