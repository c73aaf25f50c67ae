"""Features and clusters of every picture, into files.

    about = {"checkpoint": "runs/mine/trunk.pt"}
    features(trunk, Centred(images, 224), Path("features.npy"), about, workers=8)
    clusters(swav, Centred(images, 224), Path("clusters.csv"), workers=8)

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


class Nearest(nn.Module):
    """Of each picture: its nearest prototype, the cosine, and the confidence: its share in
    softmax(cosines / temperature). Sinkhorn has no part in it: that shares out a batch."""

    def __init__(self, model: SwAV, temperature: float):
        super().__init__()
        self.model, self.temperature = model, temperature

    def forward(self, images: Tensor) -> list[Tensor]:
        _, cosines = self.model([images])                                # (B, K)
        cosine, prototype = cosines.max(1)
        return [prototype.float(), cosine, (cosines / self.temperature).softmax(1).amax(1)]


def clusters(model: SwAV, centred: Centred, out: Path, temperature: float = 0.1, rows: int = 16,
             columns: int = 10, **options) -> tuple[dict, list[list[int]]]:
    """A CSV of name, prototype and confidence; and, of the `rows` prototypes that most pictures are
    nearest to, the `columns` nearest of these pictures. options: of labelled.extract."""
    (prototype, cosine, confidence), ok = extract(Nearest(model, temperature), centred,
                                                  desc="clusters", **options)
    prototype, images, count = prototype.long(), centred.images, model.prototypes.out_features
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
    nearest = [order[prototype[order] == k][:columns].tolist() for k in largest]
    return {"out": str(out), "pictures": int(ok.sum()), "left_out": int((~ok).sum()),
            "prototypes": count, "used": int((members > 0).sum()),
            "confidence": round(confidence[ok].mean().item(), 4)}, nearest


def wait() -> None:
    if dist.is_initialized():
        dist.barrier()
