"""input.py: what is measured and said about the input, when images are shrunk, and that a run keeps
to it."""
import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data.cache import Shrunk
from data.demo import DemoImages
from data.images import open_images
from recipes import input as recipes_input
from recipes.command_line import configure
from recipes.config import with_length
from recipes.input import (
    Speed,
    balance,
    chosen,
    computing,
    describe,
    duration,
    measure,
    settle,
)
from tests.data.conftest import Memory
from tests.helpers import equal, log_of, refuse, run, run_ranks, write_pictures
from weights.atomic import load

SLOW = Speed(original=0.05, shrinking=0.04, shrunk=0.01, stored=20e3, measured=17)
FAST = Speed(original=0.015, shrinking=0.01, shrunk=0.01, stored=20e3, measured=32)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """12 images, larger than the crops of helpers.SMALL need; a cache folder of their own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_pictures(tmp_path / "photos", 12, size=(150, 180))
    return tmp_path / "photos"


def config_of(**given):
    return with_length(configure({"recipe": "demo", "crops": "2x32+2x16", "batch_size": 4,
                                  "steps": 9, "device": "cpu", "workers": 0} | given), 12)


def cached(tmp_path):
    return [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def with_speed(monkeypatch, speed):
    monkeypatch.setattr(recipes_input, "measure", lambda *_: speed)


# ------------------------------------------------------------------------------------- measuring
def test_each_way_is_measured_on_a_sample(monkeypatch):
    """By a clock on which a byte of an image takes a second to read, and 10 to work on."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(recipes_input.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(recipes_input, "SECONDS", 1e9)

    class Images(Memory):
        def __getitem__(self, i):
            clock.now += 8
            if i in self.broken:
                raise OSError("broken")
            return bytes(8)

    def work(data, seed):
        assert torch.get_num_threads() == 1
        clock.now += 10 * len(data)

    class Halves:
        def shrink(self, data):
            clock.now += 3
            return data[:4]

    threads = torch.get_num_threads()
    assert measure(Images(100), work, Halves()) == Speed(88, 3, 40, 4, 32)
    assert measure(Images(10, broken=range(6)), work, Halves()) == Speed(88, 3, 40, 4, 4)
    assert measure(Images(10), work, None) == Speed(88, 0, 88, 0, 8)    # of small ones a few do
    assert measure(Images(10), work, SimpleNamespace(shrink=lambda data: data)) == Speed(
        88, 0, 88, 0, 8)
    assert measure(Images(3, broken=range(3)), work, None) is None
    monkeypatch.setattr(recipes_input, "SECONDS", 200)                  # 131 of them an image
    assert measure(Images(100), work, Halves()).measured == 2
    assert torch.get_num_threads() == threads


def test_larger_crops_take_longer_to_compute():
    threads = torch.get_num_threads()
    small, large = (computing(config_of(crops=crops)) for crops in ("2x32+2x16", "8x224"))
    torch.set_num_threads(threads)
    assert 0 < small < large                    # of 144 times the multiply-adds
    began = time.perf_counter()
    assert computing(config_of(arch="regnety_256gf", crops="2x224+4x96")) > 10
    assert time.perf_counter() - began < 2                      # seconds: it is not timed


@pytest.mark.parametrize("decoding, computing, workers", [
    (0.01, 0.01, 8), (0.03, 0.01, 12), (1.0, 0.0, 16), (0.0, 1.0, 1), (0.01, 0.02, 6)])
def test_workers_are_in_proportion_to_what_they_do(monkeypatch, decoding, computing, workers):
    """Of 16 processors, all of which compute; at least one."""
    monkeypatch.setattr(recipes_input, "processors", lambda: 16)
    assert balance(decoding, computing) == workers


def test_workers_on_a_cpu_follow_what_was_measured(photos, monkeypatch):
    images = open_images(photos)
    monkeypatch.setattr(recipes_input, "balance", lambda *seconds: round(sum(seconds) * 1000))
    monkeypatch.setattr(recipes_input, "computing", lambda config: 0.02)
    with_speed(monkeypatch, SLOW)
    later = settle(config_of(workers=-1), images, "cpu")                # 0.01 s in later epochs
    assert later.workers == 30 and "\ncomputing: about " in later.text
    assert settle(config_of(workers=-1, cache="off"), images, "cpu").workers == 70
    given = settle(config_of(workers=3), images, "cpu")
    assert given.workers == 3 and "computing: " not in given.text


# -------------------------------------------------------------------------------------- deciding
def test_images_are_shrunk_where_that_pays_and_the_cache_is_small(photos, monkeypatch):
    images, config = open_images(photos), config_of()
    assert chosen(config, images, SLOW) and not chosen(config, images, FAST)
    assert not chosen(config, images, SLOW._replace(stored=21e9 / 12))
    assert not chosen(config, images, None)
    assert not chosen(config, DemoImages(), SLOW)                   # nothing that names an entry
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=900e3))
    assert not chosen(config, images, SLOW)                         # 240 kB, of 900 that are left
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    assert chosen(config, images, SLOW)


@pytest.mark.parametrize("given, done, shrink, folder", [
    ({}, None, 99, "cache/seer-in-the-open/images"), ({"cache": "off"}, None, 0, None),
    ({"cache": "mine"}, None, 99, "mine"), ({"shrink": 0}, None, 0, None),
    ({"shrink": 120}, None, 120, "cache/seer-in-the-open/images"),
    ({"shrink": 120, "cache": "off"}, None, 120, None),
    ({}, 3, 0, None),                                   # from before there was a cache
    ({"shrink": 99}, 3, 99, "cache/seer-in-the-open/images")])
def test_what_is_decided_once(photos, tmp_path, monkeypatch, given, done, shrink, folder):
    monkeypatch.chdir(tmp_path)
    with_speed(monkeypatch, SLOW)
    images = open_images(photos)
    found = settle(config_of(**given), images, "cpu", done=done)
    assert found.config.shrink == shrink and found.workers == 0
    if not shrink:
        assert found.images is images
    else:
        assert isinstance(found.images, Shrunk) and found.images.side == shrink
        assert found.images.folder == (folder and (
            Path(folder) if folder == "mine" else tmp_path / folder))
    with_speed(monkeypatch, FAST)
    again = settle(config_of(**given), images, "cpu", done=done).config.shrink
    assert again == (0 if given == {} else shrink)


def test_no_cache_for_a_user_without_a_home(photos, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    with_speed(monkeypatch, SLOW)
    assert settle(config_of(), open_images(photos), "cpu").config.shrink == 0


def decide_on_a_rank(rank, photos):
    """Only rank 0 finds that shrinking pays."""
    recipes_input.measure = lambda *_: SLOW if rank == 0 else FAST
    found = settle(config_of(), open_images(photos), "cpu", world=2)
    return found.config.shrink, found.images.side, found.text


@pytest.mark.long
def test_rank_0_decides_for_all(photos, tmp_path):
    (shrink, side, text), other = run_ranks(decide_on_a_rank, tmp_path, str(photos))
    assert (shrink, side, text) == other and shrink == side == 99 and "with 2 about" in text


# ---------------------------------------------------------------------------------------- saying
def test_the_expected_time_is_of_the_slower_first_epoch_and_the_rest(photos):
    images, config = Memory(1000), config_of(steps=1000)                # 4,000 of 1,000 images
    plain = describe(dataclasses.replace(config, shrink=0), images, 99, FAST, 2, 0)
    assert plain == ("input: 67 images/s a worker process, measured on 32 images; with 2 about "
                     "30 s for this run, if computing is no slower")
    offered = describe(dataclasses.replace(config, shrink=0), images, 99, SLOW, 2, 500)
    assert "with 2 about 50 s for this run" in offered and (
        "cache: --cache FOLDER would keep images shrunk to 99 pixels, about 20 MB; then 100 "
        "images/s from the second epoch on") in offered
    kept = describe(dataclasses.replace(config, shrink=99), images, 99, SLOW, 2, 0)
    assert "input: 20 images/s in the first epoch, then 100, a worker process" in kept
    assert "with 2 about 40 s" in kept                                  # 1,000 / 40 + 3,000 / 200
    assert "shorter side of 99 pixels and kept, about 20 MB in" in kept
    assert "seer-in-the-open/images, safe to delete (without: 1.7 min)" in kept
    resumed = describe(dataclasses.replace(config, shrink=99), images, 99, SLOW, 2, 500)
    assert "with 2 about 10 s" in resumed                               # 2,000 / 200
    unkept = describe(dataclasses.replace(config, shrink=99, cache="off"), images, 99, SLOW, 2, 0)
    assert "with 2 about 1.7 min" in unkept and "not kept" in unkept


@pytest.mark.parametrize("seconds, text", [
    (4.2, "4.2 s"), (99, "99 s"), (600, "10 min"), (3600, "60 min"), (7200, "2 h"),
    (3.5 * 3600, "3.5 h"), (86400 * 12, "12 days"), (86400 * 8333, "8,333 days")])
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_explain_and_the_first_lines_of_a_run_say_how_fast_the_input_is(photos, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([f"--data={photos}", "--explain", "--workers=0", "--steps=2"])
    assert "\ninput: " in capsys.readouterr().out and not cached(tmp_path)
    run(photos, out, "--steps=2")
    printed = capsys.readouterr().out
    line, = [line for line in printed.splitlines() if line.startswith("input: ")]
    assert "measured on 12 images; with 1 about " in line and "for this run" in line
    run(photos, out, "--steps=2")
    assert "input: " not in capsys.readouterr().out                     # finished: not measured


# --------------------------------------------------------------------------- a run and its cache
@pytest.mark.parametrize("options", [["--cache=off"], pytest.param([], marks=pytest.mark.long)])
def test_a_run_keeps_to_its_shrunk_images(photos, tmp_path, monkeypatch, capsys, options):
    """Begun with a cache, taken back by two steps and resumed where shrinking would not pay, with
    the cache deleted, or off: the same run, bitwise."""
    with_speed(monkeypatch, SLOW)
    run(photos, tmp_path / "run", "--steps=4", "--save-every=1", "--keep=9")
    assert "safe to delete" in capsys.readouterr().out
    assert len(cached(tmp_path)) == 12
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["shrink"] == 99 and config["cache"] == "auto"
    whole = load(tmp_path / "run" / "checkpoint.pt")
    with_speed(monkeypatch, FAST)
    shutil.rmtree(tmp_path / "cache")
    for path in (tmp_path / "run").glob("checkpoint*.pt"):
        if load(path)["step"] > 2:
            path.unlink()
    run(photos, tmp_path / "run", "--steps=4", "--save-every=1", "--keep=9", *options)
    assert bool(cached(tmp_path)) == (not options)
    again = load(tmp_path / "run" / "checkpoint.pt")
    assert again["config"]["shrink"] == 99 and equal(again["model"], whole["model"])
    assert [line["step"] for line in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    assert "shrink was 99, not 0" in refuse(
        capsys, f"--data={photos}", f"--out={tmp_path / 'run'}", "--recipe=demo", "--shrink=0")


@pytest.mark.long
def test_a_folder_that_cannot_be_written_is_refused(photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert "needs auto, off, or a folder that can be written" in refuse(
        capsys, f"--data={photos}", f"--out={tmp_path / 'run'}", "--steps=1",
        f"--cache={tmp_path / 'file' / 'cache'}")
    assert not (tmp_path / "run").exists()
