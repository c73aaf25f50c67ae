"""evaluation/metrics.py against scikit-learn (oracles/make_svm.py) and by hand."""
import json

import pytest
import torch

from evaluation.metrics import average_precision, mean_average_precision, per_cent
from tests.helpers import ORACLES


def test_average_precision_of_ties():
    stored = json.loads((ORACLES / "svm.json").read_text())
    got = average_precision(torch.tensor(stored["tied"]).float(), torch.tensor(stored["relevant"]))
    assert got.item() == pytest.approx(stored["tied_precision"])
    got = average_precision(torch.tensor([3.0, 2.0, 1.0]), torch.tensor([True, False, True]))
    assert got.item() == pytest.approx((1 + 2 / 3) / 2)


def test_classes_without_an_image_do_not_count():
    scores = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.0, 3.0], [1.0, 0.0, 2.0]])
    targets = torch.tensor([[1, 0, 1], [0, 0, 0], [1, 0, 1]], dtype=torch.bool)
    first, last = (1 + 2 / 3) / 2, (1 / 2 + 2 / 3) / 2
    assert mean_average_precision(scores, targets) == round(100 * (first + last) / 2, 2)
    assert per_cent(torch.tensor([1, 2, 3]), torch.tensor([1, 0, 3])) == 66.67
