"""Detection and instance segmentation: a trunk in Mask R-CNN, trained and measured.

    python evaluate.py detect runs/demo-regnety_100mf                   # on the built-in scenes
    torchrun --nproc_per_node 8 evaluate.py detect seer_regnety_64gf --data coco/
    python evaluate.py detect runs/mine --data VOC2012/ --labels 0.1 --sheet sheet.png
    python evaluate.py detect runs/detect-mine --data coco/             # measured, not trained
    python evaluate.py detect runs/detect-mine --data photos/ --show found/

SEER's second table (arXiv 2103.01988), whose recipe is `SEER`. The network is in detector.py, the
measuring in coco.py, the training in supervised.py. As there, a run is a pure function of its
settings, and goes on where it was stopped; OUT also holds predictions-bbox.json and -segm.json,
those measured last, in COCO's results format.

Differs from SEER's (detectron2): no "precise BN"; BatchNorm's running statistics are measured with.

Shapes: n objects of an image, H and W its pixels.
"""
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data.detection import Scenes, open_detection
from data.stream import Fault, Positions, Stream, fault_of, mix
from distributed.hardware import autocast, pick_precision
from distributed.ranks import fail_together, gather_lists, is_main, my_share, rank_and_world
from evaluation.coco import as_results, average_precision, coco_tool
from evaluation.detector import Detector
from evaluation.features import Preprocessing
from evaluation.supervised import MEASURED, Training
from evaluation.task import EvalTask
from figures.detections import Shown, draw, sheet
from multicrop import decode
from weights.atomic import refuse_existing, write_whole


class Recipe(NamedTuple):
    """lr: of a batch of 16, of others in proportion; it rises over the first steps (warmup), and is
    divided by 10 at each of the milestones, shares of the run.  weight_decay: of all parameters.
    times: a run is measured, and a checkpoint written.  Others: as of Detector."""
    steps: int
    batch_size: int = 16
    lr: float = 0.02
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    warmup: int = 100
    weight_decay: float = 1e-4
    momentum: float = 0.9
    times: int = MEASURED
    sides: tuple[int, ...] = tuple(range(640, 801, 32))
    longest: int = 1333
    width: int = 256
    anchor: int = 8
    proposals: int = 2000
    samples: int = 512

    def lr_at(self, step: int) -> float:
        passed = sum(step >= share * self.steps for share in self.milestones)
        rise = min(1, (step + 1) / self.warmup)
        return self.lr * self.batch_size / 16 * rise * 0.1 ** passed

    @property
    def of_detector(self) -> dict:
        names = ("sides", "longest", "width", "anchor", "proposals", "samples")
        return {name: getattr(self, name) for name in names}

    @property
    def as_dict(self) -> dict:
        """As checkpoints, config.json and results hold it."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}


SEER = Recipe(90_000)       # VISSL: object_detection/COCOInstance; rate / 10 at 60,000 and 80,000
LARGE = 20_000              # images: from here on SEER's recipe
SMALL_SIDE = 320            # pixels of the short side; below it the network is smaller
LONGEST = 1333 / 800        # of the long side to the short one, as SEER's


def choose_recipe(count: int, side: int) -> Recipe:
    """SEER's for 20,000 images or more; for fewer a small one:

    - 4 epochs in batches of 8, at least 500 steps, at twice the rate for its batch: short runs need
      it. Measured 4 times.
    - Images keep their size, up to a short side of 800 pixels.
    - Where that is below 320 pixels, the network is smaller too (64 channels, 256 proposals, 64
      samples), about a 16th of the work for a pixel; and anchors have 4 strides, not 8, for objects
      have fewer pixels.

    count: images of the training set.  side: their median short side, pixels.
    """
    if count >= LARGE:
        return SEER
    side = min(side, max(SEER.sides))
    recipe = SEER._replace(steps=max(500, round(4 * count / 8)), batch_size=8, lr=0.04, times=4,
                           sides=(side,), longest=round(side * LONGEST))
    if side < SMALL_SIDE:
        recipe = recipe._replace(width=64, anchor=4, proposals=256, samples=64)
    return recipe


def change_recipe(recipe: Recipe, options, count: int) -> Recipe:
    """By the flags --steps or --epochs, --batch-size, --lr and --size."""
    batch_size = options.batch_size or recipe.batch_size
    steps = options.steps or recipe.steps
    if options.epochs:
        steps = max(1, round(options.epochs * count / batch_size))
    recipe = recipe._replace(steps=steps, batch_size=batch_size,
                             lr=recipe.lr if options.lr is None else options.lr,
                             times=min(recipe.times, steps))
    if options.size:
        recipe = recipe._replace(sides=(options.size,), longest=round(options.size * LONGEST))
    return recipe


# ------------------------------------------------------------------------------------- the input
def prepare(scene: tuple[Tensor, dict], seed: int, position: int) -> tuple[Tensor, dict, int]:
    """Half of all images are flipped, with boxes and masks; crowds are no objects to learn. Image,
    uint8 (3, H, W), what Detector takes of its target, and the seed for Detector's draws."""
    image, target = scene
    kept = target["iscrowd"] == 0
    target = {name: target[name][kept] for name in ("boxes", "labels", "masks") if name in target}
    if mix(seed, 0) & 1:
        image, (x1, y1, x2, y2) = image.flip(2), target["boxes"].unbind(1)
        width = image.shape[2]
        target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(2)
    return image, target, mix(seed, 1)


def collate(samples: list[tuple]) -> tuple[list, list, list, list[Fault]]:
    images, targets, seeds, faults = zip(*samples)
    return list(images), list(targets), list(seeds), [one for some in faults for one in some]


def open_loader(train: Scenes, recipe: Recipe, seed: int, steps: range, device: torch.device,
                workers: int) -> DataLoader:
    """This rank's share of each step's batch: images, targets, seeds, faults."""
    positions = Positions(steps.start, steps.stop, recipe.batch_size, *rank_and_world())
    return DataLoader(Stream(train, prepare, seed), batch_sampler=positions, collate_fn=collate,
                      num_workers=workers, pin_memory=device.type == "cuda")


class Readable(Dataset):
    """Image i and its image_id, or the Fault with which it could not be read."""

    def __init__(self, scenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | Fault:
        try:
            image, target = self.scenes[i]
            return image, target["image_id"]
        except Exception as error:          # decoders raise nearly anything on damaged files
            return fault_of(error, self.scenes.name(i))


class Photos:
    """Images without objects, as Readable takes them. images: len(), [i] -> bytes, .name(i)."""

    def __init__(self, images):
        self.images, self.name = images, images.name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict]:
        return pil_to_tensor(decode(self.images[i])), {"image_id": i + 1}


# ------------------------------------------------------------------------------------ measuring
def detect(detector: Detector, scenes, indices, device,
           workers: int = 0) -> Iterator[tuple[int, Tensor, int, dict]]:
    """Of each of these images that can be read: i, the image, its image_id, and its detections. One
    at a time, so that they do not depend on the others."""
    detector.eval()
    loader = DataLoader(Subset(Readable(scenes), indices), batch_size=None, num_workers=workers)
    for i, item in zip(indices, loader):
        if isinstance(item, Fault):
            say_left_out([f"{item.name}: {item.cause}"])
            continue
        image, image_id = item
        with torch.no_grad():
            found, = detector([image.to(device).float() / 255])
        yield i, image, image_id, found


def say_left_out(names: list[str]) -> None:
    for name in names:
        print(f"left out: {name}", file=sys.stderr)


def measure(detector: Detector, val: Scenes, device, workers: int = 0,
            out: Path | None = None) -> tuple[dict[str, dict], int]:
    """{"box": AP..., "mask": AP... where there are masks}, of the images that can be read, and how
    many these are. out: folder for the predictions. A collective."""
    results, seen = {"bbox": []} | ({"segm": []} if val.has_masks else {}), []
    for _, _, image_id, found in detect(detector, val, my_share(len(val)), device, workers):
        seen.append(image_id)
        for kind, rows in as_results(found, image_id, val.category_ids).items():
            if kind in results:
                results[kind] += rows
    results, seen = {kind: gather_lists(rows) for kind, rows in results.items()}, gather_lists(seen)
    if not seen:
        raise ValueError("no image of val could be read")
    metrics = []
    with fail_together():
        if is_main():
            whole, known = val.as_coco(), {*seen}
            truth = whole | {
                "images": [one for one in whole["images"] if one["id"] in known],
                "annotations": [one for one in whole["annotations"] if one["image_id"] in known]}
            names = {"bbox": "box", "segm": "mask"}
            metrics = [{names[kind]: average_precision(truth, rows, kind, val.area_limits)
                        for kind, rows in results.items()}]
            for kind, rows in results.items() if out else ():
                write_whole(out / f"predictions-{kind}.json", json.dumps(rows))
    metrics, = gather_lists(metrics)
    return metrics, len(seen)


# ------------------------------------------------------------------------------------- training
class DetectorTraining(Training):
    """last, best: AP of masks or, without these, boxes.  metrics: all that `measure` gives.
    faults: training images that could not be read, "name: cause"."""
    STATE = (*Training.STATE, "metrics", "faults")
    nesterov = False

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.metrics, self.faults = {}, []

    def loss(self, images: list[Tensor], targets: list[dict], seeds: list[int],
             faults: list[Fault]) -> Tensor:
        names = {f"{fault.name}: {fault.cause}" for fault in faults} - {*self.faults}
        say_left_out(sorted(names))
        self.faults += names
        images = [image.to(self.device, non_blocking=True).float() / 255 for image in images]
        targets = [{name: x.to(self.device, non_blocking=True) for name, x in target.items()}
                   for target in targets]
        with autocast(self.device, self.dtype):
            losses = self.wrapped(images, targets, seeds)
        return sum(loss.float() for loss in losses.values())

    def measure(self, step: int, val: Scenes, workers: int, out: Path) -> None:
        self.faults = sorted({*gather_lists(self.faults)})
        self.metrics, counted = measure(self.model, val, self.device, workers, out)
        self.reached(step, [self.metrics.get("mask", self.metrics["box"])["AP"] or 0.0], counted)


def fit(detector: Detector, train: Scenes, val: Scenes, recipe: Recipe, out: Path,
        preprocessing: Preprocessing = Preprocessing(), device="cpu",
        dtype: torch.dtype = torch.float32, workers: int = 0, seed: int = 0,
        about: dict | None = None, checkpoint_activations: bool = False) -> DetectorTraining:
    """Train; the same call again goes on. preprocessing: its mean and std are the detector's.
    about: what else the result depends on. Raises ValueError where OUT holds something else."""
    device, (_, world) = torch.device(device), rank_and_world()
    if recipe.batch_size % world:
        raise ValueError(f"a batch of {recipe.batch_size} is not divisible by {world} processes")
    settings = {"recipe": recipe.as_dict, "seed": seed, "precision": str(dtype),
                "pictures": len(train), "val": len(val), "classes": train.classes,
                "masks": train.has_masks, **(about or {})}
    training = DetectorTraining(detector, recipe, False, device, dtype, sync_bn_group=world,
                                checkpoint_activations=checkpoint_activations)
    training.begin(out, settings, preprocessing)
    loader = open_loader(train, recipe, seed, range(training.step, recipe.steps), device, workers)
    training.train(loader, recipe.steps, recipe.times, recipe.lr_at,
                   lambda step: training.measure(step, val, workers, out), out, settings)
    return training


# ------------------------------------------------------------------------------------- evaluate.py
def run(task: EvalTask) -> dict:
    """Train a detector and measure it; one that is trained is measured alone. AP of boxes and masks
    on val, after the last step."""
    options, device = task.options, task.device
    if options.show:
        return show(task)
    coco_tool()
    train, val = open_detection(options.data, options.train, options.val, options.annotations)
    if options.boxes_only or not (train.has_masks and val.has_masks):
        train, val = train.without_masks(), val.without_masks()
    broken = train.left_out + val.left_out
    if is_main():
        say_left_out(broken)
    if holds_detector(task):
        detector, classes, recipe = load_detector(task)
        if classes != val.classes:
            raise ValueError(f"{task.source} detects {classes[:3]}..., not {val.classes[:3]}...")
        metrics, counted = measure(detector.to(device), val, device, options.workers)
        result = {**metrics, "val": counted}
    else:
        train = train.share(options.labels) if options.labels else train
        sides = sorted(min(train.size(i)) for i in range(0, len(train), -(-len(train) // 128)))
        recipe = change_recipe(choose_recipe(len(train), sides[len(sides) // 2]), options,
                               len(train))
        torch.manual_seed(options.seed)
        detector = Detector(task.trunk, len(train.classes), train.has_masks, **recipe.of_detector,
                            **task.preprocessing.normalisation)
        training = fit(
            detector, train, val, recipe, out := Path(options.out or f"runs/detect-{task.name()}"),
            task.preprocessing, device, pick_precision(options.precision, device), options.workers,
            options.seed, {"checkpoint": task.digest() or options.arch, "data": options.data,
                           "labels": options.labels or "1"}, options.checkpoint_activations)
        result = {**training.metrics, "best": training.best[0], "labels": options.labels or "1",
                  "train": len(train), "val": training.counted,
                  "left_out_in_training": len(training.faults), "out": str(out),
                  "recipe": recipe.as_dict}
    task.preprocessing = task.preprocessing._replace(size=recipe.sides[-1], crop_ratio=1.0,
                                                     bicubic=False)
    if options.sheet and is_main():
        save_sheet(options.sheet, detector, val, device, options.rows)
    return result | {"left_out": len(val) - result["val"], "broken": len(broken)}


def holds_detector(task: EvalTask) -> bool:
    return bool(task.loaded) and any(name.startswith("detector.") for name in task.loaded.tensors)


def load_detector(task: EvalTask) -> tuple[Detector, list[str], Recipe]:
    """What `run` has trained: network, classes, recipe. Raises ValueError where it is none."""
    if not holds_detector(task):
        raise ValueError(f"{task.source} holds no detector: name what detect wrote")
    try:
        classes, masks = task.config["classes"], task.config["masks"]
        recipe = Recipe(**{name: tuple(x) if isinstance(x, list) else x
                           for name, x in task.config["recipe"].items()})
    except (KeyError, TypeError):
        raise ValueError(f"{task.source} needs its config.json beside it") from None
    detector = Detector(task.trunk, len(classes), masks, **recipe.of_detector,
                        **task.preprocessing.normalisation)
    detector.load(task.loaded.tensors)
    return detector.eval(), classes, recipe


def save_sheet(path: str, detector: Detector, val: Scenes, device, rows: int) -> None:
    """Detections beside the ground truth, of the first images."""
    sheet(path, [Shown(val.name(i), image, val.target(i), found) for i, image, _, found in
                 detect(detector, val, range(min(rows, len(val))), device)], val.classes)


def show(task: EvalTask) -> dict:
    """Draw what a trained detector finds in any images: a PNG each, and detections.json, in COCO's
    results format with the names of file and class."""
    (detector, classes, _), images, options = load_detector(task), task.images(), task.options
    if not is_main():
        return {}
    folder = Path(options.show)
    refuse_existing(folder / "detections.json", options.force)
    folder.mkdir(parents=True, exist_ok=True)
    rows, drawn = [], 0
    photos, device = Photos(images), task.device
    for i, image, _, found in detect(detector.to(device), photos, range(len(photos)), device,
                                     options.workers):
        # a number, for names may be alike in two folders
        name = f"{i:06d}-{Path(images.name(i)).stem}.png"
        to_pil_image(draw(image, found, classes)).save(folder / name)
        drawn += 1
        kinds = as_results(found, i + 1, list(range(1, len(classes) + 1)))
        for box, *mask in zip(*kinds.values()):
            rows.append(box | dict(*mask) | {"file_name": images.name(i),
                                             "category": classes[box["category_id"] - 1]})
    write_whole(folder / "detections.json", json.dumps(rows))
    return {"out": str(folder), "pictures": drawn, "left_out": len(photos) - drawn,
            "detections": len(rows)}
