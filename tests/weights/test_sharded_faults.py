"""weights/sharded.py: what goes wrong on one rank, or at any instant; metadata that is none."""
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from tests.helpers import ROOT, environment, equal, group_of_one, run_ranks
from weights import sharded
from weights.files import read
from weights.load import load_weights

SHAPES = {"model/trunk.stem.0.weight": (7, 3, 3), "model/trunk.few": (2, 5),   # fewer than 4 ranks
          "model/head.0.weight": (16, 4), "optimizer/state/12/momentum_buffer": (7, 3, 3)}


# ------------------------------------------------------------------------- states and their workers
def wholes(step=0):
    """The sharded tensors of a state, whole, by their path."""
    torch.manual_seed(step)
    tensors = {path: torch.randn(shape) for path, shape in SHAPES.items()}
    return tensors | {"model/head.0.weight": tensors["model/head.0.weight"].bfloat16()}


def state_of(tensors, step=0, rank=0):
    """A run's state. rank: which of them it is of, in what is not sharded."""
    model = {path.removeprefix("model/"): x for path, x in tensors.items() if "model/" in path}
    return {"step": step, "pending": {"bad": [("a.png", rank)]},
            "model": model | {"trunk.bn.running_mean": torch.full([3], float(rank))},
            "optimizer": {"state": {12: {"momentum_buffer": tensors[
                "optimizer/state/12/momentum_buffer"]}},
                "param_groups": [{"lr": 0.5, "params": [12]}]}}


def placed(mesh_shape):
    """A mesh, and where tensors lie on it: in shards over its last dimension."""
    return init_device_mesh("cpu", mesh_shape), [Replicate()] * (len(mesh_shape) - 1) + [Shard(0)]


def shards(mesh_shape, step=0):
    mesh, placements = placed(mesh_shape)
    return {path: distribute_tensor(x, mesh, placements) for path, x in wholes(step).items()}


def group():
    return dist.new_group(backend="gloo")


def write(rank, path, *mesh_shape):
    sharded.save_sharded(path, state_of(shards(mesh_shape), rank=rank), group())


@pytest.fixture
def checkpoint(tmp_path):
    """One that one rank wrote."""
    with group_of_one(tmp_path):
        write(0, tmp_path / "checkpoint", 1)
    return tmp_path / "checkpoint"


# -------------------------------------------------------------------------------------- round trips
def test_a_state_comes_back_as_it_was(checkpoint):
    assert sorted(os.listdir(checkpoint.parent)) == ["checkpoint"]
    assert sharded.is_sharded(checkpoint) and sharded.fault_of(checkpoint) == ""
    expected = state_of(wholes())
    assert equal(sharded.load_whole(checkpoint), expected)
    assert sharded.keys(checkpoint) == {path: (x.shape, x.dtype) for path, x in wholes().items()}
    plain = sharded.load_plain(checkpoint)
    assert list(plain["model"]) == ["trunk.bn.running_mean"] and plain["step"] == 0
    assert plain["pending"] == expected["pending"]              # tuples stay tuples
    part = sharded.load_whole(checkpoint, "model/trunk.")
    assert set(part["model"]) == {"trunk.stem.0.weight", "trunk.few", "trunk.bn.running_mean"}


def test_sharded_leaves_of_a_list_keep_their_places(tmp_path):
    with group_of_one(tmp_path):
        mesh, placements = placed([1])
        x = distribute_tensor(torch.ones(2), mesh, placements)
        rest, tensors = sharded.split({"a": [x, 5, {"b": x}], "c": (1, 2)})
    assert list(tensors) == ["a/0", "a/2/b"] and rest["c"] == (1, 2)
    joined = sharded.join(rest, dict.fromkeys(tensors, "whole"))
    assert joined == {"a": ["whole", 5, {"b": "whole"}], "c": (1, 2)}


# --------------------------------------------------------------------------------------- metadata
def test_a_damaged_folder_is_one_sentence_to_who_reads_it(checkpoint):
    (checkpoint / "tensors" / "__0_0.distcp").unlink()
    with pytest.raises(ValueError, match="checkpoint is damaged.*__0_0.distcp") as error:
        read(checkpoint)
    assert len(str(error.value).splitlines()) == 1
    assert str(error.value).count(str(checkpoint)) <= 2         # and the file's


def test_damaged_metadata_is_an_error_or_what_it_was(checkpoint):
    path, rng = checkpoint / "tensors" / ".metadata", random.Random(0)
    data = path.read_bytes()
    for _ in range(300):
        changed = bytearray(data)
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed[:rng.choice([len(data), rng.randrange(len(data))])])
        try:
            sharded.keys(checkpoint)
        except ValueError as error:
            assert len(str(error).splitlines()) == 1


def test_metadata_changes_no_class(checkpoint):
    # GLOBAL Metadata, a state (None, {"vandal": 1}), BUILD: sets the attribute of the class itself
    (checkpoint / "tensors" / ".metadata").write_bytes(
        b"ctorch.distributed.checkpoint.metadata\nMetadata\n(N}X\x06\x00\x00\x00vandalK\x01stb.")
    try:
        with pytest.raises(ValueError, match="damaged, or no metadata"):
            sharded.keys(checkpoint)
        assert not hasattr(Metadata, "vandal")
    finally:
        if hasattr(Metadata, "vandal"):
            del Metadata.vandal


# --------------------------------------------------------------------------------- writes that fail
def test_what_is_there_is_not_replaced(checkpoint, tmp_path):
    before = (checkpoint / "sha256.json").read_bytes()
    (tmp_path / "again").mkdir()
    with group_of_one(tmp_path / "again"):
        with pytest.raises(OSError, match="checkpoint could not be saved"):
            write(0, checkpoint, 1)
    assert (checkpoint / "sha256.json").read_bytes() == before
    assert sharded.fault_of(checkpoint) == "" and not Path(f"{checkpoint}.tmp").exists()


def save_without_room(rank, path, full):
    """Rank `full` cannot write more than a little into any file; then it can."""
    state, threads, error = state_of(shards([2]), rank=rank), group(), ""
    state["large"] = torch.zeros(5000)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == full:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        sharded.save_sharded(path, state, threads)
    except OSError as caught:
        error = str(caught)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    left = sorted(os.listdir(Path(path).parent))
    dist.barrier()
    sharded.save_sharded(path, state, threads)
    return error, left


@pytest.mark.long
@pytest.mark.parametrize("full", [0, 1])
def test_a_rank_that_cannot_write_is_one_sentence_on_all(tmp_path, full):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "checkpoint"
    results = run_ranks(save_without_room, tmp_path, str(path), full)
    (error, left), (other, _) = results
    assert error == other and error.startswith(f"{path} could not be saved: ")
    assert len(error.splitlines()) == 1 and "Traceback" not in error and len(error) < 300
    assert left == []
    assert sharded.fault_of(path) == "" and equal(
        sharded.load_whole(path), state_of(wholes()) | {"large": torch.zeros(5000)})


def save_apart(rank, folder):
    """As on machines whose folders of one name are not the same one."""
    try:
        write(rank, f"{folder}/{rank}/checkpoint", 2)
    except OSError as error:
        return str(error)


@pytest.mark.long
def test_a_folder_that_ranks_do_not_share_is_refused(tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    errors = run_ranks(save_apart, tmp_path, str(tmp_path))
    assert all("could not be saved" in error and "all ranks" in error for error in errors)
    assert not list(tmp_path.glob("*/checkpoint"))


def save_in_part(rank, path, message, instant):
    """Rank 1 is lost in the middle of a save; rank 0 writes what it is told."""
    state, threads = state_of(shards([2]), rank=rank), group()
    if rank == 1:
        setattr(*instant_of(instant), lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    try:
        sharded.save_sharded(path, state, threads)
    except OSError as error:
        Path(message).write_text(str(error))
    os._exit(0)                                                 # the groups are broken


def instant_of(name):
    return {"writing": (dcp.FileSystemWriter, "write_data"), "hashing": (sharded, "sum_of")}[name]


@pytest.mark.long
@pytest.mark.parametrize("instant", ["writing", "hashing"])
def test_a_rank_lost_in_a_save_is_one_sentence(tmp_path, instant):
    (tmp_path / "run").mkdir()
    path, message = tmp_path / "run" / "checkpoint", tmp_path / "message"
    with pytest.raises(AssertionError, match="^rank 1:"):       # which was killed
        run_ranks(save_in_part, tmp_path, str(path), str(message), instant)
    assert "could not be saved: another rank is gone" in message.read_text()
    assert len(message.read_text().splitlines()) == 1
    assert os.listdir(tmp_path / "run") == []


def save_on_and_on(rank, path):
    """One checkpoint after another; the one before stays as `before`."""
    path, threads = Path(path), group()

    def make_way(aside):
        if path.exists():
            sharded.remove(path.with_name("before"))
            os.rename(path, path.with_name("before"))
    for step in range(10**6):
        state = state_of(shards([2], step), step, rank)
        sharded.save_sharded(path, state, threads, before=make_way)


@pytest.mark.long
def test_killed_at_any_instant_a_checkpoint_is_whole_or_absent(tmp_path):
    rng, path = random.Random(0), tmp_path / "run" / "checkpoint"
    path.parent.mkdir()
    seen = set()
    for i in range(4):
        folder = tmp_path / str(i)
        folder.mkdir()
        torch.save([str(path)], folder / "arguments.pt")
        ranks = [subprocess.Popen(
            [sys.executable, "-m", "tests.helpers", __name__, "save_on_and_on", str(folder), "2",
             str(rank)], env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
            for rank in range(2)]
        try:
            begun, last = time.monotonic(), json_of(path)
            while json_of(path) == last and time.monotonic() < begun + 60:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.5)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
        seen |= set(os.listdir(path.parent))
        there = [x for x in (path, path.with_name("before")) if x.exists()]
        assert there
        for one in there:
            assert sharded.is_sharded(one) and sharded.fault_of(one) == ""
            state = sharded.load_whole(one)
            assert equal(state, state_of(wholes(state["step"]), state["step"]))
    assert "checkpoint.tmp" in seen                             # some died in the middle of a save


def json_of(path):
    try:
        return json.loads((path / "sha256.json").read_text())
    except OSError:
        return None


# --------------------------------------------------------------------------- as a source of weights
def test_a_sharded_checkpoint_is_a_source_of_weights(tmp_path, tiny_swav):
    swav, other = tiny_swav(), tiny_swav()
    with group_of_one(tmp_path):
        mesh, placements = placed([1])
        model = {name: distribute_tensor(x, mesh, placements) if x.ndim > 1 else x
                 for name, x in swav.state_dict().items()}
        sharded.save_sharded(tmp_path / "checkpoint",
                             {"version": 1, "config": {"arch": "tiny"}, "model": model}, group())
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    loaded = load_weights(other, tmp_path / "checkpoint")
    assert loaded.untouched == () and loaded.unused == () and loaded.config == {"arch": "tiny"}
    assert equal(dict(other.state_dict()), dict(swav.state_dict()))
    with pytest.raises(ValueError, match="is a folder without a trunk.pt"):
        read(tmp_path)
