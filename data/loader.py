"""Loader: the batches of a run, from its stream to augmented crops on the device.

    augment = Augment(Photometric().to(device), torch.channels_last)
    with Loader(stream, positions, augment, device, workers=8) as batches:
        for step, micro_batches in batches:
            for crops in micro_batches:         # one float tensor (count * B, 3, s, s) per size
                ...

The workers decode and cut; colours, blur and normalisation are computed for whole batches on the
device. On a CPU, where a step has one micro-batch, they are left to the workers too: these have
time to spare, the computing threads have none.

A micro-batch is fetched when it is asked for, so a step begins with its first one. The next step's
first one is fetched at the end of the last pass over this step's. On CUDA a micro-batch is copied
on a stream of its own, while the device computes what it was given before.

Shapes: B images of a micro-batch, N crops of one size, s pixels, P parameters of an augmentation.
"""
import math
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.stream import Fault, Positions, Stream, collate
from multicrop import Photometric

# seconds without a batch from the workers, after which the run ends: before the other ranks give up
# waiting for this one (ranks.PATIENCE)
STUCK = 600
SHARED = "/dev/shm"         # Linux' shared memory, through which batches come from the workers


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


class MicroBatches(Sequence):
    """Those of a step, fetched one at a time when first asked for, and kept until the step ends.

    fetch() -> the next one, on the device.  after(): called at the end of the last pass over them,
    which of several micro-batches is the second.
    """

    def __init__(self, count: int, fetch: Callable, after: Callable[[], None]):
        self.count, self.fetch, self.after, self.fetched = count, fetch, after, []
        self.passes = 2 if count > 1 else 1

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Sequence[Tensor]:
        if not 0 <= i < self.count:
            raise IndexError(i)
        while len(self.fetched) <= i:
            self.fetched.append(self.fetch())
        return self.fetched[i]

    def __iter__(self) -> Iterator[Sequence[Tensor]]:
        for i in range(self.count):
            yield self[i]
        self.passes -= 1
        if self.passes == 0:
            self.after()


class Loader:
    """Yields, for each step, its number and its micro-batches on the device.

    positions: of this rank, a micro-batch at a time.  workers: processes; 0: none, decode here.
    start_worker: called in each worker process first, with its number.
    faults: of images replaced so far; the reader empties the list.
    waited: seconds spent waiting for input; the reader sets it back to 0.
    """

    def __init__(self, stream: Stream, positions: Positions, augment: Augment, device: torch.device,
                 workers: int = 0, start_worker: Callable[[int], None] | None = None):
        self.stream, self.positions, self.augment, self.device = stream, positions, augment, device
        self.per_step = len(positions) // max(1, len(positions.steps))      # micro-batches
        self.in_workers = device.type == "cpu" and self.per_step == 1
        self.workers, self.ahead = workers, prefetched(workers, self.per_step)
        self.loader = DataLoader(
            stream, batch_sampler=positions, num_workers=workers, worker_init_fn=start_worker,
            collate_fn=augment.collate if self.in_workers else collate,
            prefetch_factor=self.ahead if workers else None,
            timeout=STUCK if workers else 0, pin_memory=device.type == "cuda")
        self.faults, self.waited, self.batches, self.next = [], 0.0, None, None
        # of the step's micro-batches: positions and faults, or once asked for the images' numbers
        self.shown, self.numbers = [], []
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.fetching, self.raise_if_dead = False, None

    def __enter__(self) -> "Loader":
        self.batches, self.next = iter(self.loader), None
        in_main = threading.current_thread() is threading.main_thread()
        if self.workers and in_main and os.name == "posix":
            self.raise_if_dead = signal.signal(signal.SIGCHLD, self.on_child)
        return self

    def __exit__(self, *_) -> None:
        """End the workers, or Python would wait for them; one may be stuck in a file system."""
        getattr(self.batches, "_shutdown_workers", lambda: None)()
        for worker in getattr(self.batches, "_workers", []):
            if worker.is_alive():
                worker.kill()
        if self.raise_if_dead:
            signal.signal(signal.SIGCHLD, self.raise_if_dead)

    def on_child(self, number: int, frame) -> None:
        """torch's handler of SIGCHLD, which raises RuntimeError where a worker has died: in `fetch`
        alone, and not in the middle of a step, or of a save."""
        if self.fetching and self.raise_if_dead:
            self.raise_if_dead(number, frame)

    def check_workers(self, patience: float = 0) -> None:
        """Raises RuntimeError where a worker has died. patience: seconds to wait for that."""
        workers, end = getattr(self.batches, "_workers", []), time.monotonic() + patience
        while not (dead := [worker for worker in workers if worker.exitcode]):
            if not workers or time.monotonic() >= end:
                return
            time.sleep(0.01)
        raise RuntimeError(f"DataLoader worker (pid {dead[0].pid}) has died, with exit code "
                           f"{dead[0].exitcode}")

    def __iter__(self) -> Iterator[tuple[int, MicroBatches]]:
        positions = iter(self.positions)
        for step in self.positions.steps:
            self.shown, self.numbers = [], []
            micro_batches = MicroBatches(self.per_step, lambda: self.take(next(positions)),
                                         self.look_ahead)
            yield step, micro_batches
            micro_batches[self.per_step - 1]        # those that were not asked for

    @property
    def in_flight(self) -> float:
        """Bytes of shared memory that batches take at most: those that are ready or being made, and
        two that have arrived."""
        numbers = sum(3 * spec.count * spec.size ** 2 for spec in self.stream.transform.specs)
        batches = (self.workers * self.ahead + 2) * bool(self.workers)
        return batches * self.positions.micro_batch * numbers * (4 if self.in_workers else 1)

    def look_ahead(self) -> None:
        """Fetch the next micro-batch, if there is one, and begin to copy it."""
        if self.next is None:
            start = time.perf_counter()
            self.next = self.fetch()
            self.waited += time.perf_counter() - start

    def images_of(self, step: int) -> Tensor:
        """int64, on the host: the numbers of the images that the micro-batches of this step show,
        of those that were fetched so far."""
        while self.shown:
            positions, faults = self.shown.pop(0)
            failed = Counter(fault.position for fault in faults)
            self.numbers += [self.stream.index(at, failed[at]) for at in positions]
        return torch.tensor(self.numbers, dtype=torch.long)

    def take(self, positions: range) -> Sequence[Tensor]:
        """The next micro-batch, of these positions, for the stream on which the device computes."""
        self.look_ahead()
        (crops, params, faults), self.next = self.next, None
        self.faults += faults
        self.shown.append((positions, faults))
        if self.copies:
            computing = torch.cuda.current_stream(self.device)
            computing.wait_stream(self.copies)
            for tensor in crops:
                tensor.record_stream(computing)
        return crops if self.in_workers else AugmentedCrops(crops, params, self.augment)

    def fetch(self) -> tuple[list[Tensor], list[Tensor], list[Fault]] | None:
        """Crops, on the device some time later, parameters, faults; None after the last step."""
        try:
            self.fetching = True
            self.check_workers()
            crops, params, faults = next(self.batches)
        except StopIteration:
            return None
        except Exception as error:
            if "timed out" in str(error):
                raise RuntimeError(f"DataLoader: no input for {STUCK / 60:g} minutes: a file "
                                   "system that does not answer, or images that take this long"
                                   ) from None
            if "DataLoader worker" not in str(error):
                self.check_workers(patience=1)      # its socket ends before the process does
            raise
        finally:
            self.fetching = False
        with torch.cuda.stream(self.copies):        # None: where the device computes
            return [c.to(self.device, non_blocking=True) for c in crops], params, faults


# ------------------------------------------------------------------------------------ memory
def prefetched(workers: int, per_step: int) -> int:
    """Micro-batches that each worker has ready: two; of a step with many so many that all workers
    together have a step's ready, for its first pass takes them faster than they are made."""
    return max(2, math.ceil(per_step / max(1, workers)))


def free_shared_memory() -> float:
    """Bytes that a machine has left; inf where batches do not go through SHARED."""
    return shutil.disk_usage(SHARED).free if os.path.isdir(SHARED) else math.inf


def check_shared_memory(needed: float) -> None:
    """needed: bytes, of all ranks of this machine. Raises ValueError where there are fewer; else
    a worker would die of a bus error."""
    if needed > (free := free_shared_memory()):
        raise ValueError(f"the workers' batches need {needed / 1e6:,.0f} MB of shared memory, and "
                         f"{SHARED} has {free / 1e6:,.0f} MB left: give it more (docker run "
                         "--shm-size=16g, or --ipc=host), or use fewer --workers, or a smaller "
                         "--micro-batch; --workers 0 needs none")
