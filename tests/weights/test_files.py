"""weights/files.py: files that are damaged, foreign or hostile get a sentence; none is executed."""
import io
import os
import pickle
import random
import sys
from pathlib import Path

import pytest
import torch
import torchvision

from tests.helpers import ORACLES
from weights.__main__ import write
from weights.atomic import load, write_whole
from weights.files import _InertUnpickler, read
from weights.load import load_weights

TINY = torch.load(ORACLES / "regnet_tiny.pt", weights_only=True)


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['BOMB']}",)


class Meter:
    def __init__(self):
        self.values = {"top1": [1, 2]}


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_of_other_classes_are_refused_by_name_and_never_made(
        tmp_path, tiny_swav, monkeypatch, zipped):
    monkeypatch.setitem(os.environ, "BOMB", str(tmp_path / "exploded"))
    content = {"classy_state_dict": TINY["regnet_y"]["vissl"]["classy_state_dict"]
               | {"meters": [Meter(), Bomb()], "hooks": {"a": Meter}}}
    path = tmp_path / "vissl.torch"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="trust=True") as error:
        read(path)
    assert "Meter" in str(error.value) and (not zipped or "posix.system" in str(error.value))
    model = tiny_swav()
    assert load_weights(model, path, trust=True).layout == "vissl"
    with torch.no_grad():
        _, scores = model([TINY["regnet_y"]["input"]])
    torch.testing.assert_close(scores, TINY["regnet_y"]["scores"], rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "exploded").exists()
    torch.load(path, weights_only=False)                        # the bomb is a real one
    assert (tmp_path / "exploded").exists()


def test_a_text_is_utf8_and_is_written_beside_what_is_there(tmp_path):
    (tmp_path / "card.tmp").write_text("mine")
    write_whole(tmp_path / "card.md", "ü")
    assert (tmp_path / "card.md").read_bytes() == "ü".encode()
    assert (tmp_path / "card.tmp").read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_torchscript_program_is_not_run(tmp_path):
    class Program(torch.nn.Module):
        def forward(self, x):
            return x + 1

    torch.jit.script(Program()).save(str(tmp_path / "program.pt"))
    for trust in (False, True):
        with pytest.raises(ValueError, match="TorchScript program, not a file of weights"):
            read(tmp_path / "program.pt", trust)


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_cannot_change_torch(tmp_path):
    """BUILD sets attributes of what it is given: it is never given torch's own functions."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    attack = (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(N}U\x0c__defaults__Nstb.")
    path = tmp_path / "attack.pt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    start = b"}q\x00X\x01"
    path.write_bytes(whole[:whole.index(start) if start in whole else 60] + attack)
    with pytest.raises(ValueError):
        read(path, trust=True)
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before
    unpickler = _InertUnpickler(io.BytesIO(attack))
    unpickler.load()
    assert torch._utils._rebuild_tensor_v2.__defaults__ is before


@pytest.mark.filterwarnings("ignore")
def test_damage_anywhere_gets_a_sentence(tmp_path, put):
    whole = put({f"stem.{i}.weight": torch.ones(3) for i in range(3)}).read_bytes()
    rng, refused = random.Random(0), 0
    path = tmp_path / "damaged.pt"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        for trust in (False, True):
            try:
                read(path, trust)
            except ValueError as error:
                refused += 1
                assert "damaged.pt" in str(error) and not (trust and "trust=True" in str(error))
    assert refused > 50
    torch.save({"stem.0.weight": torch.ones(1)}, path, pickle_protocol=4)
    with pytest.raises(ValueError, match="is damaged, or no file of weights"):
        read(path)


def test_trust_makes_nothing_of_a_pickle_that_is_only_a_bomb(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "BOMB", str(tmp_path / "exploded"))
    torch.save(Bomb(), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("a.pt", "b.pt"):
        for trust in (False, True):
            with pytest.raises(ValueError, match=name):
                read(tmp_path / name, trust)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_foreign_files_get_a_sentence(tmp_path, put, tiny):
    whole = put(TINY["regnet_y"]["torchvision"]).read_bytes()
    for i, (content, sentence) in enumerate([
            (whole[:len(whole) // 2], "is damaged, or no file of weights"), (b"", "is damaged"),
            (b"hello", "is damaged, or no file of weights")]):
        path = tmp_path / f"{i}.pt"
        path.write_bytes(content)
        for trust in (False, True):
            with pytest.raises(ValueError, match=sentence):
                read(path, trust)
    for content, sentence in [
            ({"a": 1}, "holds no network"), ([1], "holds no network"), ({}, "holds no network"),
            (torch.zeros(2), "holds no network"),
            (torchvision.models.resnet18().state_dict(), "a network that is no RegNet"),
            ({"encoder.0.weight": torch.zeros(1)}, "known here; the first are 'encoder.0.weight'"),
            ({"type": "shard_list", "shards": []}, "shard_list of sharded training: consolidate"),
            ({"classy_state_dict": {"base_model": 3}}, "VISSL file without a network")]:
        with pytest.raises(ValueError, match=sentence):
            load_weights(tiny(), put(content))
    with pytest.raises(ValueError, match="neither a file nor the name of an official one"):
        read("seer_regnety_257gf")


def test_a_file_that_may_not_be_read_is_called_unreadable(put, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")
    paths = [put({"stem.0.weight": torch.ones(1)}, name) for name in ("a.pt", "b.safetensors")]
    monkeypatch.setattr("builtins.open", refuse)            # a superuser may read anything
    for path in paths:
        with pytest.raises(ValueError, match=f"{path.name} is unreadable: Permission denied"):
            read(path)
    with pytest.raises(ValueError, match="a.pt is unreadable: Permission denied"):
        load(paths[0])


def test_safetensors_in_and_out(tmp_path, put):
    pytest.importorskip("safetensors")
    tensors = read(put(TINY["regnet_y"]["torchvision"])).tensors
    write(tensors, "timm", tmp_path / "model.safetensors")
    back = read(tmp_path / "model.safetensors")
    assert back.layout == "timm"
    assert all(torch.equal(tensors[name], value) for name, value in back.tensors.items())


def test_safetensors_are_asked_for_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "a.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="pip install safetensors"):
        read(tmp_path / "a.safetensors")


def test_a_file_is_mapped_not_read(put):
    path = put({"stem.0.weight": torch.ones(1 << 20), "stem.1.weight": torch.ones(1),
                "stem.1.bias": torch.ones(1)})
    tensor = read(path).tensors["stem.0.weight"]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what is mapped")
    assert str(path) in maps.read_text() and tensor.sum() == 1 << 20
