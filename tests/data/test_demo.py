"""demo.py: what the built-in images promise, and how hard and how easy they are."""
import functools
import io
import math
import pickle

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from data.demo import DemoImages, png
from data.stream import Positions, Stream, collate
from distributed.hardware import autocast, count_workers, pick_precision
from evaluation.features import CenterCrops, extract
from evaluation.knn import knn, knn_top1
from evaluation.linear import linear_probe
from evaluation.metrics import per_cent
from multicrop import MultiCrop, Photometric, parse_crops
from recipes.command_line import configure
from regnet import ARCHS, RegNet

TRAIN, VAL = DemoImages("train"), DemoImages("val")
CPU = torch.device("cpu")
# images of each split that are looked at: a part at every change, all of them in a long test
PARTS = pytest.mark.parametrize("train, val", [
    (768, 384), pytest.param(4096, 1024, marks=pytest.mark.long)])


@functools.cache
def decoded(split, count):
    """The first images of a split, as CenterCrops gives them; and their labels."""
    images = DemoImages(split, count)
    crops = CenterCrops(images, 64, 1.0)
    return [crops[i] for i in range(count)], torch.from_numpy(images.labels)


def pixels(split, count):
    crops, labels = decoded(split, count)
    return torch.stack([crop for crop, _ in crops]).flatten(1).float(), labels


def test_pictures_are_pure_functions_of_seed_split_and_number():
    again = pickle.loads(pickle.dumps(DemoImages("train", count=50)))
    assert len(TRAIN) == 4096 and len(VAL) == 1024
    for i in (0, 7, 49):
        first = TRAIN[i]
        assert TRAIN[i] is first                        # kept, and made anew it is the same
        png.cache_clear()
        assert again[i] == first and again[i] is not first and again.name(i) == TRAIN.name(i)
        assert TRAIN[i] != VAL[i] and TRAIN[i] != DemoImages("train", seed=1)[i]
        assert Image.open(io.BytesIO(TRAIN[i])).size == (64, 64)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="no split 'test' .* only train, val"):
        DemoImages("test")


def test_at_least_ten_kinds_in_equal_numbers():
    counts = numpy.bincount(TRAIN.labels)
    assert len(counts) == len(TRAIN.classes) >= 10 and counts.max() - counts.min() <= 1


@pytest.mark.parametrize("count", [128, pytest.param(1024, marks=pytest.mark.long)])
def test_no_picture_is_in_both_splits(count):
    assert not {TRAIN[i] for i in range(count)} & {VAL[i] for i in range(count)}


@PARTS
def test_raw_pixels_do_not_give_the_kind_away(train, val):
    (x, labels), (queries, truth) = pixels("train", train), pixels("val", val)
    mean, std = x.mean(0), x.std(0)
    for centre, scale in ((0, 1), (mean, 1), (mean, std)):      # plain, centred, standardised
        top1 = knn_top1((x - centre) / scale, labels, (queries - centre) / scale, truth)
        print(f"raw pixels: {top1} %")
        assert top1 <= 20


@PARTS
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_an_untrained_trunk_does_not_give_the_kind_away(seed, train, val):
    torch.manual_seed(seed)
    trunk = RegNet(ARCHS["regnety_100mf"]).to(memory_format=torch.channels_last)
    (crops, labels), (queries, truth) = decoded("train", train), decoded("val", val)
    (features,), _ = extract(trunk, crops)
    (held_out,), _ = extract(trunk, queries)
    top1 = knn_top1(features, labels, held_out, truth)
    print(f"untrained trunk: {top1} %")
    assert top1 <= 25


@pytest.mark.measured
def test_labels_make_them_easy():
    """The demo's trunk, trained with labels for no more images than the demo run has crops."""
    config = configure({})
    torch.manual_seed(0)
    trunk = RegNet(ARCHS["regnety_100mf"])
    model = torch.nn.Sequential(trunk, torch.nn.Linear(trunk.num_features, len(TRAIN.classes)))
    model = model.to(memory_format=torch.channels_last)
    dtype, workers = pick_precision("auto", CPU), count_workers(-1, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    crop = MultiCrop(parse_crops("1x64@0.4-1"), 0.2, gray=0.0, blur=0.0)
    stream, photometric = Stream(TRAIN, crop, seed=0), Photometric()
    positions = Positions(0, config.steps, 128)
    loader = DataLoader(stream, batch_sampler=positions, collate_fn=collate, num_workers=workers)
    for step, (batch, (crops, params, _)) in enumerate(zip(positions, loader)):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / config.steps)) / 2
            group["lr"] = 3e-3 * min(1, step / 50) * cosine
        images = photometric(crops[0], params[0]).to(memory_format=torch.channels_last)
        labels = torch.tensor([TRAIN.labels[stream.index(position)] for position in batch])
        optimizer.zero_grad()
        with autocast(CPU, dtype):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    (crops, labels), (queries, truth) = decoded("train", len(TRAIN)), decoded("val", len(VAL))
    (logits,), _ = extract(model, queries)
    top1 = per_cent(logits.argmax(1), truth)
    (x,), _ = extract(trunk, crops)
    (held_out,), _ = extract(trunk, queries)
    print(f"supervised, {config.steps} steps of 128: classifier {top1} %, kNN "
          f"{per_cent(knn(x, labels, held_out), truth)} %, linear "
          f"{per_cent(linear_probe(x, labels, held_out)[0], truth)} %")
    assert top1 >= 90
