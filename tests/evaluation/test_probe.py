"""probe.py: what it measures, and that it leaves the trunk as it was."""
import numpy
import pytest
import torch
from PIL import Image
from test_images import write_pictures

from images import open_images
from multicrop import MultiCrop, Photometric, parse_crops
from probe import Probe
from scale import build_trunk


class Colours(torch.nn.Module):
    """Mean colour of each quarter: enough to know a picture again, if it is not turned into another."""

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def probe_of(folder, strength=0.0):
    views = MultiCrop(parse_crops("2x24@0.9-1"), strength, gray=0.0, blur=0.0, flip=0.0)
    return Probe(open_images(folder), views, Photometric())


def test_classes_are_told_by_the_votes_of_the_others(tmp_path):
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


def test_without_labels_two_views_of_a_picture_find_each_other(tmp_path):
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
    with pytest.raises(ValueError, match="at least two pictures"):
        (tmp_path / "one").mkdir()
        write_pictures(tmp_path / "one", 1)
        probe_of(tmp_path / "one")
