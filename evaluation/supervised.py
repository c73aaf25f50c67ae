"""Classifiers on a trunk, trained with labels by SGD: the trunk frozen (linear), or with the rest.

    recipe = RECIPES["finetune"]._replace(epochs=15)
    top1 = fit(Finetuned(trunk, classes=1000), train, val, recipe, out=Path("runs/finetuned"))

The recipes are the published ones (VISSL's files for SEER). Input, order and augmentation are those
of pretraining (images.py, multicrop.py), so a run is a pure function of its settings, resumes where
it was stopped, and under torchrun takes the same pictures whatever the number of ranks. OUT holds
checkpoint.pt, to go on from; and last.pt and best.pt, networks with torchvision's names (trunk and
fc), as weights.py and torchvision read them.

Shapes: B pictures, K classes.
"""
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
from classifiers import mean_precision, per_cent
from images import Positions, Stream, collate
from labelled import Centred, Depths, Labelled, extract
from multicrop import MultiCrop, Photometric, parse_crops
from scale import layout, wrap

VERSION = 1
MEASURED = 20               # times a run, at most


class Recipe(NamedTuple):
    """lr: per 256 pictures of batch.  milestones: epochs after which it is multiplied by gamma.
    size: pixels.  area: share of the picture, at least.  distort: SwAV's colours and blur, or none.
    crop_ratio, bicubic: of the centred pictures that it is measured on."""
    epochs: float
    batch_size: int
    lr: float
    milestones: tuple[float, ...]
    gamma: float = 0.1
    weight_decay: float = 0.0
    momentum: float = 0.9
    size: int = 224
    area: float = 0.08
    distort: bool = False
    crop_ratio: float = 0.875
    bicubic: bool = False

    def lr_at(self, epoch: float) -> float:
        passed = sum(epoch >= milestone * self.scale for milestone in self.milestones)
        return self.lr * self.batch_size / 256 * self.gamma ** passed

    @property
    def scale(self) -> float:
        """A shorter or longer run keeps its shape: milestones are in a run of `last` epochs."""
        return self.epochs / PUBLISHED[self.milestones]


PUBLISHED = {(8, 16, 24): 28, (30, 60, 90, 100): 105, (30,): 70}        # milestones -> epochs
RECIPES = {
    # VISSL: linear_image_classification/imagenet1k
    "linear": Recipe(28, 256, 0.01, (8, 16, 24), weight_decay=5e-4),
    # VISSL: fulltune/imagenet1k; SEER at 384 pixels: bicubic, with SwAV's distortion
    "finetune": Recipe(105, 256, 0.1, (30, 60, 90, 100)),
    "finetune384": Recipe(15, 256, 0.1, (30, 60, 90, 100), size=384, distort=True, crop_ratio=1.0,
                          bicubic=True),
    # VISSL: semi_supervised/imagenet1k, for 1 % and 10 % of the labels
    "few": Recipe(70, 256, 0.05, (30,)),
}


class Finetuned(nn.Module):
    """Trunk and fc: images -> [scores (B, K)]. All of it is trained."""

    def __init__(self, trunk: nn.Module, classes: int):
        super().__init__()
        self.trunk, self.fc = trunk, nn.Linear(trunk.num_features, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.fc(self.trunk(images))]

    def tensors(self) -> dict[str, Tensor]:
        """With torchvision's names."""
        return {name.removeprefix("trunk."): x for name, x in self.state_dict().items()}


class Probes(nn.Module):
    """A frozen trunk with a BatchNorm and a linear layer at each of several depths, trained side by
    side (VISSL's eval_mlp): images -> [scores (B, K), one a depth]."""

    def __init__(self, depths: Depths, widths: list[int], classes: int):
        super().__init__()
        self.trunk, self.heads = depths.requires_grad_(False), nn.ModuleList()
        for depth, width in zip(depths.depths, widths):
            cells = 1 if depth == "avgpool" else depths.CELLS[0] * depths.CELLS[1]
            linear = nn.Linear(width, classes)
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)
            self.heads.append(nn.Sequential(nn.Unflatten(1, (width // cells, cells)),
                                            nn.BatchNorm1d(width // cells), nn.Flatten(), linear))

    def train(self, mode: bool = True) -> "Probes":
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.no_grad():
            features = self.trunk(images)
        return [head(x.float()) for head, x in zip(self.heads, features)]

    def tensors(self) -> dict[str, Tensor]:
        return self.heads.state_dict()


class Pairs:
    """Labelled pictures as the input stream takes them: [i] -> (bytes, label)."""

    def __init__(self, labelled: Labelled):
        self.images = labelled.images
        self.labels = labelled.is_of.float() if labelled.several else labelled.labels
        self.name = self.images.name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[bytes, Tensor]:
        return self.images[i], self.labels[i]


class Cut:
    """A MultiCrop that passes a label on, as one more parameter."""

    def __init__(self, crop: MultiCrop):
        self.crop = crop

    def __call__(self, pair: tuple[bytes, Tensor], seed: int, position: int):
        crops, params = self.crop(pair[0], seed, position)
        return crops, [*params, pair[1][None]]


def fit(model: nn.Module, train: Labelled, val: Labelled, recipe: Recipe, out: Path, device="cpu",
        dtype: torch.dtype = torch.float32, workers: int = 0, seed: int = 0, mean=None, std=None,
        about: dict | None = None) -> tuple[list[float], list[float], int]:
    """Train; per cent of val that each output of the model gets right, at the end and at its best.

    Measured after each epoch, at most MEASURED times (top-1 or, where pictures have several labels,
    mean average precision); then checkpoint.pt and last.pt are written and, with the best so far,
    best.pt. The same call again goes on. about: what else the result depends on (the checkpoint, the
    pictures). Returns also how many pictures of val could be read. Raises ValueError where OUT holds
    something else.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    device = torch.device(device)
    channels = dict(mean=mean, std=std) if mean else {}
    steps = max(1, round(recipe.epochs * len(train.images) / recipe.batch_size))
    if recipe.batch_size % ranks:
        raise ValueError(f"a batch of {recipe.batch_size} is not divisible by {ranks} processes")
    specs = parse_crops(f"1x{recipe.size}@{recipe.area:g}-1")
    crop = MultiCrop(specs) if recipe.distort else MultiCrop(specs, 0.0, 0.0, 0.0, 0.0)
    stream, photometric = Stream(Pairs(train), Cut(crop), seed), Photometric(**channels).to(device)

    model.to(device)
    wrapped = wrap(model, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, recipe.lr, recipe.momentum, nesterov=True,
                                weight_decay=recipe.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    settings = {"recipe": dict(recipe._asdict(), milestones=list(recipe.milestones)), "seed": seed,
                "precision": str(dtype), "pictures": len(train.images), "val": len(val.images),
                "classes": train.classes, **(about or {})}
    start, now, best, counted = 0, None, None, 0
    if (out / "checkpoint.pt").exists():
        state = checkpoint.load(out / "checkpoint.pt")
        if state.get("settings") != settings:
            raise ValueError(f"{out} holds another run; choose another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        start, now, best, counted = (state[name] for name in ("step", "last", "best", "counted"))
    if rank == 0:
        out.mkdir(parents=True, exist_ok=True)
        written = {name: ",".join(map(str, values)) for name, values in channels.items()}
        (out / "config.json").write_text(json.dumps({"config": settings | written}, indent=1) + "\n")

    times = min(MEASURED, max(1, round(recipe.epochs)))
    looks = {round(steps * (i + 1) / times) for i in range(times)}
    loader = DataLoader(stream, batch_sampler=Positions(start, steps, recipe.batch_size, rank, ranks),
                        collate_fn=collate, num_workers=workers, pin_memory=device.type == "cuda")
    bar = tqdm(range(start, steps), initial=start, total=steps, unit="step",
               disable=rank > 0 or not sys.stderr.isatty())
    lost = None
    for step, (crops, (params, labels), _) in zip(bar, loader):
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr_at(step / steps * recipe.epochs)
        model.train()
        images = photometric(crops[0].to(device, non_blocking=True), params)
        labels = labels.to(device, non_blocking=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = wrapped(images.to(memory_format=layout(device)))
        loss = sum(F.binary_cross_entropy_with_logits(scores.float(), labels) if train.several else
                   F.cross_entropy(scores.float(), labels) for scores in outputs)
        optimizer.zero_grad(set_to_none=ranks == 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        lost = loss.detach() if lost is None else 0.95 * lost + 0.05 * loss.detach()
        if step + 1 not in looks:
            continue
        if not lost.isfinite():             # note: a sync point
            raise ValueError(f"the loss is not finite at step {step + 1}: try a lower --lr")
        if dist.is_initialized():           # each rank's own statistics; rank 0's are saved
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        now, counted = measure(model, val, recipe, device, workers, **channels)
        best = now if best is None else [max(pair) for pair in zip(now, best)]
        if rank == 0:
            tqdm.write(f"step {step + 1}/{steps}  loss {lost.item():.3f}  val "
                       + "  ".join(f"{x:.2f}" for x in now), file=sys.stderr)
            if max(now) == max(best):
                checkpoint.save(out / "best.pt", model.tensors())
            checkpoint.save(out / "last.pt", model.tensors())
            checkpoint.save(out / "checkpoint.pt", {
                "version": VERSION, "settings": settings, "step": step + 1, "best": best, "last": now,
                "counted": counted,
                "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict()})
        if dist.is_initialized():
            dist.barrier()
    return now, best, counted


def measure(model: nn.Module, labelled: Labelled, recipe: Recipe, device, workers: int,
            **channels) -> tuple[list[float], int]:
    """Top-1 or, where pictures have several labels, mean average precision, of each output of the
    model; per cent of the pictures that could be read, and their number."""
    centred = Centred(labelled.images, recipe.size, recipe.crop_ratio, recipe.bicubic)
    outputs, ok = extract(model, centred, device=device, workers=workers, desc="val", **channels)
    is_of, labels = labelled.is_of[ok], labelled.labels[ok]
    return [mean_precision(scores[ok], is_of) if labelled.several else
            per_cent(scores[ok].argmax(1), labels) for scores in outputs], int(ok.sum())
