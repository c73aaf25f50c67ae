"""weights/sharded.py: a folder that is whole or absent, read on any ranks, runs no code."""
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.helpers import equal, group_of_one, run_ranks
from weights import sharded
from weights.sharded import fault_of, fill, load_plain, load_whole, restore, save_sharded

ROWS = 1, 2, 3, 5, 8            # of four ranks: fewer than ranks, uneven, even


def whole_state(step=7):
    """As a run's, before any of it is sharded."""
    generator = torch.Generator().manual_seed(step)
    drawn = {f"fc{rows}.weight": torch.randn(rows, 3, generator=generator) for rows in ROWS}
    return {"step": step, "names": ["a", "b"], "scaler": {}, "model": drawn | {
        "bn.running_mean": torch.randn(3, generator=generator)}, "optimizer": {"state": {
            i: {"momentum_buffer": x + 1} for i, x in enumerate(drawn.values())}}}


def in_shards(tree, mesh):
    """The matrices of a tree in shards over the last dimension of a mesh."""
    if isinstance(tree, dict):
        return {key: in_shards(value, mesh) for key, value in tree.items()}
    if not isinstance(tree, torch.Tensor) or tree.dim() < 2:
        return tree
    placements = [dist.tensor.Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    return distribute_tensor(tree, mesh, placements)


def mesh_of(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape):])


@pytest.fixture
def one(tmp_path):
    """A mesh of one rank."""
    with group_of_one(tmp_path):
        yield mesh_of(1)


def save_one(path, mesh, step=7, **options):
    save_sharded(path, in_shards(whole_state(step), mesh), dist.group.WORLD, **options)


# ---------------------------------------------------------------------------------- there and back
def test_a_state_comes_back_whole_or_in_shards(tmp_path, one):
    path, state = tmp_path / "checkpoint", whole_state()
    save_one(path, one)
    assert sharded.is_sharded(path) and not fault_of(path)
    assert equal(load_whole(path), state)
    assert load_plain(path)["model"].keys() == {"bn.running_mean"}
    some = load_whole(path, "model/fc5")["model"]
    assert some.keys() == {"fc5.weight", "bn.running_mean"}
    target = in_shards(torch.zeros(5, 3), one)
    fill(path, {"model/fc5.weight": target}, dist.group.WORLD)
    assert torch.equal(target.to_local(), state["model"]["fc5.weight"])
    for name, shape in ("fc5.weight", (4, 3)), ("fc9.weight", (5, 3)):
        with pytest.raises(ValueError, match=f"holds no model/{name} of shape"):
            fill(path, {f"model/{name}": torch.zeros(shape)})


def test_a_save_replaces_what_is_moved_away_and_leaves_nothing_aside(tmp_path, one):
    path = tmp_path / "checkpoint"
    save_one(path, one, 1)
    (tmp_path / "checkpoint.tmp").mkdir()               # of a save that was killed
    (tmp_path / "checkpoint.tmp" / "left").touch()
    save_one(path, one, 2, before=lambda aside: path.rename(tmp_path / "before"))
    assert [load_whole(tmp_path / name)["step"] for name in ("before", "checkpoint")] == [1, 2]
    assert not (tmp_path / "checkpoint.tmp").exists() and not (path / "left").exists()


def saved_by_four(rank, folder):
    """Saves two checkpoints, over all ranks and over pairs of them; BatchNorm's statistics are of
    each rank. Returns what came back, in both meshes, from both."""
    meshes = {"all": mesh_of(4), "pairs": mesh_of(2, 2)}
    for name, mesh in meshes.items():
        state = in_shards(whole_state(), mesh)
        state["model"]["bn.running_mean"] += rank
        save_sharded(f"{folder}/{name}", state, dist.group.WORLD)
    return [parts_of(f"{folder}/{name}", mesh) for name in meshes for mesh in meshes.values()]


def parts_of(path, mesh):
    """This rank's parts of the sharded tensors, read from a checkpoint, with where they begin."""
    targets = {name: in_shards(torch.zeros(shape), mesh)
               for name, (shape, _) in sharded.keys(path).items()}
    fill(path, targets, dist.group.WORLD)
    shard = mesh.get_local_rank("shard"), mesh.size(-1)
    return {name: (shard, target.to_local()) for name, target in targets.items()}


def read_by_two(rank, folder):
    return [parts_of(f"{folder}/{name}", mesh_of(2)) for name in ("all", "pairs")]


@pytest.mark.long
def test_four_ranks_write_and_four_two_and_one_read(tmp_path):
    state = whole_state()
    expected = {f"model/{name}": x for name, x in state["model"].items() if x.dim() == 2} | {
        f"optimizer/state/{i}/momentum_buffer": kept["momentum_buffer"]
        for i, kept in state["optimizer"]["state"].items()}
    results = run_ranks(saved_by_four, tmp_path, str(tmp_path), world=4)
    results += run_ranks(read_by_two, tmp_path, str(tmp_path))
    for parts in (parts for of_rank in results for parts in of_rank):
        assert parts.keys() == expected.keys()
        for name, ((i, ranks), part) in parts.items():
            chunks = dict(enumerate(expected[name].chunk(ranks)))
            assert torch.equal(part, chunks.get(i, expected[name][:0])), (name, i, ranks)
    for name in ("all", "pairs"):                       # buffers are rank 0's
        assert not fault_of(tmp_path / name) and equal(load_whole(tmp_path / name), state)
        files = set(json.loads((tmp_path / name / sharded.SUMS).read_text()))
        assert files == {str(path.relative_to(tmp_path / name)) for path in
                         (tmp_path / name).rglob("*") if path.is_file()} - {sharded.SUMS}


# ------------------------------------------------------------------------------ model and optimizer
class Network(nn.Module):
    """Of uneven rows, and with statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.bn = nn.Linear(3, 5), nn.Linear(5, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.b(self.a(x))).square().sum()


def trained(mesh, steps=3):
    """A network in shards over a mesh, or whole, after some steps, and its optimizer."""
    model = Network()
    if mesh:
        for linear in (model.a, model.b):
            fully_shard(linear, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        model(torch.randn(8, 3, generator=generator)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state_of(model, optimizer):
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def gathered(tree):
    """With whole tensors in place of sharded ones."""
    if isinstance(tree, dict):
        return {key: gathered(value) for key, value in tree.items()}
    return tree.full_tensor() if isinstance(tree, DTensor) else tree


def kept(state):
    """What restore restores."""
    return state["model"], state["optimizer"]["state"]


def save_trained(rank, path, world):
    state = state_of(*trained(mesh_of(world)))
    save_sharded(path, state, dist.group.WORLD)
    return kept(gathered(state))


def restored(rank, paths, shape):
    """From sharded checkpoints, or whole ones, on a mesh of that shape."""
    results, mesh = [], mesh_of(*shape)
    for path in map(Path, paths):
        model, optimizer = trained(mesh, steps=0)
        state = torch.load(path) if path.is_file() else load_plain(path)
        restore(model, optimizer, state, path, dist.group.WORLD)
        results.append(kept(gathered(state_of(model, optimizer))))
    return results


@pytest.mark.long
def test_a_run_goes_on_with_other_ranks_and_back(tmp_path):
    path, plain = str(tmp_path / "checkpoint"), str(tmp_path / "plain.pt")
    expected = run_ranks(save_trained, tmp_path, path, 4, world=4)[0]
    model, optimizer = trained(None, steps=0)
    restore(model, optimizer, load_plain(path), tmp_path / "checkpoint")
    assert equal(kept(state_of(model, optimizer)), expected)
    torch.save(state_of(model, optimizer), plain)
    for world, shape in (2, (2,)), (4, (2, 2)):
        for results in run_ranks(restored, tmp_path, [path, plain], shape, world=world):
            assert equal(results, [expected] * 2), shape


def test_a_model_comes_back_and_another_one_is_refused(tmp_path, one):
    path = tmp_path / "checkpoint"
    expected = save_trained(0, path, 1)
    assert equal(restored(0, [path], (1,)), [expected])
    model, optimizer = trained(None, steps=0)
    model.b = nn.Linear(5, 4)
    with pytest.raises(ValueError, match="of another network: it differs in model/b.bias"):
        restore(model, optimizer, load_plain(path), path)


# ----------------------------------------------------------------------------------------- damages
def turn(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [turn, cut, os.unlink])
def test_every_damaged_file_is_found(tmp_path, one, damage):
    path, damaged = tmp_path / "checkpoint", tmp_path / "damaged"
    save_one(path, one)
    files = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    assert len(files) == 4
    for file in files:
        shutil.copytree(path, damaged)
        damage(damaged / file)
        faults = [fault_of(damaged, part, 3) for part in range(3)]      # of three ranks
        assert any(f"{damaged} is damaged" in fault for fault in faults), file
        shutil.rmtree(damaged)
    assert not any(fault_of(path, part, 3) for part in range(3))


@pytest.mark.parametrize("text", ["", "[1]", "7", "null", '{"a": 1}', '{"\\u0000": ""}'])
def test_sums_that_are_none(tmp_path, text):
    (tmp_path / sharded.SUMS).write_text(text)
    assert f"{tmp_path} is damaged" in fault_of(tmp_path)


# ------------------------------------------------------------------------------------ failed saves
def fails(*_, **__):
    raise OSError(28, "No space left on device", "/disk")


@pytest.mark.parametrize("owner, name", [
    (sharded, "save"), (dcp.FileSystemWriter, "write_data"), (dcp.FileSystemWriter, "finish"),
    (sharded, "sum_of"), (sharded, "flush"), (sharded, "flush_folder")])
def test_a_failed_save_leaves_all_as_it_was(tmp_path, one, monkeypatch, owner, name):
    path = tmp_path / "checkpoint"
    save_one(path, one, 1)
    with monkeypatch.context() as patch, pytest.raises(OSError) as error:
        patch.setattr(owner, name, fails)
        save_one(path, one, 2)
    assert str(error.value) == f"{path} could not be saved: /disk: no space left on device"
    assert not fault_of(path) and load_whole(path)["step"] == 1
    assert not (tmp_path / "checkpoint.tmp").exists()


def fail_on_rank_2(rank, path, names):
    """A sentence for each of these that cannot be done on one rank; then a save that succeeds."""
    mesh, sentences = mesh_of(4), []
    for owner, name in [(None, ""), *names, (None, "")]:
        owner = {"Writer": dcp.FileSystemWriter, "sharded": sharded, None: None}[owner]
        before = getattr(owner, name, None)
        if owner and rank == 2:
            setattr(owner, name, fails)
        try:
            save_sharded(path, in_shards(whole_state(len(sentences)), mesh), dist.group.WORLD,
                         before=lambda aside: shutil.rmtree(path, ignore_errors=True))
            sentences.append("")
        except OSError as error:
            sentences.append(str(error))
        if owner:
            setattr(owner, name, before)
        dist.barrier()
        sentences[-1] += " aside" * os.path.exists(f"{path}.tmp")
    return sentences


@pytest.mark.long
def test_one_rank_that_cannot_write_is_an_error_on_all(tmp_path):
    path = tmp_path / "checkpoint"
    names = [("Writer", "write_data"), ("sharded", "sum_of")]
    results = run_ranks(fail_on_rank_2, tmp_path, str(path), names, world=4)
    sentence = f"{path} could not be saved: /disk: no space left on device"
    assert results == [["", sentence, sentence, ""]] * 4
    assert not fault_of(path) and load_whole(path)["step"] == 3


# ------------------------------------------------------------------------------------------- code
class Bomb:
    """What pickle would call."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def metadata_of(path):
    with open(path / "tensors" / ".metadata", "rb") as file:
        return pickle.load(file)


def write_metadata(path, metadata):
    with open(path / "tensors" / ".metadata", "wb") as file:
        pickle.dump(metadata, file)


def test_metadata_that_would_run_code_does_not(tmp_path, one):
    path, exploded = tmp_path / "checkpoint", tmp_path / "exploded"
    save_one(path, one)
    metadata = metadata_of(path)
    metadata.planner_data = Bomb(exploded)
    write_metadata(path, metadata)
    with pytest.raises(ValueError, match="metadata holds posix.mkdir, which could run code"):
        load_whole(path)
    assert not exploded.exists()
    metadata_of(path)
    assert exploded.exists()                    # pickle's own reader runs it


def test_tensors_that_would_run_code_do_not(tmp_path, one):
    """torch.distributed.checkpoint reads what is no tensor (BytesStorageMetadata) as a pickle with
    code. Here such an entry passes for a tensor by attributes of its own."""
    path, exploded = tmp_path / "checkpoint", tmp_path / "exploded"
    save_one(path, one)
    metadata, name = metadata_of(path), "model/fc5.weight"
    false = dcp_metadata.BytesStorageMetadata()
    vars(false).update(vars(metadata.state_dict_metadata[name]))
    metadata.state_dict_metadata[name] = false
    index, = (index for index in metadata.storage_data if index.fqn == name)
    stored = metadata.storage_data.pop(index)
    torch.save(Bomb(exploded), path / "tensors" / stored.relative_path)
    stored.offset = 0
    stored.length = (path / "tensors" / stored.relative_path).stat().st_size
    metadata.storage_data[dcp_metadata.MetadataIndex(name)] = stored
    write_metadata(path, metadata)
    with pytest.raises(ValueError, match="damaged"):
        load_whole(path, name)
    assert not exploded.exists()


@pytest.mark.parametrize("metadata", [None, [], 7, "Metadata", {"state_dict_metadata": {}},
                                      dcp_metadata.Metadata({"model/a": 7})])
def test_metadata_that_is_none(tmp_path, one, metadata):
    save_one(tmp_path / "checkpoint", one)
    write_metadata(tmp_path / "checkpoint", metadata)
    with pytest.raises(ValueError, match="damaged, or no metadata"):
        load_whole(tmp_path / "checkpoint")


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), turn, cut, os.unlink])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
def test_a_damaged_folder_from_elsewhere_is_one_sentence(tmp_path, one, name, damage):
    """As --init reads it: without a look at its sums."""
    path = tmp_path / "checkpoint"
    save_one(path, one)
    file = path / "tensors" / name
    if damage is turn:                          # in the middle it would be a number of a tensor
        file.write_bytes(b"\xff" + file.read_bytes()[1:])
    else:
        damage(file)
    with pytest.raises(ValueError, match=f"{path}.* is damaged"):
        load_whole(path)
