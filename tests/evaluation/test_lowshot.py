"""classifiers.py against brute force, and against scikit-learn (data/make_linear.py, make_svm.py)."""
import json
import math
from pathlib import Path

import pytest
import torch

from classifiers import (average_precision, fit_linear, fit_svm, linear, linear_probe, mean_precision,
                         neighbours, svm_scores, vote)

DATA = Path(__file__).parent / "data"


def test_knn_equals_its_definition():
    torch.manual_seed(0)
    features, queries = torch.randn(60, 5), torch.randn(23, 5)
    labels = torch.randint(0, 4, (60,))
    for chunk in (0, 1, 7, 1000):
        similarities, nearest = neighbours(features, queries, 100, chunk)
        for k, temperature in ((1, 0.1), (5, 0.07), (60, 1.0), (100, 0.5), (20, 0.002)):
            expected = []
            for q in queries.double():
                similarity = [(torch.dot(q, f) / q.norm() / f.norm()).item() for f in features.double()]
                votes = [0.0] * 4
                for i in sorted(range(60), key=lambda i: -similarity[i])[:k]:
                    votes[labels[i]] += math.exp((similarity[i] - max(similarity)) / temperature)
                expected.append(votes.index(max(votes)))
            predicted = vote(similarities[:, :k], labels[nearest[:, :k]], temperature, 4)
            assert predicted.tolist() == expected


def test_linear_equals_an_independent_solver():
    stored = json.loads((DATA / "linear.json").read_text())
    features, queries = (torch.tensor(stored[name], dtype=torch.float64) for name in ("features", "queries"))
    labels = torch.tensor(stored["labels"])
    std = features.std(0)
    std[-1] = 1                                                 # the constant one
    standardised = (features - features.mean(0)) / std
    start = None
    for decay, expected in stored["fits"].items():
        fresh = fit_linear(standardised, labels, 4, float(decay), tolerance=1e-9)
        start = fit_linear(standardised, labels, 4, float(decay), start, tolerance=1e-9)
        for weights in (fresh, start):
            weights[-1] -= weights[-1].mean()
            torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        single = fit_linear(standardised.float(), labels, 4, float(decay))
        single[-1] -= single[-1].mean()
        torch.testing.assert_close(single, torch.tensor(expected), rtol=1e-2, atol=1e-2)
    for dtype in (torch.float32, torch.float64):
        predicted, decay = linear_probe(features.to(dtype), labels, queries.to(dtype),
                                        [float(decay) for decay in stored["fits"]])
        assert predicted.tolist() == stored["predicted"] and decay == stored["chosen"]


@pytest.fixture(scope="module")
def svm():
    stored = json.loads((DATA / "svm.json").read_text())
    features, queries = (torch.tensor(stored[name], dtype=torch.float64) for name in ("features", "queries"))
    is_of = torch.tensor(stored["is_of"])
    return stored, features, queries, is_of[:len(features)], is_of[len(features):]


def test_svms_equal_liblinears(svm):
    stored, features, queries, is_of, truth = svm
    unit = torch.nn.functional.normalize(features, dim=1)
    for cost, expected in stored["fits"].items():
        weights = fit_svm(unit, is_of, torch.full((3,), float(cost)), tolerance=1e-9)
        torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64).t(), rtol=1e-4, atol=1e-5)
        scores, costs = svm_scores(features, is_of, queries, [float(cost)])
        assert costs.tolist() == [float(cost)] * 3
        torch.testing.assert_close(scores, linear(torch.nn.functional.normalize(queries, dim=1), weights),
                                   rtol=1e-4, atol=1e-4)
        precisions = torch.stack([average_precision(scores[:, k], truth[:, k]) for k in range(3)])
        torch.testing.assert_close(precisions, torch.tensor(stored["precisions"][cost]).double())
        assert mean_precision(scores, truth) == pytest.approx(100 * precisions.mean().item(), abs=0.01)


def test_more_features_than_pictures_change_nothing():
    """They are turned into as many as there are pictures: the same scores."""
    torch.manual_seed(0)
    x, q = torch.randn(20, 50).double(), torch.randn(7, 50).double()
    is_of = torch.rand(20, 2) > 0.5
    scores, _ = svm_scores(x, is_of, q, [1.0])
    x, q = (torch.nn.functional.normalize(some, dim=1) for some in (x, q))
    plain = linear(q, fit_svm(x, is_of, torch.ones(2)))
    torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-5)


def test_the_cost_is_the_one_that_does_best_on_held_out_pictures():
    """Three folds, brute force. Too few pictures of the class for three folds: cost 1."""
    chosen = set()
    for seed in range(4):
        torch.manual_seed(seed)
        x = torch.nn.functional.normalize(torch.randn(60, 20).double(), dim=1)
        is_of = ((x[:, :1] > 0.1) ^ (torch.rand(60, 1) < 0.1 * seed))
        fold, means, seen = torch.empty(60, dtype=torch.long), {}, [0, 0]
        for i in range(60):                         # those of the class, and the others, in turn
            fold[i] = seen[is_of[i, 0]] % 3
            seen[is_of[i, 0]] += 1
        for cost in (0.01, 1.0, 1000.0):
            precisions = []
            for f in range(3):
                weights = fit_svm(x[fold != f], is_of[fold != f], torch.tensor([cost]))
                precisions.append(average_precision(linear(x[fold == f], weights)[:, 0], is_of[fold == f, 0]))
            means[cost] = sum(precisions).item() / 3
        cost = svm_scores(x, is_of, x, (0.01, 1.0, 1000.0))[1].item()
        assert means[cost] == pytest.approx(max(means.values()), abs=1e-9)
        chosen.add(cost)
    assert len(chosen) > 1
    few = torch.zeros(60, 1, dtype=torch.bool)
    few[:2] = True
    assert svm_scores(x, few, x, (0.1, 1000.0))[1].tolist() == [1.0]


def test_average_precision_of_ties(svm):
    stored = svm[0]
    got = average_precision(torch.tensor(stored["tied"]).float(), torch.tensor(stored["relevant"]))
    assert got.item() == pytest.approx(stored["tied_precision"])
    assert average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True])).item() == (
        pytest.approx((1 + 2 / 3) / 2))
