"""Roofline: the least time that the operations of a network can take on a device, one by one.

    operations = count_operations(trunk, (3, 224, 224), torch.bfloat16)
    seconds = roofline(operations, crops=64, flops_a_second=790e12, bytes_a_second=3e12)

The operations are those that PyTorch calls in a forward and a backward pass, counted on the meta
device: that takes a second or so, and no memory, also for 10 billion parameters.
"""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# BatchNorm reads its map for the statistics, then reads and writes it; backward reads map and
# gradient twice, and writes
NORMS = {aten.native_batch_norm: 3, aten.native_batch_norm_backward: 5}
NO_KERNEL = {aten.empty, aten.empty_like, aten.new_empty_strided, aten._unsafe_view}


class Gpu(NamedTuple):
    """Rates of a GPU; by default of an H100 SXM in a node of eight.

    tflops: TFLOP/s in bf16 of a large matrix product (data sheet: 989).  bandwidth: GB/s of a copy,
    read and written (data sheet: 3,350).  nvlink: GB/s each way to the GPUs of its node, as NCCL
    reaches (github.com/NVIDIA/nccl-tests, issue 212).  network: GB/s each way to other nodes, a GPU
    (a 400 Gb/s adapter; issue 290).
    """
    tflops: float = 790.0
    bandwidth: float = 3000.0
    nvlink: float = 370.0
    network: float = 47.0


class Operation(NamedTuple):
    """kind: product (convolution, linear layer), norm (BatchNorm) or other (element by element,
    means).  FLOP, and bytes read and written, of a crop; bytes of weights, of a pass."""
    kind: str
    flops: float
    maps: float
    weights: float
    backward: bool


def roofline(operations: Iterable[Operation], crops: int, flops_a_second: float,
             bytes_a_second: float) -> float:
    """Seconds, at the least: the sum over operations of the larger of what arithmetic and what
    memory takes, were each as fast as it is alone."""
    return sum(max(crops * flops / flops_a_second, (crops * maps + weights) / bytes_a_second)
               for _, flops, maps, weights, _ in operations)


def without_elementwise(operations: Iterable[Operation]) -> list[Operation]:
    """What is left when a compiler makes all that goes element by element part of the rest."""
    return [operation for operation in operations if operation.kind != "other"]


def count_operations(network: nn.Module, shape: tuple[int, ...],
                     dtype: torch.dtype) -> list[Operation]:
    """Of a forward and a backward pass of a module on the meta device, in training mode. Changes
    the module's dtype.

    shape: of a crop, an image with three channels or else features, whose gradient is computed too.
    dtype: of maps and weights, as autocast gives them; its casts are not counted.
    """
    network.to(dtype).train()
    crops = torch.empty(2, *shape, dtype=dtype, device="meta", requires_grad=shape[0] != 3)
    wanted = [crops] * crops.requires_grad + list(network.parameters())
    return count(lambda: network(crops), wanted, len(crops))


def count(forward: Callable[[], Tensor], wanted: list[Tensor], rows: int) -> list[Operation]:
    """Of forward(), and of the gradients of its sum for `wanted`, on rows crops or images."""
    with Counter(rows) as counter:
        outputs = forward()
        counter.backward = True
        torch.autograd.grad(outputs, wanted, torch.empty_like(outputs))
    return counter.operations


class Counter(TorchDispatchMode):
    """Lists the operations that are called inside, on any device; rows: of crops or images."""

    def __init__(self, rows: int):
        super().__init__()
        self.rows, self.operations, self.backward = rows, [], False

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        results, name = call(*args, **(kwargs or {})), call.overloadpacket
        if name is aten.convolution:
            self.product(*args[:2], results)
        elif name in (aten.mm, aten.addmm):
            self.product(*args[-2:], results)
        elif name is aten.convolution_backward:
            gradient, maps, weight, *_, (of_maps, of_weight, _) = args
            for _ in range(of_maps + of_weight):            # each with the same sizes
                self.product(maps, weight, gradient)
        elif not (call.is_view or name in NO_KERNEL):
            passes = NORMS.get(name)
            size = (passes * results[0].nbytes if passes else
                    sum(map(size_of, tensors([*args, results]))))
            self.add("norm" if passes else "other", 0, size, 0)
        return results

    def product(self, a: Tensor, b: Tensor, output: Tensor) -> None:
        """A convolution of maps a with weights b; or a product of matrices: a has a row for each
        crop and b is a weight, or a has a column for each and the output is a weight's gradient."""
        if a.dim() == 2:
            flops = 2 * a.numel() * b.shape[1]
            weight = b if len(a) == self.rows else output
        else:
            flops, weight = 2 * output.numel() * b.numel() // len(b), b
        maps = sum(size_of(t) for t in (a, b, output) if t is not weight)
        self.add("product", flops, maps, size_of(weight))

    def add(self, kind: str, flops: float, maps: float, weights: float) -> None:
        rows = self.rows
        self.operations.append(Operation(kind, flops / rows, maps / rows, weights, self.backward))


def size_of(tensor: Tensor) -> int:
    """Bytes; of an expanded tensor those that are there."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


def tensors(values) -> list[Tensor]:
    """Those in lists and tuples of lists, tuples and whatever else."""
    if isinstance(values, (list, tuple)):
        return [tensor for some in values for tensor in tensors(some)]
    return [values] if isinstance(values, Tensor) else []
