"""evaluation/export.py: files of features and of clusters, resumed, and written by two ranks."""
import csv
import shutil
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import evaluate
import train
from data.images import open_images
from evaluation.export import clusters, features
from evaluation.features import CenterCrops, extract
from evaluation.task import load_trunk, open_task
from methods.build import build_method
from recipes.command_line import configure
from swav import SwAV
from tests.evaluation.conftest import QUICK, RANDOM, normalised
from tests.helpers import run_ranks
from weights.atomic import load

TRAIN = ["--recipe=demo", "--crops=2x32+2x16", "--steps=2", "--batch-size=4", "--workers=0",
         "--device=cpu", "--prototypes=7", "--head=16-8"]


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
    assert "holds other features" in refused("features", *options, "--size=48")


def test_clusters_are_the_nearest_prototypes(classes, tmp_path, capsys, command, refused):
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
    assert "holds no prototypes" in refused("clusters", out / "trunk.pt", f"--data={classes}",
                                            *QUICK[1:])


# --------------------------------------------------------------------------------- on two ranks
class Means(torch.nn.Module):
    """A trunk without parameters: the mean colour."""
    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))


def export_on_rank(rank, folder, out, begun=None):
    """Features and clusters of a small set by a small network, into files named `out`."""
    torch.manual_seed(0)
    crops, model = CenterCrops(open_images(folder), 8), SwAV(Means(), (4, 2), 5)
    results = [features(model.trunk, crops, Path(f"{out}.npy"), {}),
               *clusters(model, crops, Path(f"{out}.csv"))]
    return results + [features(model.trunk, crops, Path(begun), {})] if begun else results


def begin(out, begun):
    """What an interrupted `features` leaves: its rows 30 to 69 are not there yet."""
    for name in (".npy", ".ok.npy", ".txt", ".json"):
        shutil.copy(out.with_suffix(name), begun.with_suffix(name))
    done = numpy.lib.format.open_memmap(begun.with_suffix(".ok.npy"), "r+")
    rows = numpy.lib.format.open_memmap(begun.with_suffix(".npy"), "r+")
    done[30:70], rows[30:70] = 0, 7


def same_files(one, others):
    for name in (".npy", ".ok.npy", ".txt", ".json"):
        for other in others:
            assert (other.with_suffix(name).read_bytes()
                    == one.with_suffix(name).read_bytes()), (other, name)


def test_two_ranks_write_what_one_writes(shades, tmp_path):
    """By a network that takes no time; with a RegNet, and from the command line: below."""
    (shades / "val" / "3" / "1.png").write_bytes(b"no")
    one, two, begun = (tmp_path / name for name in ("one", "two", "begun"))
    exported, of_clusters, nearest = export_on_rank(0, shades, one)
    assert (exported["pictures"], exported["left_out"]) == (84, 1) and of_clusters["used"] > 1
    begin(one, begun)
    both = run_ranks(export_on_rank, tmp_path, str(shades), str(two), str(begun))
    assert both[0] == both[1]
    assert [row | {"out": ""} for row in (both[0][0], both[0][1], both[0][3])] == [
        row | {"out": ""} for row in (exported, of_clusters, exported)]
    assert both[0][2] == nearest
    same_files(one, (two, begun))
    assert two.with_suffix(".csv").read_bytes() == one.with_suffix(".csv").read_bytes()


def protocols_on_rank(rank, *commands):
    return [evaluate.PROTOCOLS[argv[0]](open_task(evaluate.parse(argv))) for argv in commands]


@pytest.mark.long
def test_two_ranks_measure_what_one_measures(shades, tmp_path):
    """Features, also where two go on with what one began, and clusters, byte by byte. (Trained by
    SGD, the probes' BatchNorm has its own half of each batch, as in VISSL: there the ranks agree
    with each other.)"""
    run = tmp_path / "run"
    train.main([f"--data={shades}", f"--out={run}", *TRAIN])
    (shades / "val" / "3" / "1.png").write_bytes(b"no")

    def argv(what, out, *more):
        return [what, str(run), f"--data={shades}", f"--out={tmp_path / out}", *QUICK[1:], *more]

    sgd = "--sgd", "--epochs=6", "--batch-size=12", "--lr=1", "--depths=res2,avgpool"
    exported, of_clusters, linear = protocols_on_rank(
        0, argv("features", "one.npy"), argv("clusters", "one.csv"), argv("linear", "one", *sgd))
    assert (exported["pictures"], exported["left_out"]) == (84, 1) and of_clusters["used"] > 1
    begin(tmp_path / "one.npy", tmp_path / "begun.npy")
    both = run_ranks(protocols_on_rank, tmp_path, argv("features", "two.npy"),
                     argv("features", "begun.npy"), argv("clusters", "two.csv"),
                     argv("linear", "two", *sgd))
    assert both[0] == both[1]
    two, begun, of_two, by_sgd = both[0]
    assert [row | {"out": ""} for row in (two, begun, of_two)] == [
        row | {"out": ""} for row in (exported, exported, of_clusters)]
    same_files(tmp_path / "one.npy", (tmp_path / "two.npy", tmp_path / "begun.npy"))
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert [row["depth"] for row in by_sgd["all"]] == ["res2", "avgpool"]
    assert all(100 / 6 < row["best"] < 100 for row in (by_sgd, linear))
    assert abs(by_sgd["best"] - linear["best"]) < 25
