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
from training.checkpoint import VERSION, newest
from training.run_folder import lock, refuse_foreign
from weights.atomic import load

KNOWN = {field.name for field in dataclasses.fields(Config)}
# what may change between the parts of one run
FREE = {"out", "days", "cache", "device", "workers", "log_every", "save_every", "save_minutes",
        "keep", "keep_every", "max_bad_steps", "micro_batch", "checkpoint_activations", "compile",
        "probe", "probe_every"}


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
        left_out = {"out", "device", "workers", "checkpoint_activations"} | {
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
        if rank == 0 and out.exists():
            held = lock(out)
    state, config = resume(config, images, out, given, grow)
    check_ranks(config, world)
    if len(set(gather_lists([(config, state["step"] if state else 0)]))) > 1:
        raise ValueError(f"the ranks do not see the same images, or not the same "
                         f"{out}/checkpoint.pt; both must be shared")
    return held, state, config


def resume(config: Config, images, out: Path, given: Collection[str] | None = None,
           grow: bool = False) -> tuple[dict | None, Config]:
    """The state to go on from, or None; and the run's configuration.

    given: names of the options that were asked for, which must be those of the run; all others stay
    as the run began with. None: all.  grow: go on with these images, whatever they are.
    state["last"]: whether the state is that of checkpoint.pt. Raises ValueError where the folder
    holds another run, or something else.
    """
    state, path = newest_state(out)
    if state is None:
        if grow:
            raise ValueError(f"--grow: {out} holds no run to go on with")
        return None, config
    old = Config(**{name: value for name, value in state["config"].items() if name in KNOWN})
    state |= {"last": path.name == "checkpoint.pt", "events": []}
    changed = {name for name in KNOWN - FREE if getattr(old, name) != getattr(config, name)}
    same, unchanged, new = same_place(old.data, config.data), same_images(state, images), {}
    if same and unchanged:
        new = {"data": config.data}
    elif grow:
        new = {"data": config.data, "grown_at": state["step"] * old.batch_size}
        state["events"].append(f"from here on {len(images):,} images of {config.data}, before "
                               f"{state['num_images']:,} of {old.data}; a new epoch begins")
    elif same:
        now = f"{len(images):,}" if len(images) != state["num_images"] else "as many others"
        raise ValueError(
            f"{out} was trained on {state['num_images']:,} images, and {config.data} now holds "
            f"{now}: restore them, go on with what is there (--grow), or start another run from "
            f"its weights (--init {out}/checkpoint.pt --out ...)")
    elif not (given is None or "data" in given):        # config.json is gone
        raise ValueError(f"{out} was trained on {old.data or 'the demo images'}: name it (--data)")
    if LENGTHS & changed & set(KNOWN if given is None else given) and config.steps > old.steps:
        new |= extended(config, old, state, out)
    elif config.steps == old.steps:
        new |= {name: getattr(config, name) for name in LENGTHS}
    refused = [f"{name} was {old.text(name)}, not {config.text(name)}"
               for name in sorted(changed - new.keys()) if given is None or name in given]
    if refused:
        raise ValueError(f"{out} holds another run ({'; '.join(refused)}); choose another --out")
    kept = {name: getattr(old, name) for name in KNOWN - FREE}
    return state, dataclasses.replace(config, **kept | new)


def same_place(one: str, other: str) -> bool:
    """Whether two names are of the same data: photos and photos/, a link and its target."""
    return bool(one) == bool(other) and os.path.realpath(one) == os.path.realpath(other)


def same_images(state: dict, images) -> bool:
    known = state.get("fingerprint", images.fingerprint)        # earlier versions have none
    return (state["num_images"], known) == (len(images), images.fingerprint)


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


def newest_state(out: Path) -> tuple[dict | None, Path | None]:
    """The newest checkpoint that is not damaged, and its file; None where there is none. Raises
    ValueError where all are damaged, or of another version, or where the folder holds what a new
    run would replace."""
    faults = []
    for path in newest(out):
        try:
            state = load(path)
            break
        except ValueError as error:
            faults.append(str(error))
    else:
        if faults:
            raise ValueError("; ".join(faults))
        refuse_foreign(out)
        return None, None
    version = state.get("version") if isinstance(state, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} is not a checkpoint of this program's version: its version is "
                         f"{version}, the program's {VERSION}; finish the run with the "
                         "program that began it, or start another from its trunk.pt (--init)")
    if faults and int(os.environ.get("RANK", 0)) == 0:
        print(f"{'; '.join(faults)}: going on from {path}", file=sys.stderr)
    return state, path
