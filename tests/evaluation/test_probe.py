"""evaluation/probe.py: what it measures, and that it leaves the trunk as it was."""
import numpy
import pytest
import torch
from PIL import Image

from data.images import open_images
from evaluation.probe import Probe, open_probe
from methods.build import build_trunk
from multicrop import MultiCrop, Photometric, parse_crops
from recipes.command_line import configure
from tests.helpers import write_pictures


class Colours(torch.nn.Module):
    """Mean colour of each quarter: enough to know an image again, if it is not changed much."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def probe_of(folder, strength=0.0):
    views = MultiCrop(parse_crops("2x24@0.9-1"), strength, gray=0.0, blur=0.0, flip=0.0)
    return Probe(open_images(folder), views, Photometric())


def test_classes_are_predicted_by_the_votes_of_the_others(tmp_path):
    for name, colour in (("red", (220, 20, 20)), ("blue", (20, 20, 220))):
        for i in range(8):
            noise = numpy.random.default_rng(i).integers(-20, 20, (30, 30, 3))
            place = tmp_path / name / f"{i}.png"
            place.parent.mkdir(exist_ok=True)
            Image.fromarray((noise + colour).clip(0, 255).astype(numpy.uint8)).save(place)
    probe = probe_of(tmp_path)
    assert probe(Colours()) == {"knn": 100.0}
    assert probe(torch.nn.Flatten())["knn"] == 100.0
    probe.labels = probe.labels[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    assert probe(Colours())["knn"] < 100


def test_without_labels_two_views_of_an_image_find_each_other(tmp_path):
    write_pictures(tmp_path, 12)
    (tmp_path / "broken.png").write_bytes(b"no")
    probe = probe_of(tmp_path)
    assert probe(Colours())["retrieved"] > 80                       # chance: 8 %

    class Blind(torch.nn.Module):
        def forward(self, images):
            return torch.ones(len(images), 3)

    assert probe(Blind())["retrieved"] == pytest.approx(100 / 12, abs=0.01)


def test_a_trunk_is_as_it_was(tmp_path):
    write_pictures(tmp_path, 4)
    trunk = build_trunk("regnety_100mf").train()
    before = {name: value.clone() for name, value in trunk.state_dict().items()}
    state = torch.get_rng_state()
    probe_of(tmp_path)(trunk)
    assert trunk.training and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in trunk.state_dict().items())
    with pytest.raises(ValueError, match="at least two images"):
        (tmp_path / "one").mkdir()
        write_pictures(tmp_path / "one", 1)
        probe_of(tmp_path / "one")


def test_a_run_opens_its_probe(tmp_path):
    """Two views of the size of its first crops, normalised as in the run."""
    write_pictures(tmp_path / "photos", 5)
    config = configure({"probe": str(tmp_path / "photos"), "crops": "3x32@0.5-1+4x16",
                        "mean": "0.1,0.2,0.3"})
    probe = open_probe(config, torch.device("cpu"), torch.float32)
    assert probe.crops.shape == (10, 3, 32, 32)
    torch.testing.assert_close(probe.photometric.mean.flatten(), torch.tensor([0.1, 0.2, 0.3]))
    for split in ("train", "val"):
        write_pictures(tmp_path / "photos" / split, 2)
    with pytest.raises(ValueError, match="name one of them"):
        open_probe(config, torch.device("cpu"), torch.float32)
