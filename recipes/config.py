"""Config: every option of a run, with its default, its range and its help text.

    config = Config(arch="regnety_16gf", crops="2x224+4x96", batch_size=256)
    config.crops[0].size, config.head[-1], config.mean       # parsed: 224, 256, (0.485, ...)
    config.text("crops"), config.as_dict()                   # as it is written, and as it is saved

One frozen dataclass; the command line is generated from its fields (command_line.py). A recipe is a
named set of defaults (published.py, small.py), and what a user gives wins over the recipe.
"""
import dataclasses
import difflib
import functools
import math
import os
from dataclasses import dataclass

import numpy

from distributed.hardware import check_device
from methods.build import METHODS, TRUNKS, options_of_others
from multicrop import MAX_PIXELS, CropSpec, parse_channels, parse_crops
from regnet import ARCHS
from weights.terminal import span

LENGTHS = {"steps", "epochs", "images"}
MAX_STEPS = 10 ** 9
MAX_WIDTH = 100_000                  # of a layer of the head


def parse_head(text: str) -> tuple[int, ...]:
    """"8192-8192-256" -> (8192, 8192, 256)."""
    try:
        widths = tuple(int(width) for width in text.split("-"))
        if min(widths) < 1:
            raise ValueError
        return widths
    except ValueError:
        raise ValueError(f"head {text!r} is not WIDTH-WIDTH-..., as in 8192-8192-256") from None


def parse_numbers(name: str, text: str) -> tuple[float, ...]:
    """"1,0.1" -> (1.0, 0.1). name: of the option."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError(f"{name} {text!r} is not NUMBER,NUMBER,..., as in 1,0.1") from None


def numbers_text(values: tuple[float, ...]) -> str:
    """The way back from parse_numbers, and parse_channels."""
    return ",".join(map(number, values))


def number(x: float) -> str:
    """The shortest digits that give x again, without an exponent: 0.14, 1, 0.00001."""
    return numpy.format_float_positional(x, trim="-")


def crops_text(crops: tuple[CropSpec, ...]) -> str:
    """The way back from parse_crops; a scale is written where it is not the usual one."""
    parts = []
    for i, (count, size, scale) in enumerate(crops):
        usual = (0.14, 1.0) if i == 0 else (0.05, 0.14)
        parts.append(f"{count}x{size}" + (
            f"@{number(scale[0])}-{number(scale[1])}" if scale != usual else ""))
    return "+".join(parts)


# options that are written as text: how it is read, and written
WRITTEN = {"crops": (lambda text: tuple(parse_crops(text)), crops_text),
           "head": (parse_head, lambda widths: "-".join(map(str, widths))),
           "predictor": (parse_head, lambda widths: "-".join(map(str, widths))),
           "mean": (parse_channels, numbers_text), "std": (parse_channels, numbers_text),
           **{name: (functools.partial(parse_numbers, name), numbers_text)
              for name in ("blur", "solarize", "teacher_temperature")}}


def option(default, help: str, low=None, high=math.inf, choices=None):
    """A field, with its help text and, for a number, the range it must lie in."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. The defaults are SEER's (VISSL's configuration files)."""
    data: str = option("", "images: a folder of any depth, a text file of paths, or tar files "
                       "('shards/{000000..000999}.tar', 'shards/*.tar'); none: the demo images")
    max_pixels: int = option(MAX_PIXELS, "of an image; larger ones are replaced (PIL refuses "
                             "twice this default)", 1, 2 * MAX_PIXELS)
    shrink: int = option(-1, "images whose shorter side has more pixels are shrunk to it before "
                         "they are cut; 0: none; -1: as --cache says, for the whole run", -1,
                         65_535)
    cache: str = option("auto", "folder where shrunk images are kept; off: none; auto: where "
                        "decoding is measured to take most of the time and the set is small, in "
                        "the user's cache folder, shrunk to what the crops need")
    out: str = option("", "folder of the run; none: runs/RECIPE-ARCH, of other methods "
                      "runs/RECIPE-METHOD-ARCH")
    init: str = option("", "weights to start from: a file or an official name (python -m weights "
                       "lists them); none: random ones")
    method: str = option("swav", "what is learned: " + ", ".join(METHODS), choices=tuple(METHODS))
    recipe: str = option("", "named set of defaults; none: small for fewer than 100,000 images "
                         "of your own, medium up to 100 million, seer for more or with --arch "
                         "alone, else demo; of other methods instead of medium and seer the "
                         "published one, by the method's name")
    days: float = option(2.0, "recipe medium: days that the run may take, by which it chooses the "
                         "network", 0.001, 10_000)
    arch: str = option("regnety_256gf", "trunk, a name from regnet.ARCHS, or resnet50, "
                       "resnet50w2, w4, w5")
    # a given length replaces the recipe's; of several given, the shortest counts
    steps: int = option(0, "length of the run in optimizer steps", 0, MAX_STEPS)
    epochs: float = option(0.0, "length of the run in passes over the data", 0, 1_000_000)
    images: int = option(0, "length of the run in images seen", 0, 10 ** 12)
    batch_size: int = option(8192, "images per step over all ranks (SEER: 8192)", 2, 1_000_000)
    # images -> crops
    crops: tuple[CropSpec, ...] = option(
        "2x224+4x96", "COUNTxSIZE[@FROM-TO]+..., FROM-TO the share of the area")
    strength: float = option(1.0, "strength of the colour jitter (SwAV: 1)", 0, 10)
    strength_from: float = option(0.0, "strength at the start, where it rises", 0, 10)
    strength_rise: float = option(0.0, "share of the run in which the strength rises", 0, 1)
    gray: float = option(0.2, "probability of a gray crop (SwAV: 0.2)", 0, 1)
    blur: tuple[float, ...] = option("0.5", "probability of a blurred crop (SwAV: 0.5), or of each "
                                     "of an image's crops in turn (BYOL: 1,0.1)")
    solarize: tuple[float, ...] = option("0", "probability of a solarized crop, or of each of an "
                                         "image's crops in turn (BYOL: 0,0.2)")
    mean: tuple[float, ...] = option("0.485,0.456,0.406", "channel means to subtract (ImageNet's)")
    std: tuple[float, ...] = option("0.229,0.224,0.225", "channel deviations to divide by "
                                    "(ImageNet's)")
    # crops -> scores -> loss
    head: tuple[int, ...] = option("8192-8192-256", "widths of the projection head")
    head_bn: bool = option(False, "BatchNorm in the head (SwAV, and SEER up to 32GF)")
    prototypes: int = option(16000, "number of prototypes, K (SwAV: 3000); dino: of outputs; "
                             "deepcluster_v2: of clusters", 1, 1_000_000)
    epsilon: float = option(0.05, "Sinkhorn's softness of the codes (SEER-10B: 0.03)", 1e-3, 10)
    sinkhorn_iterations: int = option(10, "Sinkhorn iterations (SwAV: 3)", 1, 1000)
    hard: bool = option(False, "one-hot codes")
    codes_from_all_crops: bool | None = option(
        None, "of a batch in several micro-batches: all crops, not the assigned ones alone, go "
              "through the pass that makes the codes, for a head's BatchNorm (7 % more "
              "multiply-adds for 2x224+4x96); None: where the head has BatchNorm")
    temperature: float = option(0.1, "temperature of the predictions, or similarities", 1e-3, 10)
    queue: int = option(0, "embeddings kept for Sinkhorn, over all ranks; used once full; mocov2: "
                        "keys", 0, 10_000_000)
    queue_start: int = option(0, "step from which the queue is used, if full", 0, MAX_STEPS)
    freeze_prototypes: int = option(313, "steps during which the prototypes stay as they began; "
                                    "dino: the last layer", 0, MAX_STEPS)
    # of other methods (methods/)
    predictor: tuple[int, ...] = option("4096-256", "byol: widths of the predictor")
    target_momentum: float = option(0.996, "mocov2, byol, dino: momentum of the slowly moving copy "
                                    "of the network", 0, 1)
    teacher_temperature: tuple[float, ...] = option(
        "0.04,0.07", "dino: the teacher's, at first and after --teacher-warmup")
    teacher_warmup: float = option(0.0375, "dino: share of the run in which the teacher's "
                                   "temperature changes", 0, 1)
    off_diagonal: float = option(0.0051, "barlow_twins: weight of the redundancy term", 0, 1000)
    loss_scale: float = option(0.024, "barlow_twins: factor of the loss", 1e-6, 1000)
    clusterings: int = option(3, "deepcluster_v2: k-means, each of --prototypes clusters", 1, 100)
    # optimizer
    lr: float = option(0.3, "peak learning rate per 256 images of batch", 0, 10_000)
    final_lr: float = option(0.001, "last learning rate of the cosine, share of the peak", 0, 1)
    warmup: float = option(0.0655, "share of the run in which the learning rate rises", 0, 1)
    first_lr: float = option(0.0, "learning rate before the first step, share of the peak", 0, 1)
    momentum: float = option(0.9, "momentum of SGD", 0, 1)
    trust_coefficient: float = option(0.001, "LARC's step relative to a tensor's norm; 0: "
                                     "plain SGD", 0, 10)
    exclude_bias_bn: bool = option(False, "BatchNorm and biases take plain SGD, without LARC and "
                                   "weight decay (BYOL, Barlow Twins)")
    weight_decay: float = option(1e-5, "weight decay, BatchNorm and biases too (SwAV: 1e-6)", 0, 1)
    # machine
    micro_batch: int = option(0, "images a rank computes at once; 0: what its memory has room "
                              "for (--plan)", 0, 1_000_000)
    checkpoint_activations: bool | None = option(
        None, "activation checkpointing of each block; None: where memory is short without it")
    shard: bool | None = option(
        None, "FSDP2: each rank of a group keeps a shard of weights, gradients and momentum; None: "
        "where there is no room for whole ones (--plan)")
    shard_group: int = option(0, "ranks that hold one copy of the shards; 0: a node's, where there "
                              "are several nodes, else all", 0, 100_000)
    compile: bool = option(False, "compile the trunk, one graph per crop size: a minute or more "
                           "before the first step (docs/speed.md: where it pays)")
    channels_last: bool | None = option(
        None, "memory layout: channels-last, or contiguous; None: the faster one, measured at the "
        "start of the run (docs/gpu.md)")
    pad_widths: bool | None = option(
        None, "compute odd widths, as those of the 256GF and 10B, as multiples of 8 "
        "(distributed/padding.py); None: on CUDA, where that is measured to be faster")
    cudnn_benchmark: bool | None = option(
        None, "cuDNN times its algorithms for each shape (torch.backends.cudnn.benchmark); None: "
        "on CUDA, where that is measured to be faster")
    threads: int = option(0, "computing threads of a rank on a CPU; sums round by it, so the run "
                          "keeps it; 0: its processors", 0, 1024)
    compress_gradients: bool = option(False, "send gradients between ranks as bf16: half the "
                                      "bytes, each rounded to 8 bits")
    sync_bn_group: int = option(0, "ranks that share BatchNorm's statistics (SEER: 64); 0: none", 0,
                                100_000)
    precision: str = option("auto", "auto: bf16 where the device is made for it, else fp32",
                            choices=("auto", "bf16", "fp16", "fp32"))
    device: str = option("", "cuda, mps or cpu; none: the best one here")
    workers: int = option(-1, "decoding processes per rank; -1: its processors, on a CPU their "
                          "measured part of the work, at least a quarter", -1, 256)
    seed: int = option(0, "seed of weights, order, crops and augmentations", 0, 2 ** 63 - 1)
    log_every: int = option(20, "steps between lines of log.jsonl", 1, MAX_STEPS)
    # a run that was changed; set when it is resumed
    restart_lr: float = option(0.0, "of a finished run that a greater length extends: learning "
                               "rate at which another half cosine begins, share of the peak; 0: "
                               "the last rate stays", 0, 1)
    extended_at: int = option(0, "", 0, MAX_STEPS)          # step; not on the command line
    grown_at: int = option(0, "", 0, 2 ** 63 - 1)           # position of the stream; neither
    probe: str = option("", "folder of images to measure the trunk with while it trains: kNN "
                        "where they are in class folders, else how often two augmented views of a "
                        "image find each other")
    probe_every: int = option(0, "steps between probes; 0: a twentieth of the run", 0, MAX_STEPS)
    save_every: int = option(500, "steps between checkpoints", 1, MAX_STEPS)
    save_minutes: float = option(10.0, "minutes after which a checkpoint is due all the same; 0: "
                                 "by steps alone", 0, 10_000)
    keep: int = option(2, "checkpoints that stay, the newest", 1, MAX_STEPS)
    keep_every: int = option(0, "steps between checkpoints that stay for good; 0: none", 0,
                             MAX_STEPS)
    max_bad_steps: int = option(10, "steps in a row with a loss or gradient that is not finite, "
                                "after which the run ends; each is skipped", 1, MAX_STEPS)

    def __post_init__(self):
        for name, (parse, _) in WRITTEN.items():
            value = getattr(self, name)
            if isinstance(value, str | int | float):        # a number: as runs were saved before
                value = parse(str(value))
            object.__setattr__(self, name, tuple(value))

    def text(self, name: str) -> str:
        """An option's value as it is written on the command line."""
        value = getattr(self, name)
        if name in WRITTEN:
            return WRITTEN[name][1](value)
        return f"{value:.12g}" if isinstance(value, float) else str(value)

    def as_dict(self) -> dict:
        """Plain values, as config.json and checkpoints hold them; Config(**these) is the same."""
        return {field.name: self.text(field.name) if field.name in WRITTEN else
                getattr(self, field.name) for field in dataclasses.fields(self)}

    def codes_need_all_crops(self) -> bool:
        wanted = self.codes_from_all_crops
        return self.head_bn if wanted is None else wanted

    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def warmup_steps(self) -> int:
        return round(self.warmup * (self.extended_at or self.steps))

    def strength_at(self, position: int) -> float:
        """Strength of the colour jitter for the image at a position of the stream."""
        steps = self.extended_at or self.steps
        progress = position // self.batch_size / max(1, self.strength_rise * steps)
        rise = min(1.0, progress) if self.strength_rise else 1.0
        return self.strength_from + rise * (self.strength - self.strength_from)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine, by step. After extended_at another half cosine, from
        restart_lr, or the last rate."""
        warmup, floor = self.warmup_steps(), self.final_lr
        if step < warmup:
            rise = self.peak_lr() * (step + 1) / warmup
            return rise + self.first_lr * (self.peak_lr() - rise)
        begin, end, top = warmup, self.extended_at or self.steps, 1.0
        if 0 < self.extended_at <= step:
            begin, end, top = self.extended_at, self.steps, self.restart_lr or floor
        progress = (step - begin) / max(1, end - begin)
        return self.peak_lr() * (floor + (top - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def complete(given: dict, world: int, recipe: str, rule: dict) -> Config:
    """A rule's defaults and the given options -> Config. Raises ValueError for a bad one."""
    defaults = {name: value for name, (value, _) in rule.items()}
    if LENGTHS & set(given):
        defaults = {name: value for name, value in defaults.items() if name not in LENGTHS}
    config = Config(**defaults | given | {"recipe": recipe})
    if config.arch not in TRUNKS:
        raise ValueError(unknown("arch", config.arch, TRUNKS))
    check_ranges(config)
    check_method(config)
    check_crops(config)
    check_ranks(config, world)
    check_shards(config)
    share = config.batch_size // world
    if config.micro_batch and share % config.micro_batch:
        fitting = max(n for n in range(1, min(config.micro_batch, share) + 1) if share % n == 0)
        raise ValueError(f"--micro-batch {config.micro_batch} does not divide the {share} images "
                         f"of a process; {fitting} does")
    for spec in config.crops:
        crops, pixel = (config.micro_batch or share) * spec.count, 2 ** (depth(config) + 1)
        if crops == 1 and spec.size <= pixel:
            raise ValueError(f"--micro-batch 1 with {spec.count}x{spec.size} in --crops: one crop "
                             "that ends as one pixel is no batch for BatchNorm; use 2")
    places = {name: os.path.abspath(getattr(config, name)) for name in ("data", "probe")
              if getattr(config, name)}                     # a run is resumed from any folder
    name = recipe if config.method in ("swav", recipe) else f"{recipe}-{config.method}"
    return dataclasses.replace(config, out=config.out or f"runs/{name}-{config.arch}", **places)


def check_ranges(config: Config) -> None:
    """Raises ValueError for a number outside its range, and a device that no run can use."""
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if low is not None and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{flag(field.name)} {value}: needs {span(low, high)}")
    for name, low, high, count in (
            ("mean", -10, 10, 3), ("std", 0.001, 10, 3), ("head", 1, MAX_WIDTH, None),
            ("predictor", 1, MAX_WIDTH, None), ("blur", 0, 1, None), ("solarize", 0, 1, None),
            ("teacher_temperature", 1e-3, 10, 2)):
        values = getattr(config, name)
        if len(values) != (count or len(values)) or not all(low <= x <= high for x in values):
            raise ValueError(f"{flag(name)} {config.text(name)}: needs {'two ' * (count == 2)}"
                             f"numbers from {span(low, high)}"
                             + ", of channels that go from 0 to 1" * (count == 3))
    check_device(config.device)


def check_method(config: Config) -> None:
    """Raises ValueError for an option of another method."""
    usual = Config()
    others = [flag(name) for name in sorted(options_of_others(config.method))
              if getattr(config, name) != getattr(usual, name)]
    if others:
        raise ValueError(f"--method {config.method} takes no {', '.join(others)}")


def check_crops(config: Config) -> None:
    """Raises ValueError for crops that the method, or the network, cannot take."""
    counts, needs = [spec.count for spec in config.crops], METHODS[config.method].crops
    fits = {"one": True, "two of the first size": counts[0] >= 2, "exactly two, of one size":
            counts == [2], "two": sum(counts) >= 2}
    if not fits[needs]:
        raise ValueError(f"--crops {config.text('crops')}: {config.method} needs crops of an "
                         f"image: {needs}" + ", or more" * ("exactly" not in needs))
    size, stages = min(spec.size for spec in config.crops), depth(config)
    if size <= 2 ** stages:
        # nothing to convolve; and oneDNN's bf16 gradient there is garbage (torch 2.11 and 2.15)
        raise ValueError(f"--crops {config.text('crops')}: {size} pixels are a single one before "
                         f"the last of {config.arch}'s {stages} stages; use more than "
                         f"{2 ** stages}")


def depth(config: Config) -> int:
    """Number of stages of the trunk."""
    return len(ARCHS[config.arch].stages()) if config.arch in ARCHS else 4


def check_ranks(config: Config, world: int) -> None:
    """Raises ValueError where that many processes cannot share the batch, or SwAV's queue."""
    for name in ("batch_size", "queue") if config.method == "swav" else ("batch_size",):
        if getattr(config, name) % world:
            fitting = max(1, getattr(config, name) // world) * world
            raise ValueError(f"{flag(name)} {getattr(config, name)} is not divisible by {world} "
                             f"processes; {fitting} is")


def check_shards(config: Config) -> None:
    """Raises ValueError for what a sharded run cannot do."""
    if config.shard and config.method != "swav":
        raise ValueError(f"--shard is for swav: {config.method} needs whole weights on each rank")
    if config.shard and config.compile:
        raise ValueError("a sharded network cannot be compiled: leave out --compile, or take "
                         "--no-shard where the network has room")
    if config.shard and config.precision == "fp16":
        raise ValueError("--precision fp16 cannot be sharded: take bf16 or fp32, or --no-shard "
                         "where the network has room")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def unknown(what: str, name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=3) or sorted(known)
    return f"unknown {what} {name!r}; there is {', '.join(close)}"


def with_length(config: Config, num_images: int) -> Config:
    """Resolve epochs and images into steps, once the number of images is known."""
    lengths = [config.steps, math.ceil(config.images / config.batch_size),
               math.ceil(config.epochs * num_images / config.batch_size)]
    steps = min((length for length in lengths if length > 0), default=0)
    if not steps:
        raise ValueError("the run has no length: give --steps, --epochs or --images")
    return dataclasses.replace(config, steps=steps)
