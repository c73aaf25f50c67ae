"""Recipes: everything that decides a run, its defaults with their sources, and the command line.

    config = configure({"arch": "regnety_16gf", "batch_size": 256})     # recipe seer, two changes
    config = configure(parse_arguments(["--epochs", "10", "--data", "photos/"]))

`Config` is one frozen dataclass; the command line is generated from its fields. A recipe is a
named set of defaults, so a new one is a line in RECIPES. What a user gives wins over the recipe.

Sources: SwAV (arXiv 2006.09882), SEER (2103.01988, 2202.08360), and VISSL's configuration files.
"""
import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass

from multicrop import parse_crops
from regnet import ARCHS


def option(default, help: str, low=None, high=math.inf, choices=None):
    """A field, with its help text and, for a number, the range it must lie in."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. The defaults are SEER's (VISSL's configuration files)."""
    data: str = option("", "folder of pictures, any depth; none: the built-in demo pictures")
    out: str = option("", "folder of the run; none: runs/RECIPE-ARCH")
    recipe: str = option("", "named set of defaults; none: seer with --arch, else demo")
    arch: str = option("regnety_256gf", "trunk, a name from regnet.ARCHS")
    # length: whichever of these is given replaces the recipe's; of several, the shortest
    steps: int = option(0, "length of the run in optimizer steps", 0)
    epochs: float = option(0.0, "length of the run in passes over the data", 0)
    images: int = option(0, "length of the run in pictures seen", 0)
    batch_size: int = option(8192, "pictures per step over all ranks (SEER: 8192)", 2)
    # pictures -> crops
    crops: str = option("2x224+4x96", "COUNTxSIZE[@FROM-TO]+..., FROM-TO the share of the area")
    strength: float = option(1.0, "strength of the colour jitter (SwAV: 1)", 0)
    gray: float = option(0.2, "probability of a gray crop (SwAV: 0.2)", 0, 1)
    blur: float = option(0.5, "probability of a blurred crop (SwAV: 0.5)", 0, 1)
    # crops -> scores -> loss
    head: str = option("8192-8192-256", "widths of the projection head")
    head_bn: bool = option(False, "BatchNorm in the head (SwAV, and SEER up to 32GF)")
    prototypes: int = option(16000, "number of prototypes, K (SwAV: 3000)", 1)
    epsilon: float = option(0.05, "Sinkhorn's softness of the codes (SEER-10B: 0.03)", 1e-3)
    sinkhorn_iterations: int = option(10, "Sinkhorn iterations (SwAV: 3)", 1)
    hard: bool = option(False, "one-hot codes")
    temperature: float = option(0.1, "temperature of the predictions", 1e-3)
    queue: int = option(0, "embeddings kept for Sinkhorn, over all ranks; used once full", 0)
    freeze_prototypes: int = option(313, "steps during which the prototypes stay as they began", 0)
    # optimizer
    lr: float = option(0.3, "peak learning rate per 256 pictures of batch", 0)
    final_lr: float = option(0.001, "last learning rate of the cosine, share of the peak", 0, 1)
    warmup: float = option(0.0655, "share of the run in which the learning rate rises from 0", 0, 1)
    momentum: float = option(0.9, "momentum of SGD", 0, 1)
    trust_coefficient: float = option(0.001, "LARC's step relative to a tensor's norm", 0)
    weight_decay: float = option(1e-5, "weight decay, BatchNorm and biases too (SwAV: 1e-6)", 0)
    # machine
    precision: str = option("auto", "auto: bf16 where the device is made for it, else fp32",
                            choices=("auto", "bf16", "fp16", "fp32"))
    device: str = option("", "cuda, mps or cpu; none: the best one here")
    workers: int = option(-1, "decoding processes per rank; -1: its processors, on a CPU a quarter",
                          -1)
    seed: int = option(0, "of weights, order, crops and distortions", 0)
    log_every: int = option(20, "steps between lines of log.jsonl", 1)
    save_every: int = option(500, "steps between checkpoints", 1)

    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine, by step."""
        warmup = round(self.warmup * self.steps)
        if step < warmup:
            return self.peak_lr() * (step + 1) / warmup
        progress = (step - warmup) / max(1, self.steps - warmup)
        floor = self.final_lr
        return self.peak_lr() * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


RECIPES = {
    # SEER's 256GF: one pass over a billion pictures
    "seer": dict(images=1_000_000_000),
    # 64-pixel pictures on two CPU cores in a few minutes
    "demo": dict(arch="regnety_100mf", steps=400, batch_size=128,
                 crops="2x64@0.25-1+4x32@0.08-0.25", strength=0.2, gray=0.0, blur=0.0,
                 head="256-64", head_bn=True, prototypes=64, epsilon=0.03, sinkhorn_iterations=3,
                 freeze_prototypes=0, lr=4.8, warmup=0.08, weight_decay=1e-6),
}


def parse_arguments(argv: list[str]) -> dict:
    """Command line -> the options given. Hyphens and underscores alike."""
    parser = argparse.ArgumentParser(
        description="Pretrain a RegNet with SwAV, as SEER was.", argument_default=argparse.SUPPRESS)
    for field in dataclasses.fields(Config):
        text, choices = field.metadata["help"], field.metadata["choices"]
        defaults = ", ".join(f"{name}: {recipe.get(field.name, field.default)}"
                             for name, recipe in RECIPES.items())
        kwargs = dict(help=f"{text} ({defaults})".replace("%", "%%"))
        if field.type is bool:
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= dict(type=field.type, choices=choices,
                           metavar=None if choices else field.type.__name__.upper())
        parser.add_argument(flag(field.name), **kwargs)
    flags = [arg.replace("_", "-", arg.split("=")[0].count("_")) if arg.startswith("--") else arg
             for arg in argv]
    return vars(parser.parse_args(flags))


def configure(given: dict, world: int = 1) -> Config:
    """Recipe and given options -> a complete configuration. Raises ValueError for a bad one."""
    recipe = given.get("recipe") or ("seer" if "arch" in given else "demo")
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, RECIPES))
    defaults = dict(RECIPES[recipe])
    if {"steps", "epochs", "images"} & set(given):
        defaults = {k: v for k, v in defaults.items() if k not in ("steps", "epochs", "images")}
    config = Config(**defaults | given | {"recipe": recipe})
    if config.arch not in ARCHS:
        raise ValueError(unknown("arch", config.arch, ARCHS))
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if low is not None and not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{flag(field.name)} {value}: needs {limit}")
    parse_head(config.head)
    specs = parse_crops(config.crops)
    if sum(spec.count for spec in specs) < 2:
        raise ValueError(f"--crops {config.crops}: SwAV needs at least two crops of a picture")
    size, stages = min(spec.size for spec in specs), len(ARCHS[config.arch].stages())
    if size <= 2 ** stages:
        # nothing to convolve; and oneDNN's bf16 gradient there is garbage (torch 2.11 and 2.15)
        raise ValueError(f"--crops {config.crops}: {size} pixels are a single one before the "
                         f"last of {config.arch}'s {stages} stages; use more than {2 ** stages}")
    for name in ("batch_size", "queue"):
        if getattr(config, name) % world:
            raise ValueError(f"{flag(name)} {getattr(config, name)} is not divisible by {world} "
                             f"processes; {getattr(config, name) // world * world} is")
    return dataclasses.replace(config, out=config.out or f"runs/{recipe}-{config.arch}")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def unknown(what: str, name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=3) or sorted(known)
    return f"unknown {what} {name!r}; there is {', '.join(close)}"


def parse_head(text: str) -> list[int]:
    try:
        widths = [int(width) for width in text.split("-")]
        if min(widths) < 1:
            raise ValueError
        return widths
    except ValueError:
        raise ValueError(f"head {text!r} is not WIDTH-WIDTH-..., as in 8192-8192-256") from None


def with_length(config: Config, num_images: int) -> Config:
    """Resolve epochs and images into steps, once the number of pictures is known."""
    lengths = [config.steps, math.ceil(config.images / config.batch_size),
               math.ceil(config.epochs * num_images / config.batch_size)]
    steps = min((length for length in lengths if length > 0), default=0)
    if not steps:
        raise ValueError("the run has no length: give --steps, --epochs or --images")
    return dataclasses.replace(config, steps=steps)
