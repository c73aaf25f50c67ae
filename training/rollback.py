"""Rollback: a step that is not finite, or was interrupted, leaves no trace, on any rank.

    rollback = Rollback(run, signals, per_step)         # micro-batches
    for step in steps:
        rollback.remember()
        for crops in rollback.watched(micro_batches):   # StepDropped between two, after a signal
            loss, outputs = ...                         # forward, backward
        verdict = rollback.vote(step, loss, outputs)    # one all-reduce
        if verdict.finite:
            optimizer.step()
        else:
            rollback.undo()                             # Stop after too many in a row

Weights and momentum are as before because the optimizer's step is left out; what a forward pass
changes, BatchNorm's running statistics, is copied before and put back.
"""
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distributed.ranks import all_reduce_max, on_any_rank
from distributed.step import running_statistics
from larc import norms
from training.run import Run
from training.signals import Signals, StepDropped, Stop
from training.writer import newest


class Verdict(NamedTuple):
    """On a step, the same on all ranks."""
    finite: bool                # the step counts
    bad: bool                   # not finite, and float16's loss scale is not the cause
    stop: bool                  # a signal came, to this rank or to another
    save: bool = False          # it is time to save
    gradient_norms: Tensor | None = None    # of this rank, for the optimizer: larc.norms


class Rollback:
    def __init__(self, run: Run, signals: Signals, per_step: int = 1):
        self.run, self.signals, self.per_step = run, signals, per_step
        self.step, self.origin = 0, 0.0
        # others, a queue or a memory of all images, change after the optimizer's step alone
        self.buffers = running_statistics(run.method)
        self.copies = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def remember(self) -> None:
        for copy, buffer in zip(self.copies, self.buffers):
            copy.copy_(buffer)

    def watched(self, micro_batches: Sequence) -> Sequence:
        """Of a step with several: raises StepDropped before each of them once a signal has come,
        to this rank or to another. note: each is a collective, of the hosts alone."""
        def signalled():
            return on_any_rank(self.signals.seen is not None)
        return Watched(micro_batches, signalled) if self.per_step > 1 else micro_batches

    def vote(self, step: int, loss: Tensor, outputs: tuple[Tensor, ...],
             save: bool = False) -> Verdict:
        """Whether a step counts; save: whether this rank finds that it is time to. note: the one
        sync point of a step (float16's scaler has another), and a collective."""
        run, self.step = self.run, step
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        gradient_norms = norms([p.grad for p in params if p.grad is not None])
        loss_finite, outputs_finite, gradients_finite = (
            x.isfinite().all() for x in (loss, outputs[0], gradient_norms))
        # a rank with outputs that are not finite spoils the codes of all ranks: its number is told
        origin = ~outputs_finite * (run.world - run.rank)
        lost, self.origin, spoiled, stop, save = all_reduce_max(
            [~loss_finite, origin, ~gradients_finite, self.signals.seen is not None, save],
            run.device)
        lost = lost or self.origin
        # a scale that is too large for float16 is no fault: the scaler lowers it
        overflow = (spoiled and not lost and run.scaler.is_enabled()
                    and run.scaler.get_scale() > 1)
        bad = bool(lost or spoiled) and not overflow
        if not (bad or overflow):
            run.pending["in_a_row"] = 0
        run.pending["skipped"] += bad
        run.pending["in_a_row"] += bad
        return Verdict(not (bad or overflow), bad, bool(stop), bool(save), gradient_norms)

    @torch.no_grad()
    def undo(self) -> None:
        """Raises Stop after config.max_bad_steps bad steps in a row."""
        run = self.run
        for copy, buffer in zip(self.copies, self.buffers):
            buffer.copy_(copy)
        if run.pending["in_a_row"] >= run.config.max_bad_steps:
            where = f" on rank {run.world - int(self.origin)}" * (self.origin > 0)
            raise NotFinite(f"{run.pending['in_a_row']} steps in a row, the last of them "
                            f"{self.step + 1}, had a loss or gradients that are not finite{where}",
                            run.out)


class Watched:
    """The micro-batches of a step, which end with StepDropped where `signalled()` says so."""

    def __init__(self, micro_batches: Sequence, signalled: Callable[[], bool]):
        self.micro_batches, self.signalled = micro_batches, signalled

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator:
        for crops in self.micro_batches:
            if self.signalled():
                raise StepDropped
            yield crops


class NotFinite(Stop):
    """With what to do: its text is made when it is read, for the last save may still be on its way
    when it is raised."""

    def __init__(self, what: str, out: Path):
        super().__init__(what)
        self.out = out

    def __str__(self) -> str:
        kept = "no checkpoint was saved yet: begin again with"
        if paths := newest(self.out):
            kept = f"the last good checkpoint was kept: --init {paths[0]} with another --out and"
        return f"{super().__str__()}; {kept} a lower --lr, or --precision fp32"
