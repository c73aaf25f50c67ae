"""cache.py: what is shrunk and how, what is stored and when it is used, and what goes wrong."""
import errno
import io
import os
import pickle
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy
import pytest
from PIL import Image

from data import images as data_images
from data.cache import Shrunk, cache_folder, needed_side
from data.images import open_images
from data.shards import Changed
from data.stream import Stream
from multicrop import MultiCrop, decode, parse_crops, random_box
from tests.data.conftest import every_format

SIDE = 24


def write_large(folder, count=4, suffix=".jpg", size=(60, 90)):
    """Smooth images, each of its own colours."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        coarse = numpy.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=numpy.uint8)
        Image.fromarray(coarse).resize(size[::-1], Image.BICUBIC).save(folder / f"{i}{suffix}",
                                                                       quality=95)


@pytest.fixture
def large(tmp_path):
    write_large(tmp_path / "large")
    return tmp_path / "large"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def entries(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def contents(images):
    return [images[i] for i in range(len(images))]


class Unread:
    """Images that must not be read."""

    def __init__(self, images):
        self.images, self.identity = images, images.identity

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        raise AssertionError("an original was read")


# ------------------------------------------------------------------------------------- shrinking
@pytest.mark.parametrize("crops, side", [("2x224+4x96", 692), ("2x64@0.25-1+4x32@0.08-0.25", 148)])
def test_no_crop_of_a_shrunk_image_is_enlarged(crops, side):
    specs, rng = parse_crops(crops), random.Random(0)
    assert needed_side(specs) == side
    sides = [min(right - left, bottom - top) - spec.size
             for spec in specs for _ in range(3000)
             for left, top, right, bottom in [random_box(side, side, spec.scale, rng)]]
    assert -1 <= min(sides) <= 8            # a pixel of rounding; and no larger than it must be


def test_large_images_are_shrunk_to_what_they_show_and_others_are_as_they_are(tmp_path):
    files = every_format()
    (tmp_path / "all").mkdir()
    for name, data in files.items():
        (tmp_path / "all" / name).write_bytes(data)
    images = open_images(tmp_path / "all")
    assert contents(Shrunk(images, 48)) == contents(images)         # as large as they are
    shrunk = Shrunk(images, SIDE)
    assert len(shrunk) == len(images) and shrunk.name(3) == images.name(3)
    assert shrunk.labels is None and not shrunk.classes
    sizes = set()
    for i in range(len(images)):
        original, small = decode(images[i]), decode(shrunk[i])
        sizes.add(small.size)
        assert Image.open(io.BytesIO(shrunk[i])).format == "JPEG"
        expected = original.resize(small.size, Image.Resampling.LANCZOS)
        assert numpy.abs(numpy.subtract(expected, small, dtype=float)).mean() < 6, images.name(i)
    assert sizes == {(32, 24), (24, 32)}                            # one of them is turned


def test_a_side_of_no_pixels_is_refused(large):
    with pytest.raises(ValueError, match="--shrink 0: needs at least 1"):
        Shrunk(open_images(large), 0)


# --------------------------------------------------------------------------------------- storing
def test_the_second_time_originals_are_not_read_and_the_images_are_the_same(large, cache):
    write_large(large / "small", 2, size=(20, 30))
    images = open_images(large)
    shrunk = Shrunk(images, SIDE, cache)
    first = contents(shrunk)
    assert contents(Shrunk(images, SIDE)) == first != contents(images)
    assert len(entries(cache)) == 4 and not list(cache.rglob("*.tmp"))     # small ones are not kept
    assert len(open_images(large)) == 6
    again = Shrunk(Unread(images), SIDE, cache)
    for i in range(6):
        if images.name(i).startswith("small"):
            with pytest.raises(AssertionError):
                again[i]
        else:
            assert again[i] == first[i]
    assert contents(pickle.loads(pickle.dumps(shrunk))) == first
    shutil.rmtree(cache)
    assert contents(shrunk) == first and len(entries(cache)) == 4


def test_a_cache_inside_the_folder_of_images_adds_none_to_them(large):
    contents(Shrunk(open_images(large), SIDE, large / "cache"))
    assert len(entries(large / "cache")) == len(open_images(large)) == 4


@pytest.mark.parametrize("date", ["new", "kept"])
def test_a_file_that_was_replaced_is_shrunk_again(large, cache, date):
    """Also by one of the same size, and of the same date as `cp -p` leaves."""
    shrunk = Shrunk(open_images(large), SIDE, cache)
    before, path = shrunk[0], large / "0.jpg"
    status, other = path.stat(), (large / "1.jpg").read_bytes()
    size = max(status.st_size, len(other))
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shrunk[0] == before
    path.write_bytes(other.ljust(size, b"\0"))
    if date == "kept":
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert shrunk[0] == shrunk[1] != before


def test_another_side_and_other_limits_have_their_own_entries(large, cache):
    images = open_images(large)
    assert min(decode(Shrunk(images, SIDE, cache)[0]).size) == SIDE
    assert min(decode(Shrunk(images, 30, cache)[0]).size) == 30
    assert Shrunk(images, SIDE, cache, max_pixels=100)[0] == images[0]      # refused by the crops


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:-9], lambda data: data[:3], lambda data: bytes(len(data)),
    lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:]])
def test_a_damaged_entry_is_made_again(large, cache, damage):
    shrunk = Shrunk(open_images(large), SIDE, cache)
    expected = shrunk[2]
    entry, = entries(cache)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert shrunk[2] == expected and entry.read_bytes() == whole


def test_several_may_fill_a_cache_at_once(large, cache):
    images = open_images(large)
    expected = contents(Shrunk(images, SIDE))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: contents(Shrunk(images, SIDE, cache)), range(16)))
    assert all(one == expected for one in found) and len(entries(cache)) == 4


@pytest.mark.parametrize("failing", ["mkstemp", "replace"])
def test_on_a_full_disk_it_goes_on_without_storing(large, cache, monkeypatch, capsys, failing):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    images = open_images(large)
    expected = contents(Shrunk(images, SIDE))
    monkeypatch.setattr(*(tempfile, "mkstemp") if failing == "mkstemp" else (os, "replace"), full)
    assert contents(Shrunk(images, SIDE, cache)) == expected and not entries(cache)
    warning, = capsys.readouterr().err.splitlines()                         # once
    assert warning == (f"warning: {cache} cannot be written (No space left on device): shrunk "
                       "images are not stored")


def test_images_that_cannot_be_used_are_replaced_and_counted_as_without(large, cache):
    (large / "cut.jpg").write_bytes((large / "0.jpg").read_bytes()[:700])
    (large / "empty.jpg").write_bytes(b"")
    (large / "text.png").write_text("this is no picture")
    Image.new("RGB", (400, 300)).save(large / "too large.png")
    (large / "gone.jpg").symlink_to(large / "missing.jpg")
    os.mkfifo(large / "pipe.jpg")
    crop = MultiCrop(parse_crops("2x16"), max_pixels=6000)
    images = open_images(large)
    shrunk = Shrunk(images, SIDE, cache, max_pixels=6000)
    for _ in range(2):                                  # an empty cache, then a full one
        plain, cached = Stream(images, crop, 0), Stream(shrunk, crop, 0)
        faults = [[fault for position in range(10) for fault in stream[position][2]]
                  for stream in (plain, cached)]
        assert faults[0] == faults[1]
        assert {fault.cause for fault in faults[0]} == {
            "truncated", "empty", "no picture", "too large", "vanished", "unreadable"}
    assert len(entries(cache)) == 4


# ---------------------------------------------------------------------------------------- shards
def test_images_of_shards_are_cached_while_the_shard_is_what_it_was(large, cache, tmp_path):
    data_images.main(["pack", str(large), str(tmp_path / "packed")])
    images = open_images(tmp_path / "packed" / "*.tar")
    shrunk = Shrunk(images, SIDE, cache)
    first = contents(shrunk)
    assert contents(Shrunk(Unread(images), SIDE, cache)) == first
    assert len(set(entries(cache))) == 4 and first == contents(Shrunk(open_images(large), SIDE))
    os.utime(tmp_path / "packed" / "000000.tar", ns=(0, 0))
    with pytest.raises(Changed):
        shrunk[0]


def test_pack_shrinks_the_large_ones(large, tmp_path, capsys):
    write_large(large / "small", 2, ".png", size=(20, 30))
    data_images.main(["pack", str(large), str(tmp_path / "packed"), f"--shrink={SIDE}"])
    packed, images = open_images(tmp_path / "packed" / "*.tar"), open_images(large)
    assert contents(packed) == contents(Shrunk(images, SIDE))
    assert [min(decode(data).size) for data in contents(packed)] == [SIDE] * 4 + [20] * 2
    assert packed[4] == images[4] and packed.name(5).endswith("/small/1.png")
    with pytest.raises(SystemExit):
        data_images.main(["pack", str(large), str(tmp_path / "none"), "--shrink=0"])
    assert "--shrink: '0': needs a whole number from 1 to" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "seer-in-the-open"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "seer-in-the-open"
