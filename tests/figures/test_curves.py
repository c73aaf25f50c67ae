"""figures/curves.py: curves of made-up runs; what is no run, and a missing matplotlib."""
import json
import math
import sys

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from figures.curves import curves, read_curve, title_of


def run_folder(folder, prototypes=64, loss=None):
    folder.mkdir()
    config = {"config": {"prototypes": prototypes}}
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": i, "loss": 4.1 - i / 100 if loss is None else loss,
              "prototypes_used": i / 100} for i in range(1, 90)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", 30)]
    curves(tmp_path / "loss.png", runs)
    assert Image.open(tmp_path / "loss.png").size == (840, 720)


def test_axis_line_and_names_say_what_is_drawn(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    curves("loss.png", [run_folder(tmp_path / "a"), run_folder(tmp_path / "b", 3000)])
    top = drawn[0].axes[0]
    assert top.get_ylabel() == "loss / ln K, each run's over its own K"
    assert [text.get_text() for text in top.get_legend().get_texts()] == [
        "a, K = 64", "b, K = 3,000"]
    first, second, nothing = (line.get_ydata()[0] for line in top.get_lines())
    assert nothing == 1 and "knows nothing" in top.texts[0].get_text()
    assert (first, second) == (4.09 / math.log(64), 4.09 / math.log(3000))


def test_a_loss_without_a_scale_has_an_axis_of_its_own(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    runs = [run_folder(tmp_path / "a"), run_folder(tmp_path / "b")]
    (runs[1] / "config.json").write_text(json.dumps({"config": {"method": "byol"}}))
    curves("loss.png", runs)
    top, *_, own = drawn[0].axes
    assert top.get_ylabel().startswith("loss / ln K") and own.get_ylabel() == "loss itself"
    first, second = (axis.get_lines()[0].get_ydata()[0] for axis in (top, own))
    assert (first, second) == (4.09 / math.log(64), 4.09)
    assert len(top.get_legend().get_texts()) == 2


def test_each_loss_is_divided_by_its_own_ln_k(tmp_path):
    for count in (30, 64, 3000):
        curve = read_curve(run_folder(tmp_path / f"{count}", count, loss=math.log(count)))
        assert curve.columns[1] == [1.0] * 89
    assert read_curve(run_folder(tmp_path / "one", 1, loss=0.0)).columns[1] == [0.0] * 89


def test_what_a_probe_found_has_a_panel_of_its_own(tmp_path):
    pytest.importorskip("matplotlib")
    run = run_folder(tmp_path / "a")
    with open(run / "log.jsonl", "a") as log:
        log.write(json.dumps({"step": 90, "loss": 3.2, "prototypes_used": 0.9, "knn": 71.5}) + "\n")
    curves(tmp_path / "loss.png", [run])
    assert Image.open(tmp_path / "loss.png").size == (840, 900)


def test_skipped_steps_and_a_line_that_was_cut_off_are_left_out(tmp_path):
    run = run_folder(tmp_path / "a", 30)
    with open(run / "log.jsonl", "a") as log:
        log.write('{"step": 90, "skipped": 1}\n{"step": 91, "lo')
    curve = read_curve(run)
    assert curve.name == "a, K = 30"
    assert curve.columns[0] == list(range(1, 90))
    assert curve.columns[1][-1] == pytest.approx(3.21 / 3.4011974)


@pytest.mark.parametrize("config", ["[]", '{"config": {"prototypes": 0}}', None])
def test_what_is_no_run_is_refused(config, tmp_path):
    run = run_folder(tmp_path / "a")
    (run / "config.json").write_text(config) if config else (run / "log.jsonl").unlink()
    for folder in (run, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="not the folder of a run"):
            read_curve(folder)


def test_a_file_of_the_users_stays(tmp_path):
    run = run_folder(tmp_path / "run")
    for name in ("loss.png", "other.png"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match="does not show these runs"):
            curves(tmp_path / name, [run])
        assert (tmp_path / name).read_text() == "mine"
    info = PngInfo()
    info.add_text("Title", f"Training loss: {run}")
    Image.new("L", (2, 2)).save(tmp_path / "own.png", pnginfo=info)
    assert title_of(tmp_path / "own.png") == f"Training loss: {run}"
    assert title_of(tmp_path / "loss.png") is None


def test_without_matplotlib_one_sentence_asks_for_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        curves(tmp_path / "loss.png", [run_folder(tmp_path / "a")])
