"""evaluation/summary.py: what a finished run leaves to look at."""
import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from data.demo import DemoImages
from data.images import open_images
from evaluation import summary
from evaluation.features import CenterCrops, extract
from evaluation.knn import knn_top1
from methods.build import build_method, build_trunk
from recipes.command_line import configure
from tests.helpers import write_pictures

SMALL = {"recipe": "demo", "crops": "2x16+2x16", "prototypes": 7, "head": "16-8", "workers": 0}


def test_the_untrained_trunk_is_the_one_that_training_begins_with():
    config = configure({"recipe": "demo", "seed": 3})
    torch.manual_seed(config.seed)
    fresh, begun = build_trunk(config.arch).state_dict(), build_method(config).trunk.state_dict()
    assert all(torch.equal(fresh[name], value) for name, value in begun.items())


@pytest.fixture
def threads():
    """look_back takes all processors."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def finished(tmp_path, images, **options):
    """A run without a step, with a log of one line."""
    config = configure(SMALL | options, images=images)
    (tmp_path / "config.json").write_text(json.dumps({"config": config.as_dict()}))
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 2.0, "prototypes_used": 0.5}\n')
    return SimpleNamespace(config=config, method=build_method(config), out=tmp_path,
                           device=torch.device("cpu"), stream=SimpleNamespace(images=images))


def test_a_demo_is_compared_with_what_has_learned_nothing(tmp_path, capsys, monkeypatch, threads):
    train, val = DemoImages("train", 36), DemoImages("val", 24)
    monkeypatch.setattr(summary, "DemoImages", lambda split: val)
    run = finished(tmp_path, train)
    for parameter in run.method.trunk.parameters():         # "trained": other features
        parameter.data.mul_(1.1)
    summary.look_back(run)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert list(rows) == ["raw pixels, two by two", "untrained trunk", "trained trunk"]
    assert all(0 <= row[what] <= 100 for row in rows.values() for what in ("knn", "linear"))
    assert "held-out demo images of 12 kinds, per cent" in capsys.readouterr().out
    labels, truth = torch.from_numpy(train.labels), torch.from_numpy(val.labels)
    (x,), (q,) = (extract(run.method.trunk, CenterCrops(images, 16, 1.0))[0]
                  for images in (train, val))
    assert rows["trained trunk"]["knn"] == knn_top1(x, labels, q, truth)
    assert Image.open(tmp_path / "prototypes.png").width > 16


def test_of_other_images_a_sample_is_shown(tmp_path, monkeypatch, threads):
    monkeypatch.setattr(summary, "SHEET", 5)
    write_pictures(tmp_path / "photos", 9)
    shown = []
    monkeypatch.setattr(summary, "prototypes",
                        lambda path, scores, images: (shown.append(images), path.touch()))
    summary.look_back(finished(tmp_path, open_images(tmp_path / "photos"),
                               data=str(tmp_path / "photos")))
    assert shown[0].shape == (5, 3, 16, 16) and (tmp_path / "prototypes.png").exists()
    assert not (tmp_path / "results.json").exists()
