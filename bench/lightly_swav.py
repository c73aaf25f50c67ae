"""SwAV as lightly's examples train it, with the trunk, crops, head and batch that are asked for.

    python -m bench.lightly_swav FOLDER '{"steps": 8, "batch": 64, "workers": 2, "tuned": false}'

Prints one JSON object: seconds of each step, and the parts of a step in milliseconds. lightly 1.6
has to be there (pip install lightly); `python -m bench run` starts this file. tuned: channels-last,
and bfloat16 where the processor computes in it; the examples have neither.
"""
import itertools
import json
import sys
import time

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader

from bench.timing import Clock

CPU = torch.device("cpu")


class Model(nn.Module):
    def __init__(self, arch: str, head: list[int], prototypes: int):
        super().__init__()
        from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes
        trunk = torchvision.models.get_model(arch.replace("regnety", "regnet_y"))
        width, trunk.fc = trunk.fc.in_features, nn.Identity()
        self.trunk, self.head = trunk, SwaVProjectionHead(width, *head)
        self.prototypes = SwaVPrototypes(head[-1], prototypes)

    def forward(self, x):
        return self.prototypes(nn.functional.normalize(self.head(self.trunk(x)), dim=1))


def loader_of(folder: str, sizes: list, batch: int, workers: int) -> DataLoader:
    """sizes: (count, pixels, smallest and largest area) of the large and the small crops."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SwaVTransform
    counts, pixels, least, most = zip(*sizes)
    transform = SwaVTransform(crop_sizes=pixels, crop_counts=counts, crop_min_scales=least,
                              crop_max_scales=most)
    return DataLoader(LightlyDataset(folder, transform=transform), batch, shuffle=True,
                      drop_last=True, num_workers=workers)


def run(folder: str, arch: str, sizes: list, head: list[int], prototypes: int, batch: int,
        steps: int, workers: int, tuned: bool) -> dict:
    """{"seconds": of each step, "ms": of each part of the last ones}."""
    from lightly.loss import SwaVLoss
    model, criterion = Model(arch, head, prototypes), SwaVLoss()
    form = torch.channels_last if tuned else torch.contiguous_format
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    model.to(memory_format=form)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    loader, clock, seconds = loader_of(folder, sizes, batch, workers), Clock(CPU), []

    def forward(views):
        model.prototypes.normalize()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(tuned and native)):
            return [model(view.to(memory_format=form)) for view in views]

    epochs = itertools.chain.from_iterable(loader for _ in itertools.count())
    start = time.perf_counter()
    for _ in range(steps):
        views = clock.timed("waiting for input", next)(epochs)[0]
        scores = clock.timed("forward", forward)(views)
        loss = clock.timed("codes, loss", criterion)([s.float() for s in scores[:sizes[0][0]]],
                                                     [s.float() for s in scores[sizes[0][0]:]])
        clock.timed("backward", loss.backward)()
        clock.timed("optimizer", optimizer.step)()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        start = time.perf_counter()
    one = loader_of(folder, sizes, 8, 0)
    start = time.perf_counter()
    next(iter(one))
    return {"seconds": seconds, "ms": {part: ms / steps for part, ms in clock.ms.items()},
            "input": (time.perf_counter() - start) / 8}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], **json.loads(sys.argv[2]))))
