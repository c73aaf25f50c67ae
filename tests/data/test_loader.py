"""loader.py: the stream's augmented crops, step by step, by either way; faults and workers."""
import multiprocessing
import os
import pickle
import random
import signal
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest
import torch

from data import loader
from data.images import open_images
from data.loader import STUCK, Augment, AugmentedCrops, Loader, check_shared_memory, prefetched
from data.stream import NoReadableImage, Positions, Stream, collate
from distributed.ranks import PATIENCE
from methods.build import build_method
from multicrop import MultiCrop, Photometric, parse_crops
from recipes.command_line import configure
from recipes.config import with_length
from tests.data.conftest import Memory
from tests.helpers import equal, write_pictures
from train import step_gradients
from training.run import Run
from training.signals import ignore_signals

CPU = torch.device("cpu")
SPECS = parse_crops("2x48+3x32")
AUGMENT = Augment(Photometric(), torch.channels_last)


def stream_of(count=20, broken=(), specs=SPECS):
    return Stream(Memory(count, broken), MultiCrop(specs), seed=1)


def loader_of(stream=None, micro_batch=0, steps=(2, 5), rank=0, world=1, **options) -> Loader:
    positions = Positions(*steps, 8, rank, world, micro_batch)
    return Loader(stream or stream_of(), positions, AUGMENT, CPU, **options)


def drawn(count, seed=0):
    """Random crops of `count` images, uint8, and how they are augmented: one of each a size."""
    crop, rng = MultiCrop(SPECS), random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    crops = [torch.randint(0, 256, (spec.count * count, 3, spec.size, spec.size),
                           generator=generator, dtype=torch.uint8) for spec in SPECS]
    return crops, [torch.tensor([crop.draw(rng) for _ in range(len(size))]) for size in crops]


def joined(parts, specs=SPECS):
    """Crops of several micro-batches -> of the whole batch, one tensor a size."""
    return [torch.cat([crops.unflatten(0, (spec.count, -1)) for crops in size], 1).flatten(0, 1)
            for spec, size in zip(specs, zip(*parts))]


# --------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_collate_augments_what_the_streams_collate_gives(layout):
    augment = Augment(Photometric((0.4, 0.5, 0.6), (0.1, 0.2, 0.3)), layout)
    samples = [stream_of(broken=range(5))[position] for position in range(6)]
    crops, params, faults = augment.collate(samples)
    plain, expected_params, expected_faults = collate(samples)
    assert equal(params, expected_params) and faults == expected_faults and faults
    for ours, uint8, p in zip(crops, plain, params, strict=True):
        assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=layout)
        assert torch.equal(ours, augment.photometric(uint8, p))


def test_augmented_crops_are_a_sequence_and_made_when_taken():
    crops, params = drawn(4)
    calls = []

    def augment(crops, params):
        calls.append(len(crops))
        return AUGMENT(crops, params)

    lazy = AugmentedCrops(crops, params, augment)
    assert len(lazy) == 2 and not calls
    assigned = lazy[:1]
    assert isinstance(assigned, AugmentedCrops) and len(assigned) == 1 and not calls
    once = list(assigned)
    assert calls == [8]
    whole = list(lazy)
    assert calls == [8, 8, 12] and equal(whole[:1], once)
    assert equal(whole, [AUGMENT(c, p) for c, p in zip(crops, params)])
    assert torch.equal(lazy[-1], whole[1]) and torch.equal(lazy[1:][0], whole[1])
    with pytest.raises(IndexError):
        lazy[2]


def test_both_passes_see_the_same_augmented_crops():
    """Of a step in three micro-batches: first without gradient the assigned crops, then all."""
    method = build_method(configure({"recipe": "demo", "crops": "2x48+3x32", "head": "24-16",
                                     "prototypes": 12, "head_bn": False})).eval()
    run = Run(method, method, CPU, torch.float32, torch.amp.GradScaler("cpu", enabled=False))
    seen = []

    def augment(crops, params):
        seen.append(AUGMENT(crops, params))
        return seen[-1]

    micro_batches = [AugmentedCrops(*drawn(2, seed), augment) for seed in range(3)]
    loss, _ = step_gradients(run, 0, micro_batches)
    assert [len(crops) for crops in seen] == [4] * 3 + [4, 6] * 3
    first, second = seen[:3], [(seen[i], seen[i + 1]) for i in (3, 5, 7)]
    for assigned, whole in zip(first, second):
        assert torch.equal(assigned, whole[0])
    outputs = method(joined(second))
    expected = method.loss(outputs, method.targets(outputs, 0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


# -------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize("micro_batch, number", [(0, 1), (8, 1), (4, 2), (1, 8)])
def test_steps_and_micro_batches_are_the_streams(micro_batch, number):
    stream = stream_of()
    with loader_of(stream, micro_batch) as batches:
        steps = [(step, list(micro_batches)) for step, micro_batches in batches]
    assert [step for step, _ in steps] == [2, 3, 4] and batches.per_step == number
    for step, micro_batches in steps:
        assert len(micro_batches) == number
        expected = AUGMENT.collate([stream[position] for position in range(8 * step, 8 * step + 8)])
        for ours, theirs in zip(joined(micro_batches), expected[0], strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 2])
def test_both_ways_of_augmenting_give_the_same_crops(workers):
    """In the workers where a step has one micro-batch, lazily where it has several."""
    stream = stream_of(broken=[3, 4])
    with loader_of(stream, workers=workers) as whole, \
            loader_of(stream, micro_batch=2, workers=workers) as parts:
        assert whole.in_workers and not parts.in_workers
        for (step, (crops,)), (same, micro_batches) in zip(whole, parts, strict=True):
            assert step == same and isinstance(crops, list) and len(micro_batches) == 4
            for lazy in micro_batches:
                assert isinstance(lazy, AugmentedCrops)
                assert {c.dtype for c in lazy.crops} == {torch.uint8}
            for ours, theirs in zip(crops, joined(micro_batches), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert whole.faults == parts.faults and whole.faults


def test_a_micro_batch_is_fetched_when_it_is_asked_for_and_the_next_steps_first_one_ahead():
    fetched = []
    with loader_of(micro_batch=2) as batches:
        fetch = batches.fetch
        batches.fetch = lambda: fetched.append(len(fetched)) or fetch()
        for number, (_, micro_batches) in enumerate(batches):
            before = 4 * number + bool(number)              # the first step begins with nothing
            assert len(fetched) == before
            for i, _ in enumerate(micro_batches):           # the pass for the codes
                assert len(fetched) == max(before, 4 * number + i + 1)
            first = micro_batches[0].crops
            assert len(fetched) == 4 * (number + 1)
            again = list(micro_batches)                     # the pass with gradient: the same ones
            assert len(fetched) == 4 * (number + 1) + 1 and again[0].crops is first
        assert number == 2 and batches.next is None         # the last time nothing was left


def test_micro_batches_that_are_not_taken_belong_to_their_step():
    with loader_of(micro_batch=2) as whole, loader_of(micro_batch=2) as part:
        for (_, all_four), (_, some) in zip(whole, part, strict=True):
            assert equal(list(all_four[0]), list(some[0]))
            list(all_four)


def test_a_fault_counts_when_its_micro_batch_is_taken():
    """A checkpoint between two steps does not count what was read ahead."""
    with loader_of(stream_of(broken=[3, 4, 5]), micro_batch=2) as batches:
        for step, micro_batches in batches:
            list(micro_batches)
            expected = [f for p in range(16, 8 * step + 8) for f in batches.stream[p][2]]
            assert batches.faults == expected


@pytest.mark.parametrize("workers, per_step, ahead", [(8, 1, 2), (8, 16, 2), (8, 17, 3),
                                                      (2, 32, 16), (0, 4, 4)])
def test_the_workers_have_a_steps_micro_batches_ready(workers, per_step, ahead):
    assert prefetched(workers, per_step) == ahead


def test_shared_memory_is_stated_and_a_lack_of_it_is_one_sentence(monkeypatch):
    pixels = 3 * (2 * 48 ** 2 + 3 * 32 ** 2)
    assert loader_of(workers=2).in_flight == (2 * 2 + 2) * 8 * pixels * 4           # augmented
    assert loader_of(workers=2, micro_batch=2).in_flight == (2 * 2 + 2) * 2 * pixels
    assert loader_of().in_flight == 0
    monkeypatch.setattr(loader.shutil, "disk_usage", lambda _: SimpleNamespace(free=64e6))
    monkeypatch.setattr(loader.os.path, "isdir", lambda _: True)
    check_shared_memory(64e6)
    with pytest.raises(ValueError, match="need 65 MB .* has 64 MB left: .*docker run --shm-size"):
        check_shared_memory(65e6)


def test_input_that_stalls_is_a_sentence_before_the_other_ranks_give_up(tmp_path, monkeypatch):
    assert STUCK < PATIENCE.total_seconds() / 2
    monkeypatch.setattr(loader, "STUCK", 1)
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)    # seconds
    stream = Stream(Stuck(20, tmp_path), MultiCrop(parse_crops("2x16")), 1)
    with pytest.raises(RuntimeError, match="DataLoader: no input for .* does not answer"), \
            loader_of(stream, workers=1, steps=(0, 500)) as batches:
        for _, micro_batches in batches:
            list(micro_batches)


@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="workers die without a signal")
def test_a_worker_that_dies_ends_no_step_but_the_next_fetch():
    before = signal.getsignal(signal.SIGCHLD)
    with loader_of(workers=1, steps=(0, 500)) as batches:
        batches.take(range(8))
        worker, = batches.batches._workers
        worker.kill()
        worker.join()
        time.sleep(0.1)             # Python's handler has run, and has raised nothing
        with pytest.raises(RuntimeError, match=rf"DataLoader worker .*\b{worker.pid}\)"):
            batches.take(range(8))
    with loader_of(workers=1):      # now that torch has set its own
        after = signal.getsignal(signal.SIGCHLD)
    assert before != after != signal.getsignal(signal.SIGCHLD)


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), RuntimeError("no ancdata")])
def test_a_connection_that_breaks_names_the_worker(error):
    with loader_of(workers=1) as batches:
        worker, = batches.batches._workers

        class Broken:
            _workers, _shutdown_workers = [worker], batches.batches._shutdown_workers

            def __next__(self):
                Timer(0.2, worker.kill).start()         # the socket first, then the process
                raise error

        batches.batches = Broken()
        with pytest.raises(RuntimeError, match=rf"DataLoader worker .*\b{worker.pid}\)"):
            batches.take(range(8))


def test_ranks_share_the_batch():
    with loader_of() as whole, loader_of(rank=0, world=2) as one, loader_of(rank=1, world=2) as two:
        for (_, (crops,)), (_, (first,)), (_, (second,)) in zip(whole, one, two, strict=True):
            assert equal(crops, joined([first, second]))


def test_a_run_that_is_finished_has_no_steps():
    with loader_of(steps=(5, 5)) as batches:
        assert list(batches) == []


@pytest.mark.cuda
def test_on_cuda_crops_are_augmented_there():
    device = torch.device("cuda")
    augment = Augment(Photometric().to(device), torch.contiguous_format)
    stream, positions = stream_of(), Positions(2, 5, 8)
    with Loader(stream, positions, augment, device, workers=1) as batches, loader_of(stream) as cpu:
        assert not batches.in_workers
        for (_, (lazy,)), (_, (crops,)) in zip(batches, cpu, strict=True):
            assert {c.device.type for c in lazy.crops} == {"cuda"}
            for ours, theirs in zip(lazy, crops, strict=True):
                torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------ faults and waiting
@pytest.mark.parametrize("workers, micro_batch", [(0, 0), (0, 4), (2, 0)])
def test_faults_are_gathered_in_the_order_of_the_stream(workers, micro_batch):
    stream = stream_of(broken=[3, 4, 5])
    expected = [fault for position in range(16, 40) for fault in stream[position][2]]
    with loader_of(stream, micro_batch, workers=workers) as batches:
        taken = []
        for step, micro_batches in batches:
            list(micro_batches)
            taken += batches.faults
            batches.faults = []             # as who reads them does
            so_far = [f for p in range(16, 8 * step + 8) for f in stream[p][2]]
            assert taken == so_far
    assert taken == expected and {fault.name for fault in taken} >= {"picture3", "picture4"}


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_cannot_be_read_at_all_end_the_loop(workers):
    with pytest.raises(NoReadableImage, match="no readable image"), \
            loader_of(stream_of(5, range(5)), workers=workers) as batches:
        list(batches)


class Slow(Memory):
    """Each image takes a while."""

    def __getitem__(self, i):
        time.sleep(0.02)
        return super().__getitem__(i)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_time_spent_waiting_for_input_is_counted_and_no_other(workers):
    stream = Stream(Slow(20), MultiCrop(parse_crops("2x16")), seed=1)
    with loader_of(stream, workers=workers) as batches:
        begin, waited = time.perf_counter(), []
        for _, micro_batches in batches:
            micro_batches[0]
            waited.append(batches.waited)
            batches.waited = 0.0            # as who reads it does
            time.sleep(0.1)
        total = time.perf_counter() - begin
    assert len(waited) == 3 and sum(waited) + 3 * 0.1 <= total
    assert min(waited if workers == 0 else waited[:1]) >= 8 * 0.02


def test_the_time_spent_waiting_adds_up_until_it_is_read():
    with loader_of(Stream(Slow(20), MultiCrop(parse_crops("2x16")), seed=1)) as batches:
        for step, micro_batches in batches:
            micro_batches[0]
            assert batches.waited >= (step - 1) * 8 * 0.02          # the first step is 2


# -------------------------------------------------------------------------------------- workers
def start_worker(folder, worker):
    """As a run's: SIGTERM does not end it. It leaves its process id."""
    ignore_signals(worker)
    whole = Path(folder, f"{worker}.tmp")
    whole.write_text(str(os.getpid()))
    whole.rename(Path(folder, str(worker)))


def running(pid):
    multiprocessing.active_children()       # reaps those that have ended
    try:
        os.kill(pid, 0)
        return True
    except ProcessLookupError:
        return False


class Stuck(Memory):
    """A file system that does not answer, from each worker's ninth image on; it leaves a file."""

    def __init__(self, count, folder):
        super().__init__(count)
        self.folder, self.read = folder, 0

    def __getitem__(self, i):
        self.read += 1
        if self.read > 8:
            Path(self.folder, "stuck").touch()
            time.sleep(60)
        return super().__getitem__(i)


def wait_until(condition, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


@pytest.mark.parametrize("case", ["end", "error", "stuck"])
def test_workers_get_their_numbers_and_are_ended_on_exit(tmp_path, monkeypatch, case):
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)    # seconds
    images = Stuck(20, tmp_path) if case == "stuck" else Memory(20)
    stream = Stream(images, MultiCrop(parse_crops("2x16")), 1)
    with pytest.raises(KeyboardInterrupt) if case == "error" else nullcontext():
        with loader_of(stream, workers=2, steps=(0, 500),
                       start_worker=partial(start_worker, tmp_path)) as batches:
            next(iter(batches))
            wait_until(lambda: {path.name for path in tmp_path.glob("?")} == {"0", "1"})
            pids = [int(path.read_text()) for path in tmp_path.glob("?")]
            assert all(map(running, pids))
            if case == "stuck":
                wait_until((tmp_path / "stuck").exists)
            if case == "error":
                raise KeyboardInterrupt
    wait_until(lambda: not any(map(running, pids)))


def test_without_workers_nothing_is_to_be_ended():
    with loader_of() as batches:
        next(iter(batches))
    with loader_of():
        pass


def test_workers_may_be_spawned(tmp_path):
    """What they are sent can be pickled, and gives the same; with a strength that rises."""
    write_pictures(tmp_path, 12, size=(50, 34))
    config = with_length(configure({"recipe": "demo", "steps": 3, "strength_rise": 0.5}), 30)
    crop = MultiCrop(parse_crops("2x16"), config.strength_at)
    stream = Stream(open_images(tmp_path), crop, 0)
    again, augment_again = pickle.loads(pickle.dumps((stream, AUGMENT)))
    assert equal(AUGMENT.collate([stream[5], stream[400]]),
                 augment_again.collate([again[5], again[400]]))
    strengths = [config.strength_at(position) for position in (5, 400)]
    assert strengths[0] != strengths[1]
