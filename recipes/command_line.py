"""The command line of train.py: its options, the recipe that they choose, the configuration.

    given = parse_arguments(["--data", "photos/", "--lr", "0.6"])       # the options given, alone
    config = configure(given, images=open_images("photos/"))            # with the recipe's defaults
    print(explain(given, 1, images))                                    # each setting, and why
"""
import argparse
import dataclasses

from torch.cuda import is_available as cuda_is_here

from data.demo import DemoImages
from distributed.hardware import pick_device
from distributed.roofline import Gpu
from methods.build import RESNETS
from multicrop import decode
from recipes.config import LENGTHS, WRITTEN, Config, complete, flag, unknown, with_length
from recipes.input import settle
from recipes.medium import LARGE, medium, shortened
from recipes.methods import PUBLISHED
from recipes.published import RECIPES, SWAV, seer
from recipes.small import SMALL, of_method, small, survey
from weights.terminal import Text, number_in

# of --plan: value (rates: of an H100, distributed/roofline.py), range and help text
MACHINE = {"gpus": (8, (1, 100_000), "number of GPUs"),
           "gpu_memory": (80.0, (0.1, 10_000), "memory of each, GB (10^9 bytes)"),
           "tflops": (Gpu().tflops, (0.001, 1_000_000),
                      "TFLOP/s of each in bf16, as a large matrix product reaches (data sheet of "
                      "the H100: 989)"),
           "bandwidth": (Gpu().bandwidth, (0.001, 1_000_000),
                         "GB/s of its memory, read and written, as a copy reaches (data sheet of "
                         "the H100: 3,350)"),
           "nvlink": (Gpu().nvlink, (0.001, 1_000_000),
                      "GB/s each way between the GPUs of a node, as NCCL reaches (H100: issue 212 "
                      "of nccl-tests)"),
           "network": (Gpu().network, (0.001, 1_000_000),
                       "GB/s each way to other nodes, of each GPU (an adapter of 400 Gb/s: issue "
                       "290 of nccl-tests)")}


def parse_arguments(argv: list[str]) -> dict:
    """Command line -> the options given. Hyphens and underscores alike."""
    parser = argparse.ArgumentParser(
        "train.py", usage="train.py [--data DIR] [--arch ARCH] [--out DIR] [more: see --help]",
        description="Pretrain a RegNet with SwAV, as SEER was, or with another method.",
        argument_default=argparse.SUPPRESS, allow_abbrev=False)
    swav = {name: value for name, (value, _) in SWAV["swav"].items()}
    recipes = {"seer": {}, "swav": swav, **RECIPES}     # a field's default is that of the 256GF
    for field in dataclasses.fields(Config):
        if not field.metadata["help"]:                  # set by the program alone
            continue
        about, choices = field.metadata["help"], field.metadata["choices"]
        defaults = ", ".join(f"{name}: {recipe.get(field.name, field.default)}"
                             for name, recipe in recipes.items())
        kwargs = dict(help=f"{about} ({defaults})".replace("%", "%%"))
        if field.type in (bool, bool | None):
            kwargs["action"] = argparse.BooleanOptionalAction
        else:
            kind = str if field.name in WRITTEN else field.type
            kwargs |= dict(type=kind, choices=choices, action=Text if field.type is str else None,
                           metavar=None if choices else kind.__name__.upper())
        parser.add_argument(flag(field.name), **kwargs)
    parser.add_argument("--grow", action="store_true", default=argparse.SUPPRESS,
                        help="go on with a run although images were added or removed; a new epoch "
                             "begins")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--explain", action="store_true", default=argparse.SUPPRESS,
                         help="print the recipe's settings, with its reasons, and stop")
    instead.add_argument("--plot", nargs="+", metavar="RUN",
                         help="draw the loss of these runs' folders, and stop (needs matplotlib)")
    instead.add_argument("--plan", action="store_true", default=argparse.SUPPRESS,
                         help="print what the run takes on GPUs that need not be here, and stop")
    for name, (value, limits, about) in MACHINE.items():
        parser.add_argument(flag(name), type=number_in(type(value), *limits), metavar="N",
                            help=f"of --plan: {about} ({value:g})")
    return vars(parser.parse_args(hyphens(argv)))


def split_arguments(given: dict) -> tuple[dict, dict, dict]:
    """What parse_arguments gave -> the options of a run; what else is asked for (explain, plan,
    plot, grow); the machine of --plan. Raises ValueError for a machine without --plan."""
    asked = {name: given[name] for name in ("explain", "plan", "plot", "grow") if name in given}
    machine = {name: given[name] for name in MACHINE if name in given}
    if machine and "plan" not in asked:
        raise ValueError(f"{', '.join(map(flag, machine))}: of --plan alone; a run takes the "
                         "processes that torchrun starts")
    options = {name: value for name, value in given.items() if name not in asked | machine}
    return options, asked, {name: default for name, (default, *_) in MACHINE.items()} | machine


def hyphens(argv: list[str]) -> list[str]:
    """--batch_size -> --batch-size; values stay as they are."""
    return [arg.replace("_", "-", arg.split("=")[0].count("_")) if arg.startswith("--") else arg
            for arg in argv]


def choose_recipe(given: dict, images) -> str:
    if given.get("recipe"):
        return given["recipe"]
    method = given.get("method", "swav")
    if given.get("data") and images is not None:
        if len(images) < SMALL:
            return "small"
        if method != "swav":
            return method
        if len(images) <= LARGE and given.get("arch") not in RESNETS:
            return "medium"
    if method != "swav" and given.get("arch"):
        return method
    return {None: "demo", **dict.fromkeys(RESNETS, "swav")}.get(given.get("arch"), "seer")


def rule_for(given: dict, world: int, images) -> tuple[str, dict[str, tuple[object, str]]]:
    """The recipe's name, and its options with their values and reasons."""
    recipe, method = choose_recipe(given, images), given.get("method", "swav")
    if recipe in PUBLISHED:
        if given.get("method", recipe) != recipe:
            raise ValueError(f"--recipe {recipe} is for --method {recipe}, not {method}")
        return recipe, PUBLISHED[recipe]
    if method != "swav" and recipe in ("seer", "medium", *SWAV):
        raise ValueError(f"--recipe {recipe} is for --method swav; {method} has the recipes "
                         f"{method}, small and demo")
    if recipe == "small":
        surveyed = survey(DemoImages() if images is None else images, decode)
        return recipe, small(surveyed, given, world)
    if recipe == "medium":
        if images is None:
            raise ValueError("--recipe medium is a rule for a set of images: name it (--data)")
        cpu = given.get("device", "") == "cpu" or not (given.get("device") or cuda_is_here())
        return recipe, medium(len(images), given, world, given.get("days", Config.days), cpu)
    if recipe == "seer":
        rule = seer(given.get("arch", Config.arch))
        return recipe, rule if images is None else shortened(rule, len(images))
    if recipe in SWAV:
        return recipe, SWAV[recipe]
    if recipe not in RECIPES:
        raise ValueError(unknown("recipe", recipe, [*RECIPES, *SWAV, *PUBLISHED, "seer", "small",
                                                   "medium"]))
    about = {field.name: field.metadata["help"] for field in dataclasses.fields(Config)}
    rule = {name: (value, about[name]) for name, value in RECIPES[recipe].items()}
    if method == "swav":
        return recipe, rule
    return recipe, of_method(rule, method, len(DemoImages() if images is None else images),
                             given.get("batch_size", 0))


def configure(given: dict, world: int = 1, images=None) -> Config:
    """Recipe and given options -> a complete configuration. Raises ValueError for a bad one.

    images: the dataset of --data; it decides the recipe where none is given, and recipe small
    looks at them.
    """
    return complete(given, world, *rule_for(given, world, images))


def explain(given: dict, world: int, images) -> str:
    """A run's settings, one a line: the recipe's with its reasons, then what else was given; and
    how fast its input is (input.py)."""
    recipe, rule = rule_for(given, world, images)
    config = with_length(complete(given, world, recipe, rule), len(images))
    lines = [f"recipe {recipe} for {len(images):,} images"]
    for name in [*rule, *sorted(set(given) - set(rule) - {"recipe", "data", "out"})]:
        value, reason = rule.get(name, (None, ""))
        if name in given or name in LENGTHS and LENGTHS & set(given):
            had = None if value is None else Config(**{name: value}).text(name)
            reason = "given" + f"; the recipe has {had}" * (had not in (None, config.text(name)))
        lines.append(f"  {flag(name)} {config.text(name)}".ljust(46) + reason)
    device_type = config.device.partition(":")[0] or pick_device("").type
    return "\n".join([*lines, settle(config, images, device_type, world).text])
