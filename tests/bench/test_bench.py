"""python -m bench: short measurements of the product's own step and of a baseline that is the same
method; and what cannot be measured."""
import json
import time

import pytest
import torch
from torch.nn import functional as F

import train
from bench import parts, step
from bench.__main__ import main
from bench.baseline import baseline_trunk, double_loop, textbook_codes
from bench.input import bench_cache
from bench.run import bench_run, ours
from bench.timing import Clock, read_results, write_results
from data.loader import Augment, AugmentedCrops
from larc import LARC
from methods.build import build_method, build_trunk
from multicrop import Photometric
from recipes.command_line import configure
from swav import swav_codes, swav_loss
from tests.helpers import equal

CPU = torch.device("cpu")
SMALL = ["step", "--crops=2x48+2x36", "--micro-batch=2", "--repeats=1", "--device=cpu",
         "--precision=fp32"]


# ----------------------------------------------------------------------------------- the clock
def test_a_part_is_timed_without_the_parts_inside_it():
    clock = Clock(CPU)

    def inner(seconds):
        time.sleep(seconds)
        return "inner"

    def outer():
        inside = clock.timed("inner", inner)
        time.sleep(0.02)
        return inside(0.05), inside(0.03)

    start = time.perf_counter()
    assert clock.timed("outer", outer)() == ("inner", "inner")
    whole = (time.perf_counter() - start) * 1e3
    assert 80 <= clock.ms["inner"] < whole - 20 and 20 <= clock.ms["outer"] < whole - 80
    assert sum(clock.ms.values()) == pytest.approx(whole, abs=2)


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_the_step_that_is_measured_is_that_of_train(micro_batch, monkeypatch):
    """Bitwise the weights that train.step_gradients and LARC lead to; and each part is timed."""
    config = configure({"arch": "regnety_100mf", "crops": "2x32+2x16", "head": "32-16",
                        "prototypes": 12, "batch_size": 4, "micro_batch": micro_batch})
    crops, methods = step.random_crops(config, CPU), []
    monkeypatch.setattr(step, "random_crops", lambda *_: crops)
    monkeypatch.setattr(step, "build_method",
                        lambda *args: methods.append(build_method(*args)) or methods[0])
    measured = step.product_step(config, CPU, torch.float32)
    for _ in range(2):
        clock = Clock(CPU)
        measured(clock)
        assert set(clock.ms) == set(step.PARTS) and min(clock.ms.values()) > 0

    method = build_method(config).to(memory_format=torch.channels_last)
    optimizer = LARC(method.parameters(), config.peak_lr(), config.momentum, config.weight_decay,
                     config.trust_coefficient)
    run = train.Run(method, method, CPU, torch.float32, torch.amp.GradScaler("cpu", enabled=False))
    augment = Augment(Photometric(), torch.channels_last)
    augmented = AugmentedCrops(crops, step.random_params(config), augment)
    for _ in range(2):
        optimizer.zero_grad()
        train.step_gradients(run, 0, [augmented] * (4 // micro_batch))
        optimizer.step()
        method.after_step(0)
    assert equal(method.state_dict(), methods[0].state_dict())


# ----------------------------------------------------------------------------- the measurements
@pytest.fixture
def quick(monkeypatch):
    """A small head and few prototypes, on a device whose rates are known: these take seconds."""
    monkeypatch.setattr("bench.__main__.configure", lambda given: configure(
        given | {"head": "32-16", "prototypes": 12}))
    for name, rate in (("bf16_peak", 0.1), ("convolution_rate", 1e10), ("bandwidth", 1e10)):
        monkeypatch.setattr(step, name, lambda *_, rate=rate: rate)


def check_step(out, arch, checkpointing):
    result, = json.loads(out.read_text())
    assert result["what"] == "step" and result["arch"] == arch and result["torch"]
    assert result["crops"] == "2x48+2x36" and result["augmentation, ms"]["ours"] > 0
    assert result["checkpoint_activations"] == checkpointing
    for side in ("ours", "baseline"):
        parts = [result[f"{part}, ms"][side]
                 for part in ("forward", "Sinkhorn", "backward", "optimizer")]
        assert min(parts) > 0 and result["step, ms"][side] == pytest.approx(sum(parts))
        assert result["images/s"][side] == pytest.approx(2e3 / sum(parts))
        assert result["share of bf16 peak"][side] > 0 < result["share of roofline"][side]
    assert result["ratio"] == result["step, ms"]["baseline"] / result["step, ms"]["ours"]


def test_a_save_is_measured(tmp_path, capsys, quick):
    out = tmp_path / "bench.json"
    main(["save", "--arch=regnety_100mf", "--device=cpu", "--repeats=1", f"--out={out}"])
    result, = json.loads(out.read_text())
    assert min(result[name] for name in ("first stall", "stall", "write", "torch.save")) > 0
    numbers = sum(p.numel() for p in build_method(configure(
        {"arch": "regnety_100mf", "head": "32-16", "prototypes": 12})).parameters())
    assert 8 * numbers < result["bytes"] < 9 * numbers              # weights and momentum
    assert "torch.save in the step" in capsys.readouterr().out


@pytest.mark.long
def test_a_step_is_measured(tmp_path, capsys, quick):
    out = tmp_path / "new" / "bench.json"
    main([*SMALL, "--arch=regnety_100mf", "--checkpoint-activations", f"--out={out}"])
    check_step(out, "regnety_100mf", True)
    printed = capsys.readouterr().out
    assert "activation checkpointing; cpu" in printed and "baseline" in printed


@pytest.mark.long
def test_a_step_is_measured_on_a_device_that_is_measured_too(tmp_path):
    main([*SMALL, "--arch=resnet50", f"--out={tmp_path / 'bench.json'}"])
    check_step(tmp_path / "bench.json", "resnet50", False)


def test_results_are_added_to_those_that_are_there(tmp_path):
    out = tmp_path / "new" / "bench.json"
    for seconds in (1.0, 2.0):
        write_results(out, "start", {"seconds": seconds})
    assert [(result["what"], result["seconds"]) for result in read_results(out)] == [
        ("start", 1.0), ("start", 2.0)]


@pytest.mark.long
@pytest.mark.parametrize("precision, full", [
    ("fp32", "float32"), ("bf16", "bfloat16")])
def test_trunks_are_measured(precision, full, tmp_path, capsys):
    out = tmp_path / "bench.json"
    main(["trunk", "--arch=regnety_800mf", "--crops=1x48", "--micro-batch=2", "--repeats=1",
          "--device=cpu", f"--precision={precision}", f"--out={out}"])
    result, = json.loads(out.read_text())
    for row in ("forward, ms", "step, ms"):
        ms = result[row]
        assert ms["ratio"] == ms["torchvision"] / ms["channels-last"] and ms["NCHW"] > 0
    assert result["layout"] == "channels-last" and result["precision"] == full
    assert "regnety_800mf, 2 images of 48" in capsys.readouterr().out


@pytest.mark.long
def test_detectors_are_measured(tmp_path, capsys):
    out = tmp_path / "bench.json"
    main(["detect", "--crops=1x64", "--micro-batch=1", "--repeats=1", "--device=cpu",
          "--precision=fp32", f"--out={out}"])
    result, = json.loads(out.read_text())
    for row in ("step, ms", "detections, ms"):
        assert result[row]["ratio"] == result[row]["torchvision"] / result[row]["ours"]
    assert "Mask R-CNN on regnety_400mf, 1 scenes of 64 pixels" in capsys.readouterr().out


@pytest.mark.long
def test_the_optimizer_and_sinkhorn_are_measured(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.json"
    main(["optimizer", "--arch=regnety_200mf", "--repeats=1", "--device=cpu", f"--out={out}"])
    monkeypatch.setattr(parts, "PROBLEMS", ((64, 300, 3), (32, 100, 10)))
    main(["sinkhorn", "--repeats=1", f"--out={out}"])
    optimizer, sinkhorn = json.loads(out.read_text())
    assert optimizer["parameters"] > 2e6
    assert optimizer["ratio"] == optimizer["baseline"] / optimizer["ours"]
    assert optimizer["of floor"] * optimizer["floor"] == pytest.approx(optimizer["ours"])
    assert (sinkhorn["collectives"], sinkhorn["one call per crop"]) == (10, 20)
    assert [(row["B"], row["K"]) for row in sinkhorn["rows"]] == [(64, 300), (32, 100)]
    assert "collectives a step of 2 assigned crops" in capsys.readouterr().out


@pytest.mark.parametrize("line, reached", [("step 1/100  loss 4.1", True), ("sorry", False)])
def test_the_start_is_measured(line, reached, tmp_path, monkeypatch):
    """With another program instead of Python and train.py, which takes seconds."""
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho first\necho '{line}'\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    if reached:
        assert 0 <= step.bench_start("regnety_100mf")["seconds"] < 10
    else:
        with pytest.raises(RuntimeError, match="--arch regnety_100mf .* did not reach"):
            step.bench_start("regnety_100mf")


@pytest.mark.measured
def test_growth_features_and_compile_are_measured(tmp_path, capsys):
    """Minutes: the sizes are the published ones."""
    out = tmp_path / "bench.json"
    main(["growth", "--repeats=1", f"--out={out}"])
    main(["features", "--arch=regnety_100mf", "--repeats=1", f"--out={out}"])
    main(["compile", "--arch=regnety_100mf", "--crops=2x48+2x36", "--micro-batch=4",
          "--repeats=1", f"--out={out}"])
    growth, features, compiled = json.loads(out.read_text())
    exponents = [table["exponent"] for table in growth["tables"].values()]
    assert len(exponents) == 5 and exponents[0] > 0.5 > exponents[-1]       # the batch; the set
    assert features["pictures"] == 384 and compiled["graphs"] == 2
    assert (compiled["graphs made later"], compiled["graph breaks"]) == (0, 0)
    assert compiled["ratio"] == compiled["step, ms"]["eager"] / compiled["step, ms"]["compiled"]


@pytest.mark.long
def test_the_input_is_measured(tmp_path):
    out, threads = tmp_path / "bench.json", torch.get_num_threads()
    try:
        main(["input", "--crops=2x64+2x32", "--repeats=1", f"--out={out}"])
    finally:
        torch.set_num_threads(threads)                              # it takes one
    result, = json.loads(out.read_text())
    for size in ("500x375", "4000x3000"):
        ms = result[size]
        assert ms["c / b"] == ms["(c) baseline"] / ms["(b) worker"]
        assert ms["(d) worker, augmentation"] > 0 < ms["(a') at the chosen scale"]
    assert result["loader"] > 0


def test_the_cache_is_measured():
    threads = torch.get_num_threads()
    try:
        result = bench_cache("2x32", 1, (320, 240), 2)
    finally:
        torch.set_num_threads(threads)
    first, later = result["(b) cache, first epoch"], result["(c) cache, later epochs"]
    assert first > later > 0 < result["(d) stored small"] and result["side"] == 99


# --------------------------------------------------------------------------------- the baseline
def test_the_baseline_is_the_same_method():
    """Its codes and loss are those of swav.py; so are its steps those of larc.py (test_larc.py)."""
    scores = F.normalize(torch.randn(5 * 6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    theirs = textbook_codes(scores.unflatten(0, (5, 6)), 0.05, 3)
    ours = swav_codes(scores, num_crops=5)
    torch.testing.assert_close(torch.stack(theirs), ours, rtol=1e-4, atol=1e-6)
    for temperature in (0.1, 0.5):
        loss = double_loop(scores.unflatten(0, (5, 6)), theirs, temperature)
        expected = swav_loss(scores, ours, num_crops=5, temperature=temperature)
        torch.testing.assert_close(loss, expected)


@pytest.mark.long
def test_the_baseline_is_the_same_network():
    for arch in ("regnety_400mf", "regnetx_200mf", "resnet50"):
        ours, theirs = build_trunk(arch), baseline_trunk(arch)
        theirs.fc = torch.nn.Identity()
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            n: p.shape for n, p in theirs.named_parameters()}


# ---------------------------------------------------------------------- what cannot be measured
@pytest.mark.parametrize("argv, expected", [
    (["step", "--arch=regnety_33gf"], "unknown arch 'regnety_33gf'"),
    (["start", "--arch=regnety_33gf"], "unknown arch 'regnety_33gf'"),
    (["step", "--micro_batch=0"], "--micro-batch: '0': needs a whole number from 1 to 100,000"),
    (["step", "--micro_batch=100000", "--device=cpu"], "GB for --micro-batch 100000, more than"),
    (["step", "--micro=4"], "unrecognized arguments: --micro=4"),
    (["input", "--crops=2x100000"], "a size of 7 to 2,048 pixels"),
    (["step", "--device=meta"], "--device meta cannot be used here"),
    (["step", "--repeats=-1"], "--repeats: '-1': needs"),
    (["step", "--out={folder}"], "is no file of results"),
    (["step", "--device=tpu9"], "--device tpu9 cannot be used here")])
def test_what_cannot_be_measured_is_refused(argv, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main([word.format(folder=tmp_path) for word in argv])
    assert stop.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.long
def test_a_step_without_room_is_one_sentence(tmp_path, capsys, monkeypatch, quick):
    def full(*_):
        raise torch.OutOfMemoryError
    small = [*SMALL, "--arch=regnety_100mf", f"--out={tmp_path / 'bench.json'}"]
    monkeypatch.setattr(step, "least_ms", lambda *_: 1.0)
    monkeypatch.setattr(step, "baseline_step", full)
    main(small)
    result, = json.loads((tmp_path / "bench.json").read_text())
    assert "baseline" not in result["step, ms"] and result["step, ms"]["ours"] > 0
    monkeypatch.setattr(step, "product_step", full)
    with pytest.raises(SystemExit):
        main(small)
    assert "no room for this step: try a smaller --micro-batch" in capsys.readouterr().err


def test_without_lightly_a_whole_run_is_not_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("bench.run.importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["run", f"--out={tmp_path / 'bench.json'}"])
    assert "compares with lightly: python -m pip install lightly==1.6" in capsys.readouterr().err


@pytest.mark.long
def test_a_whole_run_is_timed_from_its_folder(monkeypatch, tmp_path):
    """Ours; lightly's stands in, as it is not installed here."""
    monkeypatch.setattr("bench.run.importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("bench.run.BATCH", 4)
    monkeypatch.setattr("bench.run.lightlys", lambda *args: (8.0 if args[-1] else 4.0, {"a": 1.0}))
    result = bench_run("regnety_100mf", "2x32+2x16", 1, steps=6, images=8)
    rate, = result["images/s"]["ours"]
    assert result["ratio"] == rate / 4 and result["ratio to tuned"] == rate / 8
    with pytest.raises(RuntimeError, match="train.py --data=.* failed: train.py: error: "):
        ours(tmp_path, "regnety_100mf", "2x32", 6, tmp_path / "run")
