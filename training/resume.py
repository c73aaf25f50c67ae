"""Resume: the same run each time, on the same images, or on what was asked for.

    given = remembered(given, world) | given            # options that are not named are the run's
    held, state, config = open_folder(config, images, named)            # state None: a new run

Named options must be those of the run, but for those in FREE, and two that change it: a greater
length goes on with a run that is finished, and --grow with other images.
"""
import dataclasses
import json
import os
import sys
from collections.abc import Collection
from pathlib import Path

from distributed.ranks import fail_together, gather_lists, rank_and_world
from recipes.config import LENGTHS, Config, check_ranks
from training.checkpoint import VERSION
from training.run_folder import refuse_foreign
from training.writer import LAST, newest
from weights.atomic import load, lock
from weights.sharded import fault_of, load_plain

KNOWN = {field.name for field in dataclasses.fields(Config)}
# what may change between the parts of one run; what is not remembered of it either
MACHINE = {"out", "device", "workers", "micro_batch", "checkpoint_activations", "shard",
           "shard_group"}
FREE = MACHINE | {"days", "cache", "log_every", "save_every", "save_minutes", "keep", "keep_every",
                  "max_bad_steps", "compile", "compress_gradients", "probe", "probe_every",
                  "channels_last", "pad_widths", "cudnn_benchmark", "threads"}


def remembered(given: dict, world: int) -> dict:
    """The options of the run in the folder given["out"]; {} where it has no checkpoint. Left out
    are its length where another is given, and what belongs to the machine. Raises ValueError for a
    damaged config.json."""
    out = Path(given.get("out", ""))
    if not given.get("out") or not newest(out):
        return {}
    try:
        saved = json.loads((out / "config.json").read_text())["config"]
        share = saved["batch_size"] // world
        left_out = MACHINE - {"micro_batch"} | {
            name for name in LENGTHS if LENGTHS & set(given)} | (
            {"micro_batch"} if share % max(1, saved["micro_batch"]) else set())
        return {name: saved[name] for name in saved if name in KNOWN - left_out}
    except FileNotFoundError:
        return {}                       # the checkpoint has them too: resume compares
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{out / 'config.json'} is damaged: move it away, and name all options "
                         "of the run") from None


def open_folder(config: Config, images, given: Collection[str] | None = None, grow: bool = False):
    """Lock the folder where it is there, and find out what it holds -> the lock, or None; the state
    to go on from, or None; the run's configuration.

    given, grow: as in resume. Raises ValueError where the run cannot go on, on all ranks alike.
    """
    rank, world = rank_and_world()
    out, held = Path(config.out), None
    with fail_together():           # the lock first: what the folder holds must not change any more
        if config.data and out.resolve().is_relative_to(Path(config.data).resolve()):
            raise ValueError(f"{out} lies in the folder of the images, and what a run draws would "
                             "become one of them: choose another --out")
        if rank == 0 and out.exists():
            newest(out) or refuse_foreign(out)
            held = lock(out)
    state, config = resume(config, images, out, given, grow)
    check_ranks(config, world)
    same_everywhere((config, state["step"] if state else 0), out)
    return held, state, config


def resume(config: Config, images, out: Path, given: Collection[str] | None = None,
           grow: bool = False) -> tuple[dict | None, Config]:
    """The state to go on from, or None; and the run's configuration.

    given: names of the options that were asked for, which must be those of the run; all others stay
    as the run began with. None: all.  grow: go on with these images, whatever they are.
    state["last"]: whether the state is that of checkpoint.pt. Raises ValueError where the folder
    holds another run, or something else.
    """
    state = newest_state(out)
    if state is None:
        if grow:
            raise ValueError(f"--grow: {out} holds no run to go on with")
        return None, config
    old = Config(**{name: value for name, value in state["config"].items() if name in KNOWN})
    state |= {"last": state["path"].name in LAST, "events": []}
    named = KNOWN if given is None else set(given)
    changed = {name for name in KNOWN - FREE if getattr(old, name) != getattr(config, name)}
    new = {"data": config.data}
    # config.json remembers an extension that ended before its first checkpoint
    asked = LENGTHS & changed & named or config.extended_at == old.steps
    if asked and config.steps > old.steps:
        new |= extended(config, old, state, out)
    elif config.steps == old.steps:
        new |= {name: getattr(config, name) for name in LENGTHS}
    if not same_images(state, config, images):
        new |= grown(config, old, state, images, grow, new.get("steps", old.steps))
    refused = [f"{name} was {old.text(name)}, not {config.text(name)}"
               for name in sorted(changed & named - new.keys())]
    if refused:
        raise ValueError(f"{out} holds another run ({'; '.join(refused)}); choose another --out")
    kept = {name: getattr(old, name) for name in KNOWN - MACHINE if name not in FREE & named}
    return state, dataclasses.replace(config, **kept | new)


def same_images(state: dict, config: Config, images) -> bool:
    """Whether a run's images are there: by the same names in the same place, where one may have
    been damaged since; or in another place, and of the same sizes."""
    return (state["num_images"], state["fingerprint"]) == (len(images), images.fingerprint) and (
        state["place"] == os.path.realpath(config.data) or state["sizes"] == images.sizes)


def grown(config: Config, old: Config, state: dict, images, grow: bool, steps: int) -> dict:
    """What changes in the configuration of a run that goes on with other images. grow: whether it
    was asked to.  steps: that it will have. Raises ValueError where it cannot."""
    now, before = config.data or "the demo set", old.data or "the demo set"
    if not grow:
        count = f"{len(images):,}" if len(images) != state["num_images"] else "as many others"
        raise ValueError(
            f"{config.out} was trained on {state['num_images']:,} images of {before}, and {now} "
            f"now holds {count}: name or restore them (--data), go on with what is there (--grow), "
            f"or start another run from its weights (--init {state['path']} --out ...)")
    if config.method == "deepcluster_v2":
        raise ValueError("--grow: deepcluster_v2 remembers each image of its run, and cannot go on "
                         f"with others: start another run from its weights (--init {state['path']} "
                         "--out ...)")
    if state["step"] >= steps:
        raise ValueError(f"--grow: {config.out} is finished after {steps} steps: give it a greater "
                         "length too, as --steps")
    state["events"].append(f"from here on {len(images):,} images of {now}, before "
                           f"{state['num_images']:,} of {before}; a new epoch begins")
    return {"grown_at": state["step"] * old.batch_size}


def extended(config: Config, old: Config, state: dict, out: Path) -> dict:
    """What changes in the configuration of a finished run that is given a greater length."""
    if state["step"] < old.steps:
        raise ValueError(f"{out} has done {state['step']} of its {old.steps} steps: finish it "
                         "first (leave the length out), then a greater one goes on")
    new = {name: getattr(config, name) for name in (*LENGTHS, "restart_lr")}
    new["extended_at"] = old.steps
    tail = dataclasses.replace(old, **new)
    rate = f"{tail.lr_at(old.steps):.3g}"
    state["events"].append(
        f"extended from {old.steps} to {config.steps} steps, at a learning rate " + (
            f"of {rate} that falls along half a cosine" if config.restart_lr else
            f"that stays at {rate} (--restart-lr 0.1 begins a cosine at a tenth of the peak)")
        + f"; the weights of step {old.steps} stay in trunk-{old.steps}.pt")
    return new


def newest_state(out: Path) -> dict | None:
    """The newest checkpoint that is not damaged, with its "path"; None where there is none. Raises
    ValueError where all are damaged, or of another version, or where the folder holds what a new
    run would replace."""
    faults, paths = [], newest(out)
    same_everywhere([path.name for path in paths], out)
    for path in paths:
        try:
            state = open_checkpoint(path)
            break
        except ValueError as error:
            faults.append(str(error))
    else:
        if faults:
            raise ValueError("; ".join(faults))
        refuse_foreign(out)
        return None
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} is not a checkpoint of this program's version: its version is "
                         f"{version}, the program's {VERSION}; finish the run with the "
                         "program that began it, or start another from its trunk.pt (--init)")
    if faults and int(os.environ.get("RANK", 0)) == 0:
        print(f"{'; '.join(faults)}: going on from {path}", file=sys.stderr)
    return state | {"path": path}


def open_checkpoint(path: Path) -> dict:
    """A run's state. Sharded tensors stay on the disk, and the ranks share the work of checking
    them. Raises ValueError for a damaged one, on all ranks alike."""
    if not path.is_dir():
        return load(path)
    with fail_together():
        if fault := fault_of(path, *rank_and_world()):
            raise ValueError(fault)
        return load_plain(path)


def same_everywhere(what, out: Path) -> None:
    """Raises ValueError where the ranks do not see the same. A collective."""
    if len(set(map(repr, gather_lists([what])))) > 1:
        raise ValueError(f"the ranks do not see the same images, or not the same checkpoints in "
                         f"{out}; both must be shared")
