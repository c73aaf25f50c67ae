"""Training with labels by SGD: of layers on a frozen trunk (linear --sgd), or of all (finetune).

    recipe = RECIPES["finetune"]._replace(epochs=15)
    last, best, counted = fit(Finetuned(trunk, 1000), train, val, recipe, Path("runs/finetuned"))
    train_with_labels(task, model, train, val, "finetune", {"labels": "all"})   # evaluate.py's

The recipes are the published ones (VISSL's files for SEER). Input, order and augmentation are those
of pretraining (data.stream, multicrop), so a run is a pure function of its settings, resumes where
it was stopped, and under torchrun takes the same images whatever the number of ranks. OUT holds
checkpoint.pt, to go on from; and last.pt and best.pt, networks with torchvision's names (trunk and
fc), as weights.files and torchvision read them.

Shapes: B images of a batch, K classes.
"""
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.labelled import Labelled
from data.stream import Positions, Stream, collate
from distributed.fsdp import shard_mesh
from distributed.hardware import autocast, layout, pick_precision
from distributed.ranks import barrier, is_main, rank_and_world
from distributed.step import backward
from distributed.wrap import wrap
from evaluation.features import Preprocessing, extract
from evaluation.metrics import mean_average_precision, per_cent
from evaluation.task import EvalTask
from multicrop import MultiCrop, Photometric, parse_crops
from weights.atomic import load, save, write_whole
from weights.sharded import (
    fault_of,
    is_sharded,
    load_plain,
    load_whole,
    remove,
    restore,
    save_sharded,
)

VERSION = 1
MEASURED = 20               # times a run, at most


class Recipe(NamedTuple):
    """lr: per 256 images of batch.  milestones: epochs after which it is multiplied by gamma.
    area: share of an image that a crop covers, at least.  augment: SwAV's colour jitter, grayscale
    and blur; without it crops are only flipped."""
    epochs: float
    batch_size: int
    lr: float
    milestones: tuple[float, ...]
    gamma: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    area: float = 0.08
    augment: bool = False

    def lr_at(self, epoch: float) -> float:
        """A shorter or longer run keeps its shape: milestones are those of the published length."""
        scale = self.epochs / PUBLISHED[self.milestones]
        passed = sum(epoch >= milestone * scale for milestone in self.milestones)
        return self.lr * self.batch_size / 256 * self.gamma ** passed


PUBLISHED = {(8, 16, 24): 28, (30, 60, 90, 100): 105, (30,): 70}        # milestones -> epochs
RECIPES = {
    # VISSL: linear_image_classification/imagenet1k
    "linear": Recipe(28, 256, 0.01, (8, 16, 24), weight_decay=5e-4),
    # VISSL: fulltune/imagenet1k; SEER's at 384 pixels (features.SEER_FINETUNED) augments as SwAV
    "finetune": Recipe(105, 256, 0.1, (30, 60, 90, 100)),
    "finetune384": Recipe(15, 256, 0.1, (30, 60, 90, 100), augment=True),
    # VISSL: semi_supervised/imagenet1k, for 1 % and 10 % of the labels
    "few": Recipe(70, 256, 0.05, (30,)),
    # of a trunk that has learned, and fewer than 5,000 images; measured (docs/miniature.md): at
    # twice this rate, with batches of 128, a loss became infinite
    "small": Recipe(20, 64, 0.0125, (30,)),
}
SMALLEST_BATCH = 64         # or all images: of a set's 44, batches of 8 cost a new trunk 22 points
LEAST_STEPS = 160           # where no --epochs is given


def as_dict(recipe: Recipe, preprocessing: Preprocessing) -> dict:
    """A recipe as checkpoints, config.json and results hold it."""
    return recipe._asdict() | {"milestones": list(recipe.milestones)} | preprocessing.geometry


# ------------------------------------------------------------------------------------- the input
class _ImagesAndLabels:
    """A labelled dataset as the input stream takes it: [i] -> (bytes, label)."""

    def __init__(self, labelled: Labelled):
        self.images = labelled.images
        self.labels = labelled.targets.float() if labelled.multilabel else labelled.labels
        self.name = self.images.name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[bytes, Tensor]:
        return self.images[i], self.labels[i]


class _CropAndLabel:
    """A MultiCrop that passes a label on, as one more parameter."""

    def __init__(self, crop: MultiCrop):
        self.crop = crop

    def __call__(self, pair: tuple[bytes, Tensor], seed: int, position: int):
        crops, params = self.crop(pair[0], seed, position)
        return crops, [*params, pair[1][None]]


def open_loader(train: Labelled, recipe: Recipe, size: int, seed: int, steps: range, device,
                workers: int) -> DataLoader:
    """This rank's share of each step's batch: ([crops], [their parameters, labels], faults)."""
    specs = parse_crops(f"1x{size}@{recipe.area:g}-1")
    plain = {} if recipe.augment else {"strength": 0.0, "jitter": 0.0, "gray": 0.0, "blur": 0.0}
    stream = Stream(_ImagesAndLabels(train), _CropAndLabel(MultiCrop(specs, **plain)), seed)
    positions = Positions(steps.start, steps.stop, recipe.batch_size, *rank_and_world())
    return DataLoader(stream, batch_sampler=positions, collate_fn=collate, num_workers=workers,
                      pin_memory=device.type == "cuda")


# ---------------------------------------------------------------------------------- the training
class Training:
    """A model, what updates it, and how far it has come.

    step: steps done.  last, best: per cent of val, of each output of the model.  counted: images of
    val that could be read.
    """
    STATE = ("step", "last", "best", "counted")         # of a checkpoint
    nesterov = True

    def __init__(self, model: nn.Module, recipe, multilabel: bool, device: torch.device,
                 dtype: torch.dtype, shard: bool = False, **wrapping):
        """recipe: with lr, momentum and weight_decay.  shard: weights in shards, with activation
        checkpointing (distributed/fsdp.py); a unit at a time comes to the device.  wrapping: more
        options of wrap."""
        self.model, self.device, self.dtype = model if shard else model.to(device), device, dtype
        self.group = dist.new_group(backend="gloo") if shard else None
        self.wrapped = wrap(model, device, dtype=dtype,
                            mesh=shard_mesh(device, 0) if shard else None,
                            **{"checkpoint_activations": shard} | wrapping)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, recipe.lr, recipe.momentum,
                                         weight_decay=recipe.weight_decay, nesterov=self.nesterov)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.criterion = F.binary_cross_entropy_with_logits if multilabel else F.cross_entropy
        self.step, self.last, self.best, self.counted = 0, None, None, 0

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Of a batch, summed over the outputs."""
        with autocast(self.device, self.dtype):
            outputs = self.wrapped(images.to(memory_format=layout(self.device)))
        return sum(self.criterion(scores.float(), labels) for scores in outputs)

    def update(self, lr: float, *batch) -> Tensor:
        """One step of SGD; the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        loss = self.loss(*batch)
        _, world = rank_and_world()
        self.optimizer.zero_grad(set_to_none=world == 1)        # DDP's are its buckets: they stay
        backward(self.wrapped, self.scaler.scale(loss), last=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()

    def train(self, batches: Iterable, steps: int, times: int, lr_at: Callable[[int], float],
              measure: Callable[[int], None], out: Path, settings: dict) -> None:
        """The steps that are left: measured and saved `times` a run.  batches: of these steps."""
        measured = {round(steps * (i + 1) / times) for i in range(times)}
        left, average = range(self.step, steps), None           # average: of the loss
        bar = tqdm(left, initial=left.start, total=steps, unit="step",
                   disable=not is_main() or not sys.stderr.isatty())
        for step, batch in zip(bar, batches):
            loss = self.update(lr_at(step), *batch)
            average = loss if average is None else 0.95 * average + 0.05 * loss
            if step + 1 not in measured:
                continue
            if not average.isfinite():          # note: a sync point
                raise ValueError(f"the loss is not finite at step {step + 1}: try a lower --lr")
            self.share_buffers()
            measure(step + 1)
            if is_main():
                tqdm.write(f"step {step + 1}/{steps}  loss {average.item():.3f}  val "
                           + "  ".join(f"{x:.2f}" for x in self.last), file=sys.stderr)
            self.save(out, settings)
            barrier()

    def measure(self, step: int, val: Labelled, preprocessing: Preprocessing, workers: int) -> None:
        """On val, after a step."""
        last, counted = measure(self.model, val, preprocessing, self.device, workers)
        self.reached(step, last, counted)

    def share_buffers(self) -> None:
        """All ranks measure the network that rank 0 saves."""
        if dist.is_initialized():           # running statistics are each rank's own until here
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def reached(self, step: int, last: list[float], counted: int) -> None:
        self.step, self.last, self.counted = step, last, counted
        self.best = [max(pair) for pair in zip(last, self.best or last)]

    def save(self, out: Path, settings: dict) -> None:
        """The checkpoint first: no product is without it. Of a sharded model a collective."""
        state = {"version": VERSION, "settings": settings, "model": self.model.state_dict(),
                 "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                 **{name: getattr(self, name) for name in self.STATE}}
        path, before = out / "checkpoint.pt", checkpoints(out)
        if self.group:
            path = out / f"checkpoint-{self.step:09d}"
            save_sharded(path, state, self.group)
        elif is_main():
            save(path, state)
        if is_main():
            self.save_products(path)
            for older in before:
                older != path and remove(older)

    def save_products(self, checkpoint: Path) -> None:
        """best.pt and last.pt, of the model or, where it is sharded, of its checkpoint."""
        tensors = self.model.tensors(
            load_whole(checkpoint, "model/")["model"] if self.group else self.model.state_dict())
        if max(self.last) == max(self.best):
            save(checkpoint.parent / "best.pt", tensors)
        save(checkpoint.parent / "last.pt", tensors)

    def begin(self, out: Path, settings: dict, preprocessing: Preprocessing) -> None:
        """Go on from OUT's checkpoint, where there is one, and write its config.json, which has the
        settings, and mean and std. Raises ValueError as `resume`."""
        text = {name: ",".join(map(str, x)) for name, x in preprocessing.normalisation.items()}
        notes = json.dumps({"config": settings | text}, indent=1) + "\n"
        self.resume(out, settings, notes)
        if is_main():
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / "config.json", notes)

    def resume(self, out: Path, settings: dict, notes: str) -> None:
        """Go on from OUT's checkpoint, where there is one. notes: of config.json. Raises
        ValueError where it is not of these settings, or where there is none and other files would
        be replaced."""
        paths = checkpoints(out)
        if not paths:
            names = "best.pt", "last.pt", "config.json"
            there = [name for name in names if (out / name).exists()]
            if there and not (there == ["config.json"]
                              and (out / "config.json").read_text() == notes):
                raise ValueError(f"{out} holds a {there[0]}, and no checkpoint to go on from: "
                                 "choose another --out, or move it")
            return
        path = paths[-1]
        if path.is_dir() and (fault := fault_of(path)):
            raise ValueError(fault)
        state = load_plain(path) if path.is_dir() else load(path)
        held = state.get("settings", {})
        if "distort" in held.get("recipe", {}):         # the name of `augment` until 2026-11
            held["recipe"]["augment"] = held["recipe"].pop("distort")
        if held != settings:
            raise ValueError(f"{out} holds another run; choose another --out")
        restore(self.model, self.optimizer, state, path,
                dist.group.WORLD if dist.is_initialized() else None)
        self.scaler.load_state_dict(state["scaler"])
        for name in self.STATE:
            setattr(self, name, state[name])
        if is_main():                   # they may have been lost
            self.save_products(path)


def checkpoints(out: Path) -> list[Path]:
    """The newest last: checkpoint.pt or, of a sharded run, checkpoint-STEP, a folder."""
    return [*out.glob("checkpoint.pt"), *sorted(filter(is_sharded, out.glob("checkpoint-*[0-9]")))]


def fit(model: nn.Module, train: Labelled, val: Labelled, recipe: Recipe, out: Path,
        preprocessing: Preprocessing = Preprocessing(), device="cpu",
        dtype: torch.dtype = torch.float32, workers: int = 0, seed: int = 0,
        about: dict | None = None, shard: bool = False) -> tuple[list[float], list[float], int]:
    """Train; per cent of val that each output of the model gets right, at the end and at its best.

    Measured after each epoch, at most MEASURED times (top-1 or, where images have several labels,
    mean average precision); then a checkpoint and last.pt are written and, with the best so far,
    best.pt. The same call again goes on. model: images -> [scores (B, K)], and .tensors(state
    dict), what to save of it.  about: what else the result depends on (the checkpoint, the images).
    shard: as of Training. Returns also how many images of val could be read. Raises ValueError
    where OUT holds something else.
    """
    device, (_, world) = torch.device(device), rank_and_world()
    if recipe.batch_size % world:
        raise ValueError(f"a batch of {recipe.batch_size} is not divisible by {world} processes: "
                         "give another --batch-size")
    steps = max(1, round(recipe.epochs * len(train.images) / recipe.batch_size))
    settings = {"recipe": as_dict(recipe, preprocessing), "seed": seed, "precision": str(dtype),
                "pictures": len(train.images), "val": len(val.images), "classes": train.classes,
                **(about or {})}
    training = Training(model, recipe, train.multilabel, device, dtype, shard)
    training.begin(out, settings, preprocessing)
    loader = open_loader(train, recipe, preprocessing.size, seed, range(training.step, steps),
                         device, workers)
    photometric = Photometric(**preprocessing.normalisation).to(device)
    batches = ((photometric(crops[0].to(device, non_blocking=True), params),
                labels.to(device, non_blocking=True)) for crops, (params, labels), _ in loader)
    training.train(batches, steps, min(MEASURED, max(1, round(recipe.epochs))),
                   lambda step: recipe.lr_at(step / steps * recipe.epochs),
                   lambda step: training.measure(step, val, preprocessing, workers), out, settings)
    return training.last, training.best, training.counted


def measure(model: nn.Module, labelled: Labelled, preprocessing: Preprocessing, device,
            workers: int) -> tuple[list[float], int]:
    """Top-1 or, where images have several labels, mean average precision, of each output of the
    model; per cent of the images that could be read, and their number."""
    outputs, ok = extract(model, preprocessing.center_crops(labelled.images), device=device,
                          workers=workers, desc="val", **preprocessing.normalisation)
    targets, labels = labelled.targets[ok], labelled.labels[ok]
    return [mean_average_precision(scores[ok], targets) if labelled.multilabel else
            per_cent(scores[ok].argmax(1), labels) for scores in outputs], int(ok.sum())


def train_with_labels(task: EvalTask, model: nn.Module, train: Labelled, val: Labelled,
                      recipe: str, about: dict) -> tuple[list[float], list[float], dict]:
    """`fit` with a recipe of RECIPES, changed by the command line: last, best, and what a result
    says of the training."""
    options, size, published = task.options, task.preprocessing.size, RECIPES[recipe]
    count = len(train.images)
    batch_size = options.batch_size or min(published.batch_size,
                                           max(count // 8, min(count, SMALLEST_BATCH)))
    epochs = options.epochs or max(published.epochs, LEAST_STEPS * batch_size / count)
    changes = {"area": options.area or (0.25 if size < 224 else None), "epochs": epochs,
               "batch_size": batch_size, "lr": options.lr}
    changed = published._replace(
        **{name: value for name, value in changes.items() if value is not None})
    out = Path(options.out or f"runs/{options.what}-{task.name()}")
    dtype = pick_precision(options.precision, task.device)
    if options.shard and not (options.what == "finetune" and dist.is_initialized()
                              and dtype != torch.float16):
        raise ValueError("--shard is for finetune by torchrun, in bf16 or fp32")
    about = about | {"checkpoint": task.digest() or options.arch, "data": options.data}
    last, best, counted = fit(
        model, train, val, changed, out, task.preprocessing, task.device,
        dtype, options.workers, options.seed, about, options.shard)
    return last, best, {"train": len(train.images), "val": counted, "out": str(out),
                        "left_out": len(val.images) - counted,
                        "recipe": as_dict(changed, task.preprocessing)}
