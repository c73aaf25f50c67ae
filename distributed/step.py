"""Step: BatchNorm, DDP and shards under gradient accumulation.

    with torch.no_grad(), frozen_statistics(model):         # scores first, for the codes
        scores = model(crops)
    with sync_gradients(wrapped, i == last):                # DDP communicates in the last one alone
        backward(wrapped, loss(wrapped(crops)), i == last)
"""
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from distributed.fsdp import Sharded


def running_statistics(module: nn.Module) -> list[Tensor]:
    """BatchNorm's buffers: all that a forward pass in training mode changes."""
    return [buffer for norm in module.modules() if isinstance(norm, _BatchNorm)
            for buffer in norm.buffers()]


@contextmanager
def frozen_statistics(module: nn.Module):
    """BatchNorm normalises by its batch, as in training; afterwards its buffers are as before."""
    kept = [(buffer, buffer.clone()) for buffer in running_statistics(module)]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.copy_(before)


def sync_gradients(wrapped: nn.Module, now: bool):
    """Whether DDP reduces gradients in the backward pass inside. Without DDP there is nothing to
    reduce."""
    if now or not isinstance(wrapped, DistributedDataParallel):
        return nullcontext()
    return wrapped.no_sync()


def backward(wrapped: nn.Module | Sharded, loss: Tensor, last: bool) -> None:
    """Add to the gradients. last: whether it is the step's last micro-batch, after which they are
    those of all ranks."""
    if isinstance(wrapped, Sharded):
        wrapped.backward(loss, last)
    else:
        loss.backward()
