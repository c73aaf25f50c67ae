"""Each stored reference has a script that writes it; the quick ones make the same values again.

The scripts that need other libraries (timm, transformers, scikit-learn) or whole runs are not run.
"""
import ast
import importlib
import json

import pytest
import torch

from tests.helpers import ORACLES

STORED = sorted(path.name for path in ORACLES.iterdir() if path.suffix in (".pt", ".json"))
QUICK = ["larc.pt", "swav_loss.pt", "sinkhorn_2rank.pt", "regnet_tiny.pt", "regnet_widths.json",
         "regnet_complexity.json", "resnet50_swav_keys.json", "method_keys.json"]


def assert_same(made, stored, where=""):
    """float64 to 1e-12; float32, rounded from it, to 1e-6; what was computed in float32 to 1e-4."""
    assert type(made) is type(stored), where
    if isinstance(made, torch.Tensor):
        tolerance = 1e-12 if made.dtype == torch.float64 else 1e-6
        torch.testing.assert_close(made, stored, rtol=tolerance, atol=tolerance, msg=where)
    elif isinstance(made, dict):
        assert list(made) == list(stored), where
        for key in made:
            assert_same(made[key], stored[key], f"{where}/{key}")
    elif isinstance(made, list):
        assert len(made) == len(stored), where
        for i, pair in enumerate(zip(made, stored)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(made, float):
        assert made == pytest.approx(stored, rel=0, abs=1e-4 if "vissl" in where else 1e-12), where
    else:
        assert made == stored, where


@pytest.mark.parametrize("name", STORED)
def test_a_script_says_that_it_writes_the_file(name):
    summaries = [ast.get_docstring(ast.parse(path.read_text())).splitlines()[0]
                 for path in ORACLES.glob("make_*.py")]
    assert sum(summary.startswith(f"Write {name}") for summary in summaries) == 1


@pytest.mark.parametrize("name", QUICK)
def test_the_script_makes_the_stored_values(name):
    stem, suffix = name.split(".")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                    # small tensors: threads only wait for one another
    try:
        made = importlib.import_module(f"tests.oracles.make_{stem}").make()
    finally:
        torch.set_num_threads(threads)
    if suffix == "pt":
        assert_same(made, torch.load(ORACLES / name, weights_only=True))
    else:
        assert json.loads(json.dumps(made)) == json.loads((ORACLES / name).read_text())
