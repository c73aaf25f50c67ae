"""training/snapshot.py: what is copied, into which memory, and how much a second one allocates."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from larc import LARC
from tests.helpers import equal
from tests.test_step import tiny
from training.snapshot import Snapshot


class Allocated(TorchDispatchMode):
    """Bytes of the storages that operations make inside."""

    def __init__(self):
        super().__init__()
        self.storages, self.bytes = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        known = {x.untyped_storage()._cdata for x in args if isinstance(x, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            storage = result.untyped_storage()
            self.bytes += storage.nbytes() * (storage._cdata not in known)
        return result


def state_of(model, optimizer):
    return {"step": 1, "names": ["a", ("b", None)], "model": model.state_dict(),
            "optimizer": optimizer.state_dict()}


def copied(tree):
    """An independent copy, by another way."""
    if isinstance(tree, dict):
        return {key: copied(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return list(map(copied, tree))
    return tree.cpu().clone() if isinstance(tree, torch.Tensor) else tree


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_a_second_snapshot_allocates_nothing(device):
    """And neither is changed by the step that follows it, also where nothing waits for it."""
    model = tiny(device, head_bn=True)
    model.to(memory_format=torch.channels_last)
    optimizer, snapshot, addresses = LARC(model.parameters(), 1.0), Snapshot(), []
    size = sum(value.nbytes for value in model.state_dict().values())
    for turn in range(2):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        state = state_of(model, optimizer)
        expected = copied(state)
        with Allocated() as allocated:
            held = snapshot.take(state)
        optimizer.step()
        snapshot.wait()
        assert equal(held, expected) and not equal(held, copied(state))
        assert allocated.bytes > 1.5 * size if turn == 0 else allocated.bytes == 0
        tensors = held["model"].values()
        addresses.append([x.data_ptr() for x in tensors])
        assert all(x.device.type == "cpu" and x.is_pinned() == (device == "cuda") for x in tensors)
        assert all(x.stride() == y.stride() for x, y in zip(tensors, state["model"].values()))
    assert addresses[0] == addresses[1]


def test_memory_is_that_of_the_same_place_and_shape():
    """Also of a part of a larger tensor, whose copy is dense."""
    snapshot, wide = Snapshot(), torch.randn(8, 8)
    for value, same in ((wide[:3, :5], False), (wide[1:4, :5], True), (wide[:5, :3], False)):
        before = snapshot.buffers.get(("x",))
        held = snapshot.take({"x": value})["x"]
        assert torch.equal(held, value) and (held is before) == same
    assert snapshot.take({"y": wide}).keys() == {"y"} and len(snapshot.buffers) == 1
