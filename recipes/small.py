"""Recipes: everything that decides a run, its defaults with their sources, and the command line.

    config = configure({"arch": "regnety_16gf", "batch_size": 256})     # recipe seer, two changes
    config = configure(parse_arguments(["--data", "photos/"]), images=open_images("photos/"))

`Config` is one frozen dataclass; the command line is generated from its fields. A recipe is a
named set of defaults, so a new one is a line in RECIPES. What a user gives wins over the recipe.
Recipe `small` is a rule instead: it looks at the pictures, and gives a reason for each setting.

Sources: SwAV (arXiv 2006.09882), SEER (2103.01988, 2202.08360), and VISSL's configuration files.
"""
import argparse
import dataclasses
import difflib
import math
from dataclasses import dataclass

from demo import DemoImages
from images import Survey, survey
from multicrop import MAX_PIXELS, decode, parse_crops
from regnet import ARCHS
from scale import TRUNKS


def option(default, help: str, low=None, high=math.inf, choices=None):
    """A field, with its help text and, for a number, the range it must lie in."""
    return dataclasses.field(default=default, metadata=dict(
        help=help, low=low, high=high, choices=choices))


@dataclass(frozen=True)
class Config:
    """Everything that decides a run. The defaults are SEER's (VISSL's configuration files)."""
    data: str = option("", "pictures: a folder of any depth, a text file of paths, or tar files "
                       "('shards/{000000..000999}.tar', 'shards/*.tar'); none: the demo pictures")
    max_pixels: int = option(MAX_PIXELS, "of a picture; larger ones are replaced (PIL refuses "
                             "twice this default)", 1, 2 * MAX_PIXELS)
    out: str = option("", "folder of the run; none: runs/RECIPE-ARCH")
    init: str = option("", "weights to start from: a file or an official name (python weights.py "
                       "lists them); none: random ones")
    recipe: str = option("", "named set of defaults; none: small for fewer than 100,000 pictures "
                         "of your own, seer for more or with --arch alone, else demo")
    arch: str = option("regnety_256gf", "trunk, a name from regnet.ARCHS, or resnet50")
    # length: whichever of these is given replaces the recipe's; of several, the shortest
    steps: int = option(0, "length of the run in optimizer steps", 0)
    epochs: float = option(0.0, "length of the run in passes over the data", 0)
    images: int = option(0, "length of the run in pictures seen", 0)
    batch_size: int = option(8192, "pictures per step over all ranks (SEER: 8192)", 2)
    # pictures -> crops
    crops: str = option("2x224+4x96", "COUNTxSIZE[@FROM-TO]+..., FROM-TO the share of the area")
    strength: float = option(1.0, "strength of the colour jitter (SwAV: 1)", 0)
    strength_from: float = option(0.0, "strength at the start, where it rises", 0)
    strength_rise: float = option(0.0, "share of the run in which the strength rises", 0, 1)
    gray: float = option(0.2, "probability of a gray crop (SwAV: 0.2)", 0, 1)
    blur: float = option(0.5, "probability of a blurred crop (SwAV: 0.5)", 0, 1)
    mean: str = option("0.485,0.456,0.406", "channel means to subtract (ImageNet's)")
    std: str = option("0.229,0.224,0.225", "channel deviations to divide by (ImageNet's)")
    # crops -> scores -> loss
    head: str = option("8192-8192-256", "widths of the projection head")
    head_bn: bool = option(False, "BatchNorm in the head (SwAV, and SEER up to 32GF)")
    prototypes: int = option(16000, "number of prototypes, K (SwAV: 3000)", 1)
    epsilon: float = option(0.05, "Sinkhorn's softness of the codes (SEER-10B: 0.03)", 1e-3)
    sinkhorn_iterations: int = option(10, "Sinkhorn iterations (SwAV: 3)", 1)
    hard: bool = option(False, "one-hot codes")
    temperature: float = option(0.1, "temperature of the predictions", 1e-3)
    queue: int = option(0, "embeddings kept for Sinkhorn, over all ranks; used once full", 0)
    queue_start: int = option(0, "step from which the queue is used, if full", 0)
    freeze_prototypes: int = option(313, "steps during which the prototypes stay as they began", 0)
    # optimizer
    lr: float = option(0.3, "peak learning rate per 256 pictures of batch", 0)
    final_lr: float = option(0.001, "last learning rate of the cosine, share of the peak", 0, 1)
    warmup: float = option(0.0655, "share of the run in which the learning rate rises", 0, 1)
    first_lr: float = option(0.0, "learning rate before the first step, share of the peak", 0, 1)
    momentum: float = option(0.9, "momentum of SGD", 0, 1)
    trust_coefficient: float = option(0.001, "LARC's step relative to a tensor's norm", 0)
    weight_decay: float = option(1e-5, "weight decay, BatchNorm and biases too (SwAV: 1e-6)", 0)
    # machine
    micro_batch: int = option(0, "pictures a rank computes at once; 0: what its memory has room "
                              "for (--plan)", 0)
    checkpoint_activations: bool | None = option(None, "keep only the inputs of blocks and compute "
                                                 "them again; None: where memory asks for it")
    compile: bool = option(False, "compile the trunk, one graph per crop size: a minute or more before "
                           "the first step (README: where it pays)")
    sync_bn_group: int = option(0, "ranks that share BatchNorm's statistics (SEER: 64); 0: none", 0)
    precision: str = option("auto", "auto: bf16 where the device is made for it, else fp32",
                            choices=("auto", "bf16", "fp16", "fp32"))
    device: str = option("", "cuda, mps or cpu; none: the best one here")
    workers: int = option(-1, "decoding processes per rank; -1: its processors, on a CPU a quarter",
                          -1)
    seed: int = option(0, "of weights, order, crops and distortions", 0)
    log_every: int = option(20, "steps between lines of log.jsonl", 1)
    probe: str = option("", "folder of pictures to measure the trunk with while it trains: kNN where "
                        "they are in class folders, else how often two distortions of a picture "
                        "find each other")
    probe_every: int = option(0, "steps between these; 0: a twentieth of the run", 0)
    save_every: int = option(500, "steps between checkpoints", 1)
    keep: int = option(2, "checkpoints that stay, the newest", 1)
    keep_every: int = option(0, "steps between checkpoints that stay for good; 0: none", 0)
    max_bad_steps: int = option(10, "steps in a row with a loss or gradient that is not finite, "
                                "after which the run ends; each is skipped", 1)

    def peak_lr(self) -> float:
        return self.lr * self.batch_size / 256

    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    def strength_at(self, position: int) -> float:
        """Strength of the colour jitter for the picture at a position of the stream."""
        progress = position // self.batch_size / max(1, self.strength_rise * self.steps)
        rise = min(1.0, progress) if self.strength_rise else 1.0
        return self.strength_from + rise * (self.strength - self.strength_from)

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then half a cosine, by step."""
        warmup = self.warmup_steps()
        if step < warmup:
            rise = self.peak_lr() * (step + 1) / warmup
            return rise + self.first_lr * (self.peak_lr() - rise)
        progress = (step - warmup) / max(1, self.steps - warmup)
        floor = self.final_lr
        return self.peak_lr() * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


RECIPES = {
    # 64-pixel pictures on two CPU cores in a few minutes
    "demo": dict(arch="regnety_100mf", steps=500, batch_size=128,
                 crops="2x64@0.25-1+4x32@0.08-0.25", strength=0.2, gray=0.0, blur=0.0,
                 head="256-64", head_bn=True, prototypes=64, epsilon=0.03, sinkhorn_iterations=3,
                 freeze_prototypes=0, lr=4.8, warmup=0.08, weight_decay=1e-6),
}
# SwAV's own: (value, source). Script: facebookresearch/swav's for 800 epochs, and for a batch of
# 256.
_SWAV = {
    "arch": ("resnet50", "script"), "epochs": (800.0, "script"),
    "batch_size": (4096, "script: 64 x 64"),
    "crops": ("2x224+6x96", "script; 0.14 to 1 and 0.05 to 0.14 of the area"),
    "strength": (1.0, "paper, A.3"), "gray": (0.2, "paper, A.3"), "blur": (0.5, "paper, A.3"),
    "mean": (Config.mean, "its code: ImageNet's"),
    "std": ("0.228,0.224,0.225", "its code; elsewhere the first is 0.229"),
    "head": ("2048-128", "script"), "head_bn": (True, "its code"), "prototypes": (3000, "script"),
    "epsilon": (0.05, "script"), "sinkhorn_iterations": (3, "script"),
    "temperature": (0.1, "script"), "freeze_prototypes": (313, "script"),
    "lr": (0.3, "script: 4.8 at 4096"), "final_lr": (0.001, "script: 0.0048"),
    "warmup": (0.0125, "script: 10 epochs"), "first_lr": (0.0625, "script: from 0.3"),
    "momentum": (0.9, "its code"), "trust_coefficient": (0.001, "its code"),
    "weight_decay": (1e-6, "script"), "sync_bn_group": (8, "script"),
}
SWAV = {
    "swav": _SWAV,
    "swav-bs256": _SWAV | {
        "epochs": (200.0, "script"), "batch_size": (256, "script: 4 x 64"),
        "lr": (0.6, "script"), "warmup": (0.0, "script"), "first_lr": (0.0, "script"),
        "final_lr": (0.001, "script: 0.0006"), "sync_bn_group": (8, "assumed: as the other script"),
        "freeze_prototypes": (5005, "script: an epoch"), "queue": (3840, "script"),
        "queue_start": (75_075, "script: 15 epochs of ImageNet")},
}
# SEER by size: (value, source). VISSL: its configuration files and model documentation. Name: that
# of the released weights. What no public source says is assumed, and printed so.
_ASSUMED = "assumed"
_SEER_COMMON = {
    "images": (1_000_000_000, "one pass over a billion pictures (paper)"),
    "crops": ("2x224+4x96", "VISSL"), "strength": (1.0, "VISSL's base for SwAV"),
    "gray": (0.2, "VISSL's base for SwAV"), "blur": (0.5, "VISSL's base for SwAV"),
    "mean": (Config.mean, "VISSL: ImageNet's"), "std": (Config.std, "VISSL: ImageNet's"),
    "prototypes": (16000, "VISSL"),
    "sinkhorn_iterations": (10, "VISSL, names"), "temperature": (0.1, "VISSL"),
    "queue": (0, "VISSL"), "lr": (0.3, "VISSL, per 256 pictures"), "momentum": (0.9, "VISSL"),
    "trust_coefficient": (0.001, "VISSL"), "freeze_prototypes": (313, "VISSL's base; " + _ASSUMED),
    "first_lr": (0.0625, "VISSL's base starts at 0.3; " + _ASSUMED),
}
_SEER_LARGE = {"head": ("8192-8192-256", "VISSL"), "head_bn": (False, "VISSL")}
SEER = {
    "regnety_32gf": {
        "batch_size": (4096, _ASSUMED + ": name of the 16GF"), "head": ("4096-4096-256", "VISSL"),
        "head_bn": (True, "VISSL"), "epsilon": (0.05, _ASSUMED), "weight_decay": (1e-5, _ASSUMED),
        "sync_bn_group": (32, _ASSUMED + ": name of the 16GF"),
        "final_lr": (0.001, "cosine: name; its end " + _ASSUMED),
        "warmup": (0.0655, "'warmup2x' in the name, " + _ASSUMED + " 2 x 8,000 of 244,141 steps")},
    "regnety_64gf": _SEER_LARGE | {
        "prototypes": (16000, _ASSUMED), "sinkhorn_iterations": (10, _ASSUMED),
        "batch_size": (4096, _ASSUMED), "epsilon": (0.05, _ASSUMED),
        "sync_bn_group": (64, _ASSUMED),
        "weight_decay": (1e-5, _ASSUMED), "final_lr": (0.001, _ASSUMED),
        "warmup": (0.0328, _ASSUMED + ": 8,000 steps, as the 128GF")},
    "regnety_128gf": _SEER_LARGE | {
        "batch_size": (4096, "name: 16 nodes x 8 x 32"), "epsilon": (0.05, _ASSUMED),
        "weight_decay": (1e-5, _ASSUMED), "final_lr": (1.0, "name: constant after the warm-up"),
        "sync_bn_group": (64, "name"),
        "warmup": (0.0328, "8,000 steps (name)")},
    "regnety_256gf": _SEER_LARGE | {
        "batch_size": (8192, "VISSL, name: 64 nodes x 8 x 16"), "weight_decay": (1e-5, "VISSL"),
        "epsilon": (0.05, _ASSUMED + ": the files do not say"), "sync_bn_group": (64, "name"),
        "first_lr": (0.03125, "VISSL's base starts at 0.3; " + _ASSUMED),
        "final_lr": (0.001, "VISSL: 9.6 to 0.0096"), "warmup": (0.0655, "8,000 steps (name)")},
    "regnety_10b": _SEER_LARGE | {
        "crops": ("2x160+4x96", "VISSL"), "batch_size": (7936, "VISSL: 62 nodes x 8 x 16"),
        "epsilon": (0.03, "VISSL"), "weight_decay": (1e-5, "VISSL"),
        "first_lr": (0.3 / 9.3, "VISSL's base: from 0.3"), "sync_bn_group": (8, "VISSL: a node"),
        "final_lr": (0.001, "VISSL: 9.3 to 0.0093"), "freeze_prototypes": (313, "VISSL"),
        "warmup": (0.043648, "VISSL")},
}


def seer(arch: str) -> dict[str, tuple[object, str]]:
    """SEER's recipe for a size: option -> value and source. 8GF and 16GF were trained as the 32GF;
    other sizes borrow the 32GF's, all assumed."""
    rule = _SEER_COMMON | SEER.get(arch, SEER["regnety_32gf"])
    if arch not in (*SEER, "regnety_8gf", "regnety_16gf"):
        rule = {name: (value, _ASSUMED) for name, (value, _) in rule.items()}
    return {"arch": (arch, "")} | rule


LENGTHS = {"steps", "epochs", "images"}
SMALL = 100_000             # pictures; with fewer, recipe small
SMALL_PEAK = 2.4            # its peak learning rate


def small(pictures: Survey, given: dict, world: int = 1) -> dict[str, tuple[object, str]]:
    """The rule for a set of fewer than 100,000 pictures: option -> its value, and the reason.

    given: the options given; the batch and the number of prototypes decide others.  world: number
    of processes, which divides the batch.  The numbers behind the reasons are in the README, "When
    it does not learn" and "What was tried". Raises ValueError for fewer than 8 pictures.
    """
    count, side = pictures.count, pictures.short_side
    if count < 8:
        raise ValueError(f"{count} picture{'s' * (count > 1)} cannot be told apart by clusters; "
                         "recipe small needs at least 8, and some hundreds to learn something")
    batch = given.get("batch_size") or max(2, min(128, count // 2) // world) * world
    most = min(max(128, count // 64), count // 4, 512)
    prototypes = given.get("prototypes") or 2 ** int(math.log2(most))
    queue = 0 if prototypes <= 2 * batch else math.ceil(2 * prototypes / batch - 1) * batch
    steps = max(400, round(25 * count / batch))
    mean, std = (",".join(f"{x:.3f}" for x in values) for values in (pictures.mean, pictures.std))
    if side < 48:
        crops = ("2x64@0.4-1+4x32@0.15-0.4",
                 f"your pictures have {side} pixels: enlarged; larger areas (not measured)")
    else:
        crops = ("2x64@0.25-1+4x32@0.08-0.25",
                 "seen in minutes by a small trunk; 2x128+4x64 shows more, at 4 times the cost")
    return {
        "arch": ("regnety_100mf", "learns in minutes on two processors; any other may be named"),
        "batch_size": (batch, "half of the pictures, but at most 128: a step takes half a second"),
        "steps": (steps, "25 epochs, but at least 400 steps: all sets tried had left ln K by then"),
        "crops": crops,
        "strength": (0.2, "weak: it decides most. At SwAV's 1 small sets stay at ln K"),
        "strength_rise": (0.0, "constant: rising from 0.1 to 0.8 cost 4 to 8 points of kNN"),
        "gray": (0.0, "your pictures are gray already" if pictures.gray > 0.5 else
                 "colour tells pictures apart; gray 0.2 and blur 0.5 cost 4 points of kNN"),
        "blur": (0.0, "so does detail, and crops of 32 pixels have little"),
        "mean": (mean, "measured on a sample of your pictures"),
        "std": (std, "measured on a sample of your pictures"),
        "head": ("256-64", "a small trunk needs no larger one (not measured)"),
        "head_bn": (True, "as SwAV; 4 points of kNN better than without"),
        "prototypes": (prototypes, "a power of two: one to 64 pictures, but at least 128; at most "
                                   "one to 4 pictures, and 512"),
        "queue": (queue, "with the batch, two pictures to a prototype" if queue else
                  "none: the batch has a picture for every two prototypes or more"),
        "epsilon": (0.03, "crisper codes than SwAV's 0.05 leave ln K sooner"),
        "sinkhorn_iterations": (3, "as SwAV"),
        "freeze_prototypes": (0, "a short run has no steps to give away"),
        "lr": (SMALL_PEAK * 256 / batch, f"a peak of {SMALL_PEAK:g} for any batch, with LARC; at "
                                         "a sixteenth of it the demo stays at ln K"),
        "warmup": (0.08, "short, as the run is"),
        "weight_decay": (1e-6, "as SwAV"),
    }


# of --plan: value and help text
MACHINE = {"gpus": (8, "number of GPUs"), "gpu_memory": (80.0, "memory of each, GB (10^9 bytes)"),
           "tflops": (790.0, "TFLOP/s of each in bf16, as a large matrix product reaches"),
           "utilisation": (0.4, "share of these that training reaches (assumed)")}


def parse_arguments(argv: list[str]) -> dict:
    """Command line -> the options given. Hyphens and underscores alike."""
    parser = argparse.ArgumentParser(
        description="Pretrain a RegNet with SwAV, as SEER was.", argument_default=argparse.SUPPRESS)
    # a field's default is that of the 256GF
    recipes = {"seer": {}, "swav": {name: value for name, (value, _) in _SWAV.items()}, **RECIPES}
    for field in dataclasses.fields(Config):
        text, choices = field.metadata["help"], field.metadata["choices"]
        defaults = ", ".join(f"{name}: {recipe.get(field.name, field.default)}"
                             for name, recipe in recipes.items())
        kwargs = dict(help=f"{text} ({defaults})".replace("%", "%%"))
        if field.type in (bool, bool | None):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kwargs |= dict(type=field.type, choices=choices,
                           metavar=None if choices else field.type.__name__.upper())
        parser.add_argument(flag(field.name), **kwargs)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--explain", action="store_true", default=argparse.SUPPRESS,
                         help="print the recipe's settings, with its reasons, and stop")
    instead.add_argument("--plot", nargs="+", metavar="RUN",
                         help="draw the loss of these runs' folders, and stop (needs matplotlib)")
    instead.add_argument("--plan", action="store_true", default=argparse.SUPPRESS,
                         help="print what the run takes on GPUs that need not be here, and stop")
    for name, (value, text) in MACHINE.items():
        parser.add_argument(flag(name), type=type(value), metavar="N",
                            help=f"of --plan: {text} ({value:g})")
    return vars(parser.parse_args(hyphens(argv)))


def hyphens(argv: list[str]) -> list[str]:
    """--batch_size -> --batch-size; values stay as they are."""
    return [arg.replace("_", "-", arg.split("=")[0].count("_")) if arg.startswith("--") else arg
            for arg in argv]


def choose_recipe(given: dict, images) -> str:
    if given.get("recipe"):
        return given["recipe"]
    if given.get("data") and images is not None:
        if len(images) < SMALL:
            return "small"
        if "arch" not in given:
            raise ValueError(f"{len(images):,} pictures are more than recipe small is made for: "
                             "name a network for recipe seer (--arch regnety_16gf), or insist "
                             "(--recipe small)")
    return {None: "demo", "resnet50": "swav"}.get(given.get("arch"), "seer")


def rule_for(given: dict, world: int, images) -> tuple[str, dict[str, tuple[object, str]]]:
    """The recipe's name, and its options with their values and reasons."""
    recipe = choose_recipe(given, images)
    if recipe == "small":
        pictures = survey(DemoImages() if images is None else images, decode)
        return recipe, small(pictures, given, world)
    if recipe == "seer":
        return recipe, seer(given.get("arch", Config.arch))
    if recipe in SWAV:
        return recipe, SWAV[recipe]
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, [*RECIPES, *SWAV, "seer", "small"]))
    about = {field.name: field.metadata["help"] for field in dataclasses.fields(Config)}
    return recipe, {name: (value, about[name]) for name, value in RECIPES[recipe].items()}


def configure(given: dict, world: int = 1, images=None) -> Config:
    """Recipe and given options -> a complete configuration. Raises ValueError for a bad one.

    images: the dataset of --data; it decides the recipe where none is given, and recipe small
    looks at its pictures.
    """
    return complete(given, world, *rule_for(given, world, images))


def complete(given: dict, world: int, recipe: str, rule: dict) -> Config:
    defaults = {name: value for name, (value, _) in rule.items()}
    if LENGTHS & set(given):
        defaults = {name: value for name, value in defaults.items() if name not in LENGTHS}
    config = Config(**defaults | given | {"recipe": recipe})
    if config.arch not in TRUNKS:
        raise ValueError(unknown("arch", config.arch, TRUNKS))
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        low, high = field.metadata["low"], field.metadata["high"]
        if low is not None and not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
            raise ValueError(f"{flag(field.name)} {value}: needs {limit}")
    parse_head(config.head)
    for name, low in (("mean", -math.inf), ("std", 0.0)):
        if not all(low < x < math.inf for x in parse_channels(getattr(config, name))):
            raise ValueError(f"--{name} {getattr(config, name)}: needs numbers"
                             + " above 0" * (name == "std"))
    specs = parse_crops(config.crops)
    if sum(spec.count for spec in specs) < 2:
        raise ValueError(f"--crops {config.crops}: SwAV needs at least two crops of a picture")
    size = min(spec.size for spec in specs)
    stages = len(ARCHS[config.arch].stages()) if config.arch in ARCHS else 4
    if size <= 2 ** stages:
        # nothing to convolve; and oneDNN's bf16 gradient there is garbage (torch 2.11 and 2.15)
        raise ValueError(f"--crops {config.crops}: {size} pixels are a single one before the "
                         f"last of {config.arch}'s {stages} stages; use more than {2 ** stages}")
    check_ranks(config, world)
    share = config.batch_size // world
    if config.micro_batch and share % config.micro_batch:
        fitting = max(n for n in range(1, min(config.micro_batch, share) + 1) if share % n == 0)
        raise ValueError(f"--micro-batch {config.micro_batch} does not divide the {share} pictures "
                         f"of a process; {fitting} does")
    for spec in specs:
        if (config.micro_batch or share) * spec.count == 1 and spec.size <= 2 ** (stages + 1):
            raise ValueError(f"--micro-batch 1 with {spec.count}x{spec.size} in --crops: one crop "
                             "that ends as one pixel is no batch for BatchNorm; use 2")
    return dataclasses.replace(config, out=config.out or f"runs/{recipe}-{config.arch}")


def check_ranks(config: Config, world: int) -> None:
    """Raises ValueError where that many processes cannot share the batch, or the queue."""
    for name in ("batch_size", "queue"):
        if getattr(config, name) % world:
            fitting = max(1, getattr(config, name) // world) * world
            raise ValueError(f"{flag(name)} {getattr(config, name)} is not divisible by {world} "
                             f"processes; {fitting} is")


def explain(given: dict, world: int, images) -> str:
    """A run's settings, one a line: the recipe's with its reasons, then what else was given."""
    recipe, rule = rule_for(given, world, images)
    config = with_length(complete(given, world, recipe, rule), len(images))
    lines = [f"recipe {recipe} for {len(images):,} pictures"]
    for name in [*rule, *sorted(set(given) - set(rule) - {"recipe", "data", "out"})]:
        value, reason = rule.get(name, (None, ""))
        if name in given or name in LENGTHS and LENGTHS & set(given):
            changed = value not in (None, getattr(config, name))
            reason = "given" + f"; the recipe has {value}" * changed
        lines.append(f"  {flag(name)} {getattr(config, name)}".ljust(46) + reason)
    return "\n".join(lines)


def remedies(config: Config) -> str:
    """Which settings of a run that learns nothing to change: those that differ from the values with
    which small sets learned, in the order in which they mattered (README, "When it does not
    learn")."""
    helped = {"strength": min(config.strength, 0.2),
              "lr": max(config.lr, SMALL_PEAK * 256 / config.batch_size),
              "epsilon": min(config.epsilon, 0.03), "prototypes": min(config.prototypes, 128),
              "head_bn": True, "gray": 0.0, "blur": 0.0, "freeze_prototypes": 0}
    changes = [flag(name) if value is True else
               f"{flag(name)} {value:g} (now {getattr(config, name):g})"
               for name, value in helped.items() if value != getattr(config, name)]
    return ", ".join(changes) or ("nothing that is known: all are at the values that helped; left "
                                  "to try are more --steps and a larger --batch-size")


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


def parse_channels(text: str) -> tuple[float, ...]:
    try:
        red, green, blue = map(float, text.split(","))
        return red, green, blue
    except ValueError:
        raise ValueError(f"mean or std {text!r} is not RED,GREEN,BLUE, as in 0.485,0.456,0.406"
                         ) from None


def with_length(config: Config, num_images: int) -> Config:
    """Resolve epochs and images into steps, once the number of pictures is known."""
    lengths = [config.steps, math.ceil(config.images / config.batch_size),
               math.ceil(config.epochs * num_images / config.batch_size)]
    steps = min((length for length in lengths if length > 0), default=0)
    if not steps:
        raise ValueError("the run has no length: give --steps, --epochs or --images")
    return dataclasses.replace(config, steps=steps)
