"""A whole run, from PNGs in a folder to the optimizer: train.py beside lightly 1.6's SwAV.

    python -m bench run --arch regnety_400mf --crops 2x96+4x48

Each way runs in a process of its own, in turn; a rate is of the steps after the first ones. lightly
runs as in its examples (float32, eight workers; bench/lightly_swav.py), and `tuned`: with what
train.py does on a CPU too, channels-last, bfloat16 where the processor has it, passive waiting, and
the better of one and two workers. Nothing is installed: where lightly is missing, a sentence asks.
"""
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from PIL import Image

from bench.input import jpeg
from multicrop import parse_crops

ROOT = Path(__file__).parents[1]
HEAD, PROTOTYPES, BATCH = (2048, 128), 512, 64
FIRST = 3                    # steps that are not timed


def write_images(folder: Path, count: int) -> None:
    """PNGs of 300 x 300."""
    folder.mkdir()
    for i in range(count):
        (folder / "image.jpg").write_bytes(jpeg(300, 300, i))
        with Image.open(folder / "image.jpg") as image:
            Image.fromarray(numpy.asarray(image)).save(folder / f"{i:04}.png")
    (folder / "image.jpg").unlink()


def in_process(command: list[str], **environment: str) -> str:
    """What it prints. Raises RuntimeError with its last line where it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | environment)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1]
        raise RuntimeError(f"{' '.join(command[:3])} failed: {last}")
    return done.stdout


def ours(folder: Path, arch: str, crops: str, steps: int, out: Path) -> float:
    """Images/s of train.py, which chooses its layout, threads and workers itself."""
    in_process(["train.py", f"--data={folder}", f"--arch={arch}", f"--crops={crops}",
                "--recipe=small", f"--head={HEAD[0]}-{HEAD[1]}", f"--prototypes={PROTOTYPES}",
                f"--batch-size={BATCH}", f"--steps={steps}", f"--log-every={FIRST}",
                "--save-every=100000", "--cache=off", "--queue=0", "--device=cpu", f"--out={out}"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    seconds = sum(FIRST * BATCH / line["images_per_second"] for line in lines[1:])
    return FIRST * BATCH * len(lines[1:]) / seconds


def lightlys(folder: Path, arch: str, crops: str, steps: int, workers: int, tuned: bool
             ) -> tuple[float, dict]:
    """Images/s, and milliseconds of a step by part."""
    options = {"arch": arch, "head": HEAD, "prototypes": PROTOTYPES, "batch": BATCH,
               "steps": steps, "workers": workers, "tuned": tuned,
               "sizes": [(count, size, *scale) for count, size, scale in parse_crops(crops)]}
    result = json.loads(in_process(
        ["-m", "bench.lightly_swav", str(folder), json.dumps(options)],
        **({"OMP_WAIT_POLICY": "PASSIVE"} if tuned else {})).splitlines()[-1])
    timed = result["seconds"][FIRST:]
    parts = result["ms"] | {"input, a worker": 1e3 * BATCH * result["input"]}
    return BATCH * len(timed) / sum(timed), parts


def bench_run(arch: str, crops: str, repeats: int, steps: int = 9, images: int = 256) -> dict:
    """Raises ValueError where lightly is missing."""
    if importlib.util.find_spec("lightly") is None:
        raise ValueError("bench run compares with lightly: python -m pip install lightly==1.6.*")
    how = {"lightly": (8, False), "lightly, tuned, 1 worker": (1, True),
           "lightly, tuned, 2 workers": (2, True)}
    rates, parts = {"ours": [], **{name: [] for name in how}}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, "images")
        write_images(folder, images)
        for turn in range(repeats):
            rates["ours"].append(ours(folder, arch, crops, steps, Path(temporary, f"run{turn}")))
            for name, (workers, tuned) in how.items():
                rate, parts[name] = lightlys(folder, arch, crops, steps, workers, tuned)
                rates[name].append(rate)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    tuned = max(value for name, value in medians.items() if "tuned" in name)
    result = {"arch": arch, "crops": crops, "batch": BATCH, "repeats": repeats, "images/s": rates,
              "ms a step": parts, "ratio": medians["ours"] / medians["lightly"],
              "ratio to tuned": medians["ours"] / tuned}
    print(f"{arch}, {crops}, batch {BATCH}, PNGs of 300 x 300; images/s, median of {repeats}")
    for name, value in medians.items():
        print(f"{name:<28}{value:>8.1f}   " + ", ".join(f"{rate:.1f}" for rate in rates[name]))
    print(f"ratio {result['ratio']:.2f}, to tuned {result['ratio to tuned']:.2f}")
    for name, ms in parts.items():
        print(f"{name}: ms a step: " + ", ".join(f"{part} {t:.0f}" for part, t in ms.items()))
    return result
