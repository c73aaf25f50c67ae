"""The demo run against its reference: curves of five seeds, tests/oracles/demo_curves.json."""
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from distributed.hardware import pick_precision
from tests.helpers import ORACLES, ROOT

CURVES = json.loads((ORACLES / "demo_curves.json").read_text())
HEALTHY = [seed["curve"] for seed in CURVES["healthy"].values()]
MARGIN = 0.03                # of ln K: another run may lie a little outside these


def band(step):
    """Lowest and highest loss / ln K of the healthy runs at a step, with a margin."""
    values = [curve["loss_over_ln_k"][curve["step"].index(step)] for curve in HEALTHY]
    return min(values) - MARGIN, max(values) + MARGIN


def test_the_reference_runs_did_what_the_readme_says():
    whole = [seed for seed in CURVES["healthy"].values() if "trained" in seed]
    assert len(whole) == 5 and len(HEALTHY) == 6        # and one rounded otherwise
    for seed in whole:
        assert seed["untrained"]["knn"] <= 25 and seed["trained"]["knn"] >= 90
        assert seed["trained"]["linear"] > seed["untrained"]["linear"]
        assert seed["curve"]["loss_over_ln_k"][-1] < 0.8
        assert seed["curve"]["prototypes_used"][-1] > 0.5


def test_stuck_runs_leave_the_band():
    for stuck in CURVES["stuck"].values():
        low, high = band(100)
        assert not low < stuck["curve"]["loss_over_ln_k"][stuck["curve"]["step"].index(100)] < high


@pytest.mark.long
@pytest.mark.skipif(pick_precision("auto", torch.device("cpu")) != torch.bfloat16,
                    reason="the references are runs in bf16, which this processor does not compute")
def test_a_fresh_short_run_stays_inside_the_band(tmp_path):
    """The first 100 steps of seed 0, which another machine rounds in another way."""
    log = tmp_path / "run" / "log.jsonl"
    command = [sys.executable, str(ROOT / "train.py"), "--seed=0", "--device=cpu",
               "--log-every=25", f"--out={log.parent}"]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                           env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})
    try:
        deadline = time.monotonic() + 1500
        entries = []
        while len(entries) < 4:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
            time.sleep(0.5)
            lines = log.read_text().splitlines() if log.exists() else []
            entries = [json.loads(line) for line in lines if line.endswith("}")]
    finally:
        run.terminate()
        run.wait()
    assert [entry["step"] for entry in entries[:4]] == [25, 50, 75, 100]
    for entry in entries[:4]:
        low, high = band(entry["step"])
        assert low < entry["loss_over_ln_k"] < high, f"step {entry['step']}"
