"""Agreement: whether all ranks hold the same weights, to the bit.

    if difference := disagreement(model):               # "", or a sentence that names the tensor
        raise RuntimeError(difference)

Data-parallel ranks start from the same weights, and add the same gradients to them. A bit that
flips in the memory of one GPU, or a kernel that rounds otherwise on one, is never repaired: the
ranks average gradients of different networks, and no error tells.

Each tensor is summed as integers, on its device: any single number that differs changes the sum.
Of a sharded tensor (a DTensor) the parts are compared that are the same: those of the replicas.
"""
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from distributed.ranks import rank_and_world
from distributed.sync_bn import SyncBatchNorm

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}      # by bytes


def disagreement(model: nn.Module) -> str:
    """The first parameter or buffer that is not the same on all ranks, in words; "" where there is
    none. A collective; a sync point."""
    rank, world = rank_and_world()
    if world == 1:
        return ""
    tensors = shared_tensors(model)
    sums = torch.stack([checksum(x) for x in tensors.values()])                 # (tensors,)
    of_ranks = [torch.empty_like(sums) for _ in range(world)]
    dist.all_gather(of_ranks, sums)
    of_ranks = torch.stack(of_ranks).cpu()                                      # (ranks, tensors)
    usual = torch.empty_like(of_ranks)
    for i, x in enumerate(tensors.values()):
        for same in copies(x, world):
            usual[same, i] = of_ranks[same, i].mode().values
    differing = (of_ranks != usual).any(0).nonzero().flatten().tolist()
    if not differing:
        return ""
    first = differing[0]
    others = (of_ranks != usual)[:, first].nonzero().flatten().tolist()
    return (f"the ranks hold different weights: {list(tensors)[first]} of rank "
            f"{', '.join(map(str, others))} is not that of the others ({len(differing)} of "
            f"{len(tensors)} tensors differ)")


def copies(x: Tensor, world: int) -> list[list[int]]:
    """The ranks that hold the same numbers of a tensor."""
    if not isinstance(x, DTensor):
        return [list(range(world))]
    ranks = x.device_mesh.mesh.view(-1, x.device_mesh.size(-1))         # (replicas, parts)
    return ranks.t().tolist()


def checksum(x: Tensor) -> Tensor:
    """int64, of this rank's part, without a sync point."""
    x = x.to_local() if isinstance(x, DTensor) else x
    return x.detach().view(INTEGERS[x.element_size()]).sum(dtype=torch.int64)


def shared_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, without the running statistics of BatchNorm where ranks have
    their own: where it is not synchronised over all of them."""
    own = set()
    for prefix, module in model.named_modules():
        if not isinstance(module, SyncBatchNorm) or module.ranks < dist.get_world_size():
            own |= {f"{prefix}.running_mean".strip("."), f"{prefix}.running_var".strip(".")}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: x for name, x in named if name not in own}
