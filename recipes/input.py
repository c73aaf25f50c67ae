"""The input of a run: how fast it is, measured on a sample; whether images are shrunk first; and
how many processes read them.

    stream = Stream(images, crop_of(config), config.seed)
    config, stream.images, workers, text = settle(config, images, device.type)

Shrinking changes the pixels, so it is decided once a run, by rank 0, and kept in its configuration
(`shrink`). Where shrunk images are stored (`cache`), and the number of workers, change nothing but
the speed.
"""
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from data.cache import Shrunk, cache_folder, needed_side
from data.stream import permute
from distributed.hardware import (
    autocast,
    count_workers,
    layout,
    pick_precision,
    processors,
)
from distributed.ranks import fail_together, gather_lists, is_main
from methods.build import build_method
from multicrop import MultiCrop, Photometric
from recipes.config import Config
from recipes.medium import CPU_TFLOPS, training_flops

SAMPLE, SECONDS = 32, 2.0            # images that are measured: so many, but no longer than that
FEW = 8                              # of small ones
LONG = 1e11                          # FLOP an image, of training: more are not timed
PAYS = 2.0                           # times faster: then images are shrunk by themselves
MOST, SHARE = 20e9, 0.25             # bytes of a cache by itself: at most, and of the free disk


class Speed(NamedTuple):
    """Of a worker process, from a sample. Seconds an image: from the original; of shrinking; from
    the shrunk image. Bytes of the cache, an image of the set. Number of images measured."""
    original: float
    shrinking: float
    shrunk: float
    stored: float
    measured: int


def measure(images, work: Callable, shrunk: Shrunk | None) -> Speed | None:
    """work(bytes, seed): what a worker does with an image. shrunk: None, or how images are shrunk.

    The sample is the same at each call. None where nothing in it can be read.
    """
    threads, spent, stored, done = torch.get_num_threads(), [0.0] * 3, 0, 0
    begin = time.perf_counter()
    torch.set_num_threads(1)                            # as in a worker
    try:
        for i in range(min(SAMPLE, len(images))):
            index = permute(i, len(images), 0)
            times = [time.perf_counter()]
            try:
                work(original := images[index], i)
                times.append(time.perf_counter())
                small = shrunk.shrink(original) if shrunk else original
                times.append(time.perf_counter())
                if small is not original:
                    work(small, i)
                    stored += len(small)
                times.append(time.perf_counter())
            except Exception:           # decoders raise nearly anything on damaged files
                continue
            took = [after - before for before, after in zip(times, times[1:])]
            if small is original:
                took[2] = took[0]
            spent, done = [a + b for a, b in zip(spent, took)], done + 1
            if times[-1] - begin > SECONDS or done == FEW and not stored:       # all are small
                break
    finally:
        torch.set_num_threads(threads)
    return Speed(*(total / done for total in spent), stored / done, done) if done else None


class Input(NamedTuple):
    config: Config                       # with `shrink` decided
    images: object                       # shrunk, where they are to be
    workers: int                         # of a rank
    text: str                            # what to say; "" where nothing was measured


def settle(config: Config, images, device_type: str, world: int = 1,
           done: int | None = None) -> Input:
    """Decide what is not decided yet. A collective.

    done: steps of a run that is resumed; one from before there was `shrink` goes on without. None:
    a new run. Raises ValueError for a folder that cannot be written.
    """
    side = config.shrink if config.shrink >= 0 else needed_side(config.crops)
    if config.shrink < 0 and (config.cache == "off" or done is not None):
        config = replace(config, shrink=0)
    found = []
    with fail_together():
        if is_main():
            check_folder(config)
            found = [decide(config, images, side, device_type, world, done or 0)]
    (shrink, workers, text), = gather_lists(found)
    config = replace(config, shrink=shrink)
    if shrink:
        images = Shrunk(images, shrink, folder_of(config), config.max_pixels)
    return Input(config, images, workers, text)


def decide(config: Config, images, side: int, device_type: str, world: int,
           done: int) -> tuple[int, int, str]:
    """`shrink`, the number of workers, and the text."""
    workers, compute = count_workers(config.workers, device_type), 0.0
    if done >= config.steps:
        return max(0, config.shrink), workers, ""
    shrunk = Shrunk(images, side, max_pixels=config.max_pixels) if config.shrink else None
    speed = measure(images, worker_of(config, device_type), shrunk)
    if config.shrink < 0:
        config = replace(config, shrink=side * chosen(config, images, speed))
    if speed is None:
        return config.shrink, workers, ""
    if device_type == "cpu" and (config.workers < 0 or config.recipe not in ("demo", "small")):
        compute = computing(config)
    if compute and config.workers < 0:
        workers = balance(seconds_an_epoch(config, speed)[-1], compute)
    text = describe(config, images, side, speed, max(1, workers) * world, done)
    if compute:
        left = (config.steps - done) * config.batch_size / world
        text += f"\ncomputing: about {duration(left * compute / torch.get_num_threads())}"
    return config.shrink, workers, text


def crop_of(config: Config) -> MultiCrop:
    return MultiCrop(config.crops, config.strength_at, gray=config.gray, blur=config.blur,
                     max_pixels=config.max_pixels, solarize=config.solarize)


def worker_of(config: Config, device_type: str) -> Callable:
    """What a worker does with an image: on a CPU also the augmentation (data/loader.py)."""
    crop, photometric = crop_of(config), Photometric(config.mean, config.std)

    def work(data: bytes, seed: int) -> None:
        for crops, params in zip(*crop(data, seed)):
            if device_type == "cpu":
                photometric(crops, params)
    return work


def folder_of(config: Config) -> Path | None:
    """Where shrunk images are kept; None: nowhere."""
    if config.cache not in ("auto", "off"):
        return Path(config.cache)
    try:
        return None if config.cache == "off" else cache_folder() / "images"
    except RuntimeError:                                # a user without a home
        return None


def check_folder(config: Config) -> None:
    """Raises ValueError where --cache names no folder that can be written."""
    if config.cache in ("auto", "off"):
        return
    there = nearest(Path(config.cache))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--cache {config.cache}: needs auto, off, or a folder that can be "
                         "written")


def chosen(config: Config, images, speed: Speed | None) -> bool:
    """Whether a run that was not told shrinks its images."""
    if config.cache != "auto":
        return True
    folder = folder_of(config)
    if folder is None or speed is None or not hasattr(images, "identity"):
        return False
    return (speed.original > PAYS * speed.shrunk
            and speed.stored * len(images) < min(MOST, SHARE * free(folder)))


def nearest(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def free(folder: Path) -> float:
    """Bytes that the disk of a folder, which need not be there yet, has left."""
    try:
        return shutil.disk_usage(nearest(folder)).free
    except OSError:
        return 0.0


def seconds_an_epoch(config: Config, speed: Speed) -> tuple[float, float]:
    """Seconds an image of one worker, in the first epoch and in later ones."""
    if not config.shrink:
        return speed.original, speed.original
    first = speed.shrinking + speed.shrunk
    return first, speed.shrunk if folder_of(config) else first


def computing(config: Config) -> float:
    """Processor-seconds an image of a step on this CPU: three forward passes of the trunk, which is
    timed on black crops of two images, with the threads of the run. One that would take seconds is
    taken to run at CPU_TFLOPS."""
    device, flops = torch.device("cpu"), training_flops(config.arch, config.crops)
    if flops > LONG:
        return flops / (CPU_TFLOPS * 1e12) * processors()
    torch.set_num_threads(config.threads or processors())
    trunk = build_method(config, "meta").trunk.to_empty(device=device).eval()
    form = layout(device, config.channels_last)
    trunk.to(memory_format=form)
    for tensor in trunk.state_dict().values():
        tensor.zero_()
    crops = [torch.zeros(2 * spec.count, 3, spec.size, spec.size).to(memory_format=form)
             for spec in config.crops]
    with torch.no_grad(), autocast(device, pick_precision(config.precision, device)):
        for _ in range(2):                              # the first time prepares
            begin = time.perf_counter()
            for same_size in crops:
                trunk(same_size)
            seconds = time.perf_counter() - begin
    return 3 * seconds / 2 * torch.get_num_threads()


def balance(decoding: float, computing: float) -> int:
    """Workers of a rank on a CPU, from processor-seconds an image: their part of the work, of all
    processors, rounded up. The computing threads wait while workers have their processors."""
    return max(1, math.ceil(processors() * decoding / (decoding + computing)))


def describe(config: Config, images, side: int, speed: Speed, workers: int,
             done: int) -> str:
    """How long the input takes, and what is cached. side: that was measured.  workers: of all
    ranks."""
    left, folder = (config.steps - done) * config.batch_size, folder_of(config)
    unseen = max(0, min(len(images) - done * config.batch_size, left))
    first, later = seconds_an_epoch(config, speed)
    seconds = (unseen * first + (left - unseen) * later) / workers
    rate, cache = f"{1 / first:,.0f} images/s", ""
    size = f"{speed.stored * len(images) / 1e6:,.0f} MB"
    if config.shrink and folder:
        rate += f" in the first epoch, then {1 / later:,.0f},"
        cache = (f"\ncache: images are shrunk to a shorter side of {side} pixels and kept, about "
                 f"{size} in {folder}, safe to delete (without: "
                 f"{duration(left * speed.original / workers)})")
    elif config.shrink:
        cache = f"\nimages are shrunk to a shorter side of {side} pixels, and not kept"
    elif speed.original > PAYS * speed.shrunk:
        cache = (f"\ncache: --cache FOLDER would keep images shrunk to {side} pixels, about "
                 f"{size}; then {1 / speed.shrunk:,.0f} images/s from the second epoch on")
    return (f"input: {rate} a worker process, measured on {speed.measured} images; with {workers} "
            f"about {duration(seconds)} for this run, if computing is no slower{cache}")


def duration(seconds: float) -> str:
    """4 s, 12 min, 3.5 h, 12 days."""
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 72)):
        if seconds < most * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds / 86400:,.0f} days"
