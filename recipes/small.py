"""Recipe `small`: a rule for sets of fewer than 100,000 images, with a reason for each setting.

    rule = small(survey(open_images("photos/"), decode), given={})      # option -> (value, reason)
    print(remedies(config))                         # what to change where a run learns nothing

The rule looks at a sample of the images: their number, size, colour and channel means. The numbers
behind its reasons were measured with this project (docs/collapse.md, docs/results.md).
"""
import math
from dataclasses import replace
from typing import Callable, NamedTuple

import numpy

from data.stream import NoReadableImage, fault_of, permute
from methods.build import options_of_others
from recipes.config import Config, flag
from recipes.methods import small_of

SMALL = 100_000             # images; with fewer, recipe small
SMALL_ARCH = "regnety_100mf"
SMALL_PEAK = 4.8            # its peak learning rate
LARGER_PEAK = 2.4           # of another trunk
INIT_PEAK = 1.2             # of a trunk that has learned already: --init
MOST_SEEN = 320_000         # images, the same one counted each time
VARIED = 10_000             # images; with more, SwAV's own areas of crops


class Survey(NamedTuple):
    """What a set of images is like, from a sample of them."""
    count: int                           # images in the set
    short_side: int                      # median, pixels
    gray: float                          # share of images without colour
    mean: tuple[float, float, float]     # of each channel, 0 to 1
    std: tuple[float, float, float]


def survey(images, decode: Callable, sample: int = 128) -> Survey:
    """Look at a sample, the same at each call. decode(bytes) -> RGB image, or raises.

    Raises NoReadableImage where none of the sample can be read.
    """
    sides, gray, moments, fault = [], [], [], None
    for i in range(min(sample, len(images))):
        try:
            image = decode(images[permute(i, len(images), 0)])
        except Exception as error:       # decoders raise nearly anything on damaged files
            fault = fault_of(error, images.name(permute(i, len(images), 0)))
            continue
        sides.append(min(image.size))
        pixels = numpy.asarray(image.resize((64, 64)), numpy.float64) / 255        # (64, 64, 3)
        gray.append(numpy.ptp(pixels, axis=2).mean() < 0.01)
        moments.append((pixels.mean((0, 1)), numpy.square(pixels).mean((0, 1))))
    if not moments:
        raise NoReadableImage(f"no readable image among {min(sample, len(images))}; {fault}")
    mean, square = numpy.mean(moments, axis=0)                                       # each (3,)
    std = numpy.sqrt((square - mean ** 2).clip(0.05 ** 2))       # images of one shade: not 0
    return Survey(len(images), int(numpy.median(sides)), float(numpy.mean(gray)),
                  tuple(mean.tolist()), tuple(std.tolist()))


def small(surveyed: Survey, given: dict, world: int = 1) -> dict[str, tuple[object, str]]:
    """The rule for a set of fewer than 100,000 images: option -> its value, and the reason.

    given: the options given; the batch and the number of prototypes decide others.  world: number
    of processes, which divides the batch.  The numbers behind the reasons are in docs/collapse.md
    and docs/results.md. Raises ValueError for fewer than 8 images.
    """
    count, side, method = surveyed.count, surveyed.short_side, given.get("method", "swav")
    if count < 8:
        raise ValueError(f"{count} image{'s' * (count > 1)} cannot be told apart by clusters; "
                         "recipe small needs at least 8, and some hundreds to learn something")
    batch = given.get("batch_size") or max(2, min(128, count // 2) // world) * world
    most = min(max(128, count // 64), count // 4, 256)
    prototypes = given.get("prototypes") or 2 ** int(math.log2(most))
    queue = 0 if prototypes <= 2 * batch else math.ceil(2 * prototypes / batch - 1) * batch
    steps = max(200 if given.get("init") else 400, round(min(25 * count, MOST_SEEN) / batch))
    mean, std = (",".join(f"{x:.3f}" for x in values) for values in (surveyed.mean, surveyed.std))
    if side < 48:
        crops = ("2x64@0.4-1+4x32@0.15-0.4",
                 f"your images have {side} pixels: enlarged; larger areas (not measured)")
    elif count >= VARIED:
        crops = ("2x64+4x32", "SwAV's areas: on 32,000 pictures of all kinds 3 points of kNN more "
                              "than 0.25-1 and 0.08-0.25")
    else:
        crops = ("2x64@0.25-1+4x32@0.08-0.25",
                 "seen in minutes by a small trunk; 2x128+4x64 shows more, at 4 times the cost")
    rule = {
        "arch": (SMALL_ARCH, "learns in minutes on two processors; any other may be named"),
        "batch_size": (batch, "half of the images, but at most 128: a step takes half a second"),
        "steps": (steps, "25 epochs, but at least 400 steps (200 from a trunk that has learned); "
                         "at most 320,000 images seen: 64,000, of fewer, were 2 points less"),
        "crops": crops,
        "strength": (0.2, "weak: it decides most. At SwAV's 1 small sets stay at ln K"),
        "strength_rise": (0.0, "constant: rising from 0.1 to 0.8 cost 4 to 8 points of kNN"),
        "gray": (0.0, "your images are gray already" if surveyed.gray > 0.5 else
                 "colour tells images apart; gray 0.2 and blur 0.5 cost 4 points of kNN"),
        "blur": (0.0, "so does detail, and crops of 32 pixels have little"),
        "mean": (mean, "measured on a sample of your images"),
        "std": (std, "measured on a sample of your images"),
        "head": ("256-64", "512-128 was no better on 32,000 pictures (2 points of kNN less)"),
        "head_bn": (True, "as SwAV; 4 points of kNN better than without"),
        "prototypes": (prototypes, "a power of two: one to 64 images, but at least 128; at most "
                                   "one to 4 images, and 256: 512 were a point worse on 32,000 "
                                   "pictures, and with a queue 9 points of kNN"),
        "queue": (queue, "with the batch, two images to a prototype" if queue else
                  "none: the batch has an image for every two prototypes or more"),
        "epsilon": (0.03, "crisper codes than SwAV's 0.05 leave ln K sooner"),
        "sinkhorn_iterations": (3, "as SwAV"),
        "freeze_prototypes": (0, "a short run has no steps to give away"),
        "lr": peak_of(given, batch),
        "warmup": (0.08, "short, as the run is (not measured)"),
        "weight_decay": (1e-6, "as SwAV (not measured)"),
    }
    if method == "swav":
        return rule
    for name in ("strength", "strength_rise", "gray", "blur", "head_bn"):
        rule[name] = (rule[name][0], f"as for SwAV: {rule[name][1].removeprefix('as SwAV; ')}")
    rule["lr"] = (rule["lr"][0], rule["lr"][1].split(":")[0] + ", as for SwAV (there measured)")
    init = {"lr": rule["lr"]} if given.get("init") else {}      # with a momentum encoder too
    return of_method(rule, method, count) | init


def peak_of(given: dict, batch: int) -> tuple[float, str]:
    """The learning rate per 256 images, and the reason. given: the options `arch` and `init`."""
    if given.get("init"):
        return INIT_PEAK * 256 / batch, (
            f"a peak of {INIT_PEAK:g} for any batch, as the trunk has learned already: on two sets "
            f"of 500 images 3.5 points of linear accuracy more than {SMALL_PEAK:g}, and 2.5 more "
            "than without this training")
    if given.get("arch", SMALL_ARCH) != SMALL_ARCH:
        return LARGER_PEAK * 256 / batch, (
            f"a peak of {LARGER_PEAK:g} for any batch, half of {SMALL_ARCH}'s: with that a "
            "regnety_200mf had an effective rank of 9 after 200 steps, with this one of 15")
    return SMALL_PEAK * 256 / batch, (f"a peak of {SMALL_PEAK:g} for any batch, with LARC: half of "
                                      "it cost the demo 7 points of linear accuracy")


def of_method(rule: dict, method: str, count: int, batch: int = 0) -> dict:
    """A rule of SwAV's for another method. count: images of the set.  batch: 0: the rule's."""
    others = options_of_others(method)
    kept = {name: value for name, value in rule.items() if name not in others}
    return kept | small_of(method, count, batch or rule["batch_size"][0])


def remedies(config: Config) -> str:
    """Which settings of a run that learns nothing to change: those that differ from the values with
    which small sets learned, in the order in which they mattered (docs/collapse.md)."""
    helped = {"strength": min(config.strength, 0.2),
              "lr": max(config.lr, peak_of(config.as_dict(), config.batch_size)[0])}
    if config.method == "swav":
        helped |= {"epsilon": min(config.epsilon, 0.03), "prototypes": min(config.prototypes, 256),
                   "head_bn": True}
    else:
        rule = small_of(config.method, SMALL, config.batch_size)
        aside = {"crops", "queue", "prototypes"} | ({"lr"} if config.init else set())
        helped |= {name: value for name, (value, _) in rule.items() if name not in aside}
    helped |= {"gray": 0.0, "blur": "0"}
    if config.method == "swav":
        helped |= {"freeze_prototypes": 0}
    wanted = replace(config, **helped)
    changes = [flag(name) if value is True else
               f"{flag(name)} {wanted.text(name)} (now {config.text(name)})"
               for name, value in helped.items() if wanted.text(name) != config.text(name)]
    return ", ".join(changes) or ("nothing that is known: all are at the values that helped; left "
                                  "to try are more --steps and a larger --batch-size")
