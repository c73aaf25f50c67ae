"""Loader: the batches of a run, from its stream to augmented crops on the device.

    augment = Augment(Photometric().to(device), torch.channels_last)
    with Loader(stream, positions, augment, device, workers=8) as batches:
        for step, micro_batches in batches:
            for crops in micro_batches:         # one float tensor (count * B, 3, s, s) per size
                ...

The workers decode and cut; colours, blur and normalisation are computed for whole batches on the
device. On a CPU, where a step has one micro-batch, they are left to the workers too: these have
time to spare, the computing threads have none.

Shapes: B images of a micro-batch, N crops of one size, s pixels, P parameters of an augmentation.
"""
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.stream import Fault, Positions, Stream, collate
from multicrop import Photometric

STUCK = 900                 # seconds without a batch from the workers, after which the run ends


class Augment:
    """Crops uint8 (N, 3, s, s) and their parameters (N, P) -> what the network takes."""

    def __init__(self, photometric: Photometric, memory_format: torch.memory_format):
        self.photometric, self.memory_format = photometric, memory_format

    def __call__(self, crops: Tensor, params: Tensor) -> Tensor:
        return self.photometric(crops, params).to(memory_format=self.memory_format)

    def collate(self, samples: list) -> tuple[list[Tensor], list[Tensor], list[Fault]]:
        """stream.collate, the crops augmented."""
        crops, params, faults = collate(samples)
        return list(map(self, crops, params)), params, faults


class AugmentedCrops(Sequence):
    """Crops of a micro-batch, one tensor per size, augmented on access: float crops exist for one
    micro-batch at a time, and both passes of a step see the same."""

    def __init__(self, crops: list[Tensor], params: list[Tensor], augment: Augment):
        self.crops, self.params, self.augment = crops, params, augment

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return AugmentedCrops(self.crops[i], self.params[i], self.augment)
        return self.augment(self.crops[i], self.params[i])


class Loader:
    """Yields, for each step, its number and its micro-batches on the device.

    positions: of this rank, a micro-batch at a time.  workers: processes; 0: none, decode here.
    start_worker: called in each worker process first, with its number.
    interrupted: after a micro-batch, whether to leave out those of the step that are left.
    faults: of images replaced so far; the reader empties the list.
    waited: seconds spent waiting for input; the reader sets it back to 0.
    """

    def __init__(self, stream: Stream, positions: Positions, augment: Augment, device: torch.device,
                 workers: int = 0, start_worker: Callable[[int], None] | None = None,
                 interrupted: Callable[[], bool] = lambda: False):
        self.interrupted = interrupted
        self.positions, self.augment, self.device = positions, augment, device
        self.per_step = len(positions) // max(1, len(positions.steps))      # micro-batches
        self.in_workers = device.type == "cpu" and self.per_step == 1
        self.loader = DataLoader(
            stream, batch_sampler=positions, num_workers=workers, worker_init_fn=start_worker,
            collate_fn=augment.collate if self.in_workers else collate,
            timeout=STUCK if workers else 0, pin_memory=device.type == "cuda")
        self.faults, self.waited, self.batches = [], 0.0, None

    def __enter__(self) -> "Loader":
        self.batches = iter(self.loader)
        return self

    def __exit__(self, *_) -> None:
        """End the workers, or Python would wait for them; one may be stuck in a file system."""
        getattr(self.batches, "_shutdown_workers", lambda: None)()
        for worker in getattr(self.batches, "_workers", []):
            if worker.is_alive():
                worker.kill()

    def __iter__(self) -> Iterator[tuple[int, list[Sequence[Tensor]]]]:
        for step in self.positions.steps:
            start = time.perf_counter()
            micro_batches = [self.next()]
            while len(micro_batches) < self.per_step and not self.interrupted():
                micro_batches.append(self.next())
            self.waited += time.perf_counter() - start
            yield step, micro_batches

    def next(self) -> Sequence[Tensor]:
        try:
            crops, params, faults = next(self.batches)
        except (OSError, EOFError) as error:        # its tensors come through a socket of its own
            dead = [str(worker.pid) for worker in getattr(self.batches, "_workers", [])
                    if not worker.is_alive()]
            raise RuntimeError(f"DataLoader worker (pid {', '.join(dead)}) has died: {error}"
                               ) from None
        self.faults += faults
        crops = [c.to(self.device, non_blocking=True) for c in crops]
        return crops if self.in_workers else AugmentedCrops(crops, params, self.augment)
