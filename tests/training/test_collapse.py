"""report.py: the watchdog on stored curves of real runs, and the pictures a run leaves."""
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import report
from recipes import Config, configure, remedies
from swav import collapse_statistics, symptoms

CURVES = json.loads((Path(__file__).parent / "data" / "demo_curves.json").read_text())


def heard(config, log, capsys, **options):
    """What the watchdog says to a log, line by line."""
    watchdog = report.Watchdog(config, **options)
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
    assert "--lr" not in seer           # a peak of 9.6 is above the demo's 2.4


def test_the_sheet_shows_the_nearest_pictures_of_each_prototype(tmp_path):
    # 12 pictures, each of one shade; prototype k likes picture k best, then k + 1, k + 2
    shades = torch.arange(12) * 20
    pictures = shades.view(-1, 1, 1, 1).expand(12, 3, 8, 8).to(torch.uint8)
    scores = torch.zeros(12, 5)
    for k in range(5):
        scores[k:k + 3, k] = torch.tensor([1.0, 0.5, 0.25])
    report.prototypes(tmp_path / "sheet.png", scores, pictures, nearest=3, columns=2)
    sheet = Image.open(tmp_path / "sheet.png").convert("L")
    side, gap = 8 + 2 * report.FRAME, 2 * report.FRAME
    width, height = 3 * side, side
    assert sheet.size == (2 * (width + gap) + gap, 3 * (height + gap) + gap)
    # rows run down the columns, the prototype with most pictures first: 0 has 6 of them, 4 has 3
    for row, k in enumerate((0, 4, 1, 2, 3)):
        x, y = gap + row // 3 * (width + gap), gap + row % 3 * (height + gap)
        seen = [sheet.getpixel((x + side * i + 6, y + 6)) for i in range(3)]
        assert seen == [20 * (k + i) for i in range(3)]
    report.prototypes(tmp_path / "one.png", scores[:, :1], pictures)        # nothing to arrange
    report.prototypes(tmp_path / "few.png", scores[:2], pictures[:2], most=3)


def test_right_and_wrong_pictures_are_framed(tmp_path):
    gray = torch.full((3, 6, 6), 128, dtype=torch.uint8)
    report.sheet(tmp_path / "sheet.png", [[(gray, None), (gray, True), (gray, False)], [(gray, None)]])
    page, side, gap = Image.open(tmp_path / "sheet.png"), 6 + 2 * report.FRAME, 2 * report.FRAME
    assert page.size == (3 * side + 2 * gap, 2 * side + 3 * gap)
    frames = [page.getpixel((gap + i * side, gap)) for i in range(3)]
    assert frames == [(255, 255, 255), (0, 170, 0), (220, 0, 0)]
    assert [page.getpixel((gap + i * side + 5, gap + 5)) for i in range(3)] == [(128, 128, 128)] * 3


def run_folder(folder, prototypes=64):
    folder.mkdir()
    config = {"config": {"prototypes": prototypes}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": i, "loss": 4.1 - i / 100, "prototypes_used": i / 100} for i in range(1, 90)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_are_drawn_with_ln_k(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", 30)]
    report.curves(tmp_path / "loss.png", runs)
    assert Image.open(tmp_path / "loss.png").size == (840, 720)
    with pytest.raises(ValueError, match="not the folder of a run"):
        report.curves(tmp_path / "loss.png", [tmp_path / "nowhere"])
    (tmp_path / "a" / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="not the folder of a run"):
        report.curves(tmp_path / "loss.png", [tmp_path / "a"])


def test_without_matplotlib_one_sentence_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        report.curves(tmp_path / "loss.png", [run_folder(tmp_path / "a")])
