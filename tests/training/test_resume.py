"""A run goes on as what it was, or as what was asked for; nothing of anybody's is replaced."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest

import train
from data.images import open_images
from data.loader import Loader
from data.stream import Stream
from recipes.command_line import configure, parse_arguments
from recipes.config import with_length
from swav import SwAV
from tests.helpers import ROOT, SMALL, equal, log_of, refuse, run, write_pictures
from training import monitor
from training.resume import resume
from training.signals import Signals
from training.writer import newest
from weights.atomic import load
from weights.terminal import Output

SHORT = ["--steps=4", "--micro-batch=2", "--keep=9"]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def interrupted(photos, out, monkeypatch, *options, after=2):
    """A run that a signal ends after some steps, or one more."""
    def progress(*_):
        if len(log_of(out)) == after:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(monitor, "progress", progress)
        run(photos, out, *options)
    assert ended.value.code == 75


# -------------------------------------------------------------- what is not named is the run's
@pytest.mark.long
def test_what_is_not_named_comes_from_the_run(few_photos, tmp_path, monkeypatch, capsys):
    """Data, network, lengths: with the folder's name alone the run ends as if never interrupted."""
    photos = shutil.copytree(few_photos, tmp_path / "photos")
    out, whole = tmp_path / "run", tmp_path / "whole"
    run(few_photos, whole, *SHORT)
    interrupted(photos, out, monkeypatch, *SHORT)
    before = contents(out)

    photos.rename(tmp_path / "moved")
    assert f"no such folder, list or shards of images: {photos}" in refuse(capsys, f"--out={out}")
    (tmp_path / "moved").rename(photos)
    write_pictures(photos / "more", 1)
    message = refuse(capsys, f"--out={out}")
    assert "was trained on 12 images" in message and "holds 13" in message
    assert "--grow" in message and "--init" in message
    shutil.rmtree(photos / "more")
    (photos / "0001.png").rename(photos / "new.png")
    assert "holds as many others" in refuse(capsys, f"--out={out}")
    (photos / "new.png").rename(photos / "0001.png")
    write_pictures(tmp_path / "others", 12, size=(32, 32))    # with the same names
    assert "holds as many others" in refuse(capsys, f"--out={out}", f"--data={tmp_path}/others")
    assert "arch was" in refuse(capsys, f"--out={out}", "--arch=regnetx_200mf", "--crops=2x48+2x32")
    assert contents(out) == before

    train.main([f"--out={out}", "--device=cpu", "--workers=0"])
    ended, expected = load(out / "checkpoint.pt"), load(whole / "checkpoint.pt")
    assert all(equal(ended[key], expected[key]) for key in ("step", "model", "optimizer"))
    assert log_of(out) == log_of(whole)
    assert (ended["config"]["data"], ended["config"]["keep"]) == (str(photos), 9)


@pytest.mark.long
def test_the_same_data_by_another_name(few_photos, tmp_path, monkeypatch, capsys):
    out, photos = tmp_path / "run", tmp_path / "photos"
    shutil.copytree(few_photos, photos)
    run(few_photos, out, "--steps=1")
    (tmp_path / "link").symlink_to(photos)
    monkeypatch.chdir(tmp_path)
    for name in ("photos/", "./link"):
        capsys.readouterr()
        run(name, out, "--steps=1")
        assert "is finished" in capsys.readouterr().out
    photos.rename(tmp_path / "moved")                   # the same images in another place
    run("moved", out, "--steps=1")
    assert "is finished" in capsys.readouterr().out
    (out / "config.json").unlink()                      # then no name is known
    assert f"of {few_photos}, and the demo set now holds 4,096: name or restore them" in refuse(
        capsys, f"--out={out}", "--recipe=demo", "--steps=1")
    (out / "config.json").write_text("{}")
    assert "config.json is damaged" in refuse(capsys, f"--out={out}", "--recipe=demo")


def test_options_that_may_change_are_remembered_too(few_photos, tmp_path):
    """The default folder is not named: its run's options count all the same."""
    run(few_photos, tmp_path / "run", "--steps=2", "--keep=7")
    images = open_images(few_photos)
    given = parse_arguments([f"--data={few_photos}", *SMALL, "--steps=2", "--save-every=3"])
    _, config = resume(configure(given, 1, images), images, tmp_path / "run", given)
    assert (config.keep, config.save_every) == (7, 3)


def test_a_set_that_changes_has_another_fingerprint(tmp_path):
    prints = set()
    for names in (["ab", "c"], ["a", "bc"], ["abc"]):
        (tmp_path / "list").write_text("\n".join(names))
        prints.add(open_images(tmp_path / "list").fingerprint)
    assert len(prints) == 3
    write_pictures(tmp_path / "a", 2)
    write_pictures(tmp_path / "b", 2, size=(32, 32))
    (tmp_path / "link").symlink_to(tmp_path / "a")
    before = open_images(tmp_path / "link").sizes
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert open_images(tmp_path / "link").sizes != before


# -------------------------------------------------------------------- a product is not replaced
@pytest.mark.long
def test_a_product_without_its_checkpoint_stays(few_photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(few_photos, out, "--steps=2")
    trunk = load(out / "trunk.pt")
    (out / "trunk.pt").unlink()                         # written again, from the checkpoint
    run(few_photos, out, "--steps=2")
    assert equal(load(out / "trunk.pt"), trunk)
    for checkpoint in newest(out):
        checkpoint.unlink()
    before = contents(out)
    good = [f"--data={few_photos}", f"--out={out}", *SMALL, "--steps=2"]
    assert "no checkpoint to go on from" in refuse(capsys, *good)
    assert contents(out) == before


@pytest.mark.parametrize("name", ["config.json", "log.jsonl", "views.png", "prototypes.png",
                                  "results.json", "trunk.pt", "loss.png"])
def test_a_file_that_no_run_wrote_stays(name, few_photos, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    assert f"holds a {name}, and no run that wrote it" in refuse(
        capsys, f"--data={few_photos}", f"--out={tmp_path}", *SMALL, "--steps=1")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.long
def test_other_files_of_the_folder_stay(few_photos, tmp_path, capsys):
    (tmp_path / ".lock").write_text("mine")
    run(few_photos, tmp_path, "--steps=1")
    assert (tmp_path / ".lock").read_text() == "mine"
    (tmp_path / "trunk-1.pt").write_text("mine")
    assert "trunk-1.pt is " in refuse(
        capsys, f"--data={few_photos}", f"--out={tmp_path}", *SMALL, "--steps=2")
    assert (tmp_path / "trunk-1.pt").read_text() == "mine"
    photos = shutil.copytree(few_photos, tmp_path / "photos")
    for inside in ("photos", "photos/run"):
        assert "lies in the folder of the images" in refuse(
            capsys, f"--data={photos}", f"--out={tmp_path / inside}", *SMALL, "--steps=1")
    assert not (photos / "run").exists()


# ----------------------------------------------------------------------------------- at a signal
@pytest.mark.long
def test_a_step_is_dropped_between_two_micro_batches(few_photos, tmp_path, monkeypatch, capfd):
    """A signal in the first pass over four micro-batches: no other one is computed, the state of
    the step before is saved, and the run ends as if nothing had been."""
    options = ["--steps=4", "--micro-batch=1", "--crops=2x48+2x36", "--queue=8", "--save-every=99"]
    run(few_photos, tmp_path / "whole", *options)
    calls, assigned = [], SwAV.assigned

    def signal_in_the_third_step(self, *crops):
        calls.append(1)
        if len(calls) == 2 * 4 + 2:
            os.kill(os.getpid(), signal.SIGHUP)
        return assigned(self, *crops)

    capfd.readouterr()
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(SwAV, "assigned", signal_in_the_third_step)
        run(few_photos, tmp_path / "parts", *options)
    assert ended.value.code == 75 and len(calls) == 2 * 4 + 2
    errors = capfd.readouterr().err
    assert "SIGHUP: saving after this step" in errors and "SIGHUP after step 2: the run" in errors
    assert load(tmp_path / "parts" / "checkpoint.pt")["step"] == 2
    run(few_photos, tmp_path / "parts", *options)
    one, other = (load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for key in ("step", "model", "optimizer", "queue", "pending"):
        assert equal(one[key], other[key]), key
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


def test_a_step_of_one_micro_batch_is_finished(few_photos, tmp_path, monkeypatch):
    """A signal before it is begun does not drop it, which would save no step at all."""
    calls, fetch = [], Loader.fetch

    def signal_while_loading(self):
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGHUP)
        return fetch(self)

    monkeypatch.setattr(Loader, "fetch", signal_while_loading)
    with pytest.raises(SystemExit):
        run(few_photos, tmp_path / "run", "--steps=4")
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 1


def test_the_rest_of_a_step_is_not_loaded(few_photos, tmp_path, monkeypatch):
    calls, fetch = [], Loader.fetch

    def signal_while_loading(self):
        calls.append(1)
        if len(calls) == 6:                                 # the second of four
            os.kill(os.getpid(), signal.SIGHUP)
        return fetch(self)

    monkeypatch.setattr(Loader, "fetch", signal_while_loading)
    with pytest.raises(SystemExit):
        run(few_photos, tmp_path / "run", "--steps=4", "--micro-batch=1")
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 1 and len(calls) == 6


def test_under_nohup_sighup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
def test_checkpoints_are_due_by_time_too(few_photos, tmp_path):
    """No step count, however large, makes a run lose more than save_minutes."""
    options = ["--steps=3", "--save-every=1000", "--keep=9"]
    run(few_photos, tmp_path / "often", *options, "--save-minutes=0.000001")
    run(few_photos, tmp_path / "never", *options, "--save-minutes=0")
    assert len(newest(tmp_path / "often")) == 3 and len(newest(tmp_path / "never")) == 1


def test_a_closed_pipe_takes_what_is_written():
    read, write = os.pipe()
    output = Output(os.fdopen(write, "w"))
    output.write("one")
    output.flush()
    assert os.read(read, 9) == b"one"
    os.close(read)
    for _ in range(2):
        assert output.write("two") == 3
        output.flush()
    output.close()


@pytest.mark.long
def test_closed_streams(tmp_path):
    """`>&- 2>&-`: what is printed goes nowhere, and into no file that is opened next."""
    program = ("from weights.terminal import outlive_terminal; import os\n"
               f"outlive_terminal(); file = open({str(tmp_path / 'file')!r}, 'w')\n"
               "assert file.fileno() > 2; print(1); os.write(2, b'2')")
    subprocess.run(["sh", "-c", f'"{sys.executable}" -c "$0" >&- 2>&- <&-', program], check=True,
                   cwd=ROOT)
    assert (tmp_path / "file").read_text() == ""


# -------------------------------------------------------------------------------- what is changed
def test_the_rate_of_a_run_that_is_extended():
    config = with_length(configure({"recipe": "demo", "steps": 100}), 4096)
    rates = [config.lr_at(step) for step in range(100)]
    for restart in (0.0, 0.25):
        longer = configure({"recipe": "demo", "steps": 150, "extended_at": 100,
                            "restart_lr": restart})
        assert [longer.lr_at(step) for step in range(100)] == rates
        tail, last = [longer.lr_at(step) for step in range(100, 150)], config.lr_at(100)
        assert tail[0] == pytest.approx((restart or config.final_lr) * config.peak_lr())
        if restart:
            assert tail == sorted(tail, reverse=True)
            assert tail[25] == pytest.approx((tail[0] + last) / 2)
            share = (1 + math.cos(math.pi * 49 / 50)) / 2
            assert tail[49] == pytest.approx(last + share * (tail[0] - last))
        else:
            assert tail == pytest.approx([last] * 50)
    assert longer.strength_at(120 * config.batch_size) == config.strength_at(
        100 * config.batch_size)


@pytest.mark.long
def test_a_finished_run_is_extended(few_photos, tmp_path, monkeypatch, capsys):
    out, longer = tmp_path / "run", ["--steps=6", "--restart-lr=0.5"]
    interrupted(few_photos, out, monkeypatch, "--steps=4")
    assert "finish it first" in refuse(
        capsys, f"--data={few_photos}", f"--out={out}", *SMALL, "--steps=6")
    run(few_photos, out, "--steps=4")
    product, before = load(out / "trunk.pt"), contents(out)
    write_pictures(tmp_path / "others", 5)
    assert "finished after 4 steps: give it a greater length too" in refuse(
        capsys, f"--data={tmp_path / 'others'}", f"--out={out}", *SMALL, "--steps=4", "--grow")
    assert contents(out) == before
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train", Mock(side_effect=KeyboardInterrupt))      # nothing saved yet
        run(few_photos, out, *longer)
    capsys.readouterr()
    train.main([f"--out={out}", "--device=cpu", "--workers=0"])
    assert "extended from 4 to 6 steps, at a learning rate of" in capsys.readouterr().out
    assert equal(load(out / "trunk-4.pt"), product) and not equal(load(out / "trunk.pt"), product)
    log = log_of(out)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [bool(line.get("events")) for line in log] == [False] * 4 + [True, False]
    assert log[3]["lr"] < log[5]["lr"] < log[4]["lr"]
    run(few_photos, out, *longer)
    assert "is finished: 6 steps" in capsys.readouterr().out
    train.main([f"--out={out}", "--device=cpu"])
    assert "is finished: 6 steps" in capsys.readouterr().out


@pytest.mark.long
def test_a_run_grows(few_photos, tmp_path, monkeypatch, capsys):
    """--grow: an epoch of the new set begins where the run stood; the second time it is nothing."""
    photos = shutil.copytree(few_photos, tmp_path / "photos")
    out = tmp_path / "run"
    assert "holds no run to go on with" in refuse(
        capsys, f"--data={photos}", f"--out={out}", *SMALL, "--steps=9", "--grow")
    interrupted(photos, out, monkeypatch, "--steps=9", after=1)         # a step is one micro-batch
    write_pictures(photos / "more", 5)
    (photos / "0003.png").unlink()
    capsys.readouterr()
    interrupted(photos, out, monkeypatch, "--steps=9", "--grow", after=4)
    assert "from here on 16 images" in capsys.readouterr().out
    run(photos, out, "--steps=9", "--grow")
    assert "from here on" not in capsys.readouterr().out
    log = log_of(out)
    config = json.loads((out / "config.json").read_text())["config"]
    assert config["grown_at"] == 2 * 4
    assert [line["step"] for line in log if line.get("events")] == [3]
    stream = Stream(open_images(photos), None, 0, config["grown_at"])
    epochs = [[stream.index(8 + 16 * epoch + i) for i in range(16)] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs) and epochs[0] != epochs[1]


def test_what_the_program_sets_itself_is_no_option(capsys):
    with pytest.raises(SystemExit):
        train.main(["--extended-at=3"])
    assert "unrecognized arguments" in capsys.readouterr().err
