"""Build: a trunk by its name, a method by its configuration.

    trunk = build_trunk("regnety_16gf")                     # images (N, 3, s, s) -> features (N, C)
    method = build_method(config, device="cuda", world=8)   # config.method on that trunk

What a training loop needs of a method, as SwAV (swav.py) has it. `outputs` is what forward gives, a
tuple of tensors whose rows are crop-major; A views of an image have targets, B images.

    forward(crops, one tensor per size) -> outputs, the embeddings first
    targets(outputs, step) -> (A, B, ...), without gradient
    joint: whether targets are of the whole batch; else micro-batches have their own
    loss(outputs, targets) -> scalar
    before_step(step), after_step(step): before and after the optimizer's; after_step only where
        the step was not skipped
    statistics(outputs, loss) -> numbers for the log;  state_dict(), load_state_dict()
    assigned(crops, all_crops), if joint -> outputs (A, B, ...) of the views that have targets, for
        a batch in several micro-batches, whose images are joined along the second dimension:
        targets takes these too. all_crops: whether all go through the network, as BatchNorm of the
        head needs it
    .trunk, the product; .queue, a swav.Queue or None

The mean of the loss over micro-batches and ranks is the batch's. A momentum encoder, a centre, a
memory are parameters without gradient or buffers, the same on all ranks, which change in after_step
alone. BatchNorm's statistics are put back where a step is skipped (training/rollback.py), and what
else forward and targets keep is overwritten at the next step: so a skipped step leaves no trace.
images_of: step -> int64 (n*B,), where a method has it: set by the loop; the numbers of the images
that this rank's n micro-batches show, or of those that were fetched so far.
A method is a file of this folder and an entry of METHODS.
"""
from typing import Callable, NamedTuple

import torch
from torch import nn

from methods.barlow_twins import BarlowTwins
from methods.byol import BYOL
from methods.deepcluster_v2 import DeepCluster
from methods.dino import DINO
from methods.mocov2 import MoCo
from methods.simclr import SimCLR
from methods.supervised import Supervised
from regnet import ARCHS
from swav import SwAV
from weights.trunk import RESNETS, build_trunk

TRUNKS = (*ARCHS, *RESNETS)


def build_method(config, device="cpu", world: int = 1, images=None) -> nn.Module:
    """A fresh method, its weights drawn from config.seed on the device itself, so that 10 billion
    parameters never pass the host.

    config: anything with the fields of recipes.config.Config.  world: number of processes, which
    share SwAV's queue.  images: the dataset, which deepcluster_v2 and supervised ask for; None:
    the network alone is wanted, to be counted. Raises ValueError for images without classes.
    """
    torch.manual_seed(config.seed)
    with torch.device(device):
        return METHODS[config.method].build(config, build_trunk(config.arch), world, images)


def build_swav(config, trunk: nn.Module, world: int, images) -> SwAV:
    return SwAV(trunk, config.head, config.prototypes, config.head_bn, counts=counts(config),
                epsilon=config.epsilon, iterations=config.sinkhorn_iterations, hard=config.hard,
                temperature=config.temperature, queue=config.queue // world,
                queue_start=config.queue_start, frozen_steps=config.freeze_prototypes)


def build_simclr(config, trunk: nn.Module, world: int, images) -> SimCLR:
    return SimCLR(trunk, config.head, config.head_bn, config.temperature, sum(counts(config)))


def build_mocov2(config, trunk: nn.Module, world: int, images) -> MoCo:
    return MoCo(trunk, config.head, config.queue, config.target_momentum, config.temperature)


def build_byol(config, trunk: nn.Module, world: int, images) -> BYOL:
    return BYOL(trunk, config.head, config.predictor, momentum=config.target_momentum,
                steps=config.steps)


def build_barlow_twins(config, trunk: nn.Module, world: int, images) -> BarlowTwins:
    return BarlowTwins(trunk, config.head, config.off_diagonal, config.loss_scale)


def build_dino(config, trunk: nn.Module, world: int, images) -> DINO:
    return DINO(trunk, config.head, config.prototypes, config.head_bn,
                momentum=config.target_momentum, teacher_temperature=config.teacher_temperature,
                warmup=round(config.teacher_warmup * (config.extended_at or config.steps)),
                steps=config.steps,
                frozen_steps=config.freeze_prototypes, counts=counts(config),
                student_temperature=config.temperature)


def build_deepcluster_v2(config, trunk: nn.Module, world: int, images) -> DeepCluster:
    number = config.prototypes if images is None else len(images)
    return DeepCluster(trunk, number, config.head, [config.prototypes] * config.clusterings,
                       config.temperature, counts(config), seed=config.seed,
                       steps_per_epoch=number / config.batch_size, head_bn=config.head_bn)


def build_supervised(config, trunk: nn.Module, world: int, images) -> Supervised:
    labels = torch.zeros(1, dtype=torch.long, device="cpu")
    if images is not None:
        if images.labels is None or len(images.classes) < 2:
            raise ValueError("--method supervised needs images in class folders, two or more: "
                             "--data FOLDER with FOLDER/CLASS/*.jpg")
        labels = torch.as_tensor(images.labels, dtype=torch.long, device="cpu")
    return Supervised(trunk, labels, 1000 if images is None else len(images.classes),
                      counts(config))


def counts(config) -> list[int]:
    """Crops of each size."""
    return [spec.count for spec in config.crops]


class Method(NamedTuple):
    build: Callable             # config, trunk, world, images -> the method
    crops: str                  # that it needs, at least or exactly
    options: str                # of the configuration, that not all methods have


PAIR = "exactly two, of one size"
METHODS = {
    "swav": Method(build_swav, "two", "head head_bn prototypes epsilon sinkhorn_iterations hard "
                   "codes_from_all_crops temperature queue queue_start freeze_prototypes"),
    "simclr": Method(build_simclr, "two", "head head_bn temperature"),
    "mocov2": Method(build_mocov2, PAIR, "head queue target_momentum temperature"),
    "byol": Method(build_byol, PAIR, "head predictor target_momentum"),
    "barlow_twins": Method(build_barlow_twins, PAIR, "head off_diagonal loss_scale"),
    "dino": Method(build_dino, "two of the first size", "head head_bn prototypes temperature "
                   "freeze_prototypes target_momentum teacher_temperature teacher_warmup"),
    "deepcluster_v2": Method(build_deepcluster_v2, "two",
                             "head head_bn prototypes clusterings temperature"),
    "supervised": Method(build_supervised, "one", "")}


def options_of_others(method: str) -> set[str]:
    """Options of the configuration that other methods have, and this one does not."""
    every = {option for other in METHODS.values() for option in other.options.split()}
    return every - set(METHODS[method].options.split())
