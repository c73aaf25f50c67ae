"""images.py: sources, order, purity, replacement of bad pictures."""
import io
import os
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from images import (NoReadablePicture, Positions, Stream, collate, mix, open_images, permute,
                    survey)
from multicrop import MultiCrop, decode, parse_crops

CROP = MultiCrop(parse_crops("2x16+3x8"))


def write_pictures(folder, count, suffix=".png", size=(24, 20)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng = numpy.random.default_rng(i)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=numpy.uint8)).save(
            folder / f"{i:04}{suffix}")


class Memory:
    """Pictures in memory; those whose number is in `broken` are no pictures."""

    def __init__(self, count, broken=()):
        self.count, self.broken = count, set(broken)

    def __len__(self):
        return self.count

    def name(self, i):
        return f"picture{i}"

    def __getitem__(self, i):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (i % 256, i // 256, 0)).save(buffer, "PNG")
        return buffer.getvalue()[:40 if i in self.broken else None]


def test_a_folder_of_any_depth(tmp_path):
    write_pictures(tmp_path / "b" / "deep" / "er", 2, ".PNG")
    write_pictures(tmp_path / "a ä", 3, ".jpg")
    (tmp_path / "a ä" / "notes.txt").write_text("no picture")
    images = open_images(tmp_path)
    names = [images.name(i) for i in range(len(images))]
    assert names == sorted(names) and len(names) == 5
    assert images.classes == ["a ä", "b"] and images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images[4] == (tmp_path / "b" / "deep" / "er" / "0001.PNG").read_bytes()


def test_a_survey_says_what_the_pictures_are_like(tmp_path):
    for i in range(8):
        noise = numpy.random.default_rng(i).integers(0, 256, (40 + i, 60, 3), dtype=numpy.uint8)
        noise[..., 0] = noise[..., 0] // 4 + 100
        picture = Image.fromarray(noise)
        (picture if i < 6 else picture.convert("L")).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"")
    found = survey(open_images(tmp_path), decode)
    assert found == survey(open_images(tmp_path), decode)
    assert (found.count, found.gray) == (9, 0.25) and found.short_side in (43, 44)
    pixels = numpy.concatenate([numpy.asarray(decode((tmp_path / f"{i}.png").read_bytes())).reshape(-1, 3)
                                for i in range(8)]) / 255
    assert numpy.allclose(found.mean, pixels.mean(0), atol=0.01)
    assert numpy.allclose(found.std, pixels.std(0), atol=0.1)         # smaller: pictures are resized
    (tmp_path / "shade").mkdir()
    Image.new("RGB", (30, 30), (200, 10, 200)).save(tmp_path / "shade" / "0.png")
    assert survey(open_images(tmp_path / "shade"), decode).std == (0.05, 0.05, 0.05)
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "broken.png").write_bytes(b"no")
    with pytest.raises(NoReadablePicture, match="broken.png"):
        survey(open_images(tmp_path / "none"), decode)


def test_links_in_a_circle_and_names_that_are_no_text(tmp_path):
    write_pictures(tmp_path / "a", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "._0000.png").write_bytes(b"not a picture: macOS keeps notes here")
    assert len(open_images(tmp_path)) == 2
    odd = os.fsencode(tmp_path / "a") + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(b"broken")
    stream = Stream(open_images(tmp_path), CROP, seed=0)
    faults = [fault for position in range(20) for fault in stream[position][2]]
    assert faults and all("caf" in fault.encode("utf-8").decode() for fault in faults)


def test_pictures_in_the_root_have_no_labels(tmp_path):
    write_pictures(tmp_path, 2)
    write_pictures(tmp_path / "a", 2)
    assert open_images(tmp_path).labels is None


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_missing_and_empty_folders_are_named(tmp_path, kind):
    folder = tmp_path / kind
    if kind == "empty":
        (folder / "below").mkdir(parents=True)
    with pytest.raises(ValueError, match=kind):
        open_images(folder)


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 1000, 4097])
def test_an_epoch_is_a_permutation(n):
    for key in (0, 1, 2 ** 63):
        assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permutations_look_random():
    n = 1000
    fixed = [sum(permute(i, n, mix(key)) == i for i in range(n)) for key in range(200)]
    assert abs(numpy.mean(fixed) - 1) < 0.3                     # expected number of fixed points: 1
    first = Counter(permute(0, 10, mix(key)) for key in range(5000))
    assert sum((first[i] - 500) ** 2 / 500 for i in range(10)) < 27.9        # chi2, 9 df, 0.1 %
    a = numpy.array([permute(i, n, mix(7)) for i in range(n)])
    assert abs(numpy.corrcoef(a[:-1], a[1:])[0, 1]) < 0.1


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


@pytest.mark.parametrize("workers, context", [(1, "fork"), (2, "fork"), (2, "spawn")])
def test_bitwise_the_same_with_any_workers(workers, context):
    stream = Stream(Memory(50, broken=[7, 8, 9]), CROP, seed=1)

    def batches(**options):
        return list(DataLoader(stream, batch_sampler=Positions(2, 9, 8), collate_fn=collate, **options))

    for (crops, params, bad), (crops2, params2, bad2) in zip(
            batches(), batches(num_workers=workers, multiprocessing_context=context), strict=True):
        assert all(map(torch.equal, crops + params, crops2 + params2)) and bad == bad2


def test_batches_are_crop_major():
    samples = [Stream(Memory(50), CROP, seed=1)[p] for p in range(4)]
    crops, params, _ = collate(samples)
    assert [c.shape for c in crops] == [(8, 3, 16, 16), (12, 3, 8, 8)] and len(params[1]) == 12
    assert torch.equal(crops[1][2 * 4 + 3], samples[3][0][1][2])
    assert torch.equal(params[0][1 * 4 + 2], samples[2][1][0][1])


def test_bad_pictures_are_replaced_and_named():
    broken = set(range(0, 50, 5))
    stream, seen = Stream(Memory(50, broken), CROP, seed=1), []
    for position in range(50):
        crops, _, bad = stream[position]
        seen += [fault.split(":")[0] for fault in bad]
        assert [c.shape[0] for c in crops] == [2, 3]
        again = stream[position]
        assert torch.equal(again[0][0], crops[0]) and again[2] == bad
    assert {f"picture{i}" for i in broken} <= set(seen)


def test_nothing_but_bad_pictures_is_an_error():
    with pytest.raises(ValueError, match="no readable picture"):
        Stream(Memory(5, broken=range(5)), CROP, seed=1)[0]
