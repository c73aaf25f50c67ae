"""What several tests of evaluation use: labelled images, and evaluate.py in this process."""
import contextlib
import json
import subprocess
import sys

import numpy
import pytest
import torch
from PIL import Image

import evaluate
from evaluation.features import CenterCrops
from multicrop import IMAGENET_MEAN, IMAGENET_STD

RANDOM = ["random", "--arch=regnety_100mf"]
QUICK = ["--size=32", "--workers=0", "--device=cpu"]


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """As the ranks have it. On small tensors it is as fast, and on a busy machine several times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def classes(tmp_path):
    """Red and blue images, 12 + 12 and 5 + 5: an untrained network tells them apart too."""
    folder = tmp_path / "colours"
    for split, count in (("train", 12), ("val", 5)):
        for colour in ("red", "blue"):
            for i in range(count):
                place = folder / split / colour / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                shade = Image.new("RGB", (40, 50), colour)
                Image.blend(shade, Image.new("RGB", (40, 50), "white"), i / 50).save(place)
    return folder


@pytest.fixture
def locked():
    """The folder's lock, in the hands of another process: a process does not exclude itself."""
    pytest.importorskip("fcntl")
    hold = ("import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()")

    @contextlib.contextmanager
    def run(folder):
        with subprocess.Popen([sys.executable, "-c", hold, folder / ".lock"], text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout.readline() == "held\n"
            yield
            process.stdin.close()
    return run


def write_shades(folder):
    """Six classes that overlap, 48 and 36 images: an untrained network tells apart some of them."""
    rng = numpy.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for k, colour in enumerate(rng.integers(0, 256, (6, 3))):
            (folder / split / f"{k}").mkdir(parents=True)
            for i in range(count):
                mixed = 0.25 * colour + 0.75 * rng.integers(0, 256, 3)
                Image.new("RGB", (40, 50), tuple(mixed.astype(int).tolist())).save(
                    folder / split / f"{k}" / f"{i}.png")
    return folder


@pytest.fixture
def shades(tmp_path):
    return write_shades(tmp_path / "shades")


@pytest.fixture
def command(capsys):
    """evaluate.py's result, the last line that it prints."""
    def run(*argv):
        evaluate.main([*map(str, argv)])
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return run


@pytest.fixture
def refused(capsys):
    """The one sentence with which evaluate.py turns a command line down."""
    def run(*argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            evaluate.main([*map(str, argv)])
        *usage, sentence = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and [line[:7] for line in usage] in ([], ["usage: "])
        return sentence
    return run


def normalised(images, *geometry, indices=None):
    """Center crops with ImageNet's mean and std (N, 3, s, s).  indices: of which; none: all."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    indices = range(len(images)) if indices is None else indices
    crops = CenterCrops(images, *geometry)
    return torch.stack([(crops[i][0] / 255 - mean) / std for i in indices])
