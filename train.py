"""Pretrain a RegNet with SwAV on a folder of images, as SEER was.

    python train.py                                     # the demo images, two CPU cores, minutes
    python train.py --data photos/                      # your own images; no labels needed
    torchrun --nproc_per_node 8 train.py --arch regnety_256gf --data photos/

Papers: SwAV (arXiv 2006.09882), SEER (2103.01988, 2202.08360). The method is in swav.py,
sinkhorn.py, multicrop.py, larc.py and regnet.py, the options in recipes/; this file has the step,
the loop, and what a run is made of. The same command again resumes the run, or says that it is
finished.

A run's folder holds config.json, log.jsonl (one object a line), views.png (a batch as the network
sees it), prototypes.png (the pictures nearest to each; of other methods neighbours.png), loss.png
(with matplotlib), a demo's results.json, checkpoint.pt, and trunk.pt: the product, a state dict
with torchvision's names. Other methods (--method) are in methods/.

Shapes: B images of a micro-batch on this rank, V crops, A assigned crops, K prototypes.
"""
import os

if __name__ == "__main__":
    # On a CPU, threads that spin while they wait starve the workers beside them: fp32 steps took
    # 13 s instead of 1.6 s on a busy machine. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from data.demo import DemoImages
from data.images import open_images
from data.stream import NoReadableImage, Stream
from distributed.hardware import affinity, autocast, pick_device, pick_precision, share_machine
from distributed.ranks import (
    PATIENCE,
    fail_together,
    gather_lists,
    init_process_group,
    leave_together,
    rank_and_world,
)
from distributed.step import backward, frozen_statistics, sync_gradients
from distributed.wrap import check_compiler, try_update
from evaluation.probe import open_probe
from evaluation.summary import look_back, sheet_name
from figures.curves import curves
from larc import LARC
from recipes.command_line import configure, explain, parse_arguments, split_arguments
from recipes.config import Config, with_length
from recipes.input import crop_of, settle
from recipes.machine import choose
from training.checkpoint import (
    Saver,
    keep_products,
    load_run_state,
    start_from,
    whole_method,
)
from training.monitor import Monitor, start_lines, usage
from training.plan import fit_ranks, plan_of
from training.resume import open_folder, remembered
from training.rollback import Rollback
from training.run import Run, build_network, open_loader, parameter_groups
from training.run_folder import write_config
from training.signals import INTERRUPTED, Interrupted, Signals, StepDropped, Stop
from weights.atomic import lock
from weights.terminal import outlive_terminal, reason


def step_gradients(run: Run, step: int, micro_batches: list) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Forward, codes, loss and backward of one batch; gradients are added to .grad.

    micro_batches: the crops of each, one tensor (count * B, 3, s, s) per size. Returns the loss;
    embeddings and scores, of all crops where there is one micro-batch, else of the assigned ones.

    Sinkhorn needs the scores of the WHOLE batch. With several micro-batches a first pass without
    gradient computes them; a second pass goes forward and backward, one micro-batch at a time.
    With BatchNorm in eval mode the gradient equals that of the joined batch. In training mode
    BatchNorm sees one micro-batch at a time; the head's sees all crops in the second pass, so in
    the first it needs them too (run.all_crops), for the same scores.
    """
    method, n = run.method, len(micro_batches)
    joint = n > 1 and method.joint
    if joint:
        with torch.no_grad(), frozen_statistics(method), autocast(run.device, run.dtype):
            parts = zip(*[method.assigned(crops, run.all_crops) for crops in micro_batches])
        joined = tuple(torch.cat(same, dim=1) for same in parts)        # (A, n*B, D), (A, n*B, K)
        del parts                                               # only the joined scores are kept
        targets = method.targets(joined, step).chunk(n, dim=1)
    total = 0.0
    for i, crops in enumerate(micro_batches):
        with sync_gradients(run.wrapped, now=i == n - 1):
            # an autocast of its own: weights that were cast without gradient must not be reused
            with autocast(run.device, run.dtype):
                outputs = run.wrapped(crops)                # embeddings (V*B, D), scores (V*B, K)
            target = targets[i] if joint else method.targets(outputs, step)     # codes (A, B, K)
            loss = method.loss(outputs, target) / n         # swapped prediction, eq. 2
            backward(run.wrapped, run.scaler.scale(loss), last=i == n - 1)
        total += loss.detach()
    return total, joined if joint else tuple(x.detach() for x in outputs)


def train(run: Run) -> None:
    """The loop. Raises Stop, Interrupted, and NoReadableImage."""
    config, method, optimizer, scaler = run.config, run.method, run.optimizer, run.scaler
    with Signals() as signals, run.batches as batches, Saver(run) as saver, \
            Monitor(run, saver) as monitor:
        rollback, done = Rollback(run, signals, batches.per_step), run.start
        for step, micro_batches in batches:                 # augmented crops, on the device
            for group in optimizer.param_groups:
                group["lr"] = config.lr_at(step)

            monitor.draw_views(step, micro_batches)
            rollback.remember()
            optimizer.zero_grad(set_to_none=run.world == 1)     # views of DDP's buckets: they stay
            try:
                loss, outputs = step_gradients(run, step, rollback.watched(micro_batches))
            except StepDropped:                             # a signal, between two micro-batches
                rollback.undo()
                break
            method.before_step(step)                        # SwAV: prototypes frozen at first

            scaler.unscale_(optimizer)
            verdict = rollback.vote(step, loss, outputs, saver.due())       # one all-reduce
            if verdict.finite:
                scaler.step(optimizer, gradient_norms=verdict.gradient_norms)
                method.after_step(step)                     # SwAV: prototypes to unit norm; queue
            else:
                rollback.undo()                             # Stop after too many in a row
            scaler.update()

            monitor.step(step, loss, outputs, verdict)
            done = step + 1
            saver.step(done, force=verdict.save)            # refuses weights that are not finite
            if verdict.stop:
                break
        saver.finish(done)
    if done < config.steps:
        raise Interrupted(f"{signals.seen or 'a signal to another rank'} after step {done}: "
                          f"{'the run is saved, and ' * bool(done)}the same command goes on")


# ------------------------------------------------------------------------- what a run is made of
def setup(config: Config, images, given=None, grow=False) -> Run:
    """Raises ValueError for what cannot be used, before any file is written. given, grow: names of
    the options on the command line, and whether --grow is there (see resume.resume)."""
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype = pick_precision(config.precision, device)
    if "RANK" in os.environ and not dist.is_initialized():
        # --init may have to download 37 GB
        init_process_group(device, 2 * PATIENCE if config.init else PATIENCE)
    rank, world = rank_and_world()
    share_machine(gather_lists([affinity()]))
    held, state, config = open_folder(with_length(config, len(images)), images, given, grow)
    stream = Stream(images, crop_of(config), config.seed, config.grown_at)
    stream[0]                                   # a folder without one readable image fails here
    config, machine_text = choose(fit_ranks(config, device, dtype), device, dtype)
    config, stream.images, workers, input_text = settle(config, images, device.type, world,
                                                        state and state["step"])

    if config.compile:
        with fail_together():
            check_compiler(device)
    method, wrapped = build_network(config, device, dtype, world, images)
    if config.init and not state:
        start_from(config.init, method, rank, config.method)
    optimizer = LARC(parameter_groups(config, method), config.peak_lr(), config.momentum,
                     config.weight_decay, config.trust_coefficient,
                     compiled=device.type == "cuda")
    try_update(optimizer)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(method, wrapped, device, dtype, scaler, optimizer, config, stream,
              all_crops=config.codes_need_all_crops())
    if state:
        load_run_state(run, state)
    with fail_together():
        run.batches = open_loader(run, workers)
        if config.probe and (rank == 0 or config.shard):
            run.probe = open_probe(config, device, dtype)
        if rank == 0:
            run.out.mkdir(parents=True, exist_ok=True)
            run.lock = held or lock(run.out)
            if state:
                keep_products(run, state)
            print("\n".join(filter(None, (start_lines(run), machine_text, input_text))), flush=True)
            write_config(config, run.out)
    return run


# ------------------------------------------------------------------------------------ the program
def fail(error: Exception) -> None:
    """Print the error in one sentence, and exit with status 2."""
    who = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
    print(f"train.py: error: {who}{reason(error)}", file=sys.stderr)
    sys.exit(2)


def launch(config: Config, images, given, grow) -> Run:
    """One run, from its setup to its last step."""
    try:
        run = setup(config, images, given, grow)
    except (ValueError, OSError, dist.DistError) as error:
        fail(error)
    try:
        if run.start < run.config.steps:
            train(run)
    except (Stop, NoReadableImage) as error:
        fail(error)
    except Interrupted as error:
        if run.rank == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except RuntimeError as error:
        if "DataLoader" in str(error):              # it names the process, or says "timed out"
            fail(error)
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            fail(Stop(f"another rank is gone, or does not answer ({error})"))
        raise
    return run


def main(argv: list[str] | None = None) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        given, asked, machine = split_arguments(given)
        if runs := asked.get("plot"):
            picture = Path(runs[0], "loss.png") if len(runs) == 1 else Path("loss.png")
            curves(picture, runs)
            return print(picture)
        named, given = given.keys(), remembered(given, world) | given
        images = open_images(given["data"]) if given.get("data") else None
        if "plan" in asked:
            return print(plan_of(given, machine, images))
        images = DemoImages("train") if images is None else images
        if "explain" in asked:
            return print(explain(given, world, images))
        config = configure(given, world, images)
    except (ValueError, OSError, ImportError) as error:     # on all ranks alike: rank 0 prints
        sys.exit(2) if rank else fail(error)
    with leave_together():
        run = launch(config, images, named, "grow" in asked)
    if rank == 0:               # the other ranks may exit
        if run.start < run.config.steps or not (run.out / sheet_name(run.config)).exists():
            if run.config.shard:
                run.method = whole_method(run)
            look_back(run)
            print(usage(run.config, run.out))
        else:
            print(f"{run.out} is finished: {run.start} steps. --out starts another run.")


if __name__ == "__main__":
    outlive_terminal()
    main()
