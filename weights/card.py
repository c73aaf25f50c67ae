"""Card: a page of Markdown on a run's trunk, from what the run's folder holds and nothing else.

    write_card(read("runs/mine"), Path("card/README.md"), licence="CC BY 4.0")

It reads config.json, log.jsonl and, where they are there, results.json, results.jsonl (those lines
that are of this very file) and loss.png, which is copied beside the page. Of paths only the last
name is given; results that are tables are left out. What no file says (what the images show, whose
they are, the licence) is left to be filled in, and says so.
"""
import json
import shutil
from pathlib import Path, PureWindowsPath

from weights.atomic import file_digest, read_lines, refuse_existing, write_whole
from weights.files import Loaded
from weights.load import describe
from weights.names import part_of
from weights.official import LICENCES, OFFICIAL
from weights.preprocessing import USUAL, config_of, preprocessing_of
from weights.terminal import reason

FILL_IN = "**To be filled in by the owner of the weights:**"
MAIN = ("recipe", "method", "arch", "steps", "batch_size", "crops", "lr", "weight_decay", "mean",
        "std", "precision", "seed")                 # options of every method
COLUMNS = ("step", "images", "lr", "loss", "loss_over_ln_k", "loss_over_ln_candidates",
           "loss_over_ln_keys", "prototypes_used", "outputs_used", "clusters_used",
           "effective_rank", "knn", "retrieved")    # of the log, where it has them
ROWS = 6                                            # of the log
OF_THE_MEASUREMENT = ("protocol", "checkpoint", "sha256", "data", "arch")


def write_card(loaded: Loaded, out: Path, licence: str = "", force: bool = False) -> None:
    """Write the page, and loss.png beside it. Raises ValueError where the file is not of a run of
    train.py; OSError where it cannot be written."""
    folder = loaded.path.parent
    curves = folder / "loss.png"
    text = card(loaded, licence)
    if curves.exists() and curves.resolve() != out.with_name("loss.png").resolve():
        refuse_existing(out.with_name("loss.png"), force)
        shutil.copyfile(curves, out.with_name("loss.png"))
    write_whole(out, text)


def card(loaded: Loaded, licence: str = "") -> str:
    """The page's text. Raises ValueError where the file is not of a run of train.py."""
    folder, config = loaded.path.parent, config_of(loaded)
    log, results, table, environment = [], [], {}, {}
    try:
        environment = json.loads((folder / "config.json").read_text()).get("environment", {})
        log = read_lines(folder / "log.jsonl")
        if (folder / "results.jsonl").exists():
            results = read_lines(folder / "results.jsonl")
        if (folder / "results.json").exists():
            table = json.loads((folder / "results.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not the folder of a run: {reason(error)}") from None
    if not config or not isinstance(config.get("recipe"), str):
        raise ValueError(f"{loaded.path} is not of a run of train.py, of which a card is written")
    trunk = sum(t.numel() for name, t in loaded.tensors.items() if part_of(name) == "trunk"
                and name.endswith((".weight", ".bias")))
    digest = file_digest(loaded.path)
    parts = [
        f"# {folder.resolve().name}\n\nThe trunk {describe(loaded.tensors)}, {trunk:,} parameters, "
        f"trained with {config.get('method', 'swav')}" + after(log) + ".",
        data(config, log), recipe(config, environment), curve(folder, log),
        measured(table, [line for line in results if line.get("sha256") == digest]),
        use(config, loaded.path), terms(config, licence)]
    return "\n\n".join(filter(None, parts)) + "\n"


def after(log: list[dict]) -> str:
    if not log:
        return ""
    steps, images = log[-1]["step"], log[-1]["images"]
    return f" for {steps:,} step{'s' * (steps != 1)}, {images:,} images"


def last_name(value):
    """Of text that is a path or an address, of any system, the last name; else the value."""
    return PureWindowsPath(value).name if isinstance(value, str) else value


def data(config: dict, log: list[dict]) -> str:
    name = last_name(config.get("data", ""))
    lines = [f"Images: `{name}`." if name else "Images: the demo's, drawn by the program."]
    replaced = {}
    for entry in log:
        for cause, count in entry.get("replaced", {}).items():
            replaced[cause] = replaced.get(cause, 0) + count
    if replaced:
        lines.append("Images that could not be read, and were replaced by others: " + ", ".join(
            f"{count:,} ({cause})" for cause, count in sorted(replaced.items())) + ".")
    if name:
        lines.append(f"{FILL_IN} what they show, where they come from, and on which terms.")
    return "## Data\n\n" + "\n\n".join(lines)


def recipe(config: dict, environment: dict) -> str:
    rows = [(name, last_name(value)) for name, value in config.items()
            if name not in ("data", "out") and value != ""]
    shown = [(name, value) for name, value in rows if name in MAIN]
    rest = "\n".join(f"{name}: {json.dumps(value)}" for name, value in rows if name not in MAIN)
    versions = ", ".join(f"{name} {value}" for name, value in environment.items())
    return ("## Recipe\n\n" + table_of(("option", "value"), shown) + "\n\nThe learning rate is per "
            "256 images of batch. The other options, some of them of other methods:\n\n"
            f"```\n{rest}\n```" + f"\n\nIt ran with {versions}." * bool(environment))


def curve(folder: Path, log: list[dict]) -> str:
    skipped = sum(entry.get("skipped", 0) for entry in log)      # each since the line before
    log = [entry for entry in log if "loss" in entry]
    if not log:
        return ""
    columns = [name for name in COLUMNS if any(name in entry for entry in log)]
    chosen = sorted({round(i * (len(log) - 1) / (ROWS - 1)) for i in range(ROWS)})
    picture = "![The loss over the steps](loss.png)\n\n" * (folder / "loss.png").exists()
    return ("## Curves\n\n" + picture + table_of(
        columns, [[log[i].get(name, "") for name in columns] for i in chosen])
        + f"\n\nSteps that were skipped, for they were not finite: {skipped}." * bool(skipped))


def measured(table: dict, results: list[dict]) -> str:
    """table: of results.json, per cent.  results: lines of results.jsonl."""
    lines = []
    if table:
        names = list(next(iter(table.values())))
        lines.append(table_of(("on the demo's held-out images, per cent", *names), [
            [row, *values.values()] for row, values in table.items()]))
    if results:
        lines.append(table_of(("protocol", "data", "result"), [
            (line["protocol"], last_name(line["data"]), ", ".join(
                f"{name} {json.dumps(last_name(value))}" for name, value in line.items()
                if name not in OF_THE_MEASUREMENT and not isinstance(value, (dict, list))))
            for line in results]))
    return "## Results\n\n" + "\n\n".join(lines) if lines else ""


def use(config: dict, path: Path) -> str:
    known = USUAL | preprocessing_of(config, path)
    mean, std = (", ".join(map(str, known[name])) for name in ("mean", "std"))
    return ("## Use\n\nThe trunk takes RGB from 0 to 1, minus the mean "
            f"({mean}), over the standard deviation ({std}). Its first crops had {known['size']} "
            "pixels.")


def terms(config: dict, licence: str) -> str:
    lines = [licence or f"{FILL_IN} on which terms they may be used."]
    if config.get("init"):
        name = last_name(config["init"])
        lines.append(f"The run started from `{name}`" + (
            f", whose licence is: {LICENCES[OFFICIAL[name].licence]}." if name in OFFICIAL else
            ", whose licence may bind these weights too."))
    return "## Licence\n\n" + "\n\n".join(lines)


def table_of(head, rows) -> str:
    """Markdown. Numbers have four digits that count."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(
        f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")
        for cell in line) + " |" for line in lines)
