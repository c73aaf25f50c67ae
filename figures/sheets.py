"""What a run says and shows: lines and warnings while it runs, pictures of what it has learned.

    watchdog = Watchdog(config); watchdog.look(entry)       # speaks once, if the run collapses
    views("views.png", crops, specs, mean, std)             # a batch as the network sees it
    prototypes("prototypes.png", scores, pictures)          # what each prototype has come to mean
    curves("loss.png", ["runs/demo-regnety_100mf"])         # with matplotlib, which is optional

An `entry` is what a line of log.jsonl holds.
Shapes: N pictures, K prototypes, V crops of a picture.
"""
import dataclasses
import json
import math
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.utils import save_image
from tqdm import tqdm

from recipes import Config, parse_head, remedies
from regnet import ARCHS
from scale import sync_group
from swav import symptoms

ASK = "pip install matplotlib to have the loss drawn"
FRAME = 2                               # pixels around a picture of a sheet
PROBES = ("knn", "retrieved")           # what probe.Probe measures, per cent


# --------------------------------------------------------------------------------------- words
def start(config: Config, images, world: int, device, dtype, done: int) -> None:
    """What is about to be trained, on what."""
    source = config.data or "the built-in demo pictures (--data DIR trains on your own)"
    norms = ""
    if config.sync_bn_group > 1:
        group = sync_group(config.sync_bn_group, world, device)
        norms = (f"; BatchNorm over {group} ranks" if group > 1 else "; BatchNorm of each rank by "
                 f"itself: SyncBatchNorm over {config.sync_bn_group} needs CUDA and several ranks")
    small = " (for fewer than 100,000 pictures; --explain gives its reasons)"
    print(f"data: {len(images):,} pictures from {source}\n"
          f"recipe {config.recipe}{small * (config.recipe == 'small')}: {config.arch}, "
          f"crops {config.crops}, head {config.head}, {config.prototypes} prototypes; "
          f"ln K = {math.log(config.prototypes):.3f}\n"
          f"batch {config.batch_size} = {world} rank{'s' * (world > 1)} x "
          f"{config.batch_size // world // config.micro_batch} x {config.micro_batch}; "
          f"lr {config.lr:g} per 256 pictures = "
          f"{config.peak_lr():g}; {config.steps} steps = "
          f"{config.steps * config.batch_size / len(images):.1f} epochs\n"
          f"{device}, {str(dtype).removeprefix('torch.')}"
          + "; blocks are computed again in the backward pass" * bool(config.checkpoint_activations)
          + "; compiled: the first step takes its time" * config.compile
          + norms + f"; run folder {config.out}"
          + (f"; resumed after step {done}" if done else ""), flush=True)


def progress(steps: tqdm, entry: dict, config: Config) -> None:
    """On a terminal beside the progress bar, else a line."""
    text = (f"loss {entry['loss']:.3f} ({entry['loss_over_ln_k']:.2f} ln K)  prototypes "
            f"{entry['prototypes_used']:.0%}  rank {entry['effective_rank']:.0f}  "
            f"{entry['images_per_second']:.0f} img/s")
    text += "".join(f"  {name} {entry[name]:.1f} %" for name in PROBES if name in entry)
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
    """Where TensorBoard is installed, its writer for the steps after `start`; else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(str(out), purge_step=start + 1)
    except ImportError:
        return None
    except Exception as error:          # installed, and not whole
        print(f"warning: TensorBoard does not work here ({error})")


def scalars(board, entry: dict):
    """A log entry's numbers, for TensorBoard; returns the board, or None if it has failed."""
    try:
        for name, value in entry.items() if board else ():
            if isinstance(value, int | float):
                board.add_scalar(name, value, entry["step"])
        return board
    except Exception as error:          # its own thread's: a full disk
        print(f"warning: TensorBoard has failed ({error}); log.jsonl goes on")


class Watchdog:
    """Speaks once, when a sign of collapse has lasted for `patience` steps since the learning rate
    has risen and the prototypes are free. Looks where the log does; judges no shorter run."""

    def __init__(self, config: Config, patience: int = 100):
        self.config, self.since, self.spoken = config, {}, False
        self.first = max(config.warmup_steps(), config.freeze_prototypes)
        self.patience = max(patience, config.steps // 50)

    def look(self, entry: dict) -> None:
        step = entry["step"]
        found = symptoms(entry, parse_head(self.config.head)[-1]) if step > self.first else {}
        self.since = {sign: self.since.get(sign, step) for sign in found}
        lasting = {sign: step - since for sign, since in self.since.items()
                   if step - since >= self.patience}
        if lasting and not self.spoken:
            self.spoken = True
            tqdm.write(f"warning: for {min(lasting.values())} steps, "
                       f"{'; and '.join(found[sign] for sign in lasting)}. Little or nothing is "
                       f"learned like this. What has helped, best first: {remedies(self.config)}")


def table(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title + ', per cent':<52}{'kNN':>8}{'linear':>8}")
    for name, row in rows.items():
        print(f"{name:<52}{row['knn']:>8.1f}{row['linear']:>8.1f}")


def usage(config: Config, out: Path) -> str:
    """How to use the trunk elsewhere: with torchvision alone, where it has this network."""
    params = ARCHS.get(config.arch)
    if params is None:
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
    return (f"\n{out} holds trunk.pt, log.jsonl and, to look at, prototypes.png and views.png.\n"
            f"The trunk takes RGB in 0..1, minus {config.mean}, over {config.std}:\n    "
            + "\n    ".join(lines))


# ------------------------------------------------------------------------------------ pictures
def views(path: Path, crops: list[Tensor], specs, mean: Sequence[float],
          std: Sequence[float]) -> None:
    """The first pictures of a batch of distorted, normalised crops: a row a picture, a column a
    crop."""
    rows = min(8, len(crops[0]) // specs[0].count)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    tiles, largest = [], max(spec.size for spec in specs)
    for spec, images in zip(specs, crops):
        pictures = images.float().cpu().unflatten(0, (spec.count, -1))[:, :rows] * std + mean
        side = largest - spec.size
        pad = (side // 2, side - side // 2) * 2
        tiles.append(F.pad(pictures, pad, value=1.0))
    tiles = torch.cat(tiles).transpose(0, 1).flatten(0, 1)               # (rows * V, 3, s, s)
    save_image(tiles, path, nrow=sum(spec.count for spec in specs), pad_value=1.0)


def sheet(path: Path, rows: Sequence[Sequence[tuple[Tensor, bool | None]]], columns: int = 1) -> None:
    """Rows of pictures. Each has a frame: green where it is marked right, red where wrong, or white.

    rows: of (uint8 (3, s, s), mark); a shorter one is filled up.  They run down the first of
    `columns`, then down the next.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = {None: (255, 255, 255), True: (0, 170, 0), False: (220, 0, 0)}
    longest, size = max(map(len, rows)), rows[0][0][0].shape[1]
    side, gap = size + 2 * FRAME, 2 * FRAME
    height = math.ceil(len(rows) / columns)
    page = torch.full((3, gap + height * (side + gap), gap + columns * (longest * side + gap)), 255,
                      dtype=torch.uint8)
    for r, row in enumerate(rows):
        top, left = gap + r % height * (side + gap), gap + r // height * (longest * side + gap)
        for c, (picture, mark) in enumerate(row):
            place = page[:, top:top + side, left + c * side:left + (c + 1) * side]
            place[:] = torch.tensor(frames[mark], dtype=torch.uint8).view(3, 1, 1)
            place[:, FRAME:-FRAME, FRAME:-FRAME] = picture
    save_image(page.float() / 255, path)


def prototypes(path: Path, scores: Tensor, pictures: Tensor, nearest: int = 8, most: int = 64,
               columns: int = 4) -> None:
    """The pictures nearest to each prototype, a row a prototype, the best one first.

    scores: (N, K).  pictures: uint8 (N, 3, s, s).  Of more than `most` prototypes, those that most
    pictures are nearest to.
    """
    members = torch.bincount(scores.argmax(1), minlength=scores.shape[1])
    chosen = members.argsort(descending=True, stable=True)[:most]
    best = scores[:, chosen].topk(min(nearest, len(scores)), dim=0).indices.t()      # (most, n)
    rows = [[(picture, None) for picture in pictures[some]] for some in best]
    sheet(path, rows, min(columns, len(rows)))


def curves(path: Path, runs: Sequence[str | Path]) -> None:
    """Loss over steps, with ln K as a line; under it the prototypes in use, and what --probe found.

    Raises ValueError for a folder without a log, ImportError where there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure        # no pyplot: no window, no global state
    except ImportError:
        raise ImportError(ASK) from None
    levels, lines = {}, []
    for run in map(Path, runs):
        try:
            config = json.loads((run / "config.json").read_text())["config"]
            written = (run / "log.jsonl").read_text().splitlines(keepends=True)
            log = [json.loads(line) for line in written if line.endswith("\n")]     # not one cut off
            log = [entry for entry in log if "loss" in entry]       # not that of a skipped step
            lines.append((run.name, log, *([entry[key] for entry in log]
                                           for key in ("step", "loss", "prototypes_used"))))
            levels[math.log(config["prototypes"])] = config["prototypes"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{run} is not the folder of a run: {error}") from None
    probed = any(name in entry for _, log, *_ in lines for entry in log for name in PROBES)
    figure = Figure(figsize=(7, 6 + 1.5 * probed), layout="constrained")
    top, *below = figure.subplots(2 + probed, 1, sharex=True, height_ratios=(3, 1, 1)[:2 + probed])
    for name, log, steps, loss, used in lines:
        line, = top.plot(steps, loss, label=name)
        below[0].plot(steps, used, color=line.get_color())
        for what in PROBES:
            points = [(entry["step"], entry[what]) for entry in log if what in entry]
            if points:
                below[1].plot(*zip(*points), ".-", color=line.get_color())
    for level, count in levels.items():
        top.axhline(level, color="black", linestyle="--", linewidth=1)
        top.annotate(f"ln K, K = {count:,}: nothing learned", (0.99, level), ha="right",
                     xycoords=("axes fraction", "data"), xytext=(0, 3), textcoords="offset points")
    top.set(ylabel="loss")
    top.legend(frameon=False)
    below[0].set(ylabel="prototypes in use", ylim=(0, 1.05))
    if probed:
        below[1].set(ylabel="probe, per cent")
    below[-1].set(xlabel="step")
    figure.savefig(path, dpi=120)
