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
import functools
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from data.detection import Scenes, open_detection, open_val
from data.stream import Fault, Positions, Stream, mix
from distributed.hardware import autocast, pick_precision
from distributed.ranks import gather_lists, is_main, rank_and_world
from evaluation.coco import as_results, coco_tool, detect, measure, say_left_out
from evaluation.detector import Detector, check_shape
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
SHOWN = 640, 1280           # pixels: least and most of the long side of what --show draws


def choose_recipe(count: int, side: int) -> Recipe:
    """SEER's for 20,000 images or more; for fewer a small one:

    - 3 epochs in batches of 8, at least 500 steps, at twice the rate for its batch: short runs need
      it. Measured 4 times, or every 500 steps of a longer run.
    - All images are resized to the median short side, or 800 pixels where it is more.
    - Where that is below 320 pixels, the network is smaller too (64 channels, 256 proposals, 64
      samples), about a 16th of the work for a pixel, and its rate four times; and anchors have 4
      strides, not 8, for objects have fewer pixels.

    count: images of the training set.  side: their median short side, pixels.
    """
    if count >= LARGE:
        return SEER
    side = min(side, max(SEER.sides))
    recipe = SEER._replace(steps=max(500, round(3 * count / 8)), batch_size=8, lr=0.04, times=4,
                           sides=(side,), longest=round(side * LONGEST))
    if side < SMALL_SIDE:
        recipe = recipe._replace(lr=0.08, width=64, anchor=4, proposals=256, samples=64)
    return recipe


def change_recipe(recipe: Recipe, options, count: int) -> Recipe:
    """By the flags --steps or --epochs, --batch-size, --lr and --size."""
    batch_size = options.batch_size or recipe.batch_size
    steps = options.steps or recipe.steps
    if options.epochs:
        steps = max(1, round(options.epochs * count / batch_size))
    recipe = recipe._replace(steps=steps, batch_size=batch_size,
                             lr=recipe.lr if options.lr is None else options.lr,
                             times=min(steps, MEASURED, max(recipe.times, steps // 500)))
    if options.size:
        recipe = recipe._replace(sides=(options.size,), longest=round(options.size * LONGEST))
    return recipe


# ------------------------------------------------------------------------------------- the input
def prepare(scene: tuple[Tensor, dict], seed: int, position: int,
            longest: int) -> tuple[Tensor, dict, int]:
    """Half of all images are flipped, with boxes and masks; crowds are no objects to learn. Image,
    uint8 (3, H, W), what Detector takes of its target, and the seed for Detector's draws."""
    image, target = scene
    check_shape(image, longest)
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
    stream = Stream(train, functools.partial(prepare, longest=recipe.longest), seed)
    return DataLoader(stream, batch_sampler=positions, collate_fn=collate, num_workers=workers,
                      pin_memory=device.type == "cuda")


class Photos:
    """Images without objects, as Readable takes them. images: len(), [i] -> bytes, .name(i)."""

    def __init__(self, images):
        self.images, self.name = images, images.name

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, dict]:
        return pil_to_tensor(decode(self.images[i])), {"image_id": i + 1}


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
        for fault in faults:
            say_left_out(f"{fault.name}: {fault.cause}, {fault.detail}")
        self.faults = sorted({*self.faults, *(f"{fault.name}: {fault.cause}" for fault in faults)})
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
                "train": train.digest(), "val": val.digest(), "classes": train.classes,
                "category_ids": train.category_ids, "masks": train.has_masks, **(about or {})}
    training = DetectorTraining(detector, recipe, False, device, dtype, sync_bn_group=world,
                                checkpoint_activations=checkpoint_activations)
    training.begin(out, settings, preprocessing)
    loader = open_loader(train, recipe, seed, range(training.step, recipe.steps), device, workers)
    training.train(loader, recipe.steps, recipe.times, recipe.lr_at,
                   lambda step: training.measure(step, val, workers, out), out, settings)
    return training


# ------------------------------------------------------------------------------------- evaluate.py
OF_TRAINING = "steps", "epochs", "batch_size", "lr", "size", "labels", "checkpoint_activations"


def run(task: EvalTask) -> dict:
    """Train a detector and measure it; one that is trained is measured alone, or shown."""
    if task.options.show:
        return show(task)
    coco_tool()
    return (measure_trained if holds_detector(task) else train_and_measure)(task)


def train_and_measure(task: EvalTask) -> dict:
    """AP of boxes and masks on val, after the last step."""
    options, device = task.options, task.device
    train, val = open_detection(options.data, options.train, options.val, options.annotations)
    if options.boxes_only or not (train.has_masks and val.has_masks):
        train, val = train.without_masks(), val.without_masks()
    broken = name_broken(train, val)
    train = train.share(options.labels) if options.labels else train
    sides = sorted(min(train.size(i)) for i in range(0, len(train), -(-len(train) // 128)))
    side = sides[len(sides) // 2]
    recipe = change_recipe(choose_recipe(len(train), side), options, len(train))
    if device.type == "cpu" and side < SMALL_SIDE:
        # thousands of small operations: a step took 0.65 s with one thread, 0.64 to 0.71 with two,
        # and with two 1.3 beside another process (two cores)
        torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    detector = Detector(task.trunk, len(train.classes), train.has_masks, **recipe.of_detector,
                        **task.preprocessing.normalisation)
    arch = options.arch or task.config.get("arch", "")
    training = fit(
        detector, train, val, recipe, out := Path(options.out or f"runs/detect-{task.name()}"),
        task.preprocessing, device, pick_precision(options.precision, device), options.workers,
        options.seed, {"checkpoint": task.digest() or arch, "arch": arch,
                       "labels": options.labels or "1"}, options.checkpoint_activations)
    return training.metrics | {
        "best": training.best[0], "labels": options.labels or "1", "train": len(train),
        "left_out_in_training": len(training.faults), "out": str(out), "recipe": recipe.as_dict,
        **finish(task, detector, recipe, val, training.counted, broken)}


def measure_trained(task: EvalTask) -> dict:
    """AP on val alone; predictions are written where --out says. Raises ValueError for options
    that are of training."""
    options = task.options
    if given := [name for name in OF_TRAINING if getattr(options, name)]:
        raise ValueError(f"{task.source} is a trained detector, which is measured alone: --"
                         + given[0].replace("_", "-") + " is of training")
    detector, classes, recipe = load_detector(task)
    val = open_val(options.data, options.val, options.annotations, classes)
    if options.boxes_only or not (val.has_masks and task.config["masks"]):
        val = val.without_masks()
    if classes != val.classes:
        odd = sorted({*classes} ^ {*val.classes}) or classes
        raise ValueError(f"{task.source} and {options.data or 'the scenes'} differ in their "
                         f"classes: {', '.join(odd[:5])}")
    if out := Path(options.out) if options.out else None:
        for kind in ("bbox", "segm"):
            refuse_existing(out / f"predictions-{kind}.json", options.force)
        out.mkdir(parents=True, exist_ok=True)
    metrics, counted = measure(detector.to(task.device), val, task.device, options.workers, out)
    return metrics | finish(task, detector, recipe, val, counted, name_broken(val))


def name_broken(*parts: Scenes) -> int:
    """What annotation files say that cannot be used: told, and counted."""
    broken = [what for part in parts for what in part.left_out]
    for what in broken if is_main() else ():
        say_left_out(what)
    return len(broken)


def finish(task: EvalTask, detector: Detector, recipe: Recipe, val: Scenes, counted: int,
           broken: int) -> dict:
    """The sheet, and what both ways to measure tell."""
    task.preprocessing = resized(task.preprocessing, recipe)
    if task.options.sheet and is_main():
        save_sheet(task.options.sheet, detector, val, task.device, task.options.rows)
    return {"val": counted, "left_out": len(val) - counted, "broken": broken}


def resized(preprocessing: Preprocessing, recipe: Recipe) -> Preprocessing:
    return preprocessing._replace(size=recipe.sides[-1], crop_ratio=1.0, bicubic=False)


def holds_detector(task: EvalTask) -> bool:
    return bool(task.loaded) and any(name.startswith("detector.") for name in task.loaded.tensors)


def load_detector(task: EvalTask) -> tuple[Detector, list[str], Recipe]:
    """What `run` has trained: network, classes, recipe. Raises ValueError where it is none."""
    if not holds_detector(task):
        raise ValueError(f"{task.source} holds no detector: name what detect wrote")
    try:
        classes, masks, _ = (task.config[name] for name in ("classes", "masks", "category_ids"))
        recipe = Recipe(**{name: tuple(x) if isinstance(x, list) else x
                           for name, x in task.config["recipe"].items()})
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{task.source} needs detect's config.json beside it, and to be called "
                         "best.pt or last.pt") from None
    detector = Detector(task.trunk, len(classes), masks, **recipe.of_detector,
                        **task.preprocessing.normalisation)
    detector.load(task.loaded.tensors)
    return detector.eval(), classes, recipe


def save_sheet(path: str, detector: Detector, val: Scenes, device, rows: int) -> None:
    """Detections beside the ground truth, of the first images that can be read."""
    found = itertools.islice(detect(detector, val, range(len(val)), device), rows)
    sheet(path, [Shown(val.name(i), image, val.target(i), of_image)
                 for i, image, _, of_image in found], val.classes)


def show(task: EvalTask) -> dict:
    """Draw what a trained detector finds in any images: a PNG each, and detections.json, in COCO's
    results format with the names of file and class."""
    (detector, classes, recipe), images, options = load_detector(task), task.images(), task.options
    task.preprocessing = resized(task.preprocessing, recipe)
    if not is_main():
        return {}
    folder = Path(options.show)
    refuse_existing(folder / "detections.json", options.force, [options.data])
    folder.mkdir(parents=True, exist_ok=True)
    rows, drawn, category_ids = [], 0, task.config["category_ids"]
    photos, device = Photos(images), task.device
    for i, image, _, found in detect(detector.to(device), photos, range(len(photos)), device,
                                     options.workers):
        # a number, for names may be alike in two folders
        name = f"{i:06d}-{Path(images.name(i)).stem[:100]}.png"
        side = min(max(*image.shape[1:], SHOWN[0]), SHOWN[1])
        to_pil_image(draw(image, found, classes, side=side)).save(folder / name)
        drawn += 1
        kinds = as_results(found, i + 1, category_ids)
        for label, box, *mask in zip(found["labels"].tolist(), *kinds.values()):
            rows.append(box | dict(*mask) | {"file_name": images.name(i),
                                             "category": classes[label - 1]})
    write_whole(folder / "detections.json", json.dumps(rows))
    return {"out": str(folder), "pictures": drawn, "left_out": len(photos) - drawn,
            "detections": len(rows)}
