"""evaluation/scaling.py: nested parts, the table of hand-made cells, what is run and measured anew;
one small figure from end to end."""
import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import evaluate
from data.images import open_images
from data.labelled import digest_of, open_splits
from evaluation import runs, scaling
from evaluation.cells import read_cells, write_cell
from figures.scaling import scaling as plot
from tests.evaluation.conftest import QUICK
from tests.helpers import ROOT, environment, write_pictures

NOW = {"one": "1", "two": "2"}          # the sets and their digests
SETTINGS = {"data": "/photos", "total": 60, "images": 6400, "recipe": "small", "size": 64,
            "crop_ratio": 1.0}
TRAINED = {"minutes": 2.0, "memory_gb": 0.5, "images": 6400, "jobs": 2}


def cell(pictures, arch, seed, *numbers, **more):
    """numbers: of each set its kNN and linear."""
    pairs = zip(NOW.items(), zip(numbers[::2], numbers[1::2]))
    sets = {name: {"knn": knn, "linear": linear, "set": digest}
            for (name, digest), (knn, linear) in pairs}
    return {"pictures": pictures, "arch": arch, "seed": seed, "sets": sets} | more


CELLS = [cell(1000, "regnety_200mf", 0, 50.0, 60.0, 70.0, 80.0, **TRAINED),
         cell(0, "regnety_200mf", 0, 10.0, 20.0, 30.0, 40.0),
         cell(40, "regnety_200mf", 0, 1.0, 2.0, 3.0, 4.0, **TRAINED),
         cell(40, "regnety_200mf", 1, 5.0, 2.0, 5.0, 8.0, **TRAINED | {"minutes": 3.0}),
         cell(60, "regnety_100mf", 0, 9.0, 9.0, **TRAINED),
         {"pictures": 60, "arch": "regnety_200mf", "seed": 0, "failed": "full"}]


@pytest.fixture
def out(tmp_path):
    for one in CELLS:
        write_cell(tmp_path, one)
    return tmp_path


def test_table_of_hand_made_cells(out):
    """40 pictures: linear means 3 and 5, kNN 2 and 5. 60 of the 100MF have no second set."""
    lines = scaling.write_table(out, NOW, SETTINGS).splitlines()
    assert lines[:5] == [
        "| trunk | pictures | mean, linear | mean, kNN | one, linear | one, kNN | two, linear | "
        "two, kNN | minutes | n |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| regnety_200mf | untrained | 30.0 | 20.0 | 20.0 | 10.0 | 40.0 | 30.0 | - | 1 |",
        "| regnety_200mf | 40 | 4.0 ± 1.4 | 3.5 ± 2.1 | 2.0 ± 0.0 | 3.0 ± 2.8 | 6.0 ± 2.8 | "
        "4.0 ± 1.4 | 2.5 | 2 |",
        "| regnety_200mf | 1,000 | 70.0 | 60.0 | 60.0 | 50.0 | 80.0 | 70.0 | 2.0 | 1 |"]
    assert "60 pictures; each run saw 6,400, with recipe small's settings" in lines[6]
    assert "Up to 2 runs shared the machine" in lines[6]
    assert lines[8:] == ["regnety_200mf, 60 pictures, seed 0, failed: full"]
    rows = scaling.rows_of(read_cells(out, scaling.KEY), {"one": "1"})
    one = scaling.table(rows, ["one"])
    assert one.splitlines()[2].startswith("| regnety_100mf | 60 | 9.0 | 9.0 |")
    assert scaling.rows_of(read_cells(out, scaling.KEY), {"one": "changed"}) == {}


def test_parts_are_nested_and_packed_once(tmp_path):
    write_pictures(tmp_path / "photos", 12, size=(4, 4))
    images = open_images(tmp_path / "photos")
    parts = {count: open_images(scaling.part_of(images, count, "", tmp_path)) for count in (4, 8)}
    few, many = ({part[i] for i in range(len(part))} for part in parts.values())
    assert len(few) == 4 and len(many) == 8 and few < many < {images[i] for i in range(12)}
    (tmp_path / "pictures-4" / "000000.tar").write_bytes(b"kept")
    scaling.part_of(images, 4, "", tmp_path)
    assert (tmp_path / "pictures-4" / "000000.tar").read_bytes() == b"kept"
    (tmp_path / "pictures-6.tmp").mkdir()                           # cut off
    (tmp_path / "pictures-6.tmp" / "000000.tar").write_bytes(b"half")
    assert len(open_images(scaling.part_of(images, 6, "", tmp_path))) == 6
    assert scaling.part_of(images, 12, "photos/", tmp_path) == "photos/"


def test_what_is_there_is_not_run_or_measured_again(out, monkeypatch):
    """Runs and measurements are stand-ins. The 100MF lacks the second set alone; of the 200MF 60
    pictures failed before. The untrained 400MF cannot be measured on the second set."""
    started, seen = {}, []

    def run(commands, jobs):
        for key, (words, log) in commands.items():
            started[key] = words
            log.write_text("train.py: error: no room left\n")
            yield key, 2 * (key[1] == "regnety_400mf")

    def task_of(options, recipe, checkpoint, data, arch, seed, what):
        seen.append((arch, str(checkpoint).removeprefix(f"{out}/"), Path(data).name))
        if (arch, str(checkpoint), Path(data).name) == ("regnety_400mf", "random", "two"):
            raise OSError("a disk that is gone")
        return argparse.Namespace(extract_splits=lambda depths: ())

    monkeypatch.setattr(runs, "side_by_side", run)
    monkeypatch.setattr(scaling, "task_of", task_of)
    monkeypatch.setattr(scaling, "frozen", lambda: {"knn": 1.0, "linear": 2.0})
    monkeypatch.setattr(scaling, "cost", lambda run: TRAINED)
    options = evaluate.parse(["scaling", str(out), "--data=photos", "--pictures=all", "--seeds=0",
                              "--archs=regnety_100mf,regnety_200mf,regnety_400mf",
                              "--sets=sets/one,two", *QUICK])
    scaling.fill(options, range(60), None, {"recipe": "small", "lr": 9.6, "hard": False}, out, NOW,
                 SETTINGS)
    assert {*started} == {(60, "regnety_200mf", 0), (60, "regnety_400mf", 0)}
    words = " ".join(map(str, started[60, "regnety_200mf", 0]))
    assert " --data photos --recipe small --lr 9.6 --no-hard --arch regnety_200mf " in words
    assert " --cache off --images 6400 " in words
    assert seen == [("regnety_100mf", "random", "one"), ("regnety_100mf", "random", "two"),
                    ("regnety_400mf", "random", "one"), ("regnety_400mf", "random", "two"),
                    ("regnety_100mf", "60-regnety_100mf-0/trunk.pt", "two"),
                    ("regnety_200mf", "60-regnety_200mf-0/trunk.pt", "one"),
                    ("regnety_200mf", "60-regnety_200mf-0/trunk.pt", "two")]
    cells = read_cells(out, scaling.KEY)
    assert [cells[60, arch, 0]["jobs"] for arch in ("regnety_100mf", "regnety_200mf")] == [2, 1]
    assert cells[60, "regnety_100mf", 0]["sets"] == {
        "one": {"knn": 9.0, "linear": 9.0, "set": "1"},
        "two": {"knn": 1.0, "linear": 2.0, "set": "2"}}
    assert cells[60, "regnety_400mf", 0]["failed"] == "exit status 2: no room left"
    assert "failed" not in cells[60, "regnety_200mf", 0]
    failed = cells[0, "regnety_400mf", 0]
    assert failed["failed"] == "two: a disk that is gone" and {*failed["sets"]} == {"one"}
    assert scaling.missing(failed, NOW) == ["two"]


def test_a_line_that_was_cut_off_does_not_take_the_next_one_with_it(out):
    with open(out / "results.jsonl", "a") as file:
        file.write('{"pictures": 7, "ar')
    write_cell(out, cell(8, "regnety_100mf", 0, 1.0, 2.0))
    cells = read_cells(out, scaling.KEY)
    assert cells[8, "regnety_100mf", 0]["sets"]["one"]["linear"] == 2.0 and len(cells) == 7


def test_numbers_beside_a_failure_take_the_place_of_older_ones(out):
    write_cell(out, cell(8, "regnety_100mf", 0, 1.0, 2.0))
    write_cell(out, cell(8, "regnety_100mf", 0, 3.0, 4.0, failed="two: a disk that is gone"))
    assert read_cells(out, scaling.KEY)[8, "regnety_100mf", 0]["sets"]["one"]["linear"] == 4.0


def test_the_caption_says_how_images_were_cut():
    for given, said in ((None, "ratio 0.875;"), (1.0, "ratio 1;"), (0.0, "ratio 0;")):
        assert said in scaling.caption(SETTINGS | {"crop_ratio": given}, {})


def test_a_set_is_measured_again_where_it_has_changed(classes, tmp_path):
    def digest():
        return digest_of(open_splits(classes))

    first, picture = digest(), next(classes.rglob("*.png"))
    assert digest() == first
    moved = tmp_path / "moved"
    shutil.copytree(classes, moved)
    assert digest_of(open_splits(moved)) == first
    data = picture.read_bytes()
    picture.write_bytes(data + b"more")
    assert digest() != first
    picture.write_bytes(data)
    assert digest() == first
    train, val = open_splits(classes)
    assert digest_of([train._replace(targets=train.targets.flip(1)), val]) != first


def test_a_set_that_is_not_measured_counts_as_failed(tmp_path, classes, monkeypatch, capsys):
    write_pictures(tmp_path / "photos", 12)
    argv = ["scaling", str(tmp_path / "out"), f"--data={tmp_path / 'photos'}", "--pictures=all",
            f"--sets={classes}", "--archs=regnety_100mf", "--seeds=0", *QUICK]
    digest, given = digest_of(open_splits(classes)), []

    def fill(options, images, recipe, rule, out, digests, settings):
        assert "lr" not in rule and "epsilon" in rule       # the trunk decides the rate
        for key in scaling.wanted(options, len(images)):
            write_cell(out, dict(zip(scaling.KEY, key)) | {"sets": {
                "colours": {"knn": 1.0, "linear": 2.0, "set": given[0]}}})

    monkeypatch.setattr(scaling, "fill", fill)
    for given[:], status in ((["older"], 1), ([digest], 0)):
        with pytest.raises(SystemExit) as stop:
            evaluate.main(argv)
        assert stop.value.code == status


def test_a_folder_takes_one_command_at_a_time(tmp_path, classes, monkeypatch, refused, locked):
    write_pictures(tmp_path / "photos", 12)
    argv = ["scaling", tmp_path / "out", f"--data={tmp_path / 'photos'}", "--pictures=all",
            f"--sets={classes}", *QUICK]
    monkeypatch.setattr(scaling, "fill", lambda *_: None)
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, argv)])                                # makes the folder
    with locked(tmp_path / "out"):
        assert "another run is at work in" in refused(*argv)


def test_what_cannot_be_measured_gets_one_sentence(tmp_path, classes, refused):
    photos = tmp_path / "photos"
    write_pictures(photos, 12)

    def sentence(*options):
        return refused("scaling", tmp_path / "x", *options, *QUICK)

    assert "needs --data" in sentence()
    assert "needs --sets" in sentence(f"--data={photos}", "--pictures=all")
    assert "--pictures 13: needs all, or from 6" in sentence(f"--data={photos}", "--pictures=13")
    assert "needs a whole number from 8" in sentence(f"--data={photos}", "--pictures=few")
    assert "unknown arch 'foo'" in sentence(f"--data={photos}", "--archs=foo")
    assert "takes --archs" in sentence(f"--data={photos}", "--arch=regnety_100mf")
    assert "--sets is of scaling" in refused("compare", tmp_path / "x", "--sets=a")
    assert "of different names" in sentence(f"--data={photos}", "--pictures=all",
                                            f"--sets={classes},{classes}")
    assert "no such folder" in sentence(f"--data={photos}", "--pictures=all", "--sets=nowhere")
    (tmp_path / "list.txt").write_text("a.png rose,tulip\nb.png rose\nc.png rose\n")
    assert "one label each" in sentence(f"--data={photos}", "--pictures=all",
                                        f"--sets={tmp_path / 'list.txt'}")
    assert not (tmp_path / "x").exists()


def test_plot(tmp_path, monkeypatch):
    figure, drawn = pytest.importorskip("matplotlib.figure"), []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **options: (
        drawn.append(self), save(self, *args, **options)))
    lines = {"regnety_100mf": {0: [40.0, 42.0], 4000: [60.0], 1000: [50.0, 52.0]},
             "regnety_200mf": {4000: [61.0]}}
    plot(tmp_path / "scaling.png", "two sets", {"linear": lines, "kNN": lines})
    assert Image.open(tmp_path / "scaling.png").size == (1080, 480)
    first = drawn[0].axes[0]
    assert [text.get_text() for text in first.get_legend().get_texts()] == [
        "regnety_100mf, n = 1 to 2", "regnety_200mf, n = 1"]
    assert [text.get_text() for text in first.get_xticklabels()] == ["1,000", "4,000"]
    assert first.get_xscale() == "log"
    assert first.get_lines()[0].get_xydata().tolist() == [[1000, 51], [4000, 60]]
    levels = [line for line in first.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_ydata()[0] for line in levels] == [41.0]


@pytest.mark.long
def test_a_figure_from_end_to_end(tmp_path, shades):
    """Ended by a signal within the first run; the same command goes on; a larger part and a set are
    added; other settings are refused."""
    write_pictures(tmp_path / "photos", 20)
    (tmp_path / "hues").symlink_to(shades)
    out = tmp_path / "out"
    argv = [sys.executable, "evaluate.py", "scaling", str(out), f"--data={tmp_path / 'photos'}",
            "--archs=regnety_100mf", "--seeds=0", *QUICK]

    def start(*more):
        return subprocess.Popen([*argv, *more], cwd=ROOT, env=environment(), text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    process = start(f"--sets={shades}", "--pictures=12", "--steps=12")
    run = out / "12-regnety_100mf-0"
    while not (run / "views.png").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 75 and "the same command goes on" in errors
    assert len(read_cells(out, scaling.KEY)) == 1

    process = start(f"--sets={shades}", "--pictures=12", "--steps=12")
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "resumed after step" in run.with_suffix(".txt").read_text()
    first = read_cells(out, scaling.KEY)
    assert {*first} == {(0, "regnety_100mf", 0), (12, "regnety_100mf", 0)}

    process = start(f"--sets={shades},{tmp_path / 'hues'}", "--pictures=12,all", "--steps=12",
                    "--jobs=2")
    text, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    cells = read_cells(out, scaling.KEY)
    assert all(len({json.dumps(numbers) for numbers in cell["sets"].values()}) == 1
               and len(cell["sets"]) == 2 for cell in cells.values())      # hues are the shades
    assert cells[12, "regnety_100mf", 0]["sets"].items() > first[
        12, "regnety_100mf", 0]["sets"].items()
    configs = [json.loads((out / f"{count}-regnety_100mf-0" / "config.json").read_text())["config"]
               for count in (12, 20)]
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} <= {
        "data", "out", "threads", "workers", "channels_last"}            # a layout is measured
    assert "mean, linear" in text and text.rstrip() == (out / "table.md").read_text().rstrip()

    process = start(f"--sets={shades}", "--pictures=12", "--steps=13")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2 and "(images was 120, not 130)" in errors
