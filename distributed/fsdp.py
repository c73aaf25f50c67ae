"""FSDP: a network in shards, each rank with its part of every weight, gradient and momentum.

    build = partial(build_method, config, "meta")
    model = build()                                     # on the meta device: no memory
    sharded = shard(model, model.trunk.blocks(), shard_mesh(device, 8), torch.bfloat16)
    materialise(model, build, device)                   # each rank's parts of the weights
    sharded.backward(loss(sharded(crops)), last=True)

The engine is PyTorch's FSDP2 (fully_shard). A unit (a residual block, the stem, the head) is
gathered in the precision of the computation before it is used, and freed after it; gradients are
reduced in float32. SEER's 10 billion parameters (arXiv 2202.08360) were trained this way.

Whole on every rank, in float32, stay BatchNorm's scales and shifts, and the prototypes (in SEER
too): a thousandth of the 10B. Their gradients are averaged in one all-reduce a step.

Shapes: V crops, B images, C features.
"""
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from weights.sharded import put

# what initialisers fill a tensor with, by the names of torch.nn.init and of Tensor's methods
FILLS = {"normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_",
         "xavier_normal_", "xavier_uniform_", "constant_", "ones_", "zeros_", "fill_", "zero_"}


def shard_ranks(wanted: int, ranks: int, of_node: int) -> int:
    """Ranks that share one copy of the weights: as wanted, if it divides their number, else the
    next lower number that does; 0: of_node where there are several nodes, else all."""
    wanted = min(wanted or of_node, ranks)
    return max(n for n in range(1, wanted + 1) if ranks % n == 0)


def ranks_of_node() -> int:
    """As torchrun says; else all ranks are of one node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def shard_mesh(device: torch.device, wanted: int) -> DeviceMesh:
    """(replicas, ranks of a copy), or (ranks,) where there is one copy. A collective."""
    world = dist.get_world_size()
    ranks = shard_ranks(wanted, world, ranks_of_node())
    if ranks == world:
        return init_device_mesh(device.type, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (world // ranks, ranks),
                            mesh_dim_names=("replicate", "shard"))


def shard(model: nn.Module, units: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype,
          compress: bool = False) -> "Sharded":
    """Make the parameters of a model with a .trunk DTensors on the mesh's device, but for those
    that stay whole. units: modules of the trunk that are gathered one at a time; what else a child
    of the model has is one more.  dtype: of the computation.  compress: gradients are averaged in
    bf16, else in float32."""
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32 or compress:
        policy = MixedPrecisionPolicy(dtype, torch.bfloat16 if compress else torch.float32)
    whole = set(whole_parameters(model))
    for p in whole:
        if not p.is_meta:
            p.data = p.data.to(mesh.device_type)
    # FSDP's own hook is on the output, which must not be a view
    model.trunk.register_forward_hook(lambda trunk, inputs, features: features.clone())
    for unit in (*units, *model.children()):
        if not whole.issuperset(unit.parameters()):
            fully_shard(unit, mesh=mesh, mp_policy=policy, ignored_params=whole,
                        reshard_after_forward=True)
    return Sharded(model)


def whole_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those that are not sharded."""
    whole = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    whole += [model.prototypes] if hasattr(model, "prototypes") else []
    return [p for module in whole for p in module.parameters()]


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(module, FSDPModule) for module in model.modules())


class Sharded:
    """What is called in place of the model, for passes with gradient.

    Backward goes through the trunk once for each crop size. In one backward pass over several, a
    weight's gradient waits in autograd until the last of them has come: those of the whole
    network, 19 GB in bf16 of the 10B. Here the gradients of a unit are scattered at once.
    """

    def __init__(self, model: nn.Module):
        self.model, self.cuts = model, []
        model.trunk.register_forward_hook(self.cut)

    def __call__(self, crops):
        self.cuts.clear()
        return self.model(crops)

    def cut(self, trunk: nn.Module, inputs, features: Tensor) -> Tensor:
        """Of each crop size the features (count * B, C), as a leaf of the graph of what follows."""
        if not torch.is_grad_enabled():
            return features
        leaf = features.detach().requires_grad_()
        self.cuts.append((features, leaf))
        return leaf

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add to the gradients. last: whether it is a step's last micro-batch, after which the
        gradients are those of all ranks."""
        for module in self.model.children():        # between replicas, once a step
            if isinstance(module, FSDPModule):
                module.set_requires_all_reduce(last and module is not self.model.trunk)
        loss.backward()
        while self.cuts:
            features, leaf = self.cuts.pop()
            self.model.trunk.set_requires_all_reduce(last and not self.cuts)
            # or FSDP forgets what to gather ahead for the crop sizes that are left
            self.model.trunk.set_is_last_backward(not self.cuts)
            features.backward(leaf.grad)
        if last:
            average([p.grad for p in whole_parameters(self.model)])


@torch.no_grad()
def average(grads: list[Tensor]) -> None:
    """Over all ranks, in one all-reduce."""
    joined = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(joined)
    joined /= dist.get_world_size()
    for grad, mean in zip(grads, joined.split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))


# ------------------------------------------------------------------------------- initial values
def materialise(model: nn.Module, build: Callable[[], nn.Module], device: torch.device) -> None:
    """Move a sharded model from the meta device to a real one, and draw its initial values: those
    that it would have without shards, to the bit. One tensor at a time is whole.

    build: makes such a model on the meta device, and sets the seed before it draws. It is called
    twice: to learn which tensor each fill is for, then to draw.
    """
    model.to_empty(device=device)
    state, fills = model.state_dict(keep_vars=True), []
    with Fills(lambda tensor, fill: fills.append(tensor)):
        twin = build()
    names = {id(tensor): name for name, tensor in twin.state_dict(keep_vars=True).items()}
    # of a tensor that the network has no more, as the fc of a trunk, only the numbers are drawn
    names = iter([names.get(id(tensor)) for tensor in fills])

    def draw(tensor: Tensor, fill: Callable) -> None:
        whole = torch.empty_like(tensor, device=device)
        fill(whole)
        if name := next(names):
            put(state[name], whole)

    with torch.no_grad(), Fills(draw):
        build()
    model.normalize_prototypes()            # they are made of what was filled
    if model.queue:
        model.queue.embeddings = torch.zeros_like(model.queue.embeddings, device=device)


class Fills(TorchFunctionMode):
    """Calls seen(tensor, fill) where an initialiser fills a tensor on the meta device; fill(other)
    does the same to another one."""

    def __init__(self, seen: Callable[[Tensor, Callable], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if func.__name__ in FILLS and tensors and tensors[0].is_meta:
            def fill(other: Tensor) -> None:
                func(*(other if x is tensors[0] else x for x in args),
                     **{name: other if x is tensors[0] else x for name, x in kwargs.items()})
            self.seen(tensors[0], fill)
        return func(*args, **kwargs)
