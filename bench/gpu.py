"""The first hour on a GPU: what has to be known of it, by one command, in under 25 minutes.

    python -m bench gpu                     # adds to runs/bench.json, and writes runs/bench.md
    python -m bench gpu --device cpu        # the same with small networks, in minutes

Each part runs in a process of its own, which is ended after a time, so that a part that fails, runs
out of memory or hangs is told, and the next one goes on.
"""
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.timing import about_machine
from weights.atomic import write_whole

ROOT = Path(__file__).parents[1]


class Part(NamedTuple):
    """command: what follows `python -m`.  seconds: after which it is ended.  told: its result in
    a cell of the table."""
    name: str
    command: list[str]
    seconds: float
    told: Callable[[dict], str]


def bench_gpu(device_type: str, table: Path) -> dict:
    """All parts in their order. table: file of Markdown, written after each part. Returns their
    results."""
    done = []
    for part in parts(device_type):
        print(f"{part.name} ...", flush=True)
        done.append(run_part(part))
        print(row(done[-1]), flush=True)
        table.parent.mkdir(parents=True, exist_ok=True)
        write_whole(table, markdown(done))
    print(f"\n{markdown(done)}")
    return {"parts": done}


# ------------------------------------------------------------------------------- what is measured
def parts(device_type: str) -> list[Part]:
    """In their order. Without CUDA the networks are small."""
    small = device_type != "cuda"
    sizes = [("regnety_100mf", 2, 180)] if small else [
        ("regnety_16gf", 64, 60), ("regnety_32gf", 64, 60), ("regnety_128gf", 32, 100),
        ("regnety_256gf", 16, 140)]
    crops = "2x48+2x36" if small else "2x224+4x96"

    def bench(what: str, seconds: float, told: Callable, *options: str, name: str = "") -> Part:
        return Part(name or what, ["bench", what, f"--device={device_type}", *options], seconds,
                    told)

    def of_network(what: str, told: Callable, arch: str, images: int, seconds: float, *more):
        name = f"{what} {arch.removeprefix('regnety_').upper()}"
        checkpointing = "--checkpoint-activations" in more
        return bench(what, seconds, told, f"--arch={arch}", f"--crops={crops}",
                     f"--micro-batch={images}", *["--repeats=1"] * small, *more,
                     name=name + ", checkpointing" * checkpointing)

    return [
        Part("CUDA tests", ["pytest", "-q", "-m", "cuda", "-rfE", "-p", "no:cacheprovider"], 300,
             lambda result: result["last line"]),
        bench("rates", 100, tell_rates),
        *(of_network("layouts", tell_layouts, *size) for size in sizes),
        *(of_network("step", tell_step, *size) for size in sizes),
        of_network("step", tell_step, *sizes[-1], "--checkpoint-activations"),
        of_network("optimizer", tell_optimizer, *sizes[-1][:2], 100),
        # of the 256GF a save is 16 GB, and what is timed beside it 11
        of_network("save", tell_numbers, *sizes[min(1, len(sizes) - 1)][:2], 120, "--repeats=2")]


def tell_rates(result: dict) -> str:
    return (f"bf16 matrix product {result['bf16_tflops']:.3g} TFLOP/s, 3x3 convolution "
            f"{result['convolution_tflops']:.3g}; copy {result['copy_gb_s']:,.0f} GB/s")


def tell_layouts(result: dict) -> str:
    times = "; ".join(f"{name} {ms:.1f}" if ms else f"{name} does not run"
                      for name, ms in result["ms"].items())
    if result["fastest"] is None:
        return f"ms: {times}"
    return f"ms: {times}. Fastest: {result['fastest']}, {result['share of bf16 peak']:.0%} of peak"


def tell_step(result: dict) -> str:
    ms, ours = result["step, ms"], {name: values["ours"] for name, values in result.items()
                                    if isinstance(values, dict)}
    before = (f"{ms['baseline']:.0f} → {ms['ours']:.0f} ms ({result['ratio']:.2f})"
              if "ratio" in result else f"{ms['ours']:.0f} ms (the baseline has no room)")
    parts = ", ".join(f"{name} {ours[f'{part}, ms'] / ms['ours']:.1%}"
                      for name, part in (("LARC", "optimizer"), ("Sinkhorn", "Sinkhorn")))
    return (f"{before}; {ours['images/s']:.0f} images/s, {ours['share of bf16 peak']:.0%} of peak, "
            f"{ours['share of roofline']:.0%} of the roofline; GB planned "
            f"{result['planned_gb']:.2f}, measured {result['peak_gb']:.2f}; {parts}")


def tell_optimizer(result: dict) -> str:
    return (f"LARC {result['ours']:.1f} ms, plain loop {result['baseline']:.1f} "
            f"({result['ratio']:.2f}); {result['of floor']:.2f} times 7 passes over memory")


def tell_numbers(result: dict) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in result.items()
                     if isinstance(value, float))


# --------------------------------------------------------------------------------- how it is run
def run_part(part: Part) -> dict:
    """Its name, status (ok, failed or ended), seconds, and the result or the error."""
    with tempfile.TemporaryDirectory() as folder:
        out, said, begin = Path(folder, "result.json"), Path(folder, "said"), time.monotonic()
        own = [] if part.command[0] == "pytest" else [f"--out={out}"]
        with said.open("wb") as stream:         # not a pipe: a child of a child would hold it open
            process = subprocess.Popen([sys.executable, "-u", "-m", *part.command, *own],
                                       cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT,
                                       start_new_session=True)
            why = ""
            try:
                code = process.wait(part.seconds)
                status = "failed" if code else "ok"
                why = f"by signal {-code}; it said last: " * (code < 0)
            except subprocess.TimeoutExpired:
                status, why = "ended", f"after {part.seconds:g} s; it said last: "
            finally:
                end(process)
        lines = said.read_text(errors="replace").strip().splitlines() or [""]
        written = out.read_text() if out.exists() else json.dumps([{"last line": lines[-1]}])
    about = {"part": part.name, "command": " ".join(["python -m", *part.command]),
             "status": status, "seconds": round(time.monotonic() - begin, 1)}
    result = None
    try:
        result = json.loads(written)[-1]
        last = "; ".join(lines[-8:])[-400:] if status == "ended" else lines[-1][:200]
        told = part.told(result) if status == "ok" else why + last
    except Exception as error:                              # a result of any other form
        told = f"{type(error).__name__}: {error}"
    said_last = {} if status == "ok" else {"said last": lines[-40:]}
    return about | {"told": told, "result": result} | said_last


def end(process: subprocess.Popen) -> None:
    """The process, and those that it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError, PermissionError):   # Windows; or it has ended
        process.kill()
    process.wait()


def row(done: dict) -> str:
    status = "" if done["status"] == "ok" else f"**{done['status']}**: "
    told = done["told"].replace("|", "\\|")
    return f"| {done['part']} | {status}{told} | {done['seconds']:.0f} |"


def markdown(done: Sequence[dict]) -> str:
    """The table, under a line with machine, date and versions."""
    about = ", ".join(f"{name} {value}" for name, value in about_machine().items() if value)
    return "\n".join([f"`python -m bench gpu`: {about}", "", "| part | found | s |",
                      "|---|---|---|", *map(row, done), ""])
