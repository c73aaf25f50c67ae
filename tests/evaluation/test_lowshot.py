"""evaluation/lowshot.py against liblinear (oracles/make_svm.py), and from the command line."""
import json

import pytest
import torch
from torch.nn import functional as F

from evaluation.linear import linear
from evaluation.lowshot import draw_shots, fit_svm, svm_scores
from evaluation.metrics import average_precision, mean_average_precision
from tests.evaluation.conftest import QUICK, RANDOM
from tests.helpers import ORACLES


@pytest.mark.long
def test_svms_equal_liblinears():
    stored = json.loads((ORACLES / "svm.json").read_text())
    features, queries = (torch.tensor(stored[name], dtype=torch.float64)
                         for name in ("features", "queries"))
    targets, truth = torch.tensor(stored["is_of"]).split([len(features), len(queries)])
    unit = F.normalize(features, dim=1)
    for cost, expected in stored["fits"].items():
        weights = fit_svm(unit, targets, torch.full((3,), float(cost)), tolerance=1e-9)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64).t(),
                                   rtol=1e-4, atol=1e-5)
        scores, costs = svm_scores(features, targets, queries, [float(cost)])
        assert costs.tolist() == [float(cost)] * 3
        torch.testing.assert_close(scores, linear(F.normalize(queries, dim=1), weights),
                                   rtol=1e-4, atol=1e-4)
        precisions = torch.stack([average_precision(scores[:, k], truth[:, k]) for k in range(3)])
        torch.testing.assert_close(precisions, torch.tensor(stored["precisions"][cost]).double())
        mean = 100 * precisions.mean().item()
        assert mean_average_precision(scores, truth) == pytest.approx(mean, abs=0.01)


def test_more_features_than_images_change_nothing():
    """They are turned into as many as there are images: the same scores."""
    torch.manual_seed(0)
    x, q = torch.randn(20, 50).double(), torch.randn(7, 50).double()
    targets = torch.rand(20, 2) > 0.5
    scores, _ = svm_scores(x, targets, q, [1.0])
    x, q = (F.normalize(rows, dim=1) for rows in (x, q))
    plain = linear(q, fit_svm(x, targets, torch.ones(2)))
    torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("seeds", [(2, 3), range(4)])
def test_the_cost_is_the_one_that_does_best_on_held_out_images(seeds):
    """Three folds, brute force. Too few images of the class for three folds: cost 1."""
    chosen = set()
    for seed in seeds:
        torch.manual_seed(seed)
        x = F.normalize(torch.randn(60, 20).double(), dim=1)
        targets = ((x[:, :1] > 0.1) ^ (torch.rand(60, 1) < 0.1 * seed))
        fold, means, seen = torch.empty(60, dtype=torch.long), {}, [0, 0]
        for i in range(60):                         # those of the class, and the others, in turn
            fold[i] = seen[targets[i, 0]] % 3
            seen[targets[i, 0]] += 1
        for cost in (0.01, 1.0, 1000.0):
            precisions = []
            for f in range(3):
                weights = fit_svm(x[fold != f], targets[fold != f], torch.tensor([cost]))
                precisions.append(average_precision(linear(x[fold == f], weights)[:, 0],
                                                    targets[fold == f, 0]))
            means[cost] = sum(precisions).item() / 3
        cost = svm_scores(x, targets, x, (0.01, 1.0, 1000.0))[1].item()
        assert means[cost] == pytest.approx(max(means.values()), abs=1e-9)
        chosen.add(cost)
    assert len(chosen) > 1
    few = torch.zeros(60, 1, dtype=torch.bool)
    few[:2] = True
    assert svm_scores(x, few, x, (0.1, 1000.0))[1].tolist() == [1.0]


def test_draws_have_so_many_images_of_each_class():
    targets = torch.zeros(60, 3, dtype=torch.bool)
    targets[torch.arange(60), torch.arange(60) % 3] = True
    draws = [draw_shots(targets, 4, seed) for seed in range(3)]
    assert all(targets[draw].sum(0).tolist() == [4, 4, 4] for draw in draws)
    assert draws[0].tolist() != draws[1].tolist()
    assert draws[0].tolist() == draw_shots(targets, 4, 0).tolist()


def test_lowshot_of_one_label_and_of_several(classes, command, refused):
    options = [*RANDOM, "--data", classes, *QUICK]
    result = command("lowshot", *options, "--shots=1,4,40", "--draws=3")
    assert (result["shots"], result["top1"]) == (4, 100) and len(result["all"]) == 2
    for split in ("train", "val"):
        names = sorted((classes / split).glob("*/*.png"))
        (classes / f"{split}.txt").write_text("".join(
            f"{split}/{name.parent.name}/{name.name} {name.parent.name},any\n" for name in names))
    result = command("lowshot", *options, "--shots=6", "--draws=2")
    assert result["map"] == 100 and "top1" not in result
    assert "one label each" in refused("knn", *options)
