"""Features and clusters of every image of a set, into files.

    about = {"checkpoint": "runs/mine/trunk.pt"}
    features(trunk, CenterCrops(images, 224), Path("features.npy"), about, workers=8)
    clusters(swav, CenterCrops(images, 224), Path("clusters.csv"), workers=8)

Under torchrun each rank takes its share of the images. evaluate.py's `features` and `clusters`.

Shapes: B images of a batch, N of a set, C features, K prototypes.
"""
import csv
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from distributed.ranks import barrier, is_main, my_share
from evaluation.features import CenterCrops, extract, in_batches
from evaluation.gallery import counted, open_gallery
from evaluation.task import EvalTask
from figures.sheets import Row, Tile, prototype_name, sheet
from swav import SwAV
from weights.load import load_weights


def features(trunk: nn.Module, crops: CenterCrops, out: Path, about: dict, **options) -> dict:
    """OUT.npy (N, C) float32, to be memory-mapped, NaN where an image cannot be read; OUT.ok.npy
    (N,), 1 or, of those, -1; OUT.txt, the names. An interrupted run goes on where it was.

    about: what the features depend on, besides the names.  options: of features.in_batches. Raises
    ValueError where OUT holds features of something else.
    """
    images, out = crops.images, out if out.suffix == ".npy" else Path(f"{out}.npy")
    notes, ok_file = out.with_suffix(".json"), out.with_suffix(".ok.npy")
    open_npy = numpy.lib.format.open_memmap
    names = hashlib.sha256()
    for i in range(len(images)):
        names.update(images.name(i).encode(errors="surrogateescape") + b"\n")
    about = about | {"pictures": len(images), "names": names.hexdigest()}
    check_own(out, notes, about)
    barrier()
    if is_main() and not (notes.exists() and out.exists() and ok_file.exists()):
        out.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(about) + "\n")      # first: what follows is known as ours
        with open(out.with_suffix(".txt"), "w", errors="surrogateescape") as file:
            file.writelines(images.name(i) + "\n" for i in range(len(images)))
        open_npy(ok_file, "w+", numpy.int8, (len(images),))
        open_npy(out, "w+", numpy.float32, (len(images), trunk.num_features))
    barrier()
    rows, done = open_npy(out, "r+"), open_npy(ok_file, "r+")
    left = [i for i in my_share(len(images)) if not done[i]]
    start = 0
    for (x,), ok in in_batches(trunk, Subset(crops, left), **options):
        indices = left[start:start + len(x)]
        rows[indices] = numpy.where(ok.numpy()[:, None], x.numpy(), numpy.nan)
        rows.flush()                            # a row counts once it is on the disk
        done[indices] = numpy.where(ok.numpy(), 1, -1)
        start += len(x)
    done.flush()
    barrier()
    return {"out": str(out), "pictures": len(images), "features": rows.shape[1],
            "left_out": int((numpy.asarray(done) < 0).sum())}


def check_own(out: Path, notes: Path, about: dict) -> None:
    """Raises ValueError, on all ranks, where one of features' files is there that it did not write
    for the same input."""
    written = [path for path in (notes, out, out.with_suffix(".ok.npy"), out.with_suffix(".txt"))
               if os.path.lexists(path)]
    try:
        own = json.loads(notes.read_text()) == about
    except (OSError, ValueError):
        own = False
    if written and not own:
        raise ValueError(f"{written[0]} is there, and does not belong to these features: choose "
                         "another --out")


class NearestPrototype(nn.Module):
    """images -> of each its nearest prototype, the cosine, and the confidence (B,): its share in
    softmax(cosines / temperature). Sinkhorn has no part in it: that divides up a batch.

    features: give the trunk's features too (B, C)."""

    def __init__(self, model: SwAV, temperature: float, features: bool = False):
        super().__init__()
        self.model, self.temperature, self.features = model, temperature, features

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.model.trunk(images)                              # (B, C)
        _, cosines = self.model.project(features)                        # (B, K)
        cosine, prototype = cosines.max(1)
        confidence = (cosines / self.temperature).softmax(1).amax(1)
        return [prototype.float(), cosine, confidence, *[features] * self.features]


class Cluster(NamedTuple):
    """Images that have the same nearest prototype."""
    prototype: int                      # its number
    count: int                          # of the images
    nearest: list[int]                  # some of them, the nearest first
    cosines: list[float]                # of these


def clusters(model: SwAV, crops: CenterCrops, out: Path, temperature: float = 0.1, rows: int = 16,
             columns: int = 10, gallery: Callable[..., None] | None = None,
             **options) -> tuple[dict, list[Cluster]]:
    """A CSV of name, prototype and confidence; and, of the `rows` prototypes that most images are
    nearest to, the `columns` nearest of these images. gallery: gets NearestPrototype's outputs with
    the features, which images could be read, and the result.  options: of features.extract."""
    network = NearestPrototype(model, temperature, gallery is not None)
    outputs, ok = extract(network, crops, desc="clusters", **options)
    prototype, cosine, confidence = outputs[0].long(), *outputs[1:3]
    images, count = crops.images, model.prototypes.out_features
    if is_main():
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(["name", "prototype", "confidence"])
            table.writerows((images.name(i), int(prototype[i]), f"{confidence[i]:.4f}")
                            for i in range(len(images)) if ok[i])
    members = torch.bincount(prototype[ok], minlength=count)
    order = cosine.masked_fill(~ok, -torch.inf).argsort(descending=True)[:int(ok.sum())]
    largest = members.argsort(descending=True, stable=True)[:min(rows, int((members > 0).sum()))]
    nearest = [order[prototype[order] == k][:columns] for k in largest]
    found = [Cluster(k, int(members[k]), indices.tolist(), cosine[indices].tolist())
             for k, indices in zip(largest.tolist(), nearest)]
    result = {"out": str(out), "pictures": int(ok.sum()), "left_out": int((~ok).sum()),
              "prototypes": count, "used": int((members > 0).sum()),
              "confidence": round(confidence[ok].mean().item(), 4)}
    if gallery and is_main():
        gallery(outputs, ok, result)
    return result, found


def run_features(task: EvalTask) -> dict:
    options, preprocessing = task.options, task.preprocessing
    # what is not as usual: files begun by an earlier version go on
    unusual = {name: list(values) for name, values in preprocessing.normalisation.items()
                if name in task.config}
    if options.precision == "bf16":
        unusual["precision"] = "bf16"
    about = {"checkpoint": task.digest() or f"{options.arch}, seed {options.seed}",
             **preprocessing.geometry, **unusual}
    return features(task.trunk, preprocessing.center_crops(task.images()),
                    Path(options.out or "features.npy"), about, **task.extract_options())


def run_clusters(task: EvalTask) -> dict:
    options, images = task.options, task.images()
    result, largest = clusters(
        swav_of(task), task.preprocessing.center_crops(images),
        Path(options.out or Path(options.html, "clusters.csv")),
        task.config.get("temperature", 0.1), options.rows, options.columns,
        open_gallery(task, images) if options.html else None, **task.extract_options())
    if options.sheet and is_main():
        sheet(options.sheet, caption(result, len(largest)), [
            Row(prototype_name(cluster.prototype, cluster.count),
                [Tile(task.tile(images, i), [f"{cosine:.3f}"])
                 for i, cosine in zip(cluster.nearest, cluster.cosines)]) for cluster in largest])
    return result


def caption(result: dict, shown: int) -> str:
    """Of the sheet of clusters."""
    return (f"Clusters: {counted(result)}\nA row each for the {shown:,} "
            "with most images: the prototype's number, how many images it is the nearest prototype "
            "of, and the nearest of these, with their cosine similarity to it.")


def swav_of(task: EvalTask) -> SwAV:
    """The whole model: trunk, head and prototypes, as the file's shapes say."""
    tensors = task.loaded.tensors if task.loaded else {}
    numbers = sorted({int(name.split(".")[1]) for name in tensors
                      if name.startswith("head.") and name.split(".")[1].isdigit()})
    layers = [tensors[f"head.{n}.weight"] for n in numbers]
    widths = [len(layer) for layer in layers if layer.dim() == 2]
    if not widths or "prototypes.weight" not in tensors:
        raise ValueError(f"{task.source} holds no prototypes of SwAV's kind: name the folder or "
                         "checkpoint.pt of a run of --method swav")
    head_bn = any(layer.dim() == 1 for layer in layers)
    model = SwAV(task.trunk, widths, len(tensors["prototypes.weight"]), head_bn)
    if missing := load_weights(model, task.loaded).untouched:
        raise ValueError(f"{task.source} has no {missing[0]} of SwAV's kind")
    return model
