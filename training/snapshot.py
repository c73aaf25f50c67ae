"""Snapshot: a copy of a run's state on the host, into memory that is used again.

    snapshot = Snapshot()
    state = snapshot.take({"step": 7, "model": model.state_dict()})     # the only stall of a save
    ...                                                 # training goes on
    snapshot.wait()                                     # by the thread that writes: it is there
    torch.save(state, path)

From a GPU the copies go into pinned memory, in order with the work on the current stream: nothing
waits on the host, and what a later step changes comes after the copy. The first snapshot allocates
as much as the tensors take (pinned, PyTorch rounds each up to a power of two); later ones nothing.
"""
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


class Snapshot:
    """One at a time: take overwrites the tensors of the snapshot before."""

    def __init__(self):
        self.buffers, self.copied, self.mesh = {}, None, None

    def take(self, state: dict) -> dict:
        """state, of dicts, lists, tensors and plain values, with copies of the tensors; of sharded
        ones (DTensors) this rank's part is copied."""
        before, self.buffers, self.copied = self.buffers, {}, None
        copy = self._copy(state, (), before)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self.copied = torch.cuda.current_stream().record_event()
        return copy

    def wait(self) -> None:
        """Until the copies are complete."""
        if self.copied:
            self.copied.synchronize()

    def _copy(self, tree, place: tuple, before: dict):
        """place: the keys that lead to the tree, by which its buffers are found again."""
        if isinstance(tree, DTensor):
            part = self._copy(tree.to_local(), place, before)
            return DTensor.from_local(part, self._hosts(tree.device_mesh), tree.placements,
                                      run_check=False, shape=tree.shape, stride=tree.stride())
        if isinstance(tree, Tensor):
            buffer, wanted = before.get(place), torch.empty_like(tree, device="meta")
            if buffer is None or kind(buffer) != kind(wanted):
                buffer = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
            self.buffers[place] = buffer.copy_(tree.detach(), non_blocking=tree.is_cuda)
            return buffer
        if isinstance(tree, dict):
            return {key: self._copy(value, (*place, key), before) for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self._copy(value, (*place, i), before) for i, value in enumerate(tree)]
        return tree

    def _hosts(self, mesh: DeviceMesh) -> DeviceMesh:
        """The same ranks, for tensors on the host."""
        if mesh.device_type == "cpu":
            return mesh
        if self.mesh is None:
            # of places alone: groups of its own would take NCCL's buffers once more
            self.mesh = DeviceMesh("cpu", mesh.mesh, mesh_dim_names=mesh.mesh_dim_names,
                                   _init_backend=False)
        return self.mesh


def kind(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.dtype, tensor.stride()
