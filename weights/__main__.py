"""What is in a file of weights, and the same weights for other libraries.

    python -m weights                           # the official files: size, licence, URL
    python -m weights FILE                      # the network in FILE, its parts, its licence
    python -m weights FILE --to timm OUT        # also write it to OUT, with timm's names
    python -m weights FILE --to hf FOLDER       # a folder that transformers opens
    python -m weights FILE --to onnx OUT        # a graph
    python -m weights RUN --to release OUT      # all its weights and its preprocessing, to hand out
    python -m weights RUN --to card README.md   # what the run's folder says about its trunk

FILE is anything that weights.files.read takes: a path, a run's folder, a URL, an official name. OUT
is written whole or not at all. What can't be read or written gets one line, and exit code 2.
"""
import argparse
import re
import sys
from pathlib import Path

from torch import Tensor

from weights.atomic import refuse_existing, save, save_safetensors
from weights.files import Loaded, read, state_dict_of
from weights.load import describe
from weights.names import TARGETS, from_ours, part_of, to_ours
from weights.official import LICENCES, OFFICIAL, gigabytes, official_names
from weights.terminal import Text, one_sentence

OF_IMAGES = ("memory", "queue")                         # parts: features of a run's images
PATHS = ("data", "out", "init", "cache", "probe")       # of a run; not handed out
FORMATS = {"release": "the weights of a run with its settings, without optimizer and paths",
           "hf": "a folder that transformers opens as a RegNetModel",
           "onnx": "a graph, images to features",
           "card": "a page of Markdown on what a run's folder holds, for who gets its weights"}


def summary(loaded: Loaded) -> str:
    """A line for the network, each of its parts, and the licence."""
    tensors = loaded.tensors
    trunk = [t for name, t in tensors.items() if part_of(name) == "trunk"
             and not re.search(r"running_|num_batches", name)]
    linear = [t for name, t in tensors.items()
              if re.fullmatch(r"head\.((mlp\.)?\d+|last)\.weight", name) and t.dim() == 2]
    lines = [f"{loaded.path}: {describe(tensors)}, named as in {loaded.layout}"]
    if trunk:
        lines.append(f"trunk: {sum(t.numel() for t in trunk) / 1e6:,.1f} M parameters, "
                     f"{str(trunk[0].dtype).removeprefix('torch.')}")
    if linear:
        norm = any(name.endswith("running_mean") for name in tensors if name.startswith("head."))
        lines.append("head: " + "-".join(str(n) for n in (
            linear[0].shape[1], *(t.shape[0] for t in linear))) + ", with BatchNorm" * norm)
    if prototypes := [f"{len(t):,}" for name, t in tensors.items()
                      if part_of(name) == "prototypes"]:
        lines.append(f"prototypes: {' + '.join(prototypes)}")
    if "fc.weight" in tensors:
        lines.append(f"fc: {len(tensors['fc.weight']):,} classes")
    if others := {part_of(name) for name in tensors} - {"trunk", "head", "prototypes", "fc"}:
        lines.append(f"also: {', '.join(sorted(others))}")
    licences = {OFFICIAL[name].licence for name in official_names(loaded.path)}
    if not licences and len(tensors.get("prototypes.weight", ())) == 16000:
        licences, lines = {"seer"}, [*lines, "16,000 prototypes are SEER's, most likely"]
    lines.append("licence: " + (", or ".join(LICENCES[licence] for licence in sorted(licences))
                                or "the file does not say; see where it comes from"))
    return "\n".join(lines)


def write(tensors: dict[str, Tensor], layout: str, out: Path) -> None:
    """Tensors with torchvision's names -> a file with the names of layout: .safetensors, or torch's
    format under any other suffix. Prints which parts are left out. Raises ValueError, or OSError
    where the file cannot be written."""
    state = from_ours(tensors, layout)
    print_left_out(tensors, {*map(part_of, to_ours(state_dict_of(state))[0])}, layout)
    if out.suffix != ".safetensors":
        return save(out, state)
    if layout in ("vissl", "pycls"):
        raise ValueError(f"{layout}'s files are nested dicts, which safetensors cannot hold")
    save_safetensors(out, state)


def whole_run(source: str) -> str | Path:
    """Of a run's folder its checkpoint, for trunk.pt has the trunk alone."""
    names = Path(source, "checkpoint.pt"), Path(source, "checkpoint")       # a folder, if sharded
    return next(filter(Path.exists, names), source)


def release(loaded: Loaded, out: Path) -> None:
    """Write a file that evaluate.py reads as it reads the run's own, without what is kept of the
    run's images. Raises ValueError where the settings are not known."""
    from weights.preprocessing import config_of  # needs multicrop.py

    config = {name: value for name, value in config_of(loaded).items() if name not in PATHS}
    if not config:
        raise ValueError(f"{loaded.path} is not of a run, or its config.json is gone")
    weights = {name: x for name, x in loaded.tensors.items() if part_of(name) not in OF_IMAGES}
    save(out, {"version": 1, "config": config, "model": weights})
    print_left_out(loaded.tensors, {*map(part_of, weights)}, "a release")


def print_left_out(tensors: dict[str, Tensor], kept: set[str], target: str) -> None:
    if left := sorted({*map(part_of, tensors)} - kept):
        print(f"left out, for {target} has no place for them: {', '.join(left)}", file=sys.stderr)


def convert(loaded: Loaded, target: str, out: Path, force: bool, licence: str) -> None:
    """Write what was read to out; target: a key of FORMATS, or a layout. Raises ValueError, or
    OSError where something cannot be written."""
    refuse_existing(out, None if target == "hf" else force, [loaded.path])
    if target == "card":
        from weights.card import write_card
        write_card(loaded, out, licence, force)
    elif target == "release":
        release(loaded, out)
    elif target == "hf":
        from weights.huggingface import write_folder
        write_folder(loaded, out)
        print_left_out(loaded.tensors, {"trunk", "fc"}, "transformers")
    elif target == "onnx":
        from weights.onnx import export
        refuse_existing(f"{out}.data", force)
        export(loaded, out)
        print_left_out(loaded.tensors, {"trunk", "fc"}, "the graph")
    else:
        write(loaded.tensors, target, out)


def list_official() -> None:
    for name, entry in OFFICIAL.items():
        size = gigabytes(entry)
        print(f"{name:<34} {entry.arch:<15} {'' if size is None else f'{size:.2f}+ GB':>9}  "
              f"{entry.licence:<12} {entry.about}\n    {entry.url}")


def main(argv: list[str] | None = None) -> None:
    with one_sentence("python -m weights"):
        parser = argparse.ArgumentParser(
            "python -m weights", description="What is in a file of weights, and conversion.",
            usage="python -m weights [FILE] [--to WHAT OUT [--force] [--licence TEXT]]",
            allow_abbrev=False)
        parser.add_argument("source", nargs="?", action=Text, help="a file, a run's folder, a URL "
                            "or an official name; without it, the official files are listed")
        parser.add_argument("--to", nargs=2, action=Text, metavar=("WHAT", "OUT"), help="also "
                            f"write OUT: {'; '.join(map(': '.join, FORMATS.items()))}; or a file "
                            "of weights with the names of " + ", ".join(TARGETS))
        parser.add_argument("--force", action="store_true", help="replace OUT where it is there; "
                            "a folder never is")
        parser.add_argument("--licence", action=Text, default="", help="of the weights, for the "
                            "card: its name, or a sentence; none: left to be filled in")
        args = parser.parse_args(argv)
        if not args.source:
            return list_official()
        if args.to and args.to[0] not in (*FORMATS, *TARGETS):
            raise ValueError(f"--to {args.to[0]}: there is {', '.join((*FORMATS, *TARGETS))}")
        if args.licence and (args.to or [""])[0] != "card":
            raise ValueError("--licence is of --to card")
        released = args.to and args.to[0] == "release"
        loaded = read(whole_run(args.source) if released else args.source)
        print(summary(loaded))
        if args.to:
            convert(loaded, args.to[0], Path(args.to[1]), args.force, args.licence)


if __name__ == "__main__":
    main()
