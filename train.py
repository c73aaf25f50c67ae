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
import json
import math
import platform
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import checkpoint
import evaluate
import report
from demo import DemoImages
from images import NoReadablePicture, Positions, Stream, collate, open_images, permute
from larc import LARC
from multicrop import MultiCrop, Photometric, parse_crops
from recipes import (Config, configure, explain, parse_arguments, parse_channels, parse_head,
                     with_length)
from regnet import ARCHS, RegNet
from swav import Queue, SwAV, collapse_statistics, swav_codes, swav_loss

SHEET = 2048                # pictures from which the sheet of prototypes is drawn
MAX_BAD_SHARE = 0.1         # of the pictures read so far; above it the run ends
REMEDY = "lower --lr, or use --precision fp32; the last good checkpoint was kept"
# what may change between the parts of one run
FREE = ("out", "device", "workers", "log_every", "save_every")


def pick_device(name: str, local_rank: int) -> torch.device:
    if not name:
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", local_rank if device.index is None else device.index)
            torch.cuda.set_device(device)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {name} cannot be used here: {reason}") from None
    return device


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        if device.type == "cpu":            # not every build for a CPU has oneDNN
            native = (torch.backends.mkldnn.is_available()
                      and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        else:
            native = device.type == "cuda" and torch.cuda.is_bf16_supported()
        name = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


# ---------------------------------------------------------------------------------- one step
def build_model(config: Config) -> SwAV:
    torch.manual_seed(config.seed)
    return SwAV(RegNet(ARCHS[config.arch]), parse_head(config.head), config.prototypes,
                config.head_bn)


def layout(device: torch.device) -> torch.memory_format:
    """Channels-last is 1.8 times as fast on a CPU; on a GPU it is not settled for grouped 3x3."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


def wrap(model: SwAV, device: torch.device, world: int) -> torch.nn.Module:
    """Everything that is done to the built model from outside, in order: DDP is the last."""
    if world == 1:
        return model
    return DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)


def swav_step(config: Config, model, prototypes: torch.Tensor, queue: Queue | None, crops: list):
    """Crops, one tensor per size -> loss, and the embeddings and scores it was made of."""
    num_crops = sum(spec.count for spec in parse_crops(config.crops))
    embeddings, scores = model(crops)                                # (V*B, D), (V*B, K)
    codes = swav_codes(scores, num_crops, epsilon=config.epsilon,
                       iterations=config.sinkhorn_iterations, hard=config.hard,
                       queue_scores=queue.scores(prototypes) if queue else None)
    if queue:
        queue.push(embeddings, num_crops)
    return swav_loss(scores, codes, num_crops, temperature=config.temperature), embeddings, scores


# ------------------------------------------------------------------------------------ the run
class Stop(Exception):
    """The run cannot go on; the message says why, and what to try."""


def setup(config: Config, images) -> SimpleNamespace:
    """Everything the loop needs. Raises ValueError for what cannot be used; writes nothing before
    that is known."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(config.device, int(os.environ.get("LOCAL_RANK", 0)))
    dtype = pick_precision(config.precision, device)
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    config = with_length(config, len(images))
    specs = parse_crops(config.crops)
    crop = MultiCrop(specs, config.strength_at, gray=config.gray, blur=config.blur)
    stream = Stream(images, crop, config.seed)
    stream[0]                                   # a folder without one readable picture fails here

    out = Path(config.out)
    state = resume(config, len(images), out)
    start = state["step"] if state else 0
    if len(set(gather_lists([(config, start)]))) > 1:
        raise ValueError(f"the ranks do not see the same pictures, or not the same "
                         f"{out}/checkpoint.pt; both must be shared")
    model = build_model(config).to(device, memory_format=layout(device))
    optimizer = LARC(model.parameters(), config.peak_lr(), config.momentum, config.weight_decay,
                     config.trust_coefficient)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    queue = None
    if config.queue:
        queue = Queue(config.queue // world, parse_head(config.head)[-1], device=device)
    if state:
        checkpoint.load_run_state(state, model, optimizer, scaler, queue)

    if rank == 0:
        report.start(config, images, world, device, dtype, start)
        out.mkdir(parents=True, exist_ok=True)
        write_config(config, out)
    return SimpleNamespace(
        config=config, out=out, start=start, rank=rank, world=world, device=device, dtype=dtype,
        specs=specs, stream=stream, model=model, wrapped=wrap(model, device, world),
        optimizer=optimizer, scaler=scaler, queue=queue)


def train(run: SimpleNamespace) -> None:
    """The loop. Raises Stop, and images.NoReadablePicture."""
    config, start, model, device, queue = run.config, run.start, run.model, run.device, run.queue
    optimizer, scaler, out, main = run.optimizer, run.scaler, run.out, run.rank == 0
    mean, std = parse_channels(config.mean), parse_channels(config.std)
    distort = Distort(Photometric(mean, std).to(device))
    positions = Positions(start, config.steps, config.batch_size, run.rank, run.world)
    # on a CPU the workers distort too: they have time to spare, the computing threads have none
    loader = DataLoader(run.stream, batch_sampler=positions,
                        collate_fn=distort if device.type == "cpu" else collate,
                        num_workers=share_processors(config, device),
                        pin_memory=device.type == "cuda")
    log, watchdog = open_log(out / "log.jsonl", start) if main else None, report.Watchdog(config)
    bad_pictures, bad_total, waited, logged, clock = [], 0, 0.0, start, time.perf_counter()
    steps = tqdm(range(start, config.steps), initial=start, total=config.steps, unit="step",
                 disable=not main or not sys.stderr.isatty())
    batches = iter(loader)

    for step in steps:
        # schedule
        for group in optimizer.param_groups:
            group["lr"] = config.lr_at(step)

        # crops
        wait = time.perf_counter()
        crops, params, bad = next(batches)
        waited += time.perf_counter() - wait
        bad_pictures += bad
        if device.type != "cpu":
            crops = distort.crops([c.to(device, non_blocking=True) for c in crops], params)
        if main and step == 0:
            report.views(out / "views.png", crops, run.specs, mean, std)

        # forward, codes, loss
        with torch.autocast(device.type, run.dtype, enabled=run.dtype != torch.float32):
            loss, embeddings, scores = swav_step(
                config, run.wrapped, model.prototypes.weight, queue, crops)

        # backward, freeze, step, normalise
        optimizer.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        if step < config.freeze_prototypes:
            model.freeze_prototypes()
        scaler.step(optimizer)
        scaler.update()
        model.normalize_prototypes()

        # log
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            # note: a sync point, and with several ranks a collective
            loss = mean_over_ranks(loss.detach())
            bad_pictures = gather_lists(bad_pictures)
            bad_total += len(bad_pictures)
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            seen = (done - start) * config.batch_size
            if not math.isfinite(loss.item()):
                raise Stop(f"the loss is {loss.item()}, not finite, at step {done}: {REMEDY}")
            if main:
                entry = {"step": done, "images": done * config.batch_size, "loss": loss.item(),
                         "lr": config.lr_at(step),
                         **collapse_statistics(embeddings, scores, loss, config.temperature),
                         "bad": bad_pictures, "waited": waited / seconds,
                         "images_per_second": (done - logged) * config.batch_size / seconds}
                log.write(json.dumps(entry) + "\n")
                log.flush()
                report.progress(steps, entry, config)
                watchdog.look(entry)
            if bad_total > MAX_BAD_SHARE * (seen + bad_total) and bad_total >= 10:
                raise Stop(f"{bad_total} pictures in {seen} could not be read, more than "
                           f"{MAX_BAD_SHARE:.0%}; {out}/log.jsonl names them")
            bad_pictures, waited, logged = [], 0.0, done

        # save
        if done % config.save_every == 0 or done == config.steps:
            norms = torch.stack(torch._foreach_norm(list(model.parameters())))
            if not norms.isfinite().all():      # the same on all ranks
                raise Stop(f"the weights are not finite at step {done}: {REMEDY}")
            state = checkpoint.run_state(done, dataclasses.asdict(config), len(run.stream.images),
                                         model, optimizer, scaler, queue)
            if main:
                checkpoint.save(out / "trunk.pt", model.trunk.state_dict())
                checkpoint.save(out / "checkpoint.pt", state)   # last: with it, the step counts


# -------------------------------------------------------------------------------- small print
def resume(config: Config, num_images: int, out: Path) -> dict | None:
    """The state to go on from, or None. Raises ValueError where the folder holds another run."""
    path = out / "checkpoint.pt"
    if not path.exists():
        if (out / "trunk.pt").exists() and not (out / "config.json").exists():
            raise ValueError(f"{out} holds a trunk.pt of something else; choose another --out")
        return None
    state = checkpoint.load(path)
    if not isinstance(state, dict) or state.get("version") != checkpoint.VERSION:
        raise ValueError(f"{path} is not a checkpoint of this program's version")
    if state["num_images"] != num_images and state["config"]["data"] == config.data:
        raise ValueError(f"{out} was trained on {state['num_images']} pictures and {config.data} "
                         f"now holds {num_images}; restore them or choose another --out")
    check_same_run(state["config"], config, out)
    return state


def check_same_run(old: dict, config: Config, out: Path) -> None:
    new = dataclasses.asdict(config)
    changed = [f"{k} was {old.get(k)}, not {v}" for k, v in new.items()
               if k not in FREE and old.get(k) != v]
    if changed:
        raise ValueError(f"{out} holds another run ({'; '.join(changed)}); choose another --out")


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


class Distort:
    """Distortion of a batch; and, as a worker's collate function, of its samples."""

    def __init__(self, photometric: Photometric):
        self.photometric = photometric

    def crops(self, crops: list, params: list) -> list:
        return [self.photometric(c, p).to(memory_format=layout(c.device))
                for c, p in zip(crops, params)]

    def __call__(self, samples: list):
        crops, params, bad = collate(samples)
        return self.crops(crops, params), params, bad


def write_config(config: Config, out: Path) -> None:
    environment = {"python": platform.python_version(), "torch": torch.__version__,
                   "platform": platform.platform(), "world": int(os.environ.get("WORLD_SIZE", 1))}
    text = json.dumps({"config": dataclasses.asdict(config), "version": checkpoint.VERSION,
                       "environment": environment}, indent=2)
    write_whole(out / "config.json", text + "\n")


def write_whole(path: Path, text: str) -> None:
    """All or nothing: a crash leaves the old file or the new one."""
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def open_log(path: Path, start: int):
    """Append after step `start`; lines of steps that were lost with a crash are dropped."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kept += [line + "\n"] if json.loads(line)["step"] <= start else []
        except ValueError:                      # cut off by a crash
            break
    write_whole(path, "".join(kept))
    return open(path, "a")


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
        centred = Subset(evaluate.Centred(images, size, 1.0 if demo else 0.875), some)
        return [pair for pictures, ok in DataLoader(centred, 64, num_workers=workers)
                for pair in zip(pictures.clone(), ok.tolist())]

    pictures = decoded(images)
    if demo:        # the only place where labels are read
        held_out = DemoImages("val")
        queries, rows = decoded(held_out), {}
        pixels = torch.nn.Sequential(torch.nn.AvgPool2d(2), torch.nn.Flatten())
        for name, network in {"raw pixels, two by two": pixels,
                              "untrained trunk": build_model(config).trunk,
                              "trained trunk": model.trunk}.items():
            both = (evaluate.labelled_features(network, images, pictures, **options),
                    evaluate.labelled_features(network, held_out, queries, **options))
            rows[name] = {what: evaluate.accuracy(what, *both)[0] for what in ("knn", "linear")}
        write_whole(run.out / "results.json", json.dumps(rows, indent=2) + "\n")
        title = f"{len(held_out):,} held-out demo pictures of {len(held_out.classes)} kinds"
        report.table(title, rows)

    try:
        report.curves(run.out / "loss.png", [run.out])
    except ImportError as error:
        print(error)
    shown = [(picture, ok) for picture, ok in pictures if ok][:SHEET]
    embed = torch.nn.Sequential(model.trunk, model.head)
    embeddings, _ = evaluate.extract_features(embed, shown, **options)           # (N, D)
    scores = F.normalize(embeddings, dim=1) @ model.prototypes.weight.detach().cpu().t()
    report.prototypes(run.out / "prototypes.png", scores, torch.stack([x for x, _ in shown]))


def fail(error: Exception, rank: int) -> None:
    """One sentence, exit code 2. A worker's error carries its traceback; its last line is the
    sentence."""
    reason = str(error).strip().splitlines()[-1].removeprefix("images.NoReadablePicture: ")
    print(f"train.py: error: {f'rank {rank}: ' if rank else ''}{reason}", file=sys.stderr)
    sys.exit(2)


def launch(config: Config, images, rank: int) -> SimpleNamespace:
    """One run, from its setup to its last step."""
    try:
        run = setup(config, images)
    except (ValueError, OSError) as error:
        fail(error, rank)
    try:
        if run.start < run.config.steps:
            train(run)
    except (Stop, NoReadablePicture) as error:
        fail(error, rank)
    return run


def main(argv: list[str] | None = None) -> None:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    given = parse_arguments(sys.argv[1:] if argv is None else argv)
    only_explain, runs = given.pop("explain", False), given.pop("plot", [])
    try:
        if runs:
            picture = Path(runs[0], "loss.png") if len(runs) == 1 else Path("loss.png")
            report.curves(picture, runs)
            return print(picture)
        images = open_images(given["data"]) if given.get("data") else DemoImages("train")
        if only_explain:
            return print(explain(given, world, images))
        config = configure(given, world, images)
    except (ValueError, OSError, ImportError) as error:     # the same on all ranks: one speaks
        sys.exit(2) if rank else fail(error, rank)
    try:
        run = launch(config, images, rank)
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
