"""bench.py: short measurements, and what cannot be measured."""
import json

import pytest
import torch
from torch.nn import functional as F

import bench
import ordinary
import scale
from swav import swav_codes, swav_loss


@pytest.mark.parametrize("arch, options", [
    ("regnety_100mf", ["--checkpoint-activations"]), ("resnet50", [])])
def test_a_step_is_measured(arch, options, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    times = 2 if options else 1
    for _ in range(times):
        bench.main(["step", f"--arch={arch}", "--crops=2x48+2x36", "--micro-batch=2", "--repeats=1",
                    "--device=cpu", "--precision=fp32", f"--out={out}", *options])
    results = json.loads(out.read_text())
    assert len(results) == times
    for result in results:
        assert result["what"] == "step" and result["arch"] == arch and result["torch"]
        assert result["checkpoint_activations"] == bool(options)
        for way in ("ours", "ordinary"):
            parts = [result[f"{part}, ms"][way]
                     for part in ("forward", "Sinkhorn", "backward", "optimizer")]
            assert min(parts) > 0 and result["step, ms"][way] == pytest.approx(sum(parts))
            assert result["images/s"][way] == pytest.approx(2e3 / sum(parts))
    assert "ordinary" in capsys.readouterr().out


def test_trunks_are_measured(tmp_path, capsys):
    out = tmp_path / "bench.json"
    bench.main(["trunk", "--arch=regnety_800mf", "--crops=1x64", "--micro-batch=2", "--repeats=1",
                "--device=cpu", "--precision=bf16", f"--out={out}"])
    result, = json.loads(out.read_text())
    for row in ("forward, ms", "step, ms"):
        ms = result[row]
        assert ms["ratio"] == ms["torchvision"] / ms["channels-last"] and ms["NCHW"] > 0
    assert result["layout"] == "channels-last" and "regnety_800mf, 2 pictures of 64" in capsys.readouterr().out


def test_the_optimizer_and_sinkhorn_are_measured(tmp_path, capsys, monkeypatch):
    out = tmp_path / "bench.json"
    bench.main(["optimizer", "--arch=regnety_200mf", "--repeats=1", "--device=cpu", f"--out={out}"])
    monkeypatch.setattr(bench, "PROBLEMS", ((64, 300, 3), (32, 100, 10)))
    bench.main(["sinkhorn", "--repeats=1", f"--out={out}"])
    optimizer, sinkhorn = json.loads(out.read_text())
    assert optimizer["parameters"] > 2e6 and optimizer["ratio"] == optimizer["ordinary"] / optimizer["ours"]
    assert optimizer["of floor"] * optimizer["floor"] == pytest.approx(optimizer["ours"])
    assert (sinkhorn["collectives"], sinkhorn["one call per crop"]) == (10, 20)
    assert [(row["B"], row["K"]) for row in sinkhorn["rows"]] == [(64, 300), (32, 100)]
    assert "collectives a step of 2 assigned crops" in capsys.readouterr().out


@pytest.mark.long
def test_growth_features_and_compile_are_measured(tmp_path, capsys):
    """Minutes: the sizes are the published ones."""
    out = tmp_path / "bench.json"
    bench.main(["growth", "--repeats=1", f"--out={out}"])
    bench.main(["features", "--arch=regnety_100mf", "--repeats=1", f"--out={out}"])
    bench.main(["compile", "--arch=regnety_100mf", "--crops=2x48+2x36", "--micro-batch=4", "--repeats=1",
                f"--out={out}"])
    growth, features, compiled = json.loads(out.read_text())
    exponents = [table["exponent"] for table in growth["tables"].values()]
    assert len(exponents) == 5 and exponents[0] > 0.5 > exponents[-1]       # the batch; the set
    assert features["pictures"] == 384 and compiled["graphs"] == 2
    assert (compiled["graphs made later"], compiled["graph breaks"]) == (0, 0)
    assert compiled["ratio"] == compiled["step, ms"]["eager"] / compiled["step, ms"]["compiled"]


def test_the_ordinary_way_is_the_same_method():
    """Its codes and loss are those of swav.py; so are its steps those of larc.py (test_larc.py)."""
    scores = F.normalize(torch.randn(5 * 6, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    theirs = ordinary.textbook_codes(scores.unflatten(0, (5, 6)), 0.05, 3)
    ours = swav_codes(scores, num_crops=5)
    torch.testing.assert_close(torch.stack(theirs), ours, rtol=1e-4, atol=1e-6)
    for temperature in (0.1, 0.5):
        loss = ordinary.double_loop(scores.unflatten(0, (5, 6)), theirs, temperature)
        torch.testing.assert_close(loss, swav_loss(scores, ours, num_crops=5, temperature=temperature))


def test_the_ordinary_way_is_the_same_network():
    for arch in ("regnety_400mf", "regnetx_200mf", "resnet50"):
        ours, theirs = scale.build_trunk(arch), bench.ordinary_trunk(arch)
        theirs.fc = torch.nn.Identity()
        assert {n: p.shape for n, p in ours.named_parameters()} == {
            n: p.shape for n, p in theirs.named_parameters()}


@pytest.mark.parametrize("argv, expected", [
    (["step", "--arch=regnety_33gf"], "unknown arch 'regnety_33gf'"),
    (["start", "--arch=regnety_33gf"], "did not reach its first step"),
    (["step", "--micro_batch=0"], "--micro-batch must be at least 1"),
    (["step", "--repeats=-1"], "--repeats not below 0"),
    (["step", "--out={folder}"], "is no file of results"),
    (["step", "--device=tpu9"], "--device tpu9 cannot be used here")])
def test_what_cannot_be_measured_is_refused(argv, expected, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main([word.format(folder=tmp_path) for word in argv])
    assert stop.value.code == 2 and expected in capsys.readouterr().err


def test_a_step_without_room_is_one_sentence(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError
    small = ["step", "--arch=regnety_100mf", "--crops=2x48+2x36", "--micro-batch=2", "--repeats=1",
             "--device=cpu", f"--out={tmp_path / 'bench.json'}"]
    monkeypatch.setattr(bench, "ordinary_step", full)
    bench.main(small)
    result, = json.loads((tmp_path / "bench.json").read_text())
    assert "ordinary" not in result["step, ms"] and result["step, ms"]["ours"] > 0
    monkeypatch.setattr(bench, "our_step", full)
    with pytest.raises(SystemExit):
        bench.main(small)
    assert "no room for this step: try a smaller --micro-batch" in capsys.readouterr().err
