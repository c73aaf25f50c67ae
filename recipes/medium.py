"""Recipe `medium`: a rule for 100,000 to 100 million images, between SwAV's settings and SEER's.

    rule = medium(1_281_167, given={}, world=8)         # option -> (value, reason)
    images = length_for(10_000_000)                     # that a run should see: 39 epochs

What lies between the two is interpolated, and was not measured.
"""
import functools
import math
from bisect import bisect_right
from collections.abc import Sequence

import torch

from distributed.roofline import Gpu, count_operations, roofline
from methods.build import build_trunk
from multicrop import CropSpec, parse_crops
from recipes.published import SWAV
from regnet import ARCHS, complexity

LARGE = 100_000_000         # images; with more, recipe seer
IMAGENET, BILLION = 1_281_167, 1_000_000_000
EPOCHS = 200                # at most: SwAV's length for a small batch
CPU_TFLOPS = 0.16           # that training reaches on a processor of some cores (assumed)
FEWEST_STEPS = 400
SIZES = {"regnety_100mf": 0.1, "regnety_200mf": 0.2, "regnety_400mf": 0.4, "regnety_800mf": 0.8,
         "regnety_1.6gf": 1.6, "regnety_4gf": 4.0, "regnety_8gf": 8.0, "regnety_16gf": 16.0,
         "regnety_32gf": 32.0}                              # GF of a forward pass


def length_for(count: int) -> int:
    """Images that a run should see, of a set of `count`: SwAV's 200 epochs of ImageNet and SEER's
    one pass over a billion, and between them the power law through both; never above 200 epochs,
    nor above a billion images."""
    power = math.log(BILLION / (EPOCHS * IMAGENET)) / math.log(BILLION / IMAGENET)      # 0.2
    return round(min(EPOCHS * count, BILLION * min(1.0, count / BILLION) ** power))


def prototypes_for(count: int) -> int:
    """Between SwAV's 3,000 at ImageNet and SEER's 16,000 at a billion: the fourth root."""
    return min(16_000, 100 * round(30 * (count / IMAGENET) ** 0.25))


def largest_for(count: int) -> float:
    """GF of a network for so many images: the power law through SwAV's ResNet-50, 4 GF, at ImageNet
    and SEER's 256 GF at a billion images."""
    return 4.0 * (count / IMAGENET) ** (math.log(256 / 4) / math.log(BILLION / IMAGENET))


def training_flops(arch: str, crops: Sequence[CropSpec]) -> float:
    """FLOP of a forward and backward pass of the trunk, of all crops of an image. Of ResNet-50
    those of the RegNetY of 4 GF."""
    params = ARCHS.get(arch, ARCHS["regnety_4gf"])
    return 6 * sum(spec.count * complexity(params, spec.size, num_classes=0).flops
                   for spec in crops)


@functools.cache
def gpu_seconds(arch: str, crops: tuple[CropSpec, ...]) -> float:
    """Of forward and backward pass of the trunk, of an image's crops, on an H100 at the least
    (distributed/roofline.py), in bf16 and batches of 64. Counted at the first crops' size; the
    others' count by their pixels."""
    with torch.device("meta"):
        trunk = build_trunk(arch)
    gpu, size = Gpu(), crops[0].size
    crops_of_one = sum(spec.count * spec.size ** 2 for spec in crops) / size ** 2
    return roofline(count_operations(trunk, (3, size, size), torch.bfloat16), 64,
                    gpu.tflops * 1e12, gpu.bandwidth * 1e9) * crops_of_one / 64


def medium(count: int, given: dict, world: int = 1, days: float = 2.0, cpu: bool = False
           ) -> dict[str, tuple[object, str]]:
    """count: images of the set.  given: the options given; network, batch and crops decide others.
    world: number of processes, each with a GPU, or on a CPU (cpu).  days: that the run may take."""
    crops, seen = tuple(parse_crops(given.get("crops", "2x224+6x96"))), length_for(count)

    def days_of(arch: str) -> float:
        seconds = (training_flops(arch, crops) / (CPU_TFLOPS * 1e12) if cpu else
                   gpu_seconds(arch, crops))
        return seen * seconds / world / 86400

    suited = [arch for arch, gf in SIZES.items() if gf <= 1.01 * largest_for(count)]
    fitting = suited[:bisect_right(suited, days, key=days_of)]      # larger ones take longer
    arch = given.get("arch") or (fitting[-1] if fitting else next(iter(SIZES)))
    each = 64 if SIZES.get(arch, 4.0) <= 4 else 32
    batch = given.get("batch_size") or max(256 // world, min(each, 4096 // world)) * world
    small = batch <= 512
    rule = dict(SWAV["swav-bs256" if small else "swav"])
    source = "as SwAV's script for a batch of 256" if small else "as SwAV's script for 4,096"
    rule = {name: (value, source) for name, (value, _) in rule.items() if name != "epochs"}
    steps = seen // batch
    prototypes = given.get("prototypes") or prototypes_for(count)
    queue = 3840 // world * world if small else 0
    where = "a CPU" if cpu else f"{world} GPU{'s' * (world > 1)}"
    speed = (f"at {CPU_TFLOPS:g} TFLOP/s a process (assumed)" if cpu else
             "were each as fast as an H100 can be (predicted)")
    why = f"of those up to {largest_for(count):.1f} GF, which suit so many images, the largest "
    return rule | {
        "arch": (arch, f"{why}that {where} train{'s' * (world == 1)} in {days:g} days "
                       f"(--days), {speed}"
                 if fitting else f"the smallest, and yet it takes {where} more than {days:g} days "
                                 "(--days)"),
        "images": (seen, f"{seen / count:.1f} epochs: SwAV's 200 of ImageNet and SEER's one of a "
                         "billion images, interpolated; at most 200"),
        "batch_size": (batch, f"{each} a process, from 256 to 4,096"),
        "prototypes": (prototypes, "from SwAV's 3,000 at ImageNet to SEER's 16,000 at a billion"),
        "queue": (queue, "as SwAV's for a small batch" if small else "none: the batch is large"),
        "queue_start": (round(0.075 * steps) if small else 0, "0.075 of the run, as SwAV's"),
        "freeze_prototypes": (min(round(0.005 * steps), 5005), "0.005 of the run, as SwAV's for a "
                              "batch of 256; at most its 5,005 steps") if small else (313, source),
        "sync_bn_group": (8, source),
    }


def shortened(rule: dict, count: int) -> dict:
    """A rule whose length is that of a much larger set, with the length that suits this one; as it
    is, where the set is not more than ten times smaller."""
    meant = rule["images"][0]
    if 10 * count >= meant:
        return rule
    batch, frozen = rule["batch_size"][0], rule["freeze_prototypes"][0]
    images = max(length_for(count), FEWEST_STEPS * batch)
    return rule | {
        "images": (images, f"not {meant:,}, which would be {meant / count:,.0f} epochs: "
                           f"{images / count:,.0f} epochs, at least {FEWEST_STEPS} steps (--images "
                           "asks for another length)"),
        "freeze_prototypes": (min(frozen, images // batch // 20),
                              f"a twentieth of the run, at most {frozen} steps")}
