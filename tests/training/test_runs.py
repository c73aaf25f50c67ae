"""train.py from end to end: what a run leaves, the plain loop, and bad input."""
import importlib.util
import math
import os
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image

import train
from data.images import open_images
from data.stream import Stream, collate
from distributed import wrap
from evaluation.task import load_trunk
from figures.sheets import Row, Tile, crop_names, layout, views_caption
from larc import LARC
from methods.build import build_method, build_trunk
from multicrop import MultiCrop, Photometric, parse_crops
from recipes.command_line import configure, parse_arguments
from recipes.config import with_length
from regnet import ARCHS, RegNet
from swav import SwAV
from tests.helpers import SMALL, equal, log_of, refuse, run, write_pictures
from training import monitor
from training import run as training_run
from weights.atomic import load, save


@pytest.mark.long
def test_compile_is_passed_on(photos, tmp_path, capsys, monkeypatch):
    """By all but Inductor's kernels."""
    backend = {"backend": "aot_eager_decomp_partition"}
    monkeypatch.setattr(wrap, "compile_trunk", partial(wrap.compile_trunk, **backend))
    monkeypatch.setattr(train, "check_compiler", partial(train.check_compiler, **backend))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(photos, tmp_path / "compiled", "--compile", "--steps=2")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3      # two sizes, the check
    assert "compiled: the first step takes its time" in capsys.readouterr().out
    run(photos, tmp_path / "plain", "--steps=2")
    losses = [[line["loss"] for line in log_of(tmp_path / name)] for name in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_run_that_cannot_be_compiled_ends_before_it_begins(photos, tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise RuntimeError("no g++")
    monkeypatch.setattr(train, "check_compiler", partial(wrap.check_compiler, backend=missing))
    assert "does not work here: no g++" in refuse(
        capsys, f"--data={photos}", f"--out={tmp_path / 'no'}", *SMALL, "--compile")
    assert not (tmp_path / "no").exists()


def test_a_folder_of_pictures_in_a_trained_trunk_out(photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(photos, out, "--epochs=1.5", "--workers=1")
    names = {p.name for p in out.iterdir() if not p.name.startswith("events.out.tfevents")}
    assert names - {"loss.png"} == {            # that one with matplotlib, those with tensorboard
        ".lock", "config.json", "log.jsonl", "views.png", "prototypes.png", "checkpoint.pt",
        "trunk.pt"}
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 13)) and log[-1]["images"] == 48
    named = [(fault["name"], fault["cause"]) for line in log for fault in line["bad"]]
    assert sorted(named) == [               # each once, and counted each time
        ("empty.jpg", "empty"), (os.path.join("more", "text.png"), "no picture"),
        ("truncated.jpg", "truncated")]
    replaced = sum((Counter(line["replaced"]) for line in log), Counter())
    assert set(replaced) == {"empty", "no picture", "truncated"} and replaced.total() > len(named)
    rows = [Row(f"image {i}", [Tile(torch.zeros(3, 32, 32))] * 4) for i in range(1, 5)]
    place = layout(views_caption(4), rows, crop_names(parse_crops("2x32+2x16")))
    assert Image.open(out / "views.png").size == place.size
    printed = capsys.readouterr().out
    assert "step 12/12" in printed and "batch 4 = 1 rank x 1 x 4" in printed
    assert "trunk.pt" in printed

    # the last lines of a run: how to use its trunk elsewhere, here with torchvision
    namespace = {}
    exec("\n".join(line.strip() for line in printed.splitlines()[-3:]), namespace)
    theirs, ours = namespace["trunk"], build_trunk("regnety_100mf").eval()
    ours.load_state_dict(torch.load(out / "trunk.pt", weights_only=True))
    images = torch.randn(2, 3, 64, 64)
    assert type(theirs) is torchvision.models.RegNet
    torch.testing.assert_close(ours(images), theirs(images))

    before = (out / "checkpoint.pt").read_bytes()
    run(photos, out, "--epochs=1.5", "--workers=1")
    assert "finished" in capsys.readouterr().out and (out / "checkpoint.pt").read_bytes() == before
    (out / "prototypes.png").unlink()                   # as after a crash in the last seconds
    run(photos, out, "--epochs=1.5", "--workers=1")
    assert "finished" not in capsys.readouterr().out and (out / "prototypes.png").exists()


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_each_precision_trains(photos, tmp_path, precision):
    run(photos, tmp_path / precision, "--steps=12", f"--precision={precision}",
        "--freeze-prototypes=1")
    # fp16 begins with a loss scale that overflows: its first steps are skipped
    assert all(math.isfinite(line["loss"]) for line in log_of(tmp_path / precision))
    weights = torch.load(tmp_path / precision / "trunk.pt", weights_only=True)
    fresh = build_method(configure({"recipe": "demo"})).trunk.state_dict()
    assert {v.dtype for v in weights.values()} == {torch.float32, torch.int64}
    assert not torch.equal(weights["stem.0.weight"], fresh["stem.0.weight"])


@pytest.mark.parametrize("options", [
    ["--queue=8", "--weight-decay=0.1", "--lr=60", "--warmup=0.5", "--final-lr=0.3",
     "--freeze-prototypes=2"],
    *(pytest.param(options, marks=pytest.mark.long) for options in (
        [], ["--queue=8", "--hard"], ["--temperature=0.3", "--epsilon=0.2"])),
    *(pytest.param(options, marks=pytest.mark.measured) for options in (
        ["--hard"], ["--queue=8"], ["--freeze-prototypes=2"], ["--sinkhorn-iterations=1"],
        ["--weight-decay=0.1", "--lr=60", "--warmup=0.5", "--final-lr=0.3"],
        ["--momentum=0.5", "--trust-coefficient=0.002"],
        ["--strength=1", "--gray=0.9", "--blur=1"]))])
def test_the_loop_is_the_plain_loop(photos, tmp_path, options):
    """train.py's weights against a loop written out over the method's files, textbook style. (With
    a batch of 4 and a rate of 300 a rounding grew on one processor to 4 % of the way.)"""
    options = ["--steps=4", "--lr=60", "--seed=2", *options]
    run(photos, tmp_path / "run", *options)
    config = with_length(configure(parse_arguments([*SMALL, *options])), 30)
    torch.set_num_threads(config.threads)           # as many: sums round alike
    model = build_method(config).to(memory_format=torch.channels_last)
    optimizer = LARC(model.parameters(), 0.0, config.momentum, config.weight_decay,
                     config.trust_coefficient)
    crop = MultiCrop(config.crops, config.strength, gray=config.gray, blur=config.blur)
    stream, photometric = Stream(open_images(photos), crop, config.seed), Photometric()
    begin, kept = {k: v.clone() for k, v in model.state_dict().items()}, []
    for step in range(4):
        warmup, peak = round(config.warmup * 4), config.lr * 4 / 256
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (4 - warmup)))
        optimizer.param_groups[0]["lr"] = peak * (
            (step + 1) / warmup if step < warmup else
            config.final_lr + (1 - config.final_lr) * cosine)
        crops, params, _ = collate([stream[4 * step + i] for i in range(4)])
        images = [photometric(c, p).to(memory_format=torch.channels_last)
                  for c, p in zip(crops, params)]
        embeddings, scores = model(images)
        views, loss = scores.view(4, 4, 12), 0
        history = (torch.stack([torch.cat([h[a] for h in kept[::-1]]) for a in (0, 1)])
                   if kept else None)
        for a in (0, 1):
            problem = views[a].detach()
            if config.queue and step >= 2:
                weight = model.prototypes.weight.detach()
                problem = torch.cat([problem, history[a][:8] @ weight.t()])
            q = (problem / config.epsilon).exp()
            for _ in range(config.sinkhorn_iterations):
                q = q / q.sum(0, keepdim=True)
                q = q / q.sum(1, keepdim=True)
            q = q[:4]
            if config.hard:
                q = torch.nn.functional.one_hot(q.argmax(1), 12).float()
            for v in {0, 1, 2, 3} - {a}:
                loss = loss - (q * (views[v] / config.temperature).log_softmax(1)).sum(1).mean() / 6
        kept.append(embeddings.detach().view(4, 4, -1)[:2])
        optimizer.zero_grad()
        loss.backward()
        if step < config.freeze_prototypes:
            model.prototypes.weight.grad = None
        optimizer.step()
        model.normalize_prototypes()
    saved = load(tmp_path / "run" / "checkpoint.pt")["model"]
    for part in ("trunk", "head", "prototypes"):
        ours, plain, start = (torch.cat([p.flatten() for name, p in weights.items()
                                         if name.startswith(part) and p.is_floating_point()])
                              for weights in (saved, model.state_dict(), begin))
        moved = (plain - start).norm()
        assert moved > 3e-4 * start.norm() and (ours - plain).norm() < 0.01 * moved, part


def test_compressed_gradients_are_passed_on(photos, tmp_path, monkeypatch):
    class Reached(Exception):
        pass

    def reached(*args):
        raise Reached(args[7])

    monkeypatch.setattr(training_run, "wrap", reached)
    for option, expected in ((["--compress-gradients"], True), ([], False)):
        config = configure(parse_arguments([f"--data={photos}", f"--out={tmp_path / 'run'}",
                                            *SMALL, "--steps=1", *option]))
        with pytest.raises(Reached) as seen:
            train.setup(config, open_images(str(photos)))
        assert seen.value.args == (expected,)


@pytest.mark.parametrize("options, expected", [
    ([], True), (["--no-head-bn"], False),
    *(pytest.param(*case, marks=pytest.mark.long) for case in (
        (["--no-codes-from-all-crops"], False),
        (["--no-head-bn", "--codes-from-all-crops"], True)))])
def test_codes_are_from_all_crops_where_the_head_has_batchnorm(options, expected, photos, tmp_path,
                                                               monkeypatch):
    seen, assigned = [], SwAV.assigned
    monkeypatch.setattr(SwAV, "assigned", lambda *args: seen.append(args[2]) or assigned(*args))
    run(photos, tmp_path / "run", "--steps=1", "--micro-batch=2", *options)
    assert seen == [expected] * 2


@pytest.mark.parametrize("arch", sorted(ARCHS))
def test_the_printed_usage_is_of_the_right_network(arch):
    lines = monitor.usage(configure({"arch": arch}), Path("run")).splitlines()[-3:]
    if "torchvision" not in lines[0]:
        assert replace(ARCHS[arch], rounding="torchvision").stages() != ARCHS[arch].stages()
    elif ARCHS[arch].depth < 20 and ARCHS[arch].w_0 < 60:
        namespace = {}
        exec("\n".join(line.strip() for line in lines[:2]), namespace)
        theirs = {k: v.shape for k, v in namespace["trunk"].state_dict().items()}
        with torch.device("meta"):
            assert theirs == {k: v.shape for k, v in RegNet(ARCHS[arch]).state_dict().items()}


def test_the_printed_usage_of_a_wide_resnet_is_not_torchvisions():
    assert "trunk = build_trunk('resnet50w2')" in monitor.usage(
        configure({"arch": "resnet50w2"}), Path("run"))


@pytest.mark.long
def test_swavs_own_network_from_end_to_end(photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(photos, out, "--recipe=swav", "--arch=resnet50", "--crops=2x48+2x32", "--head=32-16",
        "--epochs=0", "--steps=2", "--micro-batch=2", "--no-checkpoint-activations")
    printed = capsys.readouterr().out
    assert "recipe swav: resnet50" in printed and "SyncBatchNorm over 8 needs several" in printed
    trunk = torchvision.models.resnet50()
    trunk.fc = torch.nn.Identity()
    trunk.load_state_dict(torch.load(out / "trunk.pt", weights_only=True))
    again, config, _ = load_trunk(str(out))
    assert config["arch"] == "resnet50"
    assert equal(dict(trunk.state_dict()), dict(again.state_dict()))


def test_bad_input_gets_one_sentence_and_touches_nothing(photos, tmp_path, capsys):
    out = tmp_path / "run"
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "a.jpg").write_bytes(b"no")
    common = [f"--out={out}", *SMALL, "--steps=1"]
    good = [f"--data={photos}", *common]
    has_matplotlib = importlib.util.find_spec("matplotlib") is not None
    for argv, expected in [
            ([f"--data={tmp_path / 'nowhere'}", *common], "no such folder"),
            ([f"--data={tmp_path / 'empty'}", *common], "no images in"),
            ([f"--data={broken}", *common], "no readable image"),
            ([*good, "--arch=regnety_33gf"], "unknown arch 'regnety_33gf'; there is regnety_"),
            ([*good, "--recipe=sear"], "unknown recipe 'sear'; there is seer"),
            ([*good, "--crops=2x224+96"], "'96' is not COUNTxSIZE"),
            ([*good, "--crops=2x32+2x8"], "8 pixels are a single one before the last of"),
            ([*good, "--head=8192x256"], "head '8192x256' is not"),
            ([*good, "--crops=1x32"], "needs crops of an image: two, or more"),
            ([*good, "--batch-size=0"], "--batch-size 0: needs 2 to 1,000,000"),
            ([*good, "--batch-size=8", "--micro-batch=3"],
             "--micro-batch 3 does not divide the 8 images of a process; 2 does"),
            ([*good, "--gpus=4"], "--gpus: of --plan alone"),
            ([*good, "--micro-batch=1", "--crops=2x32+1x16"], "use 2"),
            ([*good, "--micro-batch=-1"], "--micro-batch -1: needs 0 to 1,000,000"),
            ([*good, "--recipe=swav", "--arch=resnet51"],
             "unknown arch 'resnet51'; there is resnet50"),
            ([*good, "--epsilon=0"], "--epsilon 0.0: needs 0.001 to 10"),
            ([*good, "--lr=nan"], "--lr nan: needs"),
            ([*good, "--gray=2"], "--gray 2.0: needs 0 to 1"),
            ([*good, "--mean=nan,0,0"], "--mean nan,0,0: needs numbers"),
            ([*good, "--std=0,1,1"], "--std 0,1,1: needs numbers from 0.001 to 10"),
            ([*good, "--std=red"], "std 'red' is not RED,GREEN,BLUE"),
            (["--plot", str(tmp_path / "nowhere")],
             "nowhere is not the folder of a run" if has_matplotlib else "pip install matplotlib"),
            ([*good, "--precision=int8"], "invalid choice: 'int8'"),
            ([*good, "--device=tpu9"], "--device tpu9 cannot be used here"),
            ([*good, "--stepz=1"], "unrecognized arguments"),
            ([f"--data={photos}", f"--out={out}", "--recipe=seer", "--images=0"], "no length")]:
        assert expected in refuse(capsys, *argv), argv
        assert not out.exists()


def test_another_runs_folder_is_not_overwritten(photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(photos, out, "--steps=2")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    good = [f"--data={photos}", f"--out={out}", *SMALL]
    assert "arch was regnety_100mf, not regnety_200mf" in refuse(
        capsys, *good, "--steps=2", "--arch=regnety_200mf", "--crops=2x48+2x32")
    assert "steps was 2, not 1" in refuse(capsys, *good, "--steps=1")
    (out / "checkpoint.pt").write_bytes(before["checkpoint.pt"][:5000])
    assert "damaged" in refuse(capsys, *good, "--steps=2")
    save(out / "checkpoint.pt", {"weights": torch.ones(2)})
    assert "not a checkpoint of this program" in refuse(capsys, *good, "--steps=2")
    for name in set(before) - {"checkpoint.pt"}:
        assert (out / name).read_bytes() == before[name]


def test_a_run_that_never_saved_may_be_changed(photos, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("recipes.config.Config.lr_at", lambda *_: 1e30)
        assert "not finite" in refuse(capsys, f"--data={photos}", f"--out={out}", *SMALL,
                                      "--steps=4", "--lr=9", "--max-bad-steps=2")
    assert not (out / "checkpoint.pt").exists() and not (out / "trunk.pt").exists()
    (out / "log.jsonl").write_text('{"step": 1, "cut off')
    run(photos, out, "--steps=2")
    assert [line["step"] for line in log_of(out)] == [1, 2]


def test_other_peoples_files_are_noticed(photos, tmp_path, capsys):
    good = [f"--data={photos}", *SMALL, "--steps=4"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "trunk.pt").write_text("mine")
    assert "and no run that wrote it" in refuse(capsys, *good, f"--out={tmp_path / 'mine'}")
    (tmp_path / "file").write_text("mine")
    refuse(capsys, *good, f"--out={tmp_path / 'file'}")
    assert (tmp_path / "mine" / "trunk.pt").read_text() == (tmp_path / "file").read_text() == "mine"


def test_too_many_bad_pictures_end_the_run(tmp_path, capsys):
    folder = tmp_path / "rubbish"
    write_pictures(folder, 10)
    for i in range(10):
        (folder / f"bad{i}.jpg").write_text("no picture")
    assert "could not be read" in refuse(
        capsys, f"--data={folder}", f"--out={tmp_path / 'run'}", *SMALL, "--steps=20")

