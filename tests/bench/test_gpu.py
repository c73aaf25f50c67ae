"""python -m bench gpu: each part by itself, whatever becomes of the others; and layouts."""
import json
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.__main__ import main
from bench.layouts import bench_layouts
from recipes.command_line import configure

STUB = """
import json, subprocess, sys, time
_, what, *more = sys.argv
print("said", what, flush=True)
if what == "raises":
    raise RuntimeError("no kernel | for this")
if what == "killed":
    import os; os.kill(os.getpid(), 9)
if what == "hangs":
    print("with a child", flush=True)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    open(more[0], "w").write(str(child.pid))
    time.sleep(100)
if what == "damaged":
    sys.exit(open(more[-1].split("=")[1], "w").write("[{") and 0)
json.dump([{"answer": 42 if what == "works" else None}], open(more[-1].split("=")[1], "w"))
"""


def wait_until_ended(pid: int) -> None:
    """A minute at most. Ended ones may stay as zombies where nobody asks for them."""
    state, until = Path(f"/proc/{pid}/stat"), time.monotonic() + 60
    while state.exists() and ") Z" not in state.read_text():
        assert time.monotonic() < until, "a child of a part that was ended goes on"
        time.sleep(0.02)


@pytest.mark.long
def test_a_part_that_fails_or_hangs_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    """In child processes, which are no part of the benchmark: one works, one raises, one is killed
    as where memory is short, one hangs with a child of its own, two leave other results."""
    (tmp_path / "a_part.py").write_text(STUB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pid, out = tmp_path / "pid", tmp_path / "new" / "bench.json"

    def told(result):
        return f"the answer is {result['answer'] + 0}"

    monkeypatch.setattr(gpu, "parts", lambda device_type: [
        gpu.Part(f"{what} on {device_type}", ["a_part", what, str(pid)], seconds, told)
        for what, seconds in (("raises", 60), ("killed", 60), ("hangs", 3), ("odd", 60),
                              ("damaged", 60), ("works", 60))])
    main(["gpu", "--device=cpu", f"--out={out}"])
    result, = json.loads(out.read_text())
    raised, killed, hung, odd, damaged, worked = result["parts"]
    assert [part["status"] for part in result["parts"]] == [
        "failed", "failed", "ended", "ok", "ok", "ok"]
    assert raised["told"] == "RuntimeError: no kernel | for this"
    assert killed["told"] == "by signal 9; it said last: said killed"
    said = "after 3 s; it said last: said hangs; with a child"
    assert hung["told"] == said and hung["seconds"] < 60
    assert odd["told"].startswith("TypeError") and odd["result"] == {"answer": None}
    assert damaged["told"].startswith("JSONDecodeError") and damaged["result"] is None
    assert worked["told"] == "the answer is 42" and worked["result"] == {"answer": 42}
    wait_until_ended(int(pid.read_text()))
    table = out.with_suffix(".md").read_text()
    assert result["date"] in table and result["torch"] in table and table in capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 6 and "no kernel \\| for" in rows[0] and "**ended**: after 3 s" in rows[2]
    assert rows[5].startswith("| works on cpu | the answer is 42 |")


def test_the_parts_are_what_has_to_be_known_in_25_minutes():
    for device_type in ("cuda", "cpu"):
        parts = gpu.parts(device_type)
        assert sum(part.seconds for part in parts) < 25 * 60 - len(parts)
        kinds = [part.command[1] for part in parts if part.command[0] == "bench"]
        assert list(dict.fromkeys(kinds)) == ["rates", "layouts", "step", "optimizer", "save"]
        assert parts[0].command[:4] == ["pytest", "-q", "-m", "cuda"]
    for what in ("layouts", "step"):
        archs = [part.command[3] for part in gpu.parts("cuda") if part.command[1] == what]
        assert archs[:4] == [f"--arch=regnety_{size}gf" for size in (16, 32, 128, 256)]


def test_results_are_told_in_a_cell():
    step = {name: {"ours": 20.0, "baseline": 40.0} for name in (
        "step, ms", "optimizer, ms", "Sinkhorn, ms", "images/s")}
    step |= {name: {"ours": 0.5} for name in ("share of bf16 peak", "share of roofline")}
    step |= {"optimizer, ms": {"ours": 2.0}, "Sinkhorn, ms": {"ours": 1.0}, "ratio": 2.0,
             "planned_gb": 10.0, "peak_gb": 11.0}
    assert gpu.tell_step(step) == (
        "40 → 20 ms (2.00); 20 images/s, 50% of peak, 50% of the roofline; GB planned 10.00, "
        "measured 11.00; LARC 10.0%, Sinkhorn 5.0%")
    layouts = {"ms": {"contiguous": 12.0, "channels-last": None}, "fastest": "contiguous",
               "share of bf16 peak": 0.25}
    assert gpu.tell_layouts(layouts) == (
        "ms: contiguous 12.0; channels-last does not run. Fastest: contiguous, 25% of peak")


def test_layouts_are_measured_and_one_that_does_not_run_is_told(monkeypatch, capsys):
    config = configure({"arch": "regnety_100mf", "crops": "2x32+2x16", "head": "8-4",
                        "prototypes": 4, "batch_size": 2, "micro_batch": 2})
    monkeypatch.setattr("bench.layouts.bf16_peak", lambda _: 1.0)
    benchmark = torch.backends.cudnn.benchmark
    result = bench_layouts(config, torch.device("cpu"), torch.float32, 1)
    assert {"contiguous", "channels-last"} <= set(result["ms"]) and min(result["ms"].values()) > 0
    assert result["fastest"] == min(result["ms"], key=result["ms"].get)
    assert 0 < result["share of bf16 peak"] < 1

    def full(*_):
        raise torch.OutOfMemoryError
    monkeypatch.setattr("recipes.machine.prepared", full)
    result = bench_layouts(config, torch.device("cpu"), torch.float32, 1)
    assert result["fastest"] is None and set(result["ms"].values()) == {None}
    assert "contiguous does not run; channels-last does not run" in gpu.tell_layouts(
        {"ms": {"contiguous": None, "channels-last": None}, "fastest": None})
    assert "does not run" in capsys.readouterr().out
    assert torch.backends.cudnn.benchmark == benchmark


@pytest.mark.measured
def test_the_first_hour_on_a_cpu(tmp_path):
    """As on a GPU, with a small network: minutes."""
    out = tmp_path / "bench.json"
    main(["gpu", "--device=cpu", f"--out={out}"])
    result, = json.loads(out.read_text())
    parts = {part["part"]: part for part in result["parts"]}
    found = {name: part["told"] for name, part in parts.items() if part["status"] == "ok"}
    assert "skipped" in found["CUDA tests"] or "passed" in found["CUDA tests"]
    assert "TFLOP/s" in found["rates"] and "channels-last" in found["layouts 100MF"]
    for name in ("step 100MF", "step 100MF, checkpointing"):
        assert "GB planned" in found[name] and "Sinkhorn" in found[name]
        assert parts[name]["result"]["what"] == "step"
    assert "LARC" in found["optimizer 100MF"] and "stall" in found["save 100MF"]
    assert (tmp_path / "bench.md").read_text().count("\n| ") == 1 + len(parts)
