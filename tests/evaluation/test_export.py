"""evaluation/export.py: files of features, also resumed, and of clusters."""
import csv
from collections import Counter

import numpy
import pytest
import torch
from PIL import Image

import train
from data.images import open_images
from evaluation.features import CenterCrops, extract
from evaluation.task import load_trunk
from figures.sheets import prototype_name, sheet
from methods.build import build_method
from recipes.command_line import configure
from tests.evaluation.conftest import QUICK, RANDOM, normalised
from weights.atomic import load

TRAIN = ["--recipe=demo", "--crops=2x32+2x16", "--steps=2", "--batch-size=4", "--workers=0",
         "--device=cpu", "--prototypes=7", "--head=16-8", "--channels-last", "--threads=1"]


def test_features_go_to_a_file_and_are_resumed(classes, tmp_path, command, refused):
    out = tmp_path / "new" / "features.npy"
    options = [*RANDOM, *QUICK, f"--data={classes}", f"--out={out}"]
    (classes / "val" / "red" / "broken.png").write_bytes(b"no")
    result = command("features", *options)
    assert (result["pictures"], result["features"], result["left_out"]) == (35, 152, 1)
    images, written = open_images(classes), numpy.load(out, mmap_mode="r")
    names = out.with_suffix(".txt").read_text().splitlines()
    assert names == [images.name(i) for i in range(35)] and written.shape == (35, 152)
    ok = numpy.load(out.with_suffix(".ok.npy"))
    assert [name for name, good in zip(names, ok) if good < 0] == ["val/red/broken.png"]
    trunk, *_ = load_trunk("random", "regnety_100mf")
    (expected,), _ = extract(trunk, CenterCrops(images, 32))
    torch.testing.assert_close(torch.from_numpy(written[ok > 0]), expected[ok > 0])
    # interrupted: some rows are not there yet
    partly = numpy.lib.format.open_memmap(out, "r+")
    partly[5:], partly[:5] = 0, 7
    done = numpy.lib.format.open_memmap(out.with_suffix(".ok.npy"), "r+")
    done[5:] = 0
    del partly, done
    command("features", *options)
    again = numpy.load(out)
    assert (again[:5] == 7).all()
    assert numpy.allclose(again[5:][ok[5:] > 0], expected[5:][ok[5:] > 0])
    assert numpy.isnan(again[ok < 0]).all()
    for other in ("--size=48", "--precision=bf16"):
        assert "does not belong to these features" in refused("features", *options, other)


def test_clusters_are_the_nearest_prototypes(classes, tmp_path, capsys, monkeypatch, command,
                                             refused):
    drawn = []
    monkeypatch.setattr("evaluation.export.sheet",
                        lambda *arguments: (drawn.append(arguments), sheet(*arguments)))
    out = tmp_path / "run"
    train.main([f"--data={classes}", f"--out={out}", *TRAIN])
    capsys.readouterr()
    result = command("clusters", out, f"--data={classes}", *QUICK[1:],
                     f"--out={tmp_path / 'c.csv'}", f"--sheet={tmp_path / 'sheet.png'}")
    rows = list(csv.DictReader(open(tmp_path / "c.csv")))
    assert (result["pictures"], result["prototypes"], len(rows)) == (34, 7, 34)
    config = configure({"recipe": "demo", "prototypes": 7, "head": "16-8"})
    model = build_method(config).eval()
    model.load_state_dict(load(out / "checkpoint.pt")["model"])
    images = open_images(classes)
    for i in (0, 20, 33):
        with torch.no_grad():
            _, scores = model([normalised(images, 32, indices=[i])])
        assert rows[i]["name"] == images.name(i)
        assert int(rows[i]["prototype"]) == scores.argmax().item()
        confidence = (scores / 0.1).softmax(1).max().item()
        assert float(rows[i]["confidence"]) == pytest.approx(confidence, abs=1e-3)
    assert Image.open(tmp_path / "sheet.png").width > 300
    (_, said, shown), = drawn
    counts = Counter(int(row["prototype"]) for row in rows).most_common()
    assert [row.name for row in shown] == [prototype_name(k, count) for k, count in sorted(
        counts, key=lambda pair: (-pair[1], pair[0]))]
    assert said.startswith("Clusters: 34 images by their nearest of 7 prototypes; "
                           f"{len(counts)} prototypes have images.\nA row each")
    with torch.no_grad():
        _, scores = model([normalised(images, 32)])
    cosines, prototype = scores.max(1)
    for row in shown:
        members = prototype == int(row.name.split()[1])
        expected = cosines[members].sort(descending=True).values[:10].tolist()
        assert [float(tile.text[0]) for tile in row.tiles] == pytest.approx(expected, abs=1e-3)
    halved = command("clusters", out, f"--data={classes}", *QUICK[1:], "--precision=bf16",
                     f"--out={tmp_path / 'bf16.csv'}")
    assert halved["precision"] == "bf16" and "precision" not in result
    for row, halved_row in zip(rows, csv.DictReader(open(tmp_path / "bf16.csv")), strict=True):
        assert float(halved_row["confidence"]) == pytest.approx(float(row["confidence"]), abs=0.02)
    assert "holds no prototypes" in refused("clusters", out / "trunk.pt", f"--data={classes}",
                                            *QUICK[1:])
