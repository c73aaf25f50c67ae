"""Run: what the loop works on, and what its helpers share.

    run = Run(method, wrapped, device, dtype, scaler)       # enough for train.step_gradients
"""
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from data.stream import Stream
from distributed.ranks import rank_and_world
from evaluation.probe import Probe
from recipes.config import Config


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
    workers: int = -1                   # decoding processes of this rank
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
