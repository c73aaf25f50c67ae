"""Monitor: what a run says while it trains: a progress bar or lines, log.jsonl, TensorBoard.

    print(start_lines(run))                                 # what is about to be trained
    with Monitor(run, saver) as monitor:
        monitor.step(step, loss, outputs, verdict)
    print(usage(config, out))                               # how to use the trunk elsewhere

An `entry` is what a line of log.jsonl holds.
"""
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from data.loader import SHARED
from distributed.hardware import peak_memory
from distributed.ranks import gather_lists, mean_over_ranks
from distributed.wrap import sync_group
from evaluation.summary import sheet_name
from figures.curves import PROBES
from figures.sheets import views
from methods.build import METHODS, RESNETS
from recipes.config import Config
from regnet import ARCHS
from swav import ASSIGNED
from training.checkpoint import Saver
from training.collapse import Watchdog, statistics_of
from training.plan import expected_time
from training.rollback import Verdict
from training.run import Run
from training.run_folder import Log
from training.signals import Stop
from weights.terminal import reason

MAX_BAD_SHARE = 0.1         # of the images read so far; above it the run ends


class Monitor:
    """Everything that a run says and writes while it trains, but its checkpoints.

    saver: of the run; its errors are reported."""

    def __init__(self, run: Run, saver: Saver):
        self.run, self.batches, self.saver = run, run.batches, saver
        config, self.main = run.config, run.rank == 0
        self.log = Log(run.out / "log.jsonl", run.start) if self.main else None
        self.board = board(run.out, run.start) if self.main else None
        self.watchdog = Watchdog(config)
        self.probe_every = config.probe_every or math.ceil(config.steps / 20)
        self.logged, self.clock = run.start, time.perf_counter()
        self.bar = tqdm(initial=run.start, total=config.steps, unit="step",
                        disable=not self.main or not sys.stderr.isatty())

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def draw_views(self, step: int, micro_batches: Sequence) -> None:
        """views.png, before the first step."""
        config = self.run.config
        if self.main and step == 0:
            try:
                views(self.run.out / "views.png", list(micro_batches[0]), config.crops,
                      config.mean, config.std, ASSIGNED if config.method == "swav" else 0)
            except OSError as error:
                tqdm.write(f"warning: views.png could not be written: {reason(error)}")

    def step(self, step: int, loss: Tensor, outputs: tuple[Tensor, ...], verdict: Verdict) -> None:
        """After each step. Raises Stop where too many images cannot be read."""
        config, done, pending = self.run.config, step + 1, self.run.pending
        pending["bad"] += self.batches.faults
        self.batches.faults = []
        self.bar.update()
        probing = config.probe and (done % self.probe_every == 0 or done == config.steps)
        if done % config.log_every and done != config.steps and not probing:
            return
        # note: a sync point, and with several ranks a collective
        loss, faults = mean_over_ranks(loss), gather_lists(pending["bad"])
        pending["bad_total"] += len(faults)
        # weights in shards are gathered by all ranks, else rank 0 alone has a probe
        probed = self.run.probe(self.run.method.trunk) if probing and self.run.probe else {}
        if self.main:
            self.report(step, loss, None if verdict.bad else outputs, faults, probed)
        seen, total = done * config.batch_size, pending["bad_total"]
        if total > MAX_BAD_SHARE * (seen + total) and total >= 10:
            raise Stop(f"{total} images in {seen} could not be read, more than "
                       f"{MAX_BAD_SHARE:.0%}; {self.run.out}/log.jsonl names them")
        pending |= {"bad": [], "skipped": 0, "events": []}
        self.logged, self.batches.waited = done, 0.0

    def report(self, step: int, loss: Tensor, outputs: tuple[Tensor, ...] | None, faults: list,
               probed: dict) -> None:
        """A line of log.jsonl, TensorBoard and the terminal. outputs: None after a bad step."""
        run, config, done = self.run, self.run.config, step + 1
        seconds, self.clock = time.perf_counter() - self.clock, time.perf_counter()
        entry = {"step": done, "images": done * config.batch_size, "lr": config.lr_at(step)}
        if config.method == "swav":
            entry["ln_k"] = math.log(config.prototypes)
        if outputs is not None:
            entry |= {"loss": loss.item(), **statistics_of(run.method, outputs, loss)}
        entry |= {"skipped": run.pending["skipped"], "waited": self.batches.waited / seconds,
                  "images_per_second": (done - self.logged) * config.batch_size / seconds,
                  "memory_gb": peak_memory(run.device) / 1e9}
        entry |= probed
        if run.pending["events"]:
            entry["events"] = run.pending["events"]
        entry["failed_saves"] = self.saver.writer.take_errors()
        self.log.write(entry, faults)
        self.board = scalars(self.board, entry)
        for error in entry["failed_saves"]:
            tqdm.write(f"warning: {error}; the run goes on, and tries again", file=sys.stderr)
        if outputs is not None:
            progress(self.bar, entry, config)
            self.watchdog.look(entry)


def start_lines(run: Run) -> str:
    """What is about to be trained, on what."""
    config, world, count, batches = run.config, run.world, len(run.stream.images), run.batches
    ahead = (f", each {batches.ahead} micro-batches ahead, in {batches.in_flight / 1e6:,.0f} MB of "
             "shared memory" if batches.workers else "")
    if batches.workers == 0 and config.workers < 0:
        ahead = f", for which {SHARED} is too small"
    takes = ""
    if (run.device.type != "cpu" and config.recipe not in ("demo", "small")     # these: minutes
            and config.method == "swav"):
        takes = f", {expected_time(config, run.dtype, world)}"
    pending = run.pending["events"]
    if config.method == "deepcluster_v2" and config.steps <= count / config.batch_size:
        pending = [*pending, "warning: deepcluster_v2 learns from its second epoch on, and the run "
                   "ends before it: give it more --steps"]
    source = config.data or "the built-in demo images (--data DIR trains on your own)"
    norms = ""
    if config.sync_bn_group > 1:
        group = sync_group(config.sync_bn_group, world)
        norms = (f"; BatchNorm over {group} ranks" if group > 1 else "; BatchNorm of each rank by "
                 f"itself: SyncBatchNorm over {config.sync_bn_group} needs several ranks")
    small = " (for fewer than 100,000 images; --explain gives its reasons)"
    return (f"data: {count:,} images from {source}\n"
            f"recipe {config.recipe}{small * (config.recipe == 'small')}: {config.arch}, "
            f"crops {config.text('crops')}, {method_text(config)}\n"
            f"batch {config.batch_size} = {world} rank{'s' * (world > 1)} x "
            f"{config.batch_size // world // config.micro_batch} x {config.micro_batch}; "
            f"lr {config.lr:g} per 256 images = {config.peak_lr():g}; {config.steps} steps = "
            f"{config.steps * config.batch_size / count:,.1f} epochs{takes}\n"
            f"{run.device}, {str(run.dtype).removeprefix('torch.')}"
            + "; activation checkpointing" * bool(config.checkpoint_activations)
            + "; compiled: the first step takes its time" * config.compile
            + norms + f"; {batches.workers} workers{ahead}; run folder {config.out}"
            + (f"; resumed after step {run.start}" if run.start else "")
            + "".join(f"\n{event}" for event in pending))


def method_text(config: Config) -> str:
    """The method's own settings."""
    if config.method == "swav":
        return (f"head {config.text('head')}, {config.prototypes} prototypes; "
                f"ln K = {math.log(config.prototypes):.3f}")
    options = METHODS[config.method].options.split()
    return ", ".join([config.method] + [f"{name.replace('_', ' ')} {config.text(name)}"
                                        for name in options if name != "head_bn"])


def progress(steps: tqdm, entry: dict, config: Config) -> None:
    """On a terminal beside the progress bar, else a line."""
    shown = {"loss": "loss {:.3f}", "loss_over_ln_k": " ({:.2f} ln K)",
             "loss_over_ln_candidates": " ({:.2f} of chance)", "loss_over_ln_keys":
             " ({:.2f} of chance)", "prototypes_used": "  prototypes {:.0%}",
             "clusters_used": "  clusters {:.0%}", "top1": "  top-1 {:.0%}",
             "effective_rank": "  rank {:.0f}",
             "images_per_second": "  {:.0f} img/s",
             **{probe: f"  {probe} {{:.1f}} %" for probe in PROBES}}
    text = "".join(words.format(entry[name]) for name, words in shown.items() if name in entry)
    if entry["waited"] > 0.3:
        text += f"  input-bound {entry['waited']:.0%}: more --workers help"
    for fault in entry["bad"][:3]:
        tqdm.write(f"replaced {fault['name']}: {fault['cause']}: {fault['detail']}")
    if len(entry["bad"]) > 3:
        tqdm.write(f"and {len(entry['bad']) - 3} more, named in log.jsonl")
    if steps.disable:
        left = (config.steps * config.batch_size - entry["images"]) / entry["images_per_second"]
        print(f"step {entry['step']}/{config.steps}  {text}  {left / 60:.1f} min left", flush=True)
    else:
        steps.set_postfix_str(text)


def board(out: Path, start: int):
    """TensorBoard's writer for the steps after `start`; None where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(out), purge_step=start + 1)
    except ImportError:
        return None
    except Exception as error:          # installed, but broken
        print(f"warning: TensorBoard does not work here ({error})")


def scalars(board, entry: dict):
    """A log entry's numbers, for TensorBoard; returns the board, or None if it has failed."""
    try:
        for name, value in entry.items() if board else ():
            if isinstance(value, int | float):
                board.add_scalar(name, value, entry["step"])
        return board
    except Exception as error:          # its own thread's: a full disk
        print(f"warning: TensorBoard has failed ({error}); log.jsonl is still written")


def usage(config: Config, out: Path) -> str:
    """How to use the trunk elsewhere: with torchvision alone, where it has this network."""
    params = ARCHS.get(config.arch)
    if config.arch in RESNETS and RESNETS[config.arch] > 1:
        lines = ["import torch; from methods.build import build_trunk",
                 f"trunk = build_trunk({config.arch!r})"]
    elif params is None:
        lines = [f"import torch; from torchvision.models import {config.arch}",
                 f"trunk = {config.arch}(); trunk.fc = torch.nn.Identity()"]
    elif dataclasses.replace(params, rounding="torchvision").stages() == params.stages():
        numbers = f"{params.depth}, {params.w_0}, {params.w_a}, {params.w_m}, {params.group_width}"
        lines = ["import torch; from torchvision.models.regnet import BlockParams, RegNet",
                 f"trunk = RegNet(BlockParams.from_init_params({numbers}, "
                 f"se_ratio={params.se_ratio or None})); trunk.fc = torch.nn.Identity()"]
    else:
        lines = ["import torch; from regnet import ARCHS, RegNet",
                 f"trunk = RegNet(ARCHS[{config.arch!r}])"]
    lines.append(f"trunk.load_state_dict(torch.load({str(out / 'trunk.pt')!r})); trunk.eval()")
    mean, std = config.text("mean"), config.text("std")
    return (f"\n{out} holds trunk.pt, log.jsonl and, to look at, {sheet_name(config)} and "
            "views.png.\n"
            f"The trunk takes RGB in 0..1, minus {mean}, over {std}:\n    " + "\n    ".join(lines))
