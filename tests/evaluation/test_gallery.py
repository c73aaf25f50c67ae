"""evaluation/gallery.py: neighbours, labels and links; what clusters --html writes."""
import csv
import json
import re

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.transforms import functional as TF

import evaluation.gallery
from data.demo import DemoImages
from data.images import open_images
from evaluation.features import CenterCrops, extract
from evaluation.gallery import address_of, labels_of, nearest_others
from evaluation.task import load_trunk
from methods.build import build_method
from recipes.command_line import configure
from tests.evaluation.conftest import QUICK
from tests.helpers import write_pictures
from weights.atomic import save


def test_the_nearest_others_are_those_of_brute_force():
    features = torch.randn(50, 7, dtype=torch.float64)
    features[20:40] = features[20]              # more that are equal than neighbours
    unit = F.normalize(features, dim=1)
    similarity, near = nearest_others(features, 5)
    assert near.shape == (50, 5)
    for i in range(50):
        cosines = [(float(unit[i] @ unit[j]), j) for j in range(50) if j != i]
        expected = sorted(cosines, reverse=True)[:5]
        assert similarity[i].tolist() == pytest.approx([cosine for cosine, _ in expected])
        assert i not in near[i] and len(set(near[i].tolist())) == 5
        if not 20 <= i < 40 and not {*range(20, 40)} & {j for _, j in expected}:
            assert near[i].tolist() == [j for _, j in expected]
    assert nearest_others(features[:3])[1].sort().values.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert nearest_others(features[:1])[1].shape == (1, 0)


def test_labels_are_top_folders_and_names_are_linked(classes, tmp_path):
    train = open_images(classes / "train")
    assert labels_of(train, str(classes / "train")).tolist() == train.labels.tolist()
    assert labels_of(open_images(classes), str(classes)) is None            # train and val
    assert labels_of(open_images(classes / "train" / "red"), "") is None    # no folders
    write_pictures(tmp_path / "a b" / "one", 2)
    single = open_images(tmp_path / "a b")
    assert single.classes == ["one"] and labels_of(single, "") is None
    assert address_of(single, tmp_path / "new" / "gallery") == "../../a%20b/"
    (tmp_path / "list.txt").write_text(f"a b/one/0000.png\n{tmp_path}/a b/one/0001.png\n")
    assert address_of(open_images(tmp_path / "list.txt"), tmp_path) == ""
    assert address_of(DemoImages("val"), tmp_path) == ""


def test_a_gallery_of_a_runs_clusters(classes, tmp_path, command, refused, monkeypatch):
    model = build_method(configure({"recipe": "demo", "head": "16-8", "prototypes": 4}))
    save(tmp_path / "model.pt", model.state_dict())
    photos, out = classes / "train", tmp_path / "gallery"
    (photos / "blue" / "broken.png").write_bytes(b"no")
    options = ["clusters", tmp_path / "model.pt", f"--data={photos}", *QUICK]
    out.mkdir()
    (out / "index.html").write_text("mine")
    assert "is there already" in refused(*options, f"--html={out}")
    assert (out / "index.html").read_text() == "mine"
    result = command(*options, f"--html={out}", "--force")
    rows = {row["name"]: row for row in csv.DictReader(open(out / "clusters.csv"))}
    assert result["out"] == str(out / "clusters.csv") and len(rows) == result["pictures"] == 24
    data = json.loads(re.search(r'id="data">(.*)</script', (out / "index.html").read_text())[1])
    assert {*data["names"]} == {*rows} and data["originals"] == "../colours/train/"
    assert data["about"].startswith("24 images by their nearest of 4 prototypes; ")
    images = open_images(photos)
    names = [images.name(i) for i in range(25)]
    trunk, *_ = load_trunk(str(tmp_path / "model.pt"))
    (features,), _ = extract(trunk, CenterCrops(images, 32))
    unit, sheet = F.normalize(features, dim=1), Image.open(out / "thumbs" / "0.jpg")
    for i, name in enumerate(data["names"]):
        column, row = 96 * (i % 8), 96 * (i // 8)
        tile = TF.pil_to_tensor(sheet.crop((column, row, column + 96, row + 96))).float()
        assert (tile - CenterCrops(images, 96)[names.index(name)][0]).abs().mean() < 3
        assert data["cluster"][i] == int(rows[name]["prototype"])
        assert data["confidence"][i] == pytest.approx(float(rows[name]["confidence"]), abs=6e-4)
        assert data["classes"][data["labels"][i]] == name.split("/")[0]
        cosines = [float(unit[names.index(name)] @ unit[names.index(data["names"][j])])
                   for j in data["near"][i]]
        assert data["similarity"][i] == pytest.approx(cosines, abs=2e-3) and len(cosines) == 12
    for other, words in ((["--out=c.csv", f"--html={out}2"], "leave out --out"),
                         ([f"--html={photos}/red", "--force"], "lies in it"),
                         ([f"--html={classes}", "--force"], "holds the images themselves")):
        assert words in refused(*options, *other)
    monkeypatch.setattr(evaluation.gallery, "MOST", 24)
    assert "at most 24 images, and there are 25" in refused(*options, f"--html={out}3")
