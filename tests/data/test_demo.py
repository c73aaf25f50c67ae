"""demo.py: what the built-in pictures promise, and how hard and how easy they are."""
import io
import math
import pickle

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

import train
from demo import DemoImages
from classifiers import knn, linear_probe, per_cent
from labelled import Centred, extract
from images import Positions, Stream, collate
from multicrop import MultiCrop, Photometric, parse_crops
from recipes import configure
from regnet import ARCHS, RegNet

TRAIN, VAL = DemoImages("train"), DemoImages("val")


def pixels(images):
    data = [numpy.asarray(Image.open(io.BytesIO(images[i]))) for i in range(len(images))]
    return torch.from_numpy(numpy.stack(data)).flatten(1).float(), torch.from_numpy(images.labels)


def test_pictures_are_pure_functions_of_seed_split_and_number():
    again = pickle.loads(pickle.dumps(DemoImages("train", count=50)))
    assert len(TRAIN) == 4096 and len(VAL) == 1024
    for i in (0, 7, 49):
        assert again[i] == TRAIN[i] and again.name(i) == TRAIN.name(i)
        assert TRAIN[i] != VAL[i] and TRAIN[i] != DemoImages("train", seed=1)[i]
        assert Image.open(io.BytesIO(TRAIN[i])).size == (64, 64)


def test_at_least_ten_kinds_in_equal_numbers():
    counts = numpy.bincount(TRAIN.labels)
    assert len(counts) == len(TRAIN.classes) >= 10 and counts.max() - counts.min() <= 1


def test_no_picture_is_in_both_splits():
    assert not {TRAIN[i] for i in range(512)} & {VAL[i] for i in range(512)}


def test_raw_pixels_do_not_give_the_kind_away():
    (x, labels), (queries, truth) = pixels(TRAIN), pixels(VAL)
    mean, std = x.mean(0), x.std(0)
    for a, b in ((x, queries), (x - mean, queries - mean), ((x - mean) / std, (queries - mean) / std)):
        top1 = (knn(a, labels, b) == truth).float().mean().item()
        print(f"raw pixels: {top1:.1%}")        # plain, centred, standardised
        assert top1 <= 0.20


@pytest.mark.parametrize("seed", [0, 1])
def test_an_untrained_trunk_does_not_give_the_kind_away(seed):
    torch.manual_seed(seed)
    trunk = RegNet(ARCHS["regnety_100mf"]).to(memory_format=torch.channels_last)
    x, queries = (extract(trunk, Centred(images, 64, 1.0))[0][0] for images in (TRAIN, VAL))
    predicted = knn(x, torch.from_numpy(TRAIN.labels), queries)
    assert (predicted == torch.from_numpy(VAL.labels)).float().mean() <= 0.25


@pytest.mark.long
def test_labels_make_them_easy():
    """The demo's trunk, trained with labels for no more pictures than the demo run has crops."""
    config = configure({})
    torch.manual_seed(0)
    trunk = RegNet(ARCHS["regnety_100mf"])
    model = torch.nn.Sequential(trunk, torch.nn.Linear(trunk.num_features, len(TRAIN.classes)))
    model = model.to(memory_format=torch.channels_last)
    cpu = torch.device("cpu")
    dtype, workers = train.pick_precision("auto", cpu), train.share_processors(config, cpu)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    stream = Stream(TRAIN, MultiCrop(parse_crops("1x64@0.4-1"), 0.2, gray=0.0, blur=0.0), seed=0)
    photometric, positions = Photometric(), Positions(0, config.steps, 128)
    loader = DataLoader(stream, batch_sampler=positions, collate_fn=collate, num_workers=workers)
    for step, (batch, (crops, params, _)) in enumerate(zip(positions, loader)):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, step / 50) * (1 + math.cos(math.pi * step / config.steps)) / 2
        images = photometric(crops[0], params[0]).to(memory_format=torch.channels_last)
        labels = torch.tensor([TRAIN.labels[stream.index(position)] for position in batch])
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
    (logits,), _ = extract(model, Centred(VAL, 64, 1.0))
    top1 = (logits.argmax(1) == torch.from_numpy(VAL.labels)).float().mean().item()
    x, queries = (extract(trunk, Centred(images, 64, 1.0))[0][0] for images in (TRAIN, VAL))
    labels, truth = torch.from_numpy(TRAIN.labels), torch.from_numpy(VAL.labels)
    print(f"supervised, {config.steps} steps of 128: classifier {top1:.1%}, kNN "
          f"{per_cent(knn(x, labels, queries), truth)} %, linear "
          f"{per_cent(linear_probe(x, labels, queries)[0], truth)} %")
    assert top1 >= 0.90
