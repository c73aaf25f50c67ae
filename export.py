"""Features and clusters of every picture, into files.

    about = {"checkpoint": "runs/mine/trunk.pt"}
    features(trunk, Centred(images, 224), Path("features.npy"), about, workers=8)
    cosines, ok = scores(swav, Centred(images, 224), workers=8)
    clusters(cosines, ok, images, Path("clusters.csv"))

Under torchrun each rank takes its share of the pictures.

Shapes: N pictures, C features, K prototypes.
"""
import csv
import hashlib
import json
from pathlib import Path

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset

from labelled import Centred, extract, in_batches, is_main, my_share
from swav import SwAV


def features(trunk: nn.Module, centred: Centred, out: Path, about: dict, **options) -> dict:
    """OUT.npy (N, C) float32, to be memory-mapped, NaN where a picture cannot be read; OUT.ok.npy
    (N,), 1 or, of those, -1; OUT.txt, the names. An interrupted run goes on where it was.

    about: what the features depend on, besides the names.  options: of labelled.in_batches. Raises
    ValueError where OUT holds features of something else.
    """
    images, out = centred.images, out.with_suffix(".npy")
    notes, ok_file = out.with_suffix(".json"), out.with_suffix(".ok.npy")
    open_npy = numpy.lib.format.open_memmap
    names = hashlib.sha256()
    for i in range(len(images)):
        names.update(images.name(i).encode(errors="surrogateescape") + b"\n")
    about = about | {"pictures": len(images), "names": names.hexdigest()}
    if out.exists() and not (notes.exists() and json.loads(notes.read_text()) == about):
        raise ValueError(f"{out} holds other features; choose another --out")     # on all ranks alike
    wait()
    if is_main() and not notes.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        open_npy(out, "w+", numpy.float32, (len(images), trunk.num_features))
        open_npy(ok_file, "w+", numpy.int8, (len(images),))
        with open(out.with_suffix(".txt"), "w", errors="surrogateescape") as file:
            file.writelines(images.name(i) + "\n" for i in range(len(images)))
        notes.write_text(json.dumps(about) + "\n")
    wait()
    rows, done = open_npy(out, "r+"), open_npy(ok_file, "r+")
    left = [i for i in my_share(len(images)) if not done[i]]
    start = 0
    for (x,), ok in in_batches(trunk, Subset(centred, left), **options):
        some = left[start:start + len(x)]
        rows[some] = numpy.where(ok.numpy()[:, None], x.numpy(), numpy.nan)
        rows.flush()                            # a row counts once it is on the disk
        done[some] = numpy.where(ok.numpy(), 1, -1)
        start += len(x)
    done.flush()
    wait()
    return {"out": str(out), "pictures": len(images), "features": rows.shape[1],
            "left_out": int((numpy.asarray(done) < 0).sum())}


class Scores(nn.Module):
    """A SwAV's cosines of pictures and prototypes."""

    def __init__(self, model: SwAV):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model([images])[1]


def scores(model: SwAV, centred: Centred, **options) -> tuple[Tensor, Tensor]:
    """Cosines of pictures and prototypes (N, K), and which pictures could be read (N,)."""
    (cosines,), ok = extract(Scores(model), centred, desc="clusters", **options)
    return cosines, ok


def clusters(cosines: Tensor, ok: Tensor, images, out: Path, temperature: float = 0.1) -> dict:
    """A CSV of name, nearest prototype, and confidence: its share in softmax(cosines /
    temperature). Sinkhorn has no part in it: that shares out a batch, and this is one picture."""
    confidence, prototype = (cosines / temperature).softmax(1).max(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "w", newline="", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["name", "prototype", "confidence"])
        table.writerows((images.name(i), int(prototype[i]), f"{confidence[i]:.4f}")
                        for i in range(len(images)) if ok[i])
    return {"out": str(out), "pictures": int(ok.sum()), "left_out": int((~ok).sum()),
            "prototypes": cosines.shape[1], "used": prototype[ok].unique().numel(),
            "confidence": round(confidence[ok].mean().item(), 4)}


def nearest(cosines: Tensor, ok: Tensor, rows: int, columns: int) -> list[list[int]]:
    """The pictures nearest to each of the prototypes that most pictures are nearest to."""
    cosines = cosines.masked_fill(~ok[:, None], -torch.inf)
    members = torch.bincount(cosines.argmax(1)[ok], minlength=cosines.shape[1])
    chosen = members.argsort(descending=True, stable=True)[:rows]
    return cosines[:, chosen].topk(min(columns, int(ok.sum())), dim=0).indices.t().tolist()


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()
