"""Measure what a trunk has learned, on pictures in class folders.

    python evaluate.py knn runs/demo-regnety_100mf                       # on the demo pictures
    python evaluate.py knn runs/mine/checkpoint.pt --data flowers/       # flowers/train/CLASS/*.jpg
    python evaluate.py linear random --arch regnety_400mf --data flowers/   # flowers/val/CLASS/

CHECKPOINT is a run's folder, its checkpoint.pt or its trunk.pt, any other file or official name
that weights.py knows, or `random` for an untrained network. The last line on stdout is one JSON
object; progress goes to stderr. Each picture goes through the trunk once; all that follows works on
its pooled features.

knn: each val picture is classed by its k nearest train pictures in cosine similarity, with votes
exp(similarity / temperature) (arXiv 1805.01978, section 3.4).
linear: logistic regression on standardised features by L-BFGS; its weight decay is the one that
does best on a fifth of the train pictures when fitted on the others.

Shapes: N pictures, C features.
"""
import argparse
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as TF
from tqdm import tqdm

import weights
from demo import DemoImages
from images import open_images, permute
from multicrop import (IMAGENET_MEAN, IMAGENET_STD, NEUTRAL, MultiCrop, Photometric, decode,
                       parse_crops)
from recipes import parse_channels
from scale import TRUNKS, build_trunk

PROBED = 1024                            # pictures, at most, that a run is measured on
WEIGHT_DECAYS = [10.0 ** exponent for exponent in range(0, -7, -1)]      # of the linear probe


def load_trunk(source: str, arch: str = "", seed: int = 0) -> tuple[nn.Module, dict]:
    """Anything weights.py reads (a run's folder, a file in any layout, an official name), or
    "random" -> trunk in eval mode, the run's configuration ({} where there is none). arch: of
    random. Raises ValueError where there is no trunk, or none that is known."""
    if source == "random":
        if arch not in TRUNKS:
            raise ValueError(f"random needs --arch, one of {', '.join(sorted(TRUNKS))}")
        torch.manual_seed(seed)
        return build_trunk(arch).eval(), {}
    if source in weights.OFFICIAL and arch not in ("", weights.OFFICIAL[source].arch):
        raise ValueError(f"{source} is of {weights.OFFICIAL[source].arch}, not {arch}")
    loaded = weights.read(source)
    known = weights.arch_of(loaded.tensors)
    if not known or arch not in ("", known[0]):
        raise ValueError(f"{loaded.path} holds {weights.describe(loaded.tensors)}, not "
                         + (arch or "one of regnet.ARCHS"))
    with torch.device("meta"):
        trunk = build_trunk(*known)
    weights.load_weights(trunk, loaded)
    config, beside = loaded.config, loaded.path.parent / "config.json"
    if not config and loaded.path.name == "trunk.pt" and beside.exists():
        try:
            config = json.loads(beside.read_text())["config"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{beside} is damaged: move it away") from None
    return trunk.eval(), config


def normalisation(config: dict) -> dict:
    """A run's configuration -> the mean and std its pictures were normalised with."""
    return {name: parse_channels(config[name]) for name in ("mean", "std") if name in config}


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


@torch.no_grad()
def extract_features(trunk: nn.Module, pictures: Sequence[tuple[Tensor, bool]], device="cpu",
                     batch_size: int = 256, workers: int = 0, mean=IMAGENET_MEAN,
                     std=IMAGENET_STD) -> tuple[Tensor, Tensor]:
    """Features (N, C), float32 on the CPU, and which of the N pictures could be read (N,).

    pictures: a Centred dataset, or a list of what it gives. mean, std: those of the pretraining.
    """
    trunk = trunk.to(device).eval()
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
    features, readable = [], []
    loader = DataLoader(pictures, batch_size, num_workers=workers)
    for images, ok in tqdm(loader, desc="features", disable=not sys.stderr.isatty()):
        x = (images.to(device).float() / 255 - mean) / std
        features.append(trunk(x).float().cpu())
        readable.append(ok)
    return torch.cat(features), torch.cat(readable)


class Labelled(NamedTuple):
    features: Tensor                     # (N, C)
    labels: Tensor                       # (N,)


def labelled_features(trunk: nn.Module, images, pictures, **options) -> Labelled:
    """Features and labels of the pictures that could be read; options: of extract_features.

    Raises ValueError where there are no labels, or no readable picture.
    """
    if images.labels is None:
        raise ValueError("needs pictures in class folders: train/CLASS/, val/CLASS/")
    features, ok = extract_features(trunk, pictures, **options)
    if not ok.any():
        raise ValueError("no picture could be read")
    return Labelled(features[ok], torch.as_tensor(numpy.asarray(images.labels))[ok])


def per_cent(predicted: Tensor, labels: Tensor) -> float:
    return round(100 * (predicted == labels).float().mean().item(), 2)


# ------------------------------------------------------------------------------------ protocols
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


def fit_linear(features: Tensor, labels: Tensor, classes: int, weight_decay: float,
               start: Tensor | None = None, tolerance: float = 1e-5,
               max_iterations: int = 500) -> Tensor:
    """Minimise mean cross-entropy + weight_decay / 2 * |W|^2 by L-BFGS, in the features' dtype.

    features: (N, C).  start: weights to begin from.  tolerance: largest entry of the gradient at
    which it ends.  Returns (C + 1, classes): W, and below it the biases, which do not decay.
    """
    weights = torch.zeros(features.shape[1] + 1, classes).to(features) if start is None else start
    weights = weights.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=max_iterations, tolerance_grad=tolerance,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        decay = weight_decay / 2 * weights[:-1].square().sum()
        loss = F.cross_entropy(linear(features, weights), labels) + decay
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()


def linear(features: Tensor, weights: Tensor) -> Tensor:
    """(N, C), (C + 1, classes) -> logits (N, classes)."""
    return torch.addmm(weights[-1], features, weights[:-1])


def linear_probe(features: Tensor, labels: Tensor, queries: Tensor,
                 decays: Sequence[float] = WEIGHT_DECAYS) -> tuple[Tensor, float]:
    """Logistic regression: (N, C), (N,), (M, C) -> predicted labels (M,), chosen weight decay.

    A fifth of the training pictures, drawn at random, chooses the weight decay (of equals, the
    largest); then all of them are fitted with it. Raises ValueError for fewer than 5 pictures.
    """
    if len(features) < 5:
        raise ValueError(f"linear needs at least 5 training pictures, not {len(features)}")
    mean, std = features.mean(0), features.std(0)
    std = torch.where(std > 1e-6 * std.max(), std, 1.0)      # a constant feature says nothing
    x, queries = (features - mean) / std, (queries - mean) / std
    classes = int(labels.max()) + 1
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[:len(x) // 5], order[len(x) // 5:]
    part, part_labels, held_out_x = x[rest], labels[rest], x[held_out]
    weights, best = None, (-1.0, 0.0, None)             # of equals the first, the largest decay
    for decay in sorted(decays, reverse=True):          # each fit begins where the last one ended
        weights = fit_linear(part, part_labels, classes, decay, weights)
        top1 = per_cent(linear(held_out_x, weights).argmax(1), labels[held_out])
        best = max(best, (top1, decay, weights), key=lambda entry: entry[0])
    _, decay, weights = best
    return linear(queries, fit_linear(x, labels, classes, decay, weights)).argmax(1), decay


def accuracy(protocol: str, train: Labelled, val: Labelled, k: int = 20,
             temperature: float = 0.1) -> tuple[float, dict]:
    """protocol: knn or linear -> top-1 on val in per cent, and the settings it was reached with."""
    if protocol == "knn":
        predicted = knn(*train, val.features, k, temperature)
        settings = {"k": k, "temperature": temperature}
    else:
        predicted, decay = linear_probe(*train, val.features)
        settings = {"weight_decay": decay}
    return per_cent(predicted, val.labels), settings


class Probe:
    """What a trunk knows, in one number, while it trains. The pictures are decoded once.

    images: in class folders: {"knn": per cent of their second half that the votes of the first half
    class aright}; else {"retrieved": per cent of the pictures of which one distorted view is nearest
    to the other one, among the other views of all}.
    views: what cuts and distorts them, a MultiCrop of two crops of one size.
    photometric: on the device of the trunk.  dtype: of autocast.
    Raises ValueError where fewer than two pictures can be read.
    """

    def __init__(self, images, views: MultiCrop, photometric: Photometric, dtype=torch.float32):
        self.photometric, self.dtype = photometric, dtype
        centred = Centred(images, views.specs[0].size)
        labels = images.labels
        labelled = labels is not None and len(images.classes) > 1

        def look(i: int):
            if labelled:
                picture, ok = centred[i]
                return (picture[None], torch.tensor([NEUTRAL]), int(labels[i])) if ok else None
            try:
                (crops,), (params,) = views(images[i], seed=i)
                return crops, params, -1
            except Exception as error:           # decoders raise nearly anything on damaged files
                print(f"left out {images.name(i)}: {error}", file=sys.stderr)

        some = [permute(i, len(images), 0) for i in range(min(PROBED, len(images)))]
        with ThreadPoolExecutor() as pool:
            seen = [one for one in pool.map(look, some) if one]
        if len(seen) < 2:
            raise ValueError("a probe needs at least two pictures that can be read")
        crops, params, labels = zip(*seen)
        self.crops, self.params = torch.cat(crops), torch.cat(params)    # (N or 2N, 3, s, s)
        self.labels = torch.tensor(labels) if labelled else None

    @torch.no_grad()
    def __call__(self, trunk: nn.Module) -> dict[str, float]:
        training, device, features = trunk.training, self.photometric.mean.device, []
        trunk.eval()
        for crops, params in zip(self.crops.split(64), self.params.split(64)):
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                features.append(trunk(self.photometric(crops.to(device), params)).float().cpu())
        trunk.train(training)
        features = torch.cat(features)
        if self.labels is not None:
            half = len(features) // 2
            predicted = knn(features[:half], self.labels[:half], features[half:])
            return {"knn": per_cent(predicted, self.labels[half:])}
        one, other = F.normalize(features, dim=1).unflatten(0, (-1, 2)).unbind(1)        # (N, C)
        return {"retrieved": per_cent((one @ other.t()).argmax(1), torch.arange(len(one)))}


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
    parser.add_argument("what", choices=["knn", "linear"])
    parser.add_argument("checkpoint", help="run folder, checkpoint.pt, trunk.pt, a file of another "
                        "library, an official name (python weights.py), or random")
    parser.add_argument("--data", default="", help="folder with train/ and val/; none: demo")
    parser.add_argument("--arch", default="", help="of the network called random")
    parser.add_argument("--seed", type=int, default=0, help="of the network called random")
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
        trunk, config = load_trunk(args.checkpoint, args.arch, args.seed)
        size = args.size or (parse_crops(config["crops"])[0].size if config else 224)
        ratio = args.crop_ratio or (0.875 if args.data else 1.0)
        splits = open_splits(args.data)
        train, val = (labelled_features(
            trunk, images, Centred(images, size, ratio), device=args.device, workers=args.workers,
            **normalisation(config)) for images in splits)
        top1, settings = accuracy(args.what, train, val, args.k, args.temperature)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        print(f"evaluate.py: error: {reason}", file=sys.stderr)
        sys.exit(2)
    used = len(train.labels), len(val.labels)
    print(json.dumps({
        "protocol": args.what, "checkpoint": args.checkpoint, "data": args.data or "demo",
        "top1": top1, "train": used[0], "val": used[1],
        "left_out": sum(map(len, splits)) - sum(used), **settings, "size": size,
        "crop_ratio": ratio}))


if __name__ == "__main__":
    main()
