"""images.py: sources, order, purity, replacement of bad pictures."""
import io
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from images import (NoReadablePicture, Positions, Stream, collate, mix, open_images, permute,
                    survey)
from multicrop import BadPicture, MultiCrop, decode, parse_crops

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
    assert faults and all("caf" in fault.name.encode("utf-8").decode() for fault in faults)


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


def batches(stream, world=1, **options):
    """Steps 2 to 6 of 8 pictures: each rank's batches, joined as one process would have them."""
    ranks = [DataLoader(stream, batch_sampler=Positions(2, 6, 8, rank, world), collate_fn=collate, **options)
             for rank in range(world)]
    for parts in zip(*ranks, strict=True):
        crops, params = ([torch.cat([part.unflatten(0, (spec.count, -1)) for part in same_size], 1).flatten(0, 1)
                          for spec, *same_size in zip(CROP.specs, *(part[what] for part in parts))]
                         for what in (0, 1))
        yield crops, params, [fault for *_, bad in parts for fault in bad]


@pytest.mark.parametrize("workers, context, world", [
    (1, "fork", 1), (8, "fork", 1), (2, "spawn", 1), (0, None, 2), (0, None, 4), (2, "fork", 4),
    pytest.param(8, "spawn", 2, marks=pytest.mark.long)])
def test_bitwise_the_same_with_any_workers_and_ranks(workers, context, world):
    stream = Stream(Memory(50, broken=[7, 8, 9]), CROP, seed=1)
    options = dict(num_workers=workers, multiprocessing_context=context)
    replaced = 0
    for (crops, params, bad), (crops2, params2, bad2) in zip(
            batches(stream), batches(stream, world, **options), strict=True):
        assert all(map(torch.equal, crops + params, crops2 + params2)) and bad == bad2
        replaced += len(bad)
    assert replaced


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
        seen += [fault.name for fault in bad]
        assert [c.shape[0] for c in crops] == [2, 3]
        again = stream[position]
        assert torch.equal(again[0][0], crops[0]) and again[2] == bad
    assert {f"picture{i}" for i in broken} <= set(seen)


def test_nothing_but_bad_pictures_is_an_error():
    with pytest.raises(ValueError, match="no readable picture"):
        Stream(Memory(5, broken=range(5)), CROP, seed=1)[0]


# ------------------------------------------------------------------------------------- rubbish
def picture_files():
    """Name -> bytes of small pictures in every format that is read."""
    rng = numpy.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=numpy.uint8)).resize((64, 48), Image.BICUBIC)
    deep = Image.fromarray(rng.integers(0, 65536, (48, 64), dtype=numpy.uint16))
    clear = coarse.convert("RGBA")
    clear.putalpha(coarse.convert("L"))
    frames = [coarse.rotate(angle) for angle in (90, 180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {}
    for name, image, format, options in [
            ("plain.jpg", coarse, "JPEG", {}), ("progressive.jpg", coarse, "JPEG", dict(progressive=True)),
            ("cmyk.jpg", coarse.convert("CMYK"), "JPEG", {}), ("gray.jpg", coarse.convert("L"), "JPEG", {}),
            ("turned.jpg", coarse, "JPEG", dict(exif=exif)), ("plain.png", coarse, "PNG", {}),
            ("clear.png", clear, "PNG", {}), ("deep.png", deep, "PNG", {}),
            ("palette.png", coarse.quantize(16), "PNG", dict(transparency=3)),
            ("moving.gif", coarse, "GIF", dict(save_all=True, append_images=frames)),
            ("moving.webp", coarse, "WEBP", dict(save_all=True, append_images=frames)),
            ("plain.webp", coarse, "WEBP", dict(lossless=True)), ("plain.bmp", coarse, "BMP", {}),
            ("plain.ppm", coarse, "PPM", {}), ("plain.tif", coarse, "TIFF", {}),
            ("packed.tif", coarse, "TIFF", dict(compression="tiff_lzw")), ("deep.tif", deep, "TIFF", {}),
            ("plain.jp2", coarse, "JPEG2000", {}), ("plain.avif", coarse, "AVIF", {})]:
        buffer = io.BytesIO()
        try:
            image.save(buffer, format, **options)
        except (KeyError, OSError):                 # not every PIL has JPEG 2000 and AVIF
            continue
        files[name] = buffer.getvalue()
    return files


def test_what_must_be_read_is_read():
    files = picture_files()
    first = numpy.asarray(decode(files["plain.png"]), int)
    for name, data in files.items():
        crops, _ = CROP(data, seed=0)
        assert [c.shape[0] for c in crops] == [2, 3]
        if name not in ("deep.png", "deep.tif", "palette.png", "clear.png", "gray.jpg"):
            upright = decode(data) if name != "turned.jpg" else decode(data).transpose(Image.ROTATE_90)
            assert abs(numpy.asarray(upright, int) - first).mean() < 16, name     # of animations the first frame
    ones = Image.new("RGB", (1, 1), (9, 8, 7)), Image.new("RGB", (1, 20000), (9, 8, 7)), Image.new("RGB", (20000, 1))
    for image in ones:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        crops, _ = CROP(buffer.getvalue(), seed=0)
        assert (crops[0] == torch.tensor(image.getpixel((0, 0))).view(3, 1, 1)).all()
    deep = io.BytesIO()
    Image.fromarray(numpy.array([[0, 30000], [30000, 65535]], numpy.uint16)).save(deep, "PNG", transparency=30000)
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
            for ours, plain in zip(crop(large.getvalue(), seed)[0], whole(large.getvalue(), seed)[0]):
                assert (ours.int() - plain.int()).abs().float().mean() < 3      # a pixel aside: 5
        assert set(used) >= {8}
    for size, by in ((64, 8), (150, 4), (151, 2), (301, 1)):        # a box of 600 x 602 pixels
        assert MultiCrop(parse_crops(f"1x{size}")).shrink([[(3, 5, 603, 607)]]) == by


def test_rubbish_is_replaced_named_and_counted_by_cause(tmp_path):
    files = picture_files()
    folder = tmp_path / "photos"
    write_pictures(folder, 20)
    header = b"IHDR" + (40000).to_bytes(4, "big") * 2 + files["plain.png"][24:29]
    huge = files["plain.png"][:12] + header + zlib.crc32(header).to_bytes(4, "big") + files["plain.png"][33:]
    arithmetic = files["plain.jpg"].replace(b"\xff\xc0", b"\xff\xc9", 1)       # says so, and is not
    rubbish = {
        "empty": b"", "no picture": b"<html>404</html>", "truncated": files["plain.jpg"][:700],
        "too large": huge}
    for cause, data in rubbish.items():
        (folder / f"{cause}.jpg").write_bytes(data)
    (folder / "truncated.png").write_bytes(files["plain.png"][:-800])
    (folder / "program.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n")
    (folder / "arithmetic.jpg").write_bytes(arithmetic)
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
    faults = {fault.name: fault.cause for position in range(2 * len(images)) for fault in stream[position][2]}
    faults.pop("arithmetic.jpg", None)                  # either way
    assert faults == {"truncated.png": "truncated", "program.png": "no picture", "pipe.jpg": "unreadable",
                      "endless.jpg": "unreadable"} | {
        f"{cause}.jpg": cause for cause in [*rubbish, "vanished", "unreadable"]}
    with pytest.raises(BadPicture, match="too large: 64 x 48 pixels"):
        MultiCrop(CROP.specs, max_pixels=3071)(files["plain.png"], 0)
    MultiCrop(CROP.specs, max_pixels=3072)(files["plain.png"], 0)


def resident_mb():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Bits turned, bytes set, cut out, doubled, or the end lost: one to eight times."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        if not data:
            break
        at = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 200))     # headers too
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


def fuzz(count: int) -> None:
    """In a process of its own, for a decoder may end it. Prints how many of each kind there were."""
    files, crop, seen, rng = picture_files(), MultiCrop(CROP.specs, max_pixels=10 ** 6), Counter(), random.Random(0)
    memory = []
    for i in range(count):
        signal.alarm(20)                                # a hang ends the process
        name = list(files)[i % len(files)]
        try:
            crops, _ = crop(mutated(files[name], rng), i)
            assert [c.shape for c in crops] == [(2, 3, 16, 16), (3, 3, 8, 8)]
            seen["decoded"] += 1
        except BadPicture as error:                     # nothing else may come out
            seen[error.cause] += 1
        if i >= count // 2 and i % (count // 10) == 0:
            memory.append(resident_mb())
    print(json.dumps({**seen, "grown_mb": memory[-1] - memory[0]}))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory in /proc")
@pytest.mark.parametrize("count", [500, pytest.param(20_000, marks=pytest.mark.long)])
def test_fuzz(count):
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", f"from test_images import *; fuzz({count})"],
                            capture_output=True, text=True, cwd=Path(__file__).parent,
                            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])})
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout)
    print(seen)
    assert seen.pop("grown_mb") < 20 and sum(seen.values()) == count
    assert min(seen["decoded"], seen["damaged"], seen["truncated"]) > count // 100


# ----------------------------------------------------------------------------- lists and memory
def test_a_list_of_paths(tmp_path):
    write_pictures(tmp_path / "photos", 3)
    (tmp_path / "photos" / "no suffix").write_bytes((tmp_path / "photos" / "0001.png").read_bytes())
    lines = ["photos/0002.png", str(tmp_path / "photos" / "0000.png"), "", "photos/no suffix"]
    for ending in ("\n", "\r\n"):
        (tmp_path / "list.txt").write_bytes(ending.join(lines).encode())
        images = open_images(tmp_path / "list.txt")
        assert [images.name(i) for i in range(len(images))] == [line for line in lines if line]
        assert images[1] == (tmp_path / "photos" / "0000.png").read_bytes() and images[2] == (
            tmp_path / "photos" / "0001.png").read_bytes()
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfphotos/0002.png")        # as Windows' editors write it
    assert open_images(tmp_path / "list.txt").name(0) == "photos/0002.png"
    with pytest.raises(ValueError, match="0002.png is no list of paths"):
        open_images(tmp_path / "photos" / "0002.png")
    (tmp_path / "none.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="no paths in"):
        open_images(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no such folder, list or shards"):
        open_images(tmp_path / "nothing.txt")


class Names:
    """Position -> a picture's name's length: what a worker needs of the list."""

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

    loader = iter(DataLoader(Names(open_images(path)), 1000, num_workers=8, multiprocessing_context=context))
    for _ in range(16):
        next(loader)
    print(json.dumps(all_pss()))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures memory in /proc")
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_ten_million_paths_in_eight_workers(tmp_path, context):
    for name, count in (("many", 10_000_000), ("few", 20_000)):
        with open(tmp_path / name, "w") as file:
            for start in range(0, count, 10_000):
                file.write("".join(f"photos/of/a/long/journey/{i // 1000:07d}/the-picture-{i:010d}.jpeg\n"
                                   for i in range(start, start + 10_000)))
    assert len(open_images(tmp_path / "few").name(0)) == 60
    whole = {}
    for name in ("many", "few"):
        script = f"from test_images import *\nif __name__ == '__main__': list_in_workers({str(tmp_path / name)!r}, {context!r})"
        (tmp_path / "script.py").write_text(script)
        result = subprocess.run([sys.executable, str(tmp_path / "script.py")], capture_output=True, text=True,
                                env=os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{Path(__file__).parent}"})
        assert result.returncode == 0, result.stderr
        processes, whole[name] = json.loads(result.stdout)
        assert processes == 9
    print(f"{context}: {whole['many']:.0f} MB in all 9 processes, {whole['few']:.0f} with 20,000 paths")
    assert whole["many"] - whole["few"] < 1000 and whole["many"] < 1500 + (context == "spawn") * whole["few"]


def test_a_billion_positions_are_a_permutation():
    n = 1_000_000_000
    images = [permute(position, n, 3) for position in [*range(50_000), *range(n - 50_000, n)]]
    assert len(set(images)) == 100_000 and 0 <= min(images) and max(images) < n
    assert abs(numpy.mean(images) / n - 0.5) < 0.005           # 5.5 standard errors
