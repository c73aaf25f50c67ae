"""Input: from encoded images to crops, to batches and to features; and the order of the images.

    result = bench_input("2x160+4x96", repeats=5)           # milliseconds an image
"""
import io
import itertools
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy
import torch
from PIL import Image
from torch.utils.data import DataLoader

from bench.baseline import baseline_crops
from bench.timing import in_turn
from data.cache import Shrunk, needed_side
from data.images import open_images
from data.stream import Positions, Stream, collate, mix, permute
from evaluation.features import BATCH, CenterCrops, in_batches
from methods.build import build_trunk
from multicrop import CropSpec, MultiCrop, Photometric, parse_crops, random_box


def jpeg(width: int, height: int, seed: int, quality: int = 93) -> bytes:
    """An image of clouds at all scales and some grain; 75 kB at 500 x 375."""
    rng, total = numpy.random.default_rng(seed), 0.0
    for octave in range(2, 8):
        small = rng.random((height // 2 ** octave + 2, width // 2 ** octave + 2, 3)) * 255
        cloud = Image.fromarray(small.astype(numpy.uint8)).resize((width, height), Image.BICUBIC)
        total = total + numpy.asarray(cloud, numpy.float32) * 2 ** (octave / 2)
    total = (total - total.min()) * (255 / (total.max() - total.min()))
    grainy = total + rng.standard_normal(total.shape, numpy.float32) * 8
    buffer = io.BytesIO()
    Image.fromarray(grainy.clip(0, 255).astype(numpy.uint8)).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Encoded:
    """A dataset of encoded images, the given ones again and again: len(), [i], .name(i)."""

    def __init__(self, images: list[bytes], length: int = 10 ** 6):
        self.images, self.length = images, length

    def __len__(self) -> int:
        return self.length

    def name(self, i: int) -> str:
        return str(i)

    def __getitem__(self, i: int) -> bytes:
        return self.images[i % len(self.images)]


# ------------------------------------------------------------------------------ images to crops
def bench_input(crops: str, repeats: int) -> dict:
    """Milliseconds an image on one core: of `from_image_to_crops` for two sizes of images, and of
    the whole loader, one worker process, beside the stream alone."""
    torch.set_num_threads(1)
    specs = parse_crops(crops)
    worker, seeds = MultiCrop(specs), itertools.count()
    result = {"crops": crops, "repeats": repeats}
    print(f"{crops}, one core, ms an image, median of {repeats} in turn")
    for width, height, count in ((500, 375, 32), (4000, 3000, 4)):
        result[f"{width}x{height}"] = from_image_to_crops(specs, worker, width, height, count,
                                                          seeds, repeats)
    stream = Stream(Encoded([jpeg(500, 375, seed) for seed in range(32)]), worker, seed=0)
    result["loader"] = statistics.median(loader_ms(stream) for _ in range(repeats))
    alone = in_turn({"": lambda: [stream[p] for p in range(64)]}, repeats)[""] / 64
    result["loader / stream"] = result["loader"] / alone
    print(f"\nthe whole loader, one worker process: {result['loader']:.2f} ms an image, "
          f"{result['loader / stream']:.2f} times the stream alone ({alone:.2f})")
    return result


def from_image_to_crops(specs: Sequence[CropSpec], worker: MultiCrop, width: int, height: int,
                        count: int, seeds: Iterator[int], repeats: int) -> dict[str, float]:
    """Milliseconds an image: (a) decoding alone, for large images also at the scale that is chosen;
    (b) what a worker does; (c) the baseline; (d) worker and augmentation. And their ratios."""
    images = [jpeg(width, height, seed) for seed in range(count)]
    photometric, scales = Photometric(), []

    def decoding(data, shrink=1):
        image = Image.open(io.BytesIO(data))
        if shrink > 1:
            image.draft(None, (width // shrink, height // shrink))
        image.load()

    def chosen(data):               # the scales that the worker chooses, in turn
        rng = random.Random(next(seeds))
        boxes = [[random_box(width, height, spec.scale, rng) for _ in range(spec.count)]
                 for spec in specs]
        scales.append(worker.shrink(boxes))
        decoding(data, scales[-1])

    def both(data):
        return [photometric(x, p) for x, p in zip(*worker(data, next(seeds)))]

    ways: dict[str, Callable] = {
        "(a) decoding": decoding, "(a') at the chosen scale": chosen,
        "(b) worker": lambda data: worker(data, next(seeds)),
        "(c) baseline": baseline_crops(specs), "(d) worker, augmentation": both}
    ms = in_turn({name: partial(lambda way: [way(data) for data in images], way)
                  for name, way in ways.items()}, repeats)
    ms = {name: whole / count for name, whole in ms.items()}
    size = sum(map(len, images)) / count / 1e3
    print(f"\n{width} x {height}, {size:.0f} kB, scales chosen "
          f"{dict(sorted(Counter(scales).items()))}")
    for name, one in ms.items():
        print(f"{name:<26}{one:>9.2f}")
    ratios = {"c / b": ms["(c) baseline"] / ms["(b) worker"],
              "c / d": ms["(c) baseline"] / ms["(d) worker, augmentation"],
              "b / a": ms["(b) worker"] / ms["(a) decoding"],
              "b / a'": ms["(b) worker"] / ms["(a') at the chosen scale"]}
    print("   ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))
    return ms | ratios


def bench_cache(crops: str, repeats: int, size: tuple[int, int] = (4000, 3000),
                count: int = 16) -> dict:
    """Milliseconds an image on one core, from a file to crops: of large JPEGs; of the same in the
    first epoch with a cache and in later ones; and of the same stored at the size of the cache."""
    torch.set_num_threads(1)
    specs, result = parse_crops(crops), {"crops": crops, "repeats": repeats, "size": size}
    with TemporaryDirectory() as temporary:
        large, small, kept = (Path(temporary, name) for name in ("large", "small", "kept"))
        for folder in (large, small, kept):
            folder.mkdir()
        for i in range(count):
            (large / f"{i:02}.jpg").write_bytes(jpeg(*size, i))
        cached = Shrunk(open_images(large), needed_side(specs), kept)
        for i in range(count):
            (small / f"{i:02}.jpg").write_bytes(cached[i])

        def epoch(images):
            stream = Stream(images, MultiCrop(specs), seed=0)
            return [stream[position] for position in range(count)]

        def first_epoch():
            shutil.rmtree(kept)
            return epoch(cached)

        ms = in_turn({"(a) as they are": lambda: epoch(cached.images),
                      "(b) cache, first epoch": first_epoch,
                      "(c) cache, later epochs": lambda: epoch(cached),
                      "(d) stored small": partial(epoch, open_images(small))}, repeats)
        result |= {name: whole / count for name, whole in ms.items()}
        result |= {"side": cached.side,
                   "kB": sum(path.stat().st_size for path in small.iterdir()) / count / 1e3}
    print(f"{crops}: {size[0]} x {size[1]} shrunk to a shorter side of {cached.side}, "
          f"{result['kB']:.0f} kB; one core, ms an image, median of {repeats} in turn")
    for name in ms:
        print(f"{name:<26}{result[name]:>9.2f}")
    return result


def loader_ms(stream: Stream) -> float:
    """Milliseconds an image, of a data loader with one worker process."""
    loader = iter(DataLoader(stream, batch_sampler=Positions(0, 40, 32), collate_fn=collate,
                             num_workers=1))
    for _ in range(4):              # made before the clock runs
        next(loader)
    start = time.perf_counter()
    read = sum(1 for _ in loader)
    return (time.perf_counter() - start) / read / 32 * 1e3


# --------------------------------------------------------------------------- images to features
def bench_features(arch: str, device: torch.device, repeats: int) -> dict:
    """Seconds of evaluate.py's features of JPEGs of 500 x 375 pixels, at 224, with one worker; of
    the trunk alone, on as many black images, also as it usually is; and of the input alone. With
    all threads the worker takes some of their time; with one fewer it has a processor to itself."""
    batches = 6
    encoded = Encoded([jpeg(500, 375, seed) for seed in range(16)], batches * BATCH)
    crops = CenterCrops(encoded, 224)
    trunk, plain = build_trunk(arch), build_trunk(arch).eval().to(device)
    black = torch.zeros(3, 224, 224, dtype=torch.uint8), True
    options, images = {"device": device, "desc": ""}, torch.zeros(BATCH, 3, 224, 224, device=device)
    ways = {"together": lambda: list(in_batches(trunk, crops, workers=1, **options)),
            "trunk": lambda: list(in_batches(trunk, [black] * len(crops), **options)),
            "trunk, NCHW": torch.no_grad()(lambda: [plain(images) for _ in range(batches)]),
            "input": lambda: list(DataLoader(crops, BATCH, num_workers=1))}
    result = {"arch": arch, "pictures": len(crops), "repeats": repeats}
    print(f"features of {len(crops)} images, {arch}, 224 pixels, one worker; {device}, torch "
          f"{torch.__version__}, median of {repeats} in turn, seconds")
    available = torch.get_num_threads()
    for threads in sorted({available, max(1, available - 1)}):
        torch.set_num_threads(threads)
        ms = in_turn(ways, repeats, device)
        ratio = ms["together"] / max(ms["trunk"], ms["input"])
        result[f"{threads} threads"] = ms | {"ratio": ratio}
        print(f"{threads} threads: " + "  ".join(f"{name} {ms[name] / 1e3:.2f}" for name in ms)
              + f"; together {ratio:.2f} times the larger of trunk and input")
    return result


# ------------------------------------------------------------------------ the order of the images
def bench_order(repeats: int, count: int = 1_000_000_000) -> dict:
    """Microseconds from a position of the stream to its image, among `count`."""
    positions = [mix(i) % count for i in range(10_000)]
    ms = in_turn({"order": lambda: [permute(p, count, 7) for p in positions]}, repeats)
    us = ms["order"] / len(positions) * 1e3
    print(f"{us:.2f} microseconds a position, of {count:,}; median of {repeats}")
    return {"pictures": count, "microseconds": us, "repeats": repeats}
