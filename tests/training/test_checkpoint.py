"""weights/atomic.py and training/checkpoint.py: whole files or none, which of them stay."""
import os
import random
import resource
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import environment
from training import writer
from training.writer import Writer, newest
from weights import atomic


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    atomic.save(path, {"step": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fail)
        atomic.save(path, {"step": 2})
    assert atomic.load(path) == {"step": 1}


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    torch.save({"step": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        atomic.load(tmp_path / "bomb.pt")
    assert not (tmp_path / "exploded").exists()


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path, monkeypatch):
    """The run went on from the older of two, and the next save fails."""
    with Writer(tmp_path) as saves:
        for step in (1, 2):
            saves.save({"step": step, "model": {}})
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch, Writer(tmp_path, step=None) as saves:
        patch.setattr(writer, "save",
                      lambda path, _: 1 / 0 if path.name == "checkpoint.pt" else None)
        saves.save({"step": 2, "model": {}})
    assert saves.errors == ["division by zero"]
    assert atomic.load(newest(tmp_path)[1])["step"] == 1


def test_which_checkpoints_stay(tmp_path):
    with Writer(tmp_path, keep=3, keep_every=4) as saves:
        for step in range(1, 11):
            saves.save({"step": step, "model": {"trunk.weights": torch.ones(2)}})
    assert [atomic.load(path)["step"] for path in newest(tmp_path)] == [10, 9, 8, 4]
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"} == set()


def test_a_snapshot_is_saved_not_what_comes_after(tmp_path):
    """And the trunk is that of the same snapshot."""
    weights, head = torch.ones(1000), torch.ones(10)
    with Writer(tmp_path) as saves:
        for value in (1, 2):
            saves.save({"step": value, "model": {"trunk.weights": weights, "head.0": head}})
            weights.add_(1)
            saves.wait()
            trunk = atomic.load(tmp_path / "trunk.pt")
            assert list(trunk) == ["weights"] and (trunk["weights"] == value).all()
            state = atomic.load(tmp_path / "checkpoint.pt")
            assert (state["model"]["trunk.weights"] == value).all()


def full_disk(folder):
    """In a process of its own: no file may grow beyond 200 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Writer(folder) as saves:
        saves.save({"step": 1, "model": {"trunk.weights": torch.ones(100)}})
        saves.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        saves.save({"step": 2, "model": {"trunk.weights": torch.ones(1_000_000)}})
        saves.wait()
        print(saves.error)
        saves.save({"step": 3, "model": {"trunk.weights": torch.ones(100)}})
        saves.wait()
        print(repr(saves.error))


@pytest.mark.long
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    script = f"from tests.training.test_checkpoint import *\nfull_disk({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            env=environment())
    first, second = result.stdout.splitlines()
    assert "could not be saved" in first and second == "''", result.stderr
    assert atomic.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert atomic.load(newest(tmp_path)[1])["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_bit_turned_anywhere_in_a_checkpoint_is_recognised(tmp_path):
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    atomic.save(path, {"step": 24, "weights": torch.randn(300, 7), "names": ["a", "b"]})
    good = path.read_bytes()
    assert atomic.load(path)["step"] == 24 == torch.load(path, weights_only=True)["step"]
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged, or not a checkpoint"):
            atomic.load(path)
    for length in (0, 1, 70, 71, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="is damaged, or not a checkpoint"):
            atomic.load(path)
