"""stream.py: the order, its purity, what replaces bad images, and batches."""
import pickle
from collections import Counter

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from data.stream import (
    MAX_TRIES,
    Fault,
    NoReadableImage,
    Positions,
    Stream,
    collate,
    fault_of,
    mix,
    permute,
)
from multicrop import BadImage, MultiCrop, parse_crops
from tests.data.conftest import Memory

CROP = MultiCrop(parse_crops("2x16+3x8"))


# ---------------------------------------------------------------------------------------- order
@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4097])
def test_an_epoch_is_a_permutation(n):
    for key in (0, 1, 2 ** 63):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


@pytest.mark.parametrize("keys, draws", [
    (50, 2000), pytest.param(200, 5000, marks=pytest.mark.long)])
def test_permutations_look_random(keys, draws):
    n = 1000
    fixed = [sum(permute(i, n, mix(key)) == i for i in range(n)) for key in range(keys)]
    assert abs(numpy.mean(fixed) - 1) < 4 / keys ** 0.5         # expected number: 1, variance: 1
    first, even = Counter(permute(0, 10, mix(key)) for key in range(draws)), draws / 10
    assert sum((first[i] - even) ** 2 / even for i in range(10)) < 27.9      # chi2, 9 df, 0.1 %
    a = numpy.array([permute(i, n, mix(7)) for i in range(n)])
    assert abs(numpy.corrcoef(a[:-1], a[1:])[0, 1]) < 0.1


@pytest.mark.parametrize("count", [5_000, pytest.param(50_000, marks=pytest.mark.long)])
def test_a_billion_positions_are_a_permutation(count):
    n = 1_000_000_000
    images = [permute(position, n, 3) for position in [*range(count), *range(n - count, n)]]
    assert len(set(images)) == 2 * count and 0 <= min(images) and max(images) < n
    error = (1 / 12 / (2 * count)) ** 0.5                       # of the mean of uniform numbers
    assert abs(numpy.mean(images) / n - 0.5) < 5.5 * error


def test_each_picture_once_an_epoch_for_any_number_of_ranks():
    stream = Stream(Memory(37), CROP, seed=3)
    orders = []
    for world in (1, 2, 3):
        steps = zip(*(Positions(0, 37, 6, rank, world) for rank in range(world)))
        positions = [p for ranks in steps for share in ranks for p in share]
        assert positions == list(range(37 * 6))
        orders.append([stream.index(p) for p in positions])
    assert orders[0] == orders[1] == orders[2]
    for epoch in range(6):
        assert sorted(orders[0][37 * epoch:37 * epoch + 37]) == list(range(37))
    assert orders[0][:37] != orders[0][37:74]
    assert [list(p) for p in Positions(4, 6, 6, 1, 2)] == [[27, 28, 29], [33, 34, 35]]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro_batch", [0, 1, 2, 4])
def test_micro_batches_are_consecutive_parts_of_a_ranks_share(world, micro_batch):
    for rank in range(world):
        whole = Positions(2, 5, 24, rank, world)
        parts = Positions(2, 5, 24, rank, world, micro_batch)
        size = micro_batch or 24 // world
        assert {len(part) for part in parts} == {size} and len(list(parts)) == len(parts)
        assert len(whole) == 3 and len(parts) == 3 * (24 // world // size)
        assert [p for part in parts for p in part] == [p for share in whole for p in share]


# --------------------------------------------------------------------------------------- purity
def batches(stream, world=1, **options):
    """Steps 2 to 6 of 8 images: each rank's batches, joined as one process would have them."""
    ranks = [DataLoader(stream, batch_sampler=Positions(2, 6, 8, rank, world), collate_fn=collate,
                        **options) for rank in range(world)]
    for parts in zip(*ranks, strict=True):
        crops, params = ([
            torch.cat([part.unflatten(0, (spec.count, -1)) for part in same_size], 1).flatten(0, 1)
            for spec, *same_size in zip(CROP.specs, *(part[what] for part in parts))]
            for what in (0, 1))
        yield crops, params, [fault for *_, bad in parts for fault in bad]


@pytest.mark.parametrize("workers, context, world", [
    (1, "fork", 1), (8, "fork", 1), (0, None, 2), (0, None, 4), (2, "fork", 4),
    pytest.param(2, "spawn", 1, marks=pytest.mark.long),
    pytest.param(8, "spawn", 2, marks=pytest.mark.long)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_bitwise_the_same_with_any_workers_and_ranks(workers, context, world):
    stream = Stream(Memory(50, broken=[7, 8, 9]), CROP, seed=1)
    options = dict(num_workers=workers, multiprocessing_context=context)
    replaced = 0
    for (crops, params, bad), (crops2, params2, bad2) in zip(
            batches(stream), batches(stream, world, **options), strict=True):
        assert all(map(torch.equal, crops + params, crops2 + params2)) and bad == bad2
        replaced += len(bad)
    assert replaced


def test_a_pickled_stream_is_the_same():
    """What a spawned worker is sent."""
    stream = Stream(Memory(50, broken=[7, 8, 9]), CROP, seed=1)
    again = pickle.loads(pickle.dumps(stream))
    for position in (0, 17, 10 ** 9):
        (crops, params, bad), (crops2, params2, bad2) = stream[position], again[position]
        assert all(map(torch.equal, crops + params, crops2 + params2)) and bad == bad2


def test_the_seed_and_the_position_decide():
    def first_crop(seed, position):
        return Stream(Memory(50), CROP, seed)[position][1][0]

    assert torch.equal(first_crop(1, 3), first_crop(1, 3))
    for other in (first_crop(2, 3), first_crop(1, 4), first_crop(1, 53)):
        assert not torch.equal(first_crop(1, 3), other)


# -------------------------------------------------------------------------------------- batches
def test_batches_are_crop_major():
    samples = [Stream(Memory(50), CROP, seed=1)[p] for p in range(4)]
    crops, params, _ = collate(samples)
    assert [c.shape for c in crops] == [(8, 3, 16, 16), (12, 3, 8, 8)] and len(params[1]) == 12
    assert torch.equal(crops[1][2 * 4 + 3], samples[3][0][1][2])
    assert torch.equal(params[0][1 * 4 + 2], samples[2][1][0][1])


# ---------------------------------------------------------------------------------- replacement
def test_bad_pictures_are_replaced_and_named():
    broken = set(range(0, 50, 5))
    stream, seen = Stream(Memory(50, broken), CROP, seed=1), []
    for position in range(50):
        crops, _, bad = stream[position]
        seen += [fault.name for fault in bad]
        assert [c.shape[0] for c in crops] == [2, 3]
        again = stream[position]
        assert torch.equal(again[0][0], crops[0]) and again[2] == bad
    assert {f"picture{i}" for i in broken} <= set(seen)


def test_nothing_but_bad_pictures_is_an_error():
    with pytest.raises(NoReadableImage, match=f"no readable image: {MAX_TRIES} in a row") as one:
        Stream(Memory(5, broken=range(5)), CROP, seed=1)[0]
    assert isinstance(one.value, ValueError)


@pytest.mark.parametrize("error, cause, detail", [
    (FileNotFoundError(2, "No such file"), "vanished", "No such file"),
    (PermissionError(13, "Permission denied"), "unreadable", "Permission denied"),
    (BadImage("truncated", "3 bytes"), "truncated", "3 bytes"),
    (IndexError("out of range"), "damaged", "IndexError: out of range")])
def test_a_fault_has_a_cause_to_count_and_a_detail_to_print(error, cause, detail):
    assert fault_of(error, "a\udce9.png") == Fault("a\\udce9.png", cause, detail)
