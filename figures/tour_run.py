"""The tour's run: SwAV on the built-in images in a minute; and what is in a run's folder.

    learn(Path("runs/tour/run"))                        # as train.py writes it: log and checkpoints
    moments = read_moments(Path("runs/tour/run"))       # at most three: first, middle and last
    images = read_images(source(moments[0].config), 512, 32)
    embeddings, scores = look(moments[-1], images)

A folder of train.py serves as well, of a SwAV on a RegNet; `--keep-every` keeps checkpoints of
earlier moments. `learn` is SwAV's loop without all that a long run needs: train.py has that.

Shapes: B images, V crops, D embedding, K prototypes.
"""
import json
import math
import random
from pathlib import Path
from typing import Callable, NamedTuple

import numpy
import torch
from PIL import Image
from torch import Tensor

from data.demo import DemoImages
from data.images import open_images
from figures.design_space import parse
from larc import LARC
from multicrop import NEUTRAL, MultiCrop, Photometric, decode, parse_channels, parse_crops
from regnet import RegNet
from swav import SwAV
from weights.atomic import load, save

# recipe demo's, but for smaller crops and batches and half of the kinds: it takes a minute
CONFIG = {"arch": "regnety_100mf", "batch_size": 64, "steps": 160,
          "crops": "2x40@0.25-1+2x20@0.1-0.3", "strength": 0.2, "gray": 0.0, "blur": "0",
          "mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "head": "256-64",
          "head_bn": True, "prototypes": 24, "epsilon": 0.03, "sinkhorn_iterations": 3,
          "temperature": 0.1, "lr": 4.8, "warmup": 0.08, "momentum": 0.9, "weight_decay": 1e-6,
          "seed": 0, "count": 1536, "kinds": 6}


class Moment(NamedTuple):
    step: int
    model: SwAV
    config: dict


def build(config: dict) -> SwAV:
    """Raises ValueError for a run that the tour cannot show."""
    if config.get("method", "swav") != "swav":
        raise ValueError(f"the tour is of SwAV, and the run is of {config['method']}")
    head = [int(width) for width in str(config["head"]).split("-")]
    counts = [spec.count for spec in parse_crops(config["crops"])]
    return SwAV(RegNet(parse(config["arch"])), head, config["prototypes"], config["head_bn"],
                counts=counts, epsilon=config["epsilon"],
                iterations=config["sinkhorn_iterations"], temperature=config["temperature"])


def learn(folder: Path, config: dict = CONFIG) -> None:
    """Train as config says, and write config.json, log.jsonl and checkpoint-STEP.pt."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"config": config}))
    torch.manual_seed(config["seed"])
    model, steps = build(config).to(memory_format=torch.channels_last), config["steps"]
    optimizer = LARC(model.parameters(), config["lr"], config["momentum"], config["weight_decay"])
    images = source(config)
    with open(folder / "log.jsonl", "w", buffering=1) as log:
        for step in range(steps):
            if step in (0, steps // 4):
                save(folder / f"checkpoint-{step:09}.pt", {"model": model.state_dict()})
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, config)
            loss, outputs = train_step(model, optimizer, batch(images, step, config), step)
            entry = {"step": step + 1, "loss": loss.item(), **model.statistics(outputs, loss)}
            log.write(json.dumps(entry) + "\n")
    save(folder / "checkpoint.pt", {"model": model.state_dict(), "step": steps})


def train_step(model: SwAV, optimizer: LARC, crops: list[Tensor], step: int):
    """One step of SwAV. crops: augmented, one (count * B, 3, s, s) per size."""
    outputs = model(crops)                      # embeddings (V*B, D), scores (V*B, K)
    codes = model.targets(outputs, step)        # Sinkhorn-Knopp, without gradient
    loss = model.loss(outputs, codes)           # swapped prediction
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.after_step(step)                      # prototypes back to unit norm
    return loss.detach(), outputs


def lr_at(step: int, config: dict) -> float:
    """Linear warm-up, then half a cosine."""
    done, warmup = (step + 1) / config["steps"], config["warmup"]
    cosine = 0.5 + 0.5 * math.cos(math.pi * max(0.0, done - warmup) / (1 - warmup))
    return config["lr"] * min(1.0, done / warmup) * cosine


def batch(images, step: int, config: dict) -> list[Tensor]:
    """The crops of a step's images: a pure function of the step."""
    chosen = random.Random(f"{config['seed']} {step}").sample(range(len(images)),
                                                              config["batch_size"])
    crop = MultiCrop(parse_crops(config["crops"]), config["strength"], gray=config["gray"],
                     blur=[float(p) for p in str(config["blur"]).split(",")])
    return collate([first_readable(images, i, lambda data: crop(data, step * len(images) + i))
                    for i in chosen], config)


def first_readable(images, i: int, change: Callable):
    """change(bytes) of image i, or of the next one that can be read. Raises ValueError where none
    can."""
    for j in range(i, i + len(images)):
        try:
            return change(images[j % len(images)])
        except Exception:                       # a file system's errors too
            continue
    raise ValueError("no image can be read")


def collate(cut: list, config: dict) -> list[Tensor]:
    """What MultiCrop returns of each image -> augmented crops, one (count * B, 3, s, s) per size.
    """
    augment = normalisation(config)
    sizes = zip(*(zip(*pair) for pair in cut))              # per size, of each image: crops, params
    return [augment(*(torch.stack(part, 1).flatten(0, 1) for part in zip(*size)))
            for size in sizes]


def normalisation(config: dict) -> Photometric:
    return Photometric(parse_channels(config["mean"]), parse_channels(config["std"]))


def read_moments(folder: Path) -> list[Moment]:
    """The first, the middle and the last of the checkpoints in a run's folder; fewer, where it has
    fewer. Raises ValueError for a folder that is not a run's."""
    kept = sorted(folder.glob("checkpoint-*.pt"))
    paths = [*dict.fromkeys(kept[:1] + kept[len(kept) // 2:][:1]), folder / "checkpoint.pt"]
    moments = []
    try:
        config = json.loads((folder / "config.json").read_text())["config"]
        for path in paths:
            model, state = build(config), load(path)
            model.load_state_dict(state["model"])
            step = state.get("step", int(path.stem.rpartition("-")[2]) if path in kept else 0)
            moments.append(Moment(step, model.eval(), config))
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is not the folder of a run: {error}") from None
    return list({moment.step: moment for moment in moments}.values())


def source(config: dict):
    """A run's images: a list of encoded ones, or what open_images gives. Of the built-in images
    those of every second kind, where `kinds` says so: a task for a minute."""
    if config.get("data"):
        return open_images(config["data"])
    images = DemoImages("train", config.get("count", 1536))
    apart = len(images.classes) // config.get("kinds", len(images.classes))
    return [images[i] for i in range(0, len(images), apart)]


def read_images(images, count: int, side: int) -> Tensor:
    """Some of a run's images, uint8 (count, 3, s, s): their central squares. side: s."""
    count = min(count, len(images))
    return torch.stack([first_readable(images, i * (len(images) // count),
                                       lambda data: central(data, side)) for i in range(count)])


def central(data: bytes, side: int) -> Tensor:
    image = decode(data)
    short = min(image.size)
    left, upper = ((length - short) // 2 for length in image.size)
    square = image.resize((side, side), Image.Resampling.BILINEAR,
                          (left, upper, left + short, upper + short))
    return torch.from_numpy(numpy.array(square)).permute(2, 0, 1)


@torch.no_grad()
def look(moment: Moment, images: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B, D) and scores (B, K) of whole images, uint8 (B, 3, s, s)."""
    augment = normalisation(moment.config)
    outputs = [moment.model([augment(part, torch.tensor([NEUTRAL] * len(part)))])
               for part in images.split(64)]
    return tuple(map(torch.cat, zip(*outputs)))


def nearest(scores: list[Tensor], rows: int = 6, count: int = 5) -> tuple[list[int], list[Tensor]]:
    """The prototypes that are nearest to most images in the end; and at each moment the images that
    are nearest to these. scores: (N, K), of each moment. Returns numbers, and tables (rows, n), n
    at most count."""
    members = torch.bincount(scores[-1].argmax(1), minlength=scores[-1].shape[1])
    chosen = members.argsort(descending=True, stable=True)[:rows]
    count = min(count, len(scores[-1]))
    return chosen.tolist(), [cosines[:, chosen].topk(count, dim=0).indices.t()
                             for cosines in scores]
