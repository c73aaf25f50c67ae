"""images.py: folders, lists and their names; and what decoding does with files of any content."""
import errno
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import tracemalloc
import warnings
import zlib
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.images import open_images
from data.stream import Stream, permute
from multicrop import BadImage, MultiCrop, decode, parse_crops
from tests.data.conftest import every_format, resident_mb
from tests.helpers import ROOT, environment, write_pictures

CROP = MultiCrop(parse_crops("2x16+3x8"))


# -------------------------------------------------------------------------------------- sources
def test_a_folder_of_any_depth(tmp_path):
    write_pictures(tmp_path / "b" / "deep" / "er", 2, ".PNG")
    write_pictures(tmp_path / "a ä", 3, ".jpg")
    (tmp_path / "a ä" / "notes.txt").write_text("no picture")
    images = open_images(tmp_path)
    names = [images.name(i) for i in range(len(images))]
    assert names == sorted(names) and len(names) == 5
    assert images.classes == ["a ä", "b"] and images.labels.tolist() == [0, 0, 0, 1, 1]
    assert images[4] == (tmp_path / "b" / "deep" / "er" / "0001.PNG").read_bytes()


def test_links_in_a_circle_and_names_that_are_no_text(tmp_path):
    write_pictures(tmp_path / "a", 2)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "._0000.png").write_bytes(b"not an image: macOS keeps notes here")
    assert len(open_images(tmp_path)) == 2
    odd = os.fsencode(tmp_path / "a") + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write(b"broken")
    stream = Stream(open_images(tmp_path), CROP, seed=0)
    faults = [fault for position in range(20) for fault in stream[position][2]]
    assert faults and all("caf" in fault.name.encode("utf-8").decode() for fault in faults)


def test_folders_that_cannot_be_read_are_counted_and_named(tmp_path, monkeypatch, capsys):
    """As root one can read all: the system's answer is put in its place."""
    for name in ("a", "b", "c"):
        write_pictures(tmp_path / name, 2)
    scandir = os.scandir

    def denied(folder):
        if os.path.basename(folder) in (b"b", b"c"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    assert len(open_images(tmp_path)) == 2
    warning = capsys.readouterr().err
    assert "warning: 2 folders in" in warning
    assert f"{tmp_path / 'b'}, {tmp_path / 'c'}" in warning


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


def test_a_list_of_paths(tmp_path):
    photos, path = tmp_path / "photos", tmp_path / "list.txt"
    write_pictures(photos, 3)
    (photos / "no suffix").write_bytes((photos / "0001.png").read_bytes())
    names = ["photos/0002.png", str(photos / "0000.png"), "photos/no suffix"]
    lines = ["# three images", names[0], names[1], "", "  # one more", names[2]]
    for ending in ("\n", "\r\n", " \n", "\t \r\n"):
        path.write_bytes(ending.join(lines).encode())
        images = open_images(path)
        assert [images.name(i) for i in range(len(images))] == names
        assert images[1] == (photos / "0000.png").read_bytes()
        assert images[2] == (photos / "0001.png").read_bytes()
    path.write_bytes(b"\xef\xbb\xbfphotos/0002.png")            # as Windows' editors write it
    assert open_images(path).name(0) == "photos/0002.png"
    with pytest.raises(ValueError, match="0002.png is no list of paths"):
        open_images(photos / "0002.png")
    (tmp_path / "none.txt").write_text("\n\n# nothing \n")
    with pytest.raises(ValueError, match="no paths in"):
        open_images(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no such folder, list or shards"):
        open_images(tmp_path / "nothing.txt")


def test_what_is_no_source_of_images_says_what_would_be(tmp_path, monkeypatch):
    (tmp_path / "tars" / "below").mkdir(parents=True)
    (tmp_path / "tars" / "below" / "0.tar").write_bytes(b"")
    shards = tmp_path / "tars" / "below" / "*.tar"
    with pytest.raises(ValueError, match=re.escape(f"name them, as in --data '{shards}'")):
        open_images(tmp_path / "tars")
    for url, tool in (("s3://b/photos", "mount-s3"), ("gs://b/x.tar", "gcsfuse"),
                      ("hdfs://h/x", "hadoop-fuse-dfs"), ("https://x.org/y.tar", "rclone mount")):
        with pytest.raises(ValueError, match=f"{url} is no path: mount it as a folder .{tool}"):
            open_images(url)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    (tmp_path / "list.txt").write_text("a.jpg")
    monkeypatch.setattr("builtins.open", refuse)            # a superuser may read anything
    with pytest.raises(ValueError, match="list.txt is unreadable: Permission denied"):
        open_images(tmp_path / "list.txt")


# -------------------------------------------------------------------------------------- rubbish
def test_what_must_be_read_is_read():
    files, unlike = every_format(), {"deep.png", "deep.tif", "palette.png", "clear.png", "gray.jpg"}
    first = numpy.asarray(decode(files["plain.png"]), int)
    for name, data in files.items():
        crops, _ = CROP(data, seed=0)
        assert [c.shape[0] for c in crops] == [2, 3]
        if name not in unlike:                      # of animations the first frame
            upright = decode(data)
            upright = upright if name != "turned.jpg" else upright.transpose(Image.ROTATE_90)
            assert abs(numpy.asarray(upright, int) - first).mean() < 16, name


def test_pictures_of_one_pixel_and_of_one_row_are_read():
    for image in (Image.new("RGB", (1, 1), (9, 8, 7)), Image.new("RGB", (1, 20000), (9, 8, 7)),
                  Image.new("RGB", (20000, 1))):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        crops, _ = CROP(buffer.getvalue(), seed=0)
        assert (crops[0] == torch.tensor(image.getpixel((0, 0))).view(3, 1, 1)).all()
    deep = io.BytesIO()
    Image.fromarray(numpy.array([[0, 30000], [30000, 65535]], numpy.uint16)).save(
        deep, "PNG", transparency=30000)
    assert numpy.asarray(decode(deep.getvalue()))[..., 0].tolist() == [[0, 255], [255, 255]]


def test_large_jpegs_are_decoded_smaller_and_look_the_same():
    rng = numpy.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=numpy.uint8))
    exif = Image.Exif()
    for orientation in (1, 6):
        exif[0x0112] = orientation
        large = io.BytesIO()
        small.resize((1600, 1200), Image.BICUBIC).save(large, "JPEG", quality=95, exif=exif)
        crop = MultiCrop(parse_crops("2x64@0.3-1+2x32@0.2-0.3"))
        whole, used = MultiCrop(crop.specs), []
        whole.shrink = lambda boxes: 1
        crop.shrink = lambda boxes: used.append(MultiCrop.shrink(crop, boxes)) or used[-1]
        for seed in range(8):
            for ours, plain in zip(*(cut(large.getvalue(), seed)[0] for cut in (crop, whole))):
                difference = (ours.int() - plain.int()).abs().float().mean()
                assert difference < 3               # a pixel aside: 5
        assert set(used) >= {8}
    for size, by in ((64, 8), (150, 4), (151, 2), (301, 1)):        # a box of 600 x 602 pixels
        assert MultiCrop(parse_crops(f"1x{size}")).shrink([[(3, 5, 603, 607)]]) == by


def test_rubbish_is_replaced_named_and_counted_by_cause(tmp_path):
    files = every_format()
    folder, plain = tmp_path / "photos", files["plain.png"]
    write_pictures(folder, 20)
    header = b"IHDR" + (40000).to_bytes(4, "big") * 2 + plain[24:29]
    huge = plain[:12] + header + zlib.crc32(header).to_bytes(4, "big") + plain[33:]
    rubbish = {"empty": b"", "no picture": b"<html>404</html>",
               "truncated": files["plain.jpg"][:700], "too large": huge}
    for cause, data in rubbish.items():
        (folder / f"{cause}.jpg").write_bytes(data)
    (folder / "truncated.png").write_bytes(plain[:-800])
    (folder / "program.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    (folder / "arithmetic.jpg").write_bytes(                        # says so, and is not
        files["plain.jpg"].replace(b"\xff\xc0", b"\xff\xc9", 1))
    for name in ("vanished.jpg", "unreadable.jpg", "pipe.jpg"):
        (folder / name).write_bytes(b"x")
    (folder / "endless.jpg").symlink_to("/dev/zero")
    images = open_images(folder)
    (folder / "vanished.jpg").unlink()
    (folder / "unreadable.jpg").unlink()
    (folder / "unreadable.jpg").mkdir()
    (folder / "pipe.jpg").unlink()
    os.mkfifo(folder / "pipe.jpg")
    stream = Stream(images, CROP, seed=0)
    faults = {fault.name: fault.cause for position in range(2 * len(images))
              for fault in stream[position][2]}
    faults.pop("arithmetic.jpg", None)                  # either way
    assert faults == {"truncated.png": "truncated", "program.png": "no picture",
                      "pipe.jpg": "unreadable", "endless.jpg": "unreadable"} | {
        f"{cause}.jpg": cause for cause in [*rubbish, "vanished", "unreadable"]}


def test_a_picture_of_too_many_pixels_is_not_decoded():
    data = every_format()["plain.png"]
    with pytest.raises(BadImage, match="too large: 64 x 48 pixels"):
        MultiCrop(CROP.specs, max_pixels=3071)(data, 0)
    MultiCrop(CROP.specs, max_pixels=3072)(data, 0)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, bytes set, cut out, doubled, or the end lost: one to eight times."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if not data:
            break
        headers = min(len(data), 200)                   # half of the time there
        at = rng.randrange(len(data) if rng.random() < 0.5 else headers)
        length = rng.randint(1, 16)
        match rng.randrange(6):
            case 0 | 1:
                data[at] ^= 1 << rng.randrange(8)
            case 2:
                data[at:at + length] = rng.choice([b"\x00", b"\xff", b"\x7f"]) * length
            case 3:
                del data[at:at + length]
            case 4:
                data[at:at] = data[at:at + length]
            case 5:
                del data[rng.randrange(len(data)) if rng.random() < 0.2 else -1:]
    return bytes(data)


def fuzz(count: int, report) -> None:
    """In a process of its own, for a decoder may end it. Sends how many of each kind there were."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)                            # as in a worker
    files, crop = every_format(), MultiCrop(CROP.specs, max_pixels=10 ** 6)
    seen, rng, memory = Counter(), random.Random(0), []
    for i in range(count):
        signal.alarm(20)                                # a hang ends the process
        name = list(files)[i % len(files)]
        try:
            crops, _ = crop(mutated(files[name], rng), i)
            assert [c.shape for c in crops] == [(2, 3, 16, 16), (3, 3, 8, 8)]
            seen["decoded"] += 1
        except BadImage as error:                       # nothing else may come out
            seen[error.cause] += 1
        if i >= count // 2 and i % (count // 10) == 0:
            memory.append(resident_mb())
    report.send((seen, memory[-1] - memory[0]))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory in /proc")
@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.long)])
def test_fuzz(count):
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=fuzz, args=(count, send))
    process.start()
    process.join()
    assert process.exitcode == 0, "a traceback is above; -14 is a hang, -11 a crash of a decoder"
    seen, grown_mb = receive.recv()
    print(seen)
    assert grown_mb < 20 and sum(seen.values()) == count
    assert min(seen["decoded"], seen["damaged"], seen["truncated"]) > count // 100


# --------------------------------------------------------------------------- memory of the names
def write_list(path, count):
    """A list of paths of 60 bytes."""
    with open(path, "w") as file:
        for i in range(count):
            file.write(f"photos/of/a/long/journey/{i // 1000:07d}/the-picture-{i:010d}.jpeg\n")


def test_names_are_bytes_in_one_tensor_that_processes_share(tmp_path):
    """Not Python objects: of these 50,000 would be 5.5 MB, and a copy a process."""
    count = 50_000
    write_list(tmp_path / "list", count)
    tracemalloc.start()
    images = open_images(tmp_path / "list")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(images) == count and len(images.name(count - 1)) == 60
    assert held < 1.3 * (60 + 8) * count                # a buffer that grows has room to spare
    pickled = bytes(ForkingPickler.dumps(images))       # what a spawned worker is sent
    again = ForkingPickler.loads(pickled)
    assert len(pickled) < 2000 and again.name(7) == images.name(7)
    images._names[7 * 60 + 59] = ord("G")               # one memory
    assert again.name(7).endswith(".jpeG")


class Names:
    """Position -> an image's name's length: what a worker needs of the list."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, position):
        return len(self.images.name(permute(position, len(self.images), 1)))


def list_in_workers(path: str, context: str) -> None:
    """Prints the PSS in MB of this process and 8 workers that have looked into the list."""
    def all_pss():
        family = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
        texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in family]
        return len(family), sum(int(re.search(r"\nPss:\s+(\d+)", text)[1]) for text in texts) / 1e3

    loader = iter(DataLoader(Names(open_images(path)), 1000, num_workers=8,
                             multiprocessing_context=context))
    for _ in range(16):
        next(loader)
    print(json.dumps(all_pss()))


SCRIPT = """
from tests.data.test_images import *
if __name__ == "__main__":
    list_in_workers({!r}, {!r})
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures memory in /proc")
@pytest.mark.parametrize("context", [pytest.param("fork", marks=pytest.mark.long),
                                     pytest.param("spawn", marks=pytest.mark.measured)])
def test_ten_million_paths_in_eight_workers(tmp_path, context):
    whole = {}
    for name, count in (("many", 10_000_000), ("few", 20_000)):
        write_list(tmp_path / name, count)
        (tmp_path / "script.py").write_text(SCRIPT.format(str(tmp_path / name), context))
        result = subprocess.run([sys.executable, str(tmp_path / "script.py")], text=True,
                                capture_output=True, cwd=ROOT, env=environment())
        assert result.returncode == 0, result.stderr
        processes, whole[name] = json.loads(result.stdout)
        assert processes == 9
    assert len(open_images(tmp_path / "few").name(0)) == 60
    print(f"{context}: {whole['many']:.0f} MB in all 9 processes, {whole['few']:.0f} with 20,000")
    assert whole["many"] - whole["few"] < 1000
    assert whole["many"] < 1500 + (context == "spawn") * whole["few"]
