"""Run: what the loop works on, and what its helpers share.

    run = Run(method, wrapped, device, dtype, scaler)       # enough for train.step_gradients
"""
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn

from data.loader import Augment, Loader, check_shared_memory, free_shared_memory
from data.stream import Positions, Stream
from distributed.fsdp import materialise, shard_mesh
from distributed.hardware import count_workers, layout
from distributed.ranks import rank_and_world
from distributed.wrap import wrap
from evaluation.probe import Probe
from methods.build import build_method
from multicrop import Photometric
from recipes.config import Config
from training.signals import ignore_signals


@dataclass
class Run:
    """A step alone needs the first five."""
    method: nn.Module                   # SwAV, or another with its interface (methods/build.py)
    wrapped: nn.Module                  # the method as wrap gives it back: in DDP, or itself
    device: torch.device
    dtype: torch.dtype                  # of autocast
    scaler: torch.amp.GradScaler
    optimizer: torch.optim.Optimizer | None = None
    config: Config | None = None
    stream: Stream | None = None
    batches: Loader | None = None
    all_crops: bool = False             # go through the pass that makes a step's codes
    probe: Probe | None = None
    start: int = 0                      # steps done before
    saved: int | None = None            # step of an undamaged checkpoint.pt
    lock: object = None                 # the open file that keeps other runs out of the folder
    # what the next line of the log will tell; checkpoints hold it
    pending: dict = field(default_factory=lambda: {"bad": [], "bad_total": 0, "skipped": 0,
                                                   "in_a_row": 0, "events": []})

    def __post_init__(self):
        self.rank, self.world = rank_and_world()

    @property
    def out(self) -> Path:
        return Path(self.config.out)


def build_network(config: Config, device: torch.device, dtype: torch.dtype, world: int, images):
    """-> the method with fresh weights, and what is called in its place for passes with gradient.
    Of a sharded run no rank has whole weights at any time."""
    mesh = shard_mesh(device, config.shard_group) if config.shard else None
    build = partial(build_method, config, "meta" if mesh else device, world, images)
    method = build()
    wrapped = wrap(method, device, config.sync_bn_group, config.checkpoint_activations,
                   config.compile, config.channels_last, config.pad_widths,
                   config.compress_gradients, mesh, dtype)
    if mesh:
        materialise(method, build, device)
    return method, wrapped


def parameter_groups(config: Config, method: nn.Module) -> list[dict]:
    """For the optimizer: one group, or a second one of BatchNorm's parameters and biases."""
    params = list(method.parameters())
    if not config.exclude_bias_bn:
        return [{"params": params}]
    return [{"params": [p for p in params if p.dim() > 1]},
            {"params": [p for p in params if p.dim() <= 1], "weight_decay": 0.0,
             "trust_coefficient": 0.0}]


def open_loader(run: Run, workers: int) -> Loader:
    """Raises ValueError where there is too little shared memory for the workers; on a CPU, if their
    number was not asked for, there are none then."""
    config, device = run.config, run.device
    positions = Positions(run.start, config.steps, config.batch_size, run.rank, run.world,
                          config.micro_batch)
    augment = Augment(Photometric(config.mean, config.std).to(device),
                      layout(device, config.channels_last))
    new = partial(Loader, run.stream, positions, augment, device, start_worker=ignore_signals)
    loader = new(count_workers(workers, device.type))
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))          # of this machine
    if (device.type == "cpu" and config.workers < 0
            and loader.in_flight * ranks > free_shared_memory()):
        loader = new(0)
    check_shared_memory(loader.in_flight * ranks)
    if hasattr(run.method, "images_of"):
        run.method.images_of = loader.images_of
    return loader
