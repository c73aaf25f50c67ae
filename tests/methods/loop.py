"""The step of train.py, for the tests of methods.

    loss, outputs = step_of(method, [[crops], [crops]], step=3)     # gradients are added to .grad
"""
import torch

from train import step_gradients
from training.run import Run


def step_of(method, micro_batches, step=0, wrapped=None):
    """On the CPU, in the method's own precision. wrapped: the method in DDP."""
    run = Run(method, wrapped or method, torch.device("cpu"), torch.float32,
              torch.amp.GradScaler("cpu", enabled=False))
    return step_gradients(run, step, micro_batches)
