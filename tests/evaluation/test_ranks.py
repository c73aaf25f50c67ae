"""Two ranks measure, write and train what one process does: features, export, supervised.

All are computed by one pair of processes, for it takes seconds to start them.
"""
import io
import json
import shutil
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy
import pytest
import torch

import evaluate
import train
from data.images import open_images
from data.labelled import open_splits
from evaluation import supervised
from evaluation.export import clusters, features
from evaluation.features import CenterCrops, Preprocessing, extract
from evaluation.finetune import Finetuned
from evaluation.supervised import RECIPES, fit
from evaluation.task import open_task
from methods.build import build_trunk
from swav import SwAV
from tests.evaluation.conftest import QUICK, RANDOM, write_shades
from tests.helpers import run_ranks
from weights.atomic import load, save

pytestmark = pytest.mark.long

class Means(torch.nn.Module):
    """A trunk without parameters: the mean colour."""
    num_features = 3

    def forward(self, images):
        return images.mean((2, 3))


class Two(Means):
    def forward(self, images):
        return [images.mean((2, 3)), images.flatten(1)[:, :5]]


def extracted(count=11):
    return extract(Two(), [(torch.full((3, 4, 4), i, dtype=torch.uint8), i % 7 > 0)
                           for i in range(count)])


def exported(folder, out):
    """Features and clusters by a network that takes no time, into files with this name."""
    torch.manual_seed(0)
    crops, model = CenterCrops(open_images(folder), 8), SwAV(Means(), (4, 2), 5)
    table, found = clusters(model, crops, Path(f"{out}.csv"))
    return [features(model.trunk, crops, Path(f"{out}.npy"), {}), (table, list(map(tuple, found)))]


def tuned(folder, out, frozen_statistics=True):
    """Two epochs. frozen_statistics: BatchNorm in eval mode, so that a step does not depend on the
    number of ranks."""
    (train, val), recipe = open_splits(folder), RECIPES["few"]
    torch.manual_seed(0)
    model = Finetuned(build_trunk("regnety_100mf"), len(train.classes))
    if frozen_statistics:
        model.train = lambda mode=True: torch.nn.Module.train(model, False)
    fresh = model.fc.weight.clone()
    reached = fit(model, train, val, recipe._replace(epochs=2, batch_size=8, lr=2), Path(out),
                  Preprocessing(32))
    assert (model.fc.weight - fresh).abs().max() > 0.01
    return reached, model.tensors(model.state_dict())


def printed(folder):
    """By evaluate.py, of an untrained network; it leaves the process group to run_ranks."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.setattr(evaluate, "leave_together", nullcontext)
        evaluate.main(["knn", *RANDOM, f"--data={folder}", *QUICK, "--k=5"])
    return out.getvalue()


def begin_export(one, begun):
    """What an interrupted `features` leaves: its rows 30 to 69 are not there yet."""
    for name in (".npy", ".ok.npy", ".txt", ".json"):
        shutil.copy(one.with_suffix(name), begun.with_suffix(name))
    done = numpy.lib.format.open_memmap(begun.with_suffix(".ok.npy"), "r+")
    rows = numpy.lib.format.open_memmap(begun.with_suffix(".npy"), "r+")
    done[30:70], rows[30:70] = 0, 7


def begin_training(folder, out):
    """What a fit leaves that ends after its first checkpoint."""
    def save_once(path, state):
        save(path, state)
        if Path(path).name == "checkpoint.pt":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supervised, "save", save_once)
        tuned(folder, out)
    assert load(out / "checkpoint.pt")["step"] == 6         # of 12


def same_files(one, *others):
    for name in (".npy", ".ok.npy", ".txt", ".json"):
        for other in others:
            assert (other.with_suffix(name).read_bytes()
                    == one.with_suffix(name).read_bytes()), (other, name)


def all_on_rank(rank, folder):
    """Also what goes on with what one process began, and training with BatchNorm in train mode."""
    shades, folder = f"{folder}/shades", Path(folder)
    return {"extracted": extracted(), "printed": printed(shades),
            "exported": [exported(shades, folder / name) for name in ("two", "begun")],
            "tuned": [tuned(shades, folder / name) for name in ("two", "begun")],
            "in train mode": tuned(shades, folder / "bn", frozen_statistics=False)}


@pytest.fixture(scope="module")
def alone_and_both(tmp_path_factory):
    """Their folder; what one process computes, and what each of two ranks does."""
    folder = tmp_path_factory.mktemp("ranks")
    shades = write_shades(folder / "shades")
    (shades / "val" / "3" / "1.png").write_bytes(b"no")
    alone = {"extracted": extracted(), "printed": printed(shades),
             "exported": exported(shades, folder / "one"),
             "tuned": tuned(str(shades), folder / "one")}
    begin_export(folder / "one", folder / "begun")
    begin_training(str(shades), folder / "begun")
    return folder, alone, run_ranks(all_on_rank, folder, str(folder))


def test_two_ranks_extract_what_one_does(alone_and_both):
    _, alone, both = alone_and_both
    expected, readable = alone["extracted"]
    for outputs, ok in (rank["extracted"] for rank in both):
        assert torch.equal(ok, readable) and all(map(torch.equal, outputs, expected))


def test_two_ranks_print_what_one_prints(alone_and_both):
    """Once. Started by torchrun: test_protocols.py."""
    _, alone, both = alone_and_both
    assert 100 / 6 < json.loads(alone["printed"])["top1"] < 100
    assert [rank["printed"] for rank in both] == [alone["printed"], ""]


def test_two_ranks_write_what_one_writes(alone_and_both):
    """Features, also where two go on with what one began, and clusters, byte by byte."""
    folder, alone, both = alone_and_both
    of_features, (of_clusters, nearest) = alone["exported"]
    assert (of_features["pictures"], of_features["left_out"]) == (84, 1) and of_clusters["used"] > 1
    for rank in both:
        for got, (got_clusters, got_nearest) in rank["exported"]:
            assert got | {"out": ""} == of_features | {"out": ""}
            assert got_clusters | {"out": ""} == of_clusters | {"out": ""}
            assert got_nearest == nearest
    same_files(folder / "one", folder / "two", folder / "begun")
    assert (folder / "two.csv").read_bytes() == (folder / "one.csv").read_bytes()


def test_two_ranks_tune_as_one(alone_and_both):
    """Also where two go on with what one began."""
    _, alone, both = alone_and_both
    reached, tensors = alone["tuned"]
    for rank in both:
        for got, of_rank in rank["tuned"]:
            assert got == reached
            for name, value in tensors.items():
                torch.testing.assert_close(of_rank[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_what_two_ranks_measure_is_the_network_that_is_saved(alone_and_both):
    """Each had running statistics of its own; rank 0's are saved, and all measure with them."""
    folder, _, both = alone_and_both
    saved = load(folder / "bn" / "last.pt")
    for rank in both:
        _, tensors = rank["in train mode"]
        assert all(torch.equal(tensors[name], value) for name, value in saved.items())


def protocols_on_rank(rank, *commands):
    return [evaluate.PROTOCOLS[argv[0]](open_task(evaluate.parse(argv))) for argv in commands]


@pytest.mark.long
def test_two_ranks_measure_a_run_as_one(shades, tmp_path):
    """The same of a run's RegNet and from the command line; and linear --sgd, whose BatchNorm has
    its own half of each batch, as in VISSL: there the ranks agree with each other."""
    run = tmp_path / "run"
    train.main([f"--data={shades}", f"--out={run}", "--recipe=demo", "--crops=2x32+2x16",
                "--steps=2", "--batch-size=4", "--workers=0", "--device=cpu", "--prototypes=7",
                "--head=16-8", "--channels-last", "--threads=1"])
    (shades / "val" / "3" / "1.png").write_bytes(b"no")

    def argv(what, out, *more):
        return [what, str(run), f"--data={shades}", f"--out={tmp_path / out}", *QUICK[1:], *more]

    sgd = "--sgd", "--epochs=6", "--batch-size=12", "--lr=1", "--depths=res2,avgpool"
    of_features, of_clusters, linear = protocols_on_rank(
        0, argv("features", "one.npy"), argv("clusters", "one.csv"), argv("linear", "one", *sgd))
    assert (of_features["pictures"], of_features["left_out"]) == (84, 1) and of_clusters["used"] > 1
    begin_export(tmp_path / "one", tmp_path / "begun")
    both = run_ranks(protocols_on_rank, tmp_path, argv("features", "two.npy"),
                     argv("features", "begun.npy"), argv("clusters", "two.csv"),
                     argv("linear", "two", *sgd))
    assert both[0] == both[1]
    two, begun, of_two, by_sgd = both[0]
    assert [row | {"out": ""} for row in (two, begun, of_two)] == [
        row | {"out": ""} for row in (of_features, of_features, of_clusters)]
    same_files(tmp_path / "one", tmp_path / "two", tmp_path / "begun")
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert [row["depth"] for row in by_sgd["all"]] == ["res2", "avgpool"]
    assert all(100 / 6 < row["best"] < 100 for row in (by_sgd, linear))
    assert abs(by_sgd["best"] - linear["best"]) < 25
