"""training/writer.py: a save of either form that is killed at any instant."""
import os
import shutil
from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.helpers import group_of_one
from training import writer
from training.resume import open_checkpoint
from training.writer import ShardedWriter, Writer, newest
from weights.atomic import load
from weights.sharded import load_whole

CHANGES = "rename", "replace", "unlink", "rmdir", "mkdir", "link", "fsync"


@pytest.fixture
def mesh(tmp_path):
    with group_of_one(tmp_path):
        yield init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))


def state_of(step, mesh):
    """mesh: None for a run that is not sharded."""
    weight = torch.full((4, 3), float(step))
    if mesh:
        weight = distribute_tensor(weight, mesh, [Shard(0)])
    return {"step": step, "model": {"trunk.weight": weight, "trunk.mean": torch.ones(2)}}


def save(folder, step, sharded, mesh, last=None, **options):
    """One save of a run that goes on from step `last`, the last checkpoint's; its error, or ""."""
    with (ShardedWriter if sharded else Writer)(folder, 2, 0, last, **options) as saves:
        saves._write(saves.snapshot.take(state_of(step, mesh if sharded else None)))
    return saves.error


def resumable(folder):
    """Step of the checkpoint from which a run would go on, and whether it is the last one."""
    path = newest(folder)[0]
    return open_checkpoint(path)["step"], path.name in writer.LAST


def check_products(folder, step):
    """The last checkpoint and trunk.pt are of this step, and nothing is left aside."""
    assert resumable(folder) == (step, True)
    path = newest(folder)[0]
    state = load_whole(path) if path.is_dir() else load(path)
    trunk = load(folder / "trunk.pt")
    assert trunk.keys() == {"weight", "mean"} and (trunk["weight"] == step).all()
    assert torch.equal(state["model"]["trunk.weight"], trunk["weight"])
    assert {path.name for path in folder.iterdir()} <= {
        "trunk.pt", *(path.name for path in newest(folder))}


class Killed(BaseException):
    """As by SIGKILL: nothing that comes after it changes the disk."""


def killed_at(count, action):
    """Do it up to its count-th change of the disk. Returns whether there are as many."""
    changes = 0

    def of(change):
        def counted(*arguments, **options):
            nonlocal changes
            changes += 1
            if changes >= count:
                raise Killed
            return change(*arguments, **options)
        return counted

    with ExitStack() as stack:
        for name in CHANGES:
            stack.enter_context(mock.patch.object(os, name, of(getattr(os, name))))
        try:
            action()
        except Killed:
            pass
    return changes >= count


@pytest.mark.parametrize("before, now, after", [
    (True, True, True), (None, True, True), *(pytest.param(*case, marks=pytest.mark.long)
    for case in ((True, False, True), (False, True, False), (False, True, True),
                 (True, True, False)))])
def test_at_every_instant_there_is_a_whole_checkpoint(tmp_path, mesh, before, now, after):
    """Saves of two steps (sharded or not: before), of one that is killed (now), and the next
    (after)."""
    out, started, count = tmp_path / "run", tmp_path / "started", 0
    started.mkdir()
    for step in (1, 2) if before is not None else ():
        assert not save(started, step, before, mesh, step - 1 or None)
    last, killed = 2 if before is not None else None, True
    while killed:
        count += 1
        shutil.copytree(started, out)
        killed = killed_at(count, lambda: save(out, 3, now, mesh, last))
        if last or newest(out):
            step, is_last = resumable(out)
            assert step in (last, 3), count
        else:
            step, is_last = None, False
            assert not (out / "trunk.pt").exists(), count       # else no new run could begin
        for path in newest(out):
            open_checkpoint(path)
        assert not save(out, 4, after, mesh, step if is_last else None)
        check_products(out, 4)
        assert len(newest(out)) <= 2, count
        shutil.rmtree(out)
    assert count > 12


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_first_trunk_that_cannot_be_written_costs_no_checkpoint(tmp_path, mesh, sharded):
    """Nor do the saves after it, killed at any instant."""
    def full(path, state):
        if path.name == "trunk.pt":
            raise OSError("no space left on device")
        return write(path, state)

    write, out, killed, count = writer.save, tmp_path / "run", True, 0
    while killed:
        count += 1
        out.mkdir()
        with (ShardedWriter if sharded else Writer)(out) as saves:
            with mock.patch.object(writer, "save", full):
                saves._write(state_of(1, mesh if sharded else None))
            assert "no space left" in saves.error and resumable(out) == (1, True)
            killed = killed_at(count, lambda: saves._write(state_of(2, mesh if sharded else None)))
        step, is_last = resumable(out)
        assert step in (1, 2), count
        assert not save(out, 3, sharded, mesh, step if is_last else None)
        check_products(out, 3)
        shutil.rmtree(out)
    assert count > 5


def test_older_checkpoints_of_both_forms_are_kept_and_pruned(tmp_path, mesh):
    forms = {1: True, 2: True, 3: False, 4: False, 5: True, 6: True, 7: False, 8: True}
    for step, sharded in forms.items():
        with (ShardedWriter if sharded else Writer)(tmp_path, 3, 2, step - 1 or None) as saves:
            saves.save(state_of(step, mesh if sharded else None))
        assert not saves.error
        kept = [step - i for i in range(min(step, 3))]
        kept += [old for old in range(step - 3, 0, -1) if old % 2 == 0]
        paths = newest(tmp_path)
        assert [(open_checkpoint(path)["step"], path.is_dir()) for path in paths] == [
            (step, forms[step]) for step in kept]
        assert {path.name for path in tmp_path.glob("checkpoint*")} == {
            path.name for path in paths}
