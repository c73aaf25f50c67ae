"""evaluation/linear.py against scikit-learn (oracles/make_linear.py), and from the command line."""
import json

import torch

from evaluation.linear import fit_linear, linear_probe
from tests.evaluation.conftest import QUICK, RANDOM
from tests.helpers import ORACLES


def test_linear_equals_an_independent_solver():
    stored = json.loads((ORACLES / "linear.json").read_text())
    features, queries = (torch.tensor(stored[name], dtype=torch.float64)
                         for name in ("features", "queries"))
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
            torch.testing.assert_close(weights, torch.tensor(expected).double(),
                                       rtol=1e-5, atol=1e-6)
        single = fit_linear(standardised.float(), labels, 4, float(decay))
        single[-1] -= single[-1].mean()
        torch.testing.assert_close(single, torch.tensor(expected), rtol=1e-2, atol=1e-2)
    for dtype in (torch.float32, torch.float64):
        predicted, decay = linear_probe(features.to(dtype), labels, queries.to(dtype),
                                        [float(decay) for decay in stored["fits"]])
        assert predicted.tolist() == stored["predicted"] and decay == stored["chosen"]


def test_linear_from_the_command_line(classes, tmp_path, command):
    options = ["--seed=1", "--data", classes, *QUICK]
    result = command("linear", *RANDOM, *options, "--depths=res3,avgpool")
    assert result["top1"] == 100
    assert [row["depth"] for row in result["all"]] == ["res3", "avgpool"]
    assert result["protocol"] == "linear" and "k" not in result
    result = command("linear", *RANDOM, *options, "--sgd", "--epochs=12", "--batch-size=8",
                     "--lr=1", "--depths=res4,avgpool", f"--out={tmp_path / 'sgd'}")
    assert result["top1"] == 100
    assert [row["depth"] for row in result["all"]] == ["res4", "avgpool"]
