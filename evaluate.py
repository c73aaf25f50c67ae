"""Measure what a trunk has learned, on pictures in class folders.

    python evaluate.py knn runs/demo-regnety_100mf                       # on the demo pictures
    python evaluate.py knn runs/mine/checkpoint.pt --data flowers/       # flowers/train/CLASS/*.jpg
    python evaluate.py knn random --arch regnety_400mf --data flowers/   # and flowers/val/CLASS/

CHECKPOINT is a run's folder, its checkpoint.pt or its trunk.pt, or `random` for an untrained
network. The last line on stdout is one JSON object; progress goes to stderr.

knn: each val picture is classed by its k nearest train pictures in cosine similarity of the
trunk's pooled features, with votes exp(similarity / temperature) (arXiv 1805.01978, section 3.4).

Shapes: N pictures, C features.
"""
import argparse
import json
import os
import sys
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

import checkpoint
from demo import DemoImages
from images import open_images
from multicrop import IMAGENET_MEAN, IMAGENET_STD, decode, parse_crops
from regnet import ARCHS, RegNet


def load_trunk(source: str, arch: str = "", seed: int = 0) -> tuple[RegNet, dict]:
    """A run's folder, checkpoint.pt or trunk.pt, or "random" -> trunk in eval mode, the run's
    configuration ({} for random). Raises ValueError where there is none, or of another arch."""
    if source == "random":
        if arch not in ARCHS:
            raise ValueError(f"random needs --arch, one of {', '.join(sorted(ARCHS))}")
        torch.manual_seed(seed)
        return RegNet(ARCHS[arch]).eval(), {}
    path = Path(source) / "trunk.pt" if Path(source).is_dir() else Path(source)
    state = checkpoint.load(path)
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ValueError(f"{path} holds neither a run nor a trunk")
    if {"model", "config"} <= state.keys():
        config = state["config"]
        state = {k.removeprefix("trunk."): v for k, v in state["model"].items()
                 if k.startswith("trunk.")}
    else:
        beside = path.parent / "config.json"
        if not (arch or beside.exists()):
            raise ValueError(f"{path} does not say its arch and {beside} is missing: give --arch")
        try:
            config = json.loads(beside.read_text())["config"] if beside.exists() else {}
        except (ValueError, KeyError):
            raise ValueError(f"{beside} is damaged: give --arch and move it away") from None
    name = arch or config["arch"]
    if name not in ARCHS:
        raise ValueError(f"unknown arch {name!r}; there is {', '.join(sorted(ARCHS))}")
    trunk = RegNet(ARCHS[name])
    try:
        trunk.load_state_dict(state)
    except RuntimeError:
        raise ValueError(f"{path} holds another network than {name}") from None
    return trunk.eval(), config


class Centred(Dataset):
    """Picture i -> its centre, uint8 (3, size, size), and whether it could be read.

    The short side is resized to size / crop_ratio, then a square of `size` is cut from the middle
    (published protocols: 256 and 224).
    """

    def __init__(self, images, size: int, crop_ratio: float = 0.875):
        self.images, self.size, self.resize = images, size, round(size / crop_ratio)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            image = decode(self.images[i])
        except Exception as error:           # decoders raise nearly anything on damaged files
            print(f"left out {self.images.name(i)}: {error}", file=sys.stderr)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        return TF.pil_to_tensor(TF.center_crop(TF.resize(image, self.resize), self.size)), True


@torch.inference_mode()
def extract_features(trunk: nn.Module, dataset: Centred, device="cpu", batch_size: int = 256,
                     workers: int = 0) -> tuple[Tensor, Tensor]:
    """Features (N, C), float32 on the CPU, and which of the N pictures could be read (N,)."""
    trunk = trunk.to(device).eval()
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1)
                 for x in (IMAGENET_MEAN, IMAGENET_STD))
    features, readable = [], []
    loader = DataLoader(dataset, batch_size, num_workers=workers)
    for pictures, ok in tqdm(loader, desc="features", disable=not sys.stderr.isatty()):
        x = (pictures.to(device).float() / 255 - mean) / std
        features.append(trunk(x).float().cpu())
        readable.append(ok)
    return torch.cat(features), torch.cat(readable)


def knn(features: Tensor, labels: Tensor, queries: Tensor, k: int = 20, temperature: float = 0.1,
        chunk: int = 1024) -> Tensor:
    """Weighted nearest neighbours: (N, C), (N,), (M, C) -> predicted labels (M,)."""
    features, queries = F.normalize(features, dim=1), F.normalize(queries, dim=1)
    one_hot = F.one_hot(labels).float()                                  # (N, classes)
    predictions = []
    for some in queries.split(chunk):
        similarity, nearest = (some @ features.t()).topk(min(k, len(features)))     # (m, k)
        votes = (similarity / temperature).exp().unsqueeze(2) * one_hot[nearest]
        predictions.append(votes.sum(1).argmax(1))
    return torch.cat(predictions)


def knn_accuracy(trunk: nn.Module, train, val, size: int, k: int = 20, temperature: float = 0.1,
                 device="cpu", crop_ratio: float = 0.875, workers: int = 0) -> dict:
    """kNN on val pictures from train pictures; those that cannot be read are left out.

    Returns top1 (per cent), and how many train and val pictures were used and left out. Raises
    ValueError where none is left, or where there are no labels.
    """
    sets = []
    for images in (train, val):
        if images.labels is None:
            raise ValueError("knn needs pictures in class folders: train/CLASS/, val/CLASS/")
        features, ok = extract_features(trunk, Centred(images, size, crop_ratio), device,
                                        workers=workers)
        if not ok.any():
            raise ValueError("no picture could be read")
        sets.append((features[ok], torch.as_tensor(numpy.asarray(images.labels))[ok]))
    (train_x, train_y), (val_x, val_y) = sets
    top1 = (knn(train_x, train_y, val_x, k, temperature) == val_y).float().mean().item()
    return {"top1": round(100 * top1, 2), "train": len(train_x), "val": len(val_x),
            "left_out": len(train) + len(val) - len(train_x) - len(val_x)}


def open_splits(data: str):
    """A folder with train/ and val/ class folders, or "" for the demo pictures -> two datasets."""
    if not data:
        return DemoImages("train"), DemoImages("val")
    train, val = open_images(Path(data) / "train"), open_images(Path(data) / "val")
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"train/ and val/ of {data} differ in their class folders: {odd[:5]}")
    return train, val


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure a trunk.")
    parser.add_argument("what", choices=["knn"])
    parser.add_argument("checkpoint", help="run folder, checkpoint.pt, trunk.pt, or random")
    parser.add_argument("--data", default="", help="folder with train/ and val/; none: demo")
    parser.add_argument("--arch", default="", help="name from regnet.ARCHS, if the file says none")
    parser.add_argument("--size", type=int, default=0,
                        help="pixels; none: the size of the run's first crops, else 224")
    parser.add_argument("--crop-ratio", type=float, default=0.0,
                        help="central square over short side; none: 0.875, demo 1")
    parser.add_argument("--k", type=int, default=20, help="neighbours (SEER: 200)")
    parser.add_argument("--temperature", type=float, default=0.1, help="of the votes (SEER: 0.1)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    args = parser.parse_args(argv)
    try:
        if args.k < 1 or not args.temperature > 0 or args.size < 0 or not 0 <= args.crop_ratio <= 1:
            raise ValueError("needs --k >= 1, --temperature > 0, --size > 0, 0 < --crop-ratio <= 1")
        trunk, config = load_trunk(args.checkpoint, args.arch)
        size = args.size or (parse_crops(config["crops"])[0].size if config else 224)
        ratio = args.crop_ratio or (0.875 if args.data else 1.0)
        train, val = open_splits(args.data)
        trunk.to(args.device)
        result = knn_accuracy(trunk, train, val, size, args.k, args.temperature, args.device,
                              ratio, args.workers)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        print(f"evaluate.py: error: {reason}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({"protocol": args.what, "checkpoint": args.checkpoint,
                      "data": args.data or "demo", **result, "k": args.k,
                      "temperature": args.temperature, "size": size, "crop_ratio": ratio}))


if __name__ == "__main__":
    main()
