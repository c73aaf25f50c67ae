"""training/collapse.py on stored curves of real runs, healthy and stuck."""
import json

import pytest
import torch
from torch.nn import functional as F

from recipes.command_line import configure
from recipes.config import Config
from recipes.small import remedies
from swav import collapse_statistics
from tests.helpers import ORACLES
from training.collapse import Watchdog, symptoms

CURVES = json.loads((ORACLES / "demo_curves.json").read_text())


def heard(config, log, capsys, **options):
    """What the watchdog says to a log, line by line."""
    watchdog = Watchdog(config, **options)
    for entry in log:
        watchdog.look(entry)
    return capsys.readouterr().out


def entries(curve):
    """{"step": [...], "loss": [...], ...} -> one dictionary a step."""
    return [dict(zip(curve, values)) for values in zip(*curve.values())]


@pytest.mark.parametrize("seed", sorted(CURVES["healthy"]))
def test_the_watchdog_is_silent_on_healthy_runs(seed, capsys):
    log = entries(CURVES["healthy"][seed]["curve"])
    assert heard(configure({}), log, capsys) == ""
    assert heard(configure({}), log, capsys, patience=40) == ""      # not even with less patience


@pytest.mark.parametrize("name", sorted(CURVES["stuck"]))
def test_the_watchdog_speaks_once_on_stuck_runs(name, capsys):
    stuck = CURVES["stuck"][name]
    config = configure({"recipe": "demo"} | stuck["options"])
    said = heard(config, entries(stuck["curve"]), capsys)
    assert said.count("warning") == 1 and "not below 99 % of ln K" in said
    for name, value in stuck["options"].items():
        if name in ("strength", "epsilon", "lr"):
            assert f"--{name} {getattr(configure({}), name):g} (now {value:g})" in said


def test_the_watchdog_names_each_collapse():
    healthy = {"loss_over_ln_k": 0.7, "effective_rank": 20.0, "prototypes_used": 0.8}
    assert symptoms(healthy, 64) == {}
    for change, words in (({"loss_over_ln_k": 0.995}, "ln K"),
                          ({"effective_rank": 1.2}, "rank is 1.2 of 64"),
                          ({"prototypes_used": 0.03}, "only 3% of the prototypes")):
        meaning, = symptoms(healthy | change, 64).values()
        assert words in meaning
    assert "rank is 1.2: they" in symptoms(healthy | {"effective_rank": 1.2}, 0)["effective_rank"]
    assert symptoms({"clusters_used": 0.0}, 64) == {}           # DeepCluster-v2's first epoch
    assert symptoms({"effective_rank": 110.0}, 8192) == {}      # Barlow Twins, of 128 rows
    assert "rank is 4.0 of 8192" in symptoms({"effective_rank": 4.0}, 8192)["effective_rank"]
    # an embedding of one point, as swav.py measures it
    point = F.normalize(torch.ones(256, 8), dim=1)
    scores = point @ F.normalize(torch.randn(100, 8), dim=1).t()
    assert len(symptoms(collapse_statistics(point, scores, torch.tensor(4.605)), 8)) == 3


def test_the_watchdog_waits_and_starts_anew(capsys):
    config = Config(steps=1000, warmup=0.1, freeze_prototypes=300)
    flat = {"loss_over_ln_k": 1.0, "effective_rank": 20.0, "prototypes_used": 0.8}
    log = [flat | {"step": step} for step in range(10, 1001, 10)]
    assert "for 100 steps" in heard(config, log, capsys)
    assert heard(config, log[:40], capsys) == ""                    # 90 steps after the freeze
    for entry in log:
        if entry["step"] % 100 == 0:
            entry["loss_over_ln_k"] = 0.9
    assert heard(config, log, capsys) == ""
    for entry in log:               # one sign after the other: each has its own time
        entry["loss_over_ln_k"], entry["effective_rank"] = 1.0, 20.0
        if entry["step"] % 200 < 100:
            entry["loss_over_ln_k"], entry["effective_rank"] = 0.9, 1.0
    assert heard(config, log, capsys) == ""


def test_a_run_like_recipe_small_is_told_what_is_left():
    assert "nothing that is known" in remedies(configure({}))
    seer = remedies(configure({"arch": "regnety_256gf"}))
    assert seer.startswith("--strength 0.2 (now 1), --epsilon 0.03") and "--head-bn" in seer
    assert "--lr" not in seer           # a peak of 9.6 is above the demo's 4.8
