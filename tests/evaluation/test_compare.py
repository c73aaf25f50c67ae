"""evaluation/compare.py and cells.py: the table of hand-made cells, what is skipped and refused;
one small comparison from end to end."""
import argparse
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image

import evaluate
from evaluation import compare, finetune, runs
from evaluation.cells import (
    FINETUNED,
    FROZEN,
    best_of,
    caption,
    keep_settings,
    mean_and_deviation,
    read_cells,
    rows_of,
    table,
    write_cell,
)
from figures.comparison import comparison
from methods.build import build_trunk
from recipes.config import Config
from tests.evaluation.conftest import QUICK
from tests.helpers import ROOT, environment
from weights.atomic import save

SETTINGS = {"data": "/sets/emoji", "arch": "regnety_100mf", "size": 64, "images": 6400,
            "minutes": 0.0}


def cell(method, seed, knn, linear, **more):
    return {"method": method, "seed": seed, "knn": knn, "linear": linear, "linear_1": 20.0,
            "linear_10": 40.0} | more


TRAINED = {"minutes": 2.0, "memory_gb": 0.5, "images": 6400, "jobs": 2}
CELLS = [cell("untrained", 0, 50.0, 60.0), cell("swav", 0, 60.0, 70.0, **TRAINED),
         cell("swav", 1, 64.0, 73.0, **TRAINED), cell("byol", 0, 59.5, 60.5, **TRAINED),
         cell("supervised", 0, 90.0, 95.0, **TRAINED), cell("dino", 0, 1.0, 2.0, **TRAINED),
         cell("dino", 0, 58.0, 65.0, **TRAINED), {"method": "simclr", "seed": 3, "failed": "full"}]


@pytest.fixture
def out(tmp_path):
    for one in CELLS:
        write_cell(tmp_path, one)
    return tmp_path


def test_deviation_is_that_of_the_sample():
    assert mean_and_deviation([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7 ** 0.5))
    assert mean_and_deviation([5.0]) == (5.0, None)


def test_table_of_hand_made_cells(out):
    """kNN of swav 62 ± 2.83, linear 71.5 ± 2.12; of dino the last line counts."""
    with open(out / "results.jsonl", "a") as file:
        file.write('{"method": "dino", "se')                        # cut off by a crash
    rows = rows_of(read_cells(out))
    assert table(rows).splitlines() == [
        "| method | kNN | linear | linear, 1 % | linear, 10 % | minutes | GB | images seen | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| supervised | 90.0 | 95.0 | 20.0 | 40.0 | 2.0 | 0.50 | 6,400 | 1 |",
        "| swav | **62.0 ± 2.8** | **71.5 ± 2.1** | **20.0 ± 0.0** | **40.0 ± 0.0** | 2.0 | 0.50 "
        "| 6,400 | 2 |",
        "| dino | 58.0 | 65.0 | **20.0** | **40.0** | 2.0 | 0.50 | 6,400 | 1 |",
        "| byol | **59.5** | 60.5 | **20.0** | **40.0** | 2.0 | 0.50 | 6,400 | 1 |",
        "| untrained | 50.0 | 60.0 | 20.0 | 40.0 | - | - | - | 1 |"]
    assert best_of(rows, "knn") == {"swav", "byol"}                 # 59.5 >= 62 - 2.83 > 58


def test_caption_says_what_was_held_equal_and_what_failed(out):
    cells = read_cells(out)
    text = caption(SETTINGS, cells)
    assert "each method saw 6,400 images" in text and "Up to 2 runs shared the machine" in text
    assert text.splitlines()[-1] == "simclr, seed 3, failed: full"
    assert "trained for about 1.5 minutes" in caption(SETTINGS | {"minutes": 1.5}, cells)
    assert "Given trunks" not in text and "from scratch" not in text
    tuned = {("mine", 0): cell("mine", 0, 1.0, 2.0, finetuned_1=3.0, checkpoint="/runs/mine")}
    text = caption(SETTINGS | {"epochs": 9, "lr": 0.4}, cells | tuned)
    assert "learning rate is 0.4 per 256" in text
    assert "trunks: mine, /runs/mine" in text and "from scratch" in text and "for 9 epochs" in text


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "new" / "compare.json"
    keep_settings(path, SETTINGS)
    keep_settings(path, SETTINGS)
    with pytest.raises(ValueError, match=r"other settings \(images was 6400, not 9\)"):
        keep_settings(path, SETTINGS | {"images": 9})
    with pytest.raises(ValueError, match="holds files, and no compare.json"):
        keep_settings(tmp_path / "compare.json", SETTINGS)


def test_a_set_that_has_changed_is_refused(tmp_path, monkeypatch, refused, classes):
    argv = ["compare", str(tmp_path / "out"), f"--data={classes}", *QUICK]
    monkeypatch.setattr(compare, "fill", lambda *_: None)
    for _ in range(2):
        with pytest.raises(SystemExit):
            evaluate.main(argv)
    with open(next(classes.rglob("*.png")), "ab") as file:
        file.write(b"more")
    assert "other settings (set was" in refused(*argv)


def test_a_folder_takes_one_command_at_a_time(tmp_path, monkeypatch, refused, locked):
    argv = ["compare", tmp_path / "out", *QUICK]
    monkeypatch.setattr(compare, "fill", lambda *_: None)
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, argv)])                                # makes the folder
    with locked(tmp_path / "out"):
        assert "another run is at work in" in refused(*argv)


def options(out, **more):
    return argparse.Namespace(**vars(evaluate.parse(["compare", str(out), *QUICK])) | more)


def test_a_failure_does_not_take_the_place_of_numbers(out):
    before = read_cells(out)
    failed = {"method": "swav", "failed": "full"}
    for seed in (0, 7):
        write_cell(out, failed | {"seed": seed})
    assert read_cells(out) == before | {("swav", 7): failed | {"seed": 7}}


def test_finished_cells_are_skipped_and_failed_ones_tried_again(out, monkeypatch):
    """Runs and measurements are stand-ins; seed 3 of simclr failed before, seed 0 fails now."""
    started, recipe = [], argparse.Namespace(arch="regnety_100mf", steps=50, batch_size=128)

    def run(commands, jobs):
        for key, (words, log) in commands.items():
            started.append((*key, words[words.index("--images") + 1]))
            log.write_text("step 1\ntrain.py: error: no room left\n\n")
            yield key, 2 * (key == ("simclr", 0))

    monkeypatch.setattr(runs, "side_by_side", run)
    monkeypatch.setattr(compare, "measure", lambda *_: {"knn": 1.0, "linear": 2.0, "linear_1": 3.0,
                                                        "linear_10": 4.0})
    monkeypatch.setattr(compare, "cost", lambda run: TRAINED)
    compare.fill(options(out, methods=["swav", "simclr"], seeds=[0, 3], trunks={"mine": "a.pt"}),
                 recipe, out, SETTINGS)
    assert started == [("simclr", 0, "6400"), ("swav", 3, "6400"), ("simclr", 3, "6400")]
    cells = read_cells(out)
    assert cells["simclr", 0]["failed"] == "exit status 2: no room left"
    assert cells["simclr", 3]["linear"] == 2.0 and cells["untrained", 3]["knn"] == 1.0
    assert cells["mine", 0]["knn"] == cells["mine", 3]["knn"] == 1.0            # without a run
    assert cells["swav", 0]["linear"] == 70.0                       # as it was
    assert "simclr, seed 0, failed: exit status 2: no room left" in (out / "table.md").read_text()


def test_a_trunk_that_is_there_is_measured_as_the_others(tmp_path, classes, monkeypatch):
    """Of another arch, and with its own channel means; fine-tuned thrice."""
    run, tuned = tmp_path / "run-7", []
    run.mkdir()
    save(run / "trunk.pt", build_trunk("regnety_100mf").state_dict())
    (run / "config.json").write_text(json.dumps({"config": {"mean": "0.5,0.5,0.5"}}))

    def tune(task):
        tuned.append(task)
        return {"top1": 50.0 + len(tuned)}

    monkeypatch.setattr(compare, "few_labels", lambda *_: 1.0)
    monkeypatch.setattr(finetune, "run", tune)
    given = options(tmp_path, data=str(classes), trunks={"mine": f"{tmp_path}/run-{{seed}}"},
                    finetune=True)
    cell = compare.measure(given, Config(arch="regnety_200mf"), tmp_path / "mine-7", "mine", 7)
    assert cell["checkpoint"] == str(run) and cell["knn"] == cell["linear"] == 100.0
    assert [cell[f"finetuned_{part}"] for part in (1, 10, 100)] == [51.0, 52.0, 53.0]
    assert [task.options.labels for task in tuned] == ["0.01", "0.1", ""]
    assert {task.preprocessing[::3] for task in tuned} == {(32, (0.5, 0.5, 0.5))}
    write_cell(tmp_path, {"method": "mine", "seed": 7, **cell})
    compare.check_rows(given, tmp_path)
    given.trunks["mine"] = "elsewhere"
    with pytest.raises(ValueError, match="mine, seed 7, was .*; choose another name"):
        compare.check_rows(given, tmp_path)


def test_minutes_and_memory_of_a_log(tmp_path):
    """100 images at 10 a second, then 200 at 40: 15 s; without the first line 40 a second."""
    lines = [{"images": 100, "images_per_second": 10.0, "memory_gb": 0.5},
             {"images": 300, "images_per_second": 40.0, "memory_gb": 0.4}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "log.jsonl").write_text(text + '{"images": 4')      # cut off by a crash
    assert compare.cost(tmp_path) == {"minutes": 0.25, "images": 300, "memory_gb": 0.5}
    assert compare.images_in(2.0, tmp_path) == 4800


def test_runs_go_side_by_side_and_end_with_their_caller(tmp_path):
    """Two at once; the third begins when one has ended, and is told to end, and waited for."""
    code = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit("
            "print('saved', flush=True))); print('on', flush=True); time.sleep({})")
    commands = {name: ([sys.executable, "-c", code.format(seconds)], tmp_path / f"{name}.txt")
                for name, seconds in (("a", 0), ("b", 60), ("c", 60))}
    ended = runs.side_by_side(commands, 2)
    assert next(ended) == ("a", 0) and not (tmp_path / "c.txt").exists()
    deadline = time.monotonic() + 10
    while "on" not in (tmp_path / "b.txt").read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    ended.close()
    assert (tmp_path / "b.txt").read_text() == "on\nsaved\n"


def test_what_cannot_be_compared_gets_one_sentence(tmp_path, classes, refused):
    assert "unknown method 'foo'" in refused("compare", tmp_path / "x", "--methods=foo", *QUICK)
    assert "--seed is of knn" in refused("compare", tmp_path / "x", "--seed=1")
    assert "swav is another row" in refused("compare", tmp_path / "x", "--trunks=swav=runs/a")
    assert "needs NAME=CHECKPOINT" in refused("compare", tmp_path / "x", "--trunks=runs/a")
    assert "one of --steps" in refused("compare", tmp_path / "x", "--images=9", "--minutes=1")
    assert "--device foo cannot" in refused("compare", tmp_path / "x", "--device=foo")
    (classes / "train").rename(classes / "other")
    assert "no such folder" in refused("compare", tmp_path / "x", f"--data={classes}")
    assert not (tmp_path / "x").exists()


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    panels = {name: {"swav": [60.0, 64.0], "byol": [59.5], "untrained": [50.0, 52.0]}
              for name in ("kNN", "linear")}
    comparison(tmp_path / "compare.png", "emoji", panels, "untrained")
    assert Image.open(tmp_path / "compare.png").size == (1080, 336)


@pytest.mark.long
def test_a_comparison_from_end_to_end(tmp_path, shades):
    """Ended by a signal within the first run; the same command goes on; a row of a given
    trunk, SwAV's, and fine-tuning are added to it; other settings are refused."""
    out = tmp_path / "out"
    argv = [sys.executable, "evaluate.py", "compare", str(out), f"--data={shades}",
            "--methods=swav,supervised", "--epochs=2", *QUICK]

    def start(*more):
        return subprocess.Popen([*argv, *more], cwd=ROOT, env=environment(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process = start("--seeds=0", "--steps=12")
    while not (out / "swav-0" / "views.png").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75 and "the same command goes on" in errors
    assert "after step" in (out / "swav-0.txt").read_text() and len(read_cells(out)) == 1

    process = start("--seeds=0", "--steps=12", "--jobs=2")
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    first = read_cells(out)
    assert len(first) == 3 and "resumed after step" in (out / "swav-0.txt").read_text()
    assert {cell["images"] for cell in first.values() if "images" in cell} == {12 * 24}
    assert "each method saw 288 images" in text and text.rstrip() == (
        out / "table.md").read_text().rstrip()

    process = start("--seeds=0", "--steps=12", "--finetune", "--methods=swav",
                    f"--trunks=mine={out}/swav-0")
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    both = read_cells(out)
    assert len(both) == 4 and all(both[key].items() >= {
        name: value for name, value in cell.items() if name != "jobs"}.items()
        for key, cell in first.items())                     # measured again, fine-tuned, the same
    assert "fine-tuned, 10 % | fine-tuned, all" in text and "| mine | " in text
    assert all(both["mine", 0][name] == both["swav", 0][name] for name in [*FROZEN, *FINETUNED])
    epochs = [json.loads((out / f"swav-0-finetuned-{share}" / "config.json").read_text())[
        "config"]["recipe"]["epochs"] for share in ("1", "10", "100")]
    assert epochs == [160, 160, 2]                          # a batch of all of the few images

    process = start("--seeds=0", "--steps=13")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.splitlines()[-1].endswith("(images was 288, not 312); choose another folder")
    assert os.path.isfile(out / "results.jsonl")
