"""Pretrain a RegNet with SwAV on a folder of pictures, as SEER was.

    python train.py                                     # the demo pictures, two CPU cores, minutes
    python train.py --data photos/                      # your own pictures; no labels needed
    torchrun --nproc_per_node 8 train.py --arch regnety_256gf --data photos/

Papers: SwAV (arXiv 2006.09882), SEER (2103.01988, 2202.08360). The method is in swav.py,
sinkhorn.py, multicrop.py, larc.py and regnet.py, the options in recipes.py; this file is the
distribution and the loop. The same command again resumes the run, or says that it is finished.

A run's folder holds config.json, log.jsonl (one object a line), views.png (a batch as the network
sees it), prototypes.png (the pictures nearest to each), loss.png (with matplotlib), a demo's
results.json, checkpoint.pt, and trunk.pt: the product, a state dict with torchvision's names.
"""
import os

if __name__ == "__main__":
    # On a CPU, threads that spin while they wait starve the workers beside them: fp32 steps took
    # 13 s instead of 1.6 s on a busy machine. OpenMP reads this once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import datetime
import itertools
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import checkpoint
import folder
import guard
import plan
import report
import weights
from classifiers import knn, linear_probe, per_cent
from demo import DemoImages
from images import NoReadablePicture, Positions, Stream, collate, open_images, permute
from labelled import Centred, extract
from larc import LARC
from multicrop import MultiCrop, Photometric, parse_crops
from probe import Probe
from recipes import (MACHINE, Config, check_ranks, configure, explain, flag, parse_arguments,
                     parse_channels, parse_head, with_length)
from scale import (build_model, check_compiler, layout, pick_device, pick_precision, swav_backward,
                   wrap)
from swav import Queue, SwAV, collapse_statistics, swav_codes

SHEET = 2048                # pictures from which the sheet of prototypes is drawn
MAX_BAD_SHARE = 0.1         # of the pictures read so far; above it the run ends
REMEDY = ("the last good checkpoint was kept: --init {0}/checkpoint.pt with another --out and a lower "
          "--lr, or --precision fp32")
STUCK = 900                 # seconds without a picture from the workers, after which the run ends


# ---------------------------------------------------------------------------------- one step
def fresh_model(config: Config, device="cpu") -> SwAV:
    return build_model(config.arch, parse_head(config.head), config.prototypes, config.head_bn,
                       config.seed, device)


def swav_step(config: Config, step: int, model: SwAV, wrapped: torch.nn.Module,
              queue: Queue | None, micro_batches: list, **options):
    """Loss, and the embeddings and scores the codes were made of; gradients are in .grad.

    micro_batches, options: as scale.swav_backward's.
    """
    def codes_of(embeddings, scores, num_crops):
        use = queue and step >= config.queue_start
        codes = swav_codes(scores, num_crops, epsilon=config.epsilon,
                           iterations=config.sinkhorn_iterations, hard=config.hard,
                           queue_scores=queue.scores(model.prototypes.weight) if use else None)
        if queue:
            queue.push(embeddings, num_crops)
        return codes

    return swav_backward(model, wrapped, micro_batches,
                         [spec.count for spec in parse_crops(config.crops)], codes_of,
                         config.temperature, **options)


# ------------------------------------------------------------------------------------ the run
class Stop(Exception):
    """The run cannot go on; the message says why, and what to try."""


class Interrupted(Exception):
    """A signal came; the run was saved."""


def setup(config: Config, images, given=None) -> SimpleNamespace:
    """Everything the loop needs. Raises ValueError for what cannot be used; writes nothing before
    that is known. given: names of the options that were asked for, as folder.resume takes them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype = pick_precision(config.precision, device)
    if "RANK" in os.environ:
        # --init may have to download 37 GB
        guard.join("nccl" if device.type == "cuda" else "gloo",
                   datetime.timedelta(minutes=60 if config.init else 10))

    # first the folder: what it holds must not change any more
    config, held, errors = with_length(config, len(images)), None, []
    out = Path(config.out)
    if rank == 0 and out.exists():
        try:
            held = folder.lock(out)
        except (ValueError, OSError) as error:
            errors = [str(error)]
    if errors := gather_lists(errors):
        raise ValueError(errors[0])
    state, config = folder.resume(config, len(images), out, given)
    check_ranks(config, world)
    start = state["step"] if state else 0
    if len(set(gather_lists([(config, start)]))) > 1:
        raise ValueError(f"the ranks do not see the same pictures, or not the same "
                         f"{out}/checkpoint.pt; both must be shared")

    specs = parse_crops(config.crops)
    crop = MultiCrop(specs, config.strength_at, gray=config.gray, blur=config.blur,
                     max_pixels=config.max_pixels)
    stream = Stream(images, crop, config.seed)
    stream[0]                                   # a folder without one readable picture fails here

    config = plan.fit(config, world, min(gather_lists([plan.memory_of(device)])), dtype)
    model = fresh_model(config, device)
    if config.init and not state:
        start_from(config.init, model, rank)
    if config.compile:
        try:
            check_compiler(device)
        except ValueError as error:
            errors = [str(error)]
        if errors := gather_lists(errors):
            raise ValueError(errors[0])
    wrapped = wrap(model, device, config.sync_bn_group, config.checkpoint_activations, config.compile)
    optimizer = LARC(model.parameters(), config.peak_lr(), config.momentum, config.weight_decay,
                     config.trust_coefficient)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    queue = None
    if config.queue:
        queue = Queue(config.queue // world, parse_head(config.head)[-1], device=device)
    if state:
        checkpoint.load_run_state(state, model, optimizer, scaler, queue)

    probe = None
    if rank == 0:
        try:
            if config.probe:
                probe = open_probe(config, device, dtype)
            out.mkdir(parents=True, exist_ok=True)
            held = held or folder.lock(out)
            report.start(config, images, world, device, dtype, start)
            folder.write_config(config, out)
        except (ValueError, OSError) as error:
            errors = [str(error)]
    if errors := gather_lists(errors):
        raise ValueError(errors[0])
    return SimpleNamespace(
        lock=held, probe=probe, batches=None, last=bool(state and state["last"]),
        pending=(state or {}).get("pending", {"bad": [], "bad_total": 0, "skipped": 0, "in_a_row": 0}),
        config=config, out=out, start=start, rank=rank, world=world, device=device, dtype=dtype,
        specs=specs, stream=stream, model=model, wrapped=wrapped,
        optimizer=optimizer, scaler=scaler, queue=queue)


def train(run: SimpleNamespace, signals: guard.Signals, writer: checkpoint.Writer) -> None:
    """The loop. Raises Stop, Interrupted, and images.NoReadablePicture."""
    config, start, model, device, queue = run.config, run.start, run.model, run.device, run.queue
    optimizer, scaler, out, main = run.optimizer, run.scaler, run.out, run.rank == 0
    mean, std = parse_channels(config.mean), parse_channels(config.std)
    distort = Distort(Photometric(mean, std).to(device))
    positions = Positions(start, config.steps, config.batch_size, run.rank, run.world,
                          config.micro_batch)
    # on a CPU the workers distort too: they have time to spare, the computing threads have none
    pieces = config.batch_size // run.world // config.micro_batch
    in_workers = device.type == "cpu" and pieces == 1       # of several, one is float at a time
    workers = share_processors(config, device)
    loader = DataLoader(run.stream, batch_sampler=positions,
                        collate_fn=distort.collate if in_workers else collate,
                        num_workers=workers,
                        worker_init_fn=guard.leave_signals_to_the_parent,
                        timeout=STUCK if workers else 0,
                        pin_memory=device.type == "cuda")
    log, watchdog = folder.Log(out / "log.jsonl", start) if main else None, report.Watchdog(config)
    board = report.board(out, start) if main else None
    undo, pending = guard.Undo(model, queue), run.pending
    bad_pictures, bad_total = (pending["bad"] if main else []), pending["bad_total"]
    skipped, in_a_row = pending["skipped"], pending["in_a_row"]
    probe_every = config.probe_every or math.ceil(config.steps / 20)
    waited, logged, clock = 0.0, start, time.perf_counter()
    steps = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step",
                 disable=not main or not sys.stderr.isatty())
    batches = run.batches = iter(loader)

    for step in steps:
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)

        # crops
        wait = time.perf_counter()
        micro_batches = []
        for crops, params, bad in itertools.islice(batches, pieces):
            bad_pictures += bad
            micro_batches.append([(c.to(device, non_blocking=True), p)
                                  for c, p in zip(crops, params)])
        waited += time.perf_counter() - wait
        if main and step == 0:
            try:
                report.views(out / "views.png", distort(micro_batches[0]), run.specs, mean, std)
            except OSError as error:
                tqdm.write(f"warning: views.png could not be written: {error}")

        # forward, codes, loss, backward
        undo.remember()
        optimizer.zero_grad(set_to_none=run.world == 1)     # DDP's are its buckets: they stay
        loss, embeddings, scores = swav_step(
            config, step, model, run.wrapped, queue, micro_batches, dtype=run.dtype,
            scaler=scaler, prepare=distort)
        if step < config.freeze_prototypes:
            model.freeze_prototypes()

        # is it sound, is there a signal? note: a sync point, and with several ranks a collective
        scaler.unscale_(optimizer)
        sound_loss, sound_mine, sound_gradients = guard.sound(loss, embeddings, model)
        # a scale that is too large for float16 is no fault: the scaler lowers it
        overflow = sound_loss and not sound_gradients and scaler.is_enabled() and \
            scaler.get_scale() > 1
        sound = sound_loss and sound_mine and (sound_gradients or overflow)
        origin = 0 if sound_mine else run.world - run.rank      # the others know of it by the codes
        stop, bad_step, overflow, origin = guard.agree(
            [signals.seen is not None, not sound, overflow, origin], device)

        # step, normalise; or as if it had not been
        done = step + 1
        if bad_step or overflow:
            undo.undo()
            skipped, in_a_row = skipped + bool(bad_step), in_a_row + bool(bad_step)
            if in_a_row >= config.max_bad_steps:
                where = f" on rank {run.world - int(origin)}" * (origin > 0)
                raise Stop(f"{in_a_row} steps in a row, the last of them {done}, had a loss or "
                           f"gradients that are not finite{where}; {REMEDY.format(out)}")
        else:
            in_a_row = 0
            scaler.step(optimizer)
            model.normalize_prototypes()
        scaler.update()

        # log
        probing = config.probe and (done % probe_every == 0 or done == config.steps)
        if done % config.log_every == 0 or done == config.steps or probing:
            # note: a sync point, and with several ranks a collective
            loss = mean_over_ranks(loss)
            bad_pictures = gather_lists(bad_pictures)
            bad_total += len(bad_pictures)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            seen = done * config.batch_size
            if main:
                entry = {"step": done, "images": seen, "lr": config.lr_at(step),
                         "ln_k": math.log(config.prototypes)}
                if not bad_step:
                    entry |= {"loss": loss.item(), **collapse_statistics(
                        embeddings, scores, loss, config.temperature)}
                entry |= {"skipped": skipped, "waited": waited / seconds,
                          "images_per_second": (done - logged) * config.batch_size / seconds,
                          "memory_gb": plan.peak_memory(device) / 1e9}
                if probing:
                    entry |= run.probe(model.trunk)
                entry["failed_saves"], writer.errors = writer.errors, []
                log.write(entry, bad_pictures)
                board = report.scalars(board, entry)
                for error in entry["failed_saves"]:
                    tqdm.write(f"warning: {error}; the run goes on, and tries again",
                               file=sys.stderr)
                if not bad_step:
                    report.progress(steps, entry, config)
                    watchdog.look(entry)
            if bad_total > MAX_BAD_SHARE * (seen + bad_total) and bad_total >= 10:
                raise Stop(f"{bad_total} pictures in {seen} could not be read, more than "
                           f"{MAX_BAD_SHARE:.0%}; {out}/log.jsonl names them")
            bad_pictures, skipped, waited, logged = [], 0, 0.0, done

        # save
        if done % config.save_every == 0 or done == config.steps or stop:
            norms = torch.stack(torch._foreach_norm(list(model.parameters())))
            if not norms.isfinite().all():      # the same on all ranks
                raise Stop(f"the weights are not finite at step {done}; {REMEDY.format(out)}")
            state = checkpoint.run_state(done, dataclasses.asdict(config), len(run.stream.images),
                                         model, optimizer, scaler, queue)
            state["pending"] = {"bad": list(map(tuple, gather_lists(bad_pictures))),
                                "bad_total": bad_total, "skipped": skipped, "in_a_row": in_a_row}
            if main:
                writer.save(state, model.trunk.state_dict())
        if stop or done == config.steps:
            break

    writer.wait()
    if writer.error:
        raise Stop(f"{writer.error}; {out} holds the run as it was before")
    if dist.is_initialized():
        dist.barrier()              # the others wait for the file
    if done < config.steps:
        raise Interrupted(f"{signals.seen or 'a signal to another rank'} after step {done}: the "
                          "run is saved, and the same command goes on")


# -------------------------------------------------------------------------------- small print
def start_from(source: str, model: SwAV, rank: int) -> None:
    """--init. A download is left to one rank of a machine; the others wait for it."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    for turn in (first, not first):
        errors = []
        if turn:
            try:
                loaded = weights.load_weights(model, source, quiet=rank > 0)
            except Exception as error:      # whatever it is, the other ranks must not wait
                errors = [str(error) or type(error).__name__]
        errors = gather_lists(errors)
        if errors:
            raise ValueError(errors[0])
    if rank == 0:
        print(f"starts from {source}: the trunk" + "".join(
            f", {part}" for part in ("head", "prototypes") if part not in loaded.untouched)
            + f"; new: {', '.join(loaded.untouched)}" * bool(loaded.untouched)
            + f"; left: {', '.join(loaded.unused)}" * bool(loaded.unused))


def processors() -> int:
    """Those this rank may use: its share of the machine's."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def share_processors(config: Config, device: torch.device) -> int:
    """Number of workers of this rank. On a CPU they and the computing threads share its processors,
    one to three: with more threads than processors, oneDNN's backward convolutions, which wait by
    spinning, took 7 s instead of 0.5 s a step. --workers leaves the number of threads alone, for
    sums are rounded otherwise with another number."""
    workers = processors()
    if device.type == "cpu":
        quarter = max(1, workers // 4)
        torch.set_num_threads(max(1, workers - quarter))
        workers = quarter
    return workers if config.workers < 0 else config.workers


def open_probe(config: Config, device: torch.device, dtype: torch.dtype) -> Probe:
    """--probe. Its pictures are cut as the run's first crops are."""
    if all(Path(config.probe, split).is_dir() for split in ("train", "val")):
        raise ValueError(f"--probe {config.probe} holds train and val; name one of them")
    views = MultiCrop([parse_crops(config.crops)[0]._replace(count=2)], config.strength,
                      gray=config.gray, blur=config.blur, max_pixels=config.max_pixels)
    photometric = Photometric(parse_channels(config.mean), parse_channels(config.std)).to(device)
    return Probe(open_images(config.probe), views, photometric, dtype)


class Distort:
    """A micro-batch's pairs of crops and parameters, one a size -> what the network takes; and, as
    a worker's collate function, the same for samples. What is distorted already stays as it is."""

    def __init__(self, photometric: Photometric):
        self.photometric = photometric

    def __call__(self, pairs: list) -> list:
        return [c if c.is_floating_point() else
                self.photometric(c, p).to(memory_format=layout(c.device)) for c, p in pairs]

    def collate(self, samples: list):
        crops, params, bad = collate(samples)
        return self(zip(crops, params)), params, bad


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if dist.is_initialized():
        dist.all_reduce(x)
        x = x / dist.get_world_size()
    return x


def gather_lists(mine: list) -> list:
    if not dist.is_initialized():
        return mine
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return [item for one in lists for item in one]


def look_back(run: SimpleNamespace) -> None:
    """After the run: its loss, the sheet of its prototypes and, of a demo, what it has learned."""
    config, model, images, size = run.config, run.model, run.stream.images, run.specs[0].size
    demo = config.recipe == "demo" and not config.data
    workers = min(8, processors()) if config.workers < 0 else config.workers
    torch.set_num_threads(processors())                 # the workers of the run have gone
    options = dict(device=run.device, mean=parse_channels(config.mean),
                   std=parse_channels(config.std))

    def decoded(images) -> list[tuple[torch.Tensor, bool]]:
        """A demo's pictures, or a sample of others, decoded once for all that follows."""
        count = len(images)
        some = range(count) if demo else [permute(i, count, 0) for i in range(min(SHEET, count))]
        centred = Subset(Centred(images, size, 1.0 if demo else 0.875), some)
        return [pair for pictures, ok in DataLoader(centred, 64, num_workers=workers)
                for pair in zip(pictures.clone(), ok.tolist())]

    pictures = decoded(images)
    if demo:        # the only place where labels are read
        held_out = DemoImages("val")
        queries, rows = decoded(held_out), {}
        pixels = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Flatten())
        for name, network in {"raw pixels, two by two": pixels,
                              "untrained trunk": fresh_model(config).trunk,
                              "trained trunk": model.trunk}.items():
            (features,), _ = extract(network, pictures, **options)
            (held_out_features,), _ = extract(network, queries, **options)
            labels, truth = map(torch.from_numpy, (images.labels, held_out.labels))
            predicted = {"knn": knn(features, labels, held_out_features),
                         "linear": linear_probe(features, labels, held_out_features)[0]}
            rows[name] = {what: per_cent(labels, truth) for what, labels in predicted.items()}
        folder.write_whole(run.out / "results.json", json.dumps(rows, indent=2) + "\n")
        title = f"{len(held_out):,} held-out demo pictures of {len(held_out.classes)} kinds"
        report.table(title, rows)

    try:
        report.curves(run.out / "loss.png", [run.out])
    except ImportError as error:
        print(error)
    shown = [(picture, ok) for picture, ok in pictures if ok][:SHEET]
    embed = torch.nn.Sequential(model.trunk, model.head)
    (embeddings,), _ = extract(embed, shown, **options)                          # (N, D)
    scores = F.normalize(embeddings, dim=1) @ model.prototypes.weight.detach().cpu().t()
    aside = run.out / "prototypes.tmp.png"          # the last file of all: with it, a run is finished
    report.prototypes(aside, scores, torch.stack([x for x, _ in shown]))
    os.replace(aside, run.out / "prototypes.png")


def fail(error: Exception) -> None:
    """One sentence, exit code 2. A worker's error carries its traceback; its last line is the
    sentence."""
    reason = str(error).strip().splitlines()[-1].removeprefix("images.NoReadablePicture: ")
    who = f"rank {dist.get_rank()}: " if dist.is_initialized() else ""
    print(f"train.py: error: {who}{reason}", file=sys.stderr)
    sys.exit(2)


def launch(config: Config, images, given) -> SimpleNamespace:
    """One run, from its setup to its last step."""
    try:
        run = setup(config, images, given)
    except (ValueError, OSError, dist.DistError) as error:
        fail(error)
    try:
        if run.start < run.config.steps:
            config = run.config
            with guard.Signals() as signals, checkpoint.Writer(
                    run.out, config.keep, config.keep_every,
                    run.start if run.last else None) as writer:
                train(run, signals, writer)
    except (Stop, NoReadablePicture) as error:
        fail(error)
    except Interrupted as error:
        if run.rank == 0:
            print(f"train.py: {error}", file=sys.stderr)
        sys.exit(guard.INTERRUPTED)
    except RuntimeError as error:
        if "DataLoader" in str(error):              # it names the process, or says "timed out"
            fail(error)
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            fail(Stop(f"another rank is gone, or does not answer ({error})"))
        raise
    finally:                        # or Python would wait for them, who leave signals to it
        getattr(run.batches, "_shutdown_workers", lambda: None)()
        for worker in getattr(run.batches, "_workers", []):
            if worker.is_alive():       # stuck in a file system
                worker.kill()
    return run


def main(argv: list[str] | None = None) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = parse_arguments(sys.argv[1:] if argv is None else argv)
    only_explain, runs = given.pop("explain", False), given.pop("plot", [])
    only_plan = given.pop("plan", False)
    machine = {name: given.pop(name) for name in MACHINE if name in given}
    try:
        if machine and not only_plan:
            raise ValueError(f"{', '.join(map(flag, machine))}: of --plan alone; a run takes the "
                             "processes that torchrun starts")
        machine = {name: default for name, (default, _) in MACHINE.items()} | machine
        if runs:
            picture = Path(runs[0], "loss.png") if len(runs) == 1 else Path("loss.png")
            report.curves(picture, runs)
            return print(picture)
        if only_plan and not given.get("data"):
            if "recipe" not in given:
                given.setdefault("arch", Config.arch)
            return print(plan.plan(configure(given, max(1, machine["gpus"])), **machine))
        images = open_images(given["data"]) if given.get("data") else DemoImages("train")
        if only_plan:
            config = configure(given, max(1, machine["gpus"]), images)
            return print(plan.plan(config, len(images), **machine))
        if only_explain:
            return print(explain(given, world, images))
        config = configure(given, world, images)
    except (ValueError, OSError, ImportError) as error:     # the same on all ranks: one speaks
        sys.exit(2) if rank else fail(error)
    try:
        run = launch(config, images, given.keys())
        if dist.is_initialized():
            dist.barrier()      # leave together: a rank left behind was seen to hang in gloo
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:               # alone: the others need not wait for what follows
        if run.start < run.config.steps or not (run.out / "prototypes.png").exists():
            look_back(run)
            print(report.usage(run.config, run.out))
        else:
            print(f"{run.out} is finished: {run.start} steps. --out starts another run.")


if __name__ == "__main__":
    main()
