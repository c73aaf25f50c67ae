"""train.py --method: each method in the loop, resumed, on two ranks, watched."""
import os
import signal

import pytest
import torch

import train
from data.images import open_images
from data.loader import Augment, Loader
from data.stream import Positions, Stream
from larc import LARC
from methods.build import build_method
from multicrop import MultiCrop, Photometric, parse_crops
from recipes.command_line import configure
from tests.helpers import equal, log_of, refuse, torchrun, write_pictures
from training import monitor
from training.collapse import Watchdog
from training.resume import grown
from training.rollback import Rollback
from training.run import Run, parameter_groups
from training.signals import Signals
from weights.atomic import load

SMALL = ["--recipe=demo", "--batch-size=8", "--workers=0", "--log-every=1", "--precision=fp32",
         "--device=cpu", "--channels-last", "--threads=1", "--steps=4"]
OWN = {"simclr": ["--crops=2x32", "--head=32-16"],
       "mocov2": ["--crops=2x32", "--head=32-16", "--queue=24"],
       "byol": ["--crops=2x32", "--head=32-16", "--predictor=32-16", "--exclude-bias-bn"],
       "barlow_twins": ["--crops=2x32", "--head=32-16", "--exclude-bias-bn"],
       "dino": ["--crops=2x32+2x17", "--head=32-16", "--prototypes=12"],
       "deepcluster_v2": ["--crops=2x32+2x17", "--head=32-16", "--prototypes=3"],
       "supervised": ["--crops=1x32", "--trust-coefficient=0", "--lr=0.1"]}
FEW = [pytest.param(name, marks=pytest.mark.long if name in ("mocov2", "deepcluster_v2")
                    else pytest.mark.measured) for name in OWN]
EACH = ["byol", *(param for param in FEW if param.values != ("byol",))]


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """20 images in two folders, and a broken one."""
    folder = tmp_path_factory.mktemp("classes")
    write_pictures(folder / "one", 10)
    write_pictures(folder / "two", 10, size=(30, 26))
    (folder / "two" / "broken.png").write_bytes(b"no")
    return folder


def options(method, data, out, *more):
    return [f"--data={data}", f"--out={out}", f"--method={method}", *SMALL, *OWN[method], *more]


@pytest.mark.parametrize("method", EACH)
def test_a_run_goes_on_bitwise_after_a_signal(method, classes, tmp_path, monkeypatch):
    """In micro-batches, and with all that a method keeps beside its weights."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.main(options(method, classes, whole, "--micro-batch=4"))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(monitor, "progress", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        train.main(options(method, classes, parts, "--micro-batch=4"))
    assert ended.value.code == 75 and len(log_of(parts)) < 4
    train.main([f"--out={parts}", "--device=cpu", "--workers=0"])
    expected, found = load(whole / "checkpoint.pt"), load(parts / "checkpoint.pt")
    assert all(equal(found[key], expected[key]) for key in ("step", "model", "optimizer"))
    assert log_of(parts) == log_of(whole) and len(log_of(whole)) == 4
    assert all("effective_rank" in line for line in log_of(whole))
    assert (whole / "neighbours.png").exists() and not (whole / "prototypes.png").exists()


@pytest.mark.parametrize("method", FEW)
def test_two_ranks_go_on_with_a_run_of_one(method, classes, tmp_path):
    """With BatchNorm over all ranks the run is that of one process, but for rounding."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    more = ["--sync-bn-group=2", "--save-every=2", "--exclude-bias-bn", "--lr=0.5"]
    train.main(options(method, classes, whole, *more))
    train.main(options(method, classes, parts, *more))
    (parts / "checkpoint.pt").unlink()                      # goes on after step 2
    done = torchrun(*options(method, classes, parts, *more))
    assert done.returncode == 0, done.stderr
    assert "resumed after step 2" in done.stdout
    for one, two in zip(log_of(whole), log_of(parts), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-3, abs=1e-4)
    state, other = (load(out / "checkpoint.pt")["model"] for out in (whole, parts))
    assert state.keys() == other.keys()
    for name, x in state.items():
        if x.is_floating_point() and "running" not in name:
            assert (x - other[name]).norm() <= 0.02 * x.norm() + 1e-4, name


@pytest.mark.parametrize("method", FEW)
def test_precision_checkpointing_and_probe(method, classes, tmp_path, monkeypatch):
    """Activation checkpointing changes no digit of a run, with or without a probe."""
    plain, probed = tmp_path / "plain", tmp_path / "probed"
    train.main(options(method, classes, plain, "--precision=bf16"))
    train.main(options(method, classes, probed, "--precision=bf16", "--checkpoint-activations",
                       f"--probe={classes}", "--probe-every=2"))
    expected, found = load(plain / "checkpoint.pt"), load(probed / "checkpoint.pt")
    assert equal(found["model"], expected["model"])
    assert "knn" in log_of(probed)[1]


def test_deepcluster_does_not_grow():
    """Its memory is of the run's images."""
    config = configure({"method": "deepcluster_v2", "recipe": "demo"})
    state = {"num_images": 9, "step": 3, "path": "run/checkpoint.pt", "events": []}
    with pytest.raises(ValueError, match="remembers each image.*--init run/checkpoint.pt"):
        grown(config, config, state, range(12), True, 10)


def test_the_numbers_of_the_images_that_are_shown(classes):
    """Also where one is broken, and another takes its place."""
    images, crop = open_images(classes), MultiCrop(parse_crops("1x8"))
    shown = []
    stream = Stream(images, lambda data, seed, position: shown.append(data) or crop(data, seed), 3)
    loader = Loader(stream, Positions(0, 4, 12, micro_batch=6),
                    Augment(Photometric(), torch.contiguous_format), torch.device("cpu"))
    good = {images[i]: i for i in range(len(images)) if images[i] != b"no"}
    with loader as batches:
        for step, micro_batches in batches:
            before = len(loader.images_of(step))
            list(micro_batches)
            numbers = loader.images_of(step).tolist()
            assert (before, len(numbers)) == (0, 12)
            # the loader is a micro-batch ahead: what it decodes stands in the stream's order
            decoded = [good[data] for data in shown if data in good]
            assert numbers == decoded[12 * step:12 * step + 12]
    assert b"no" in shown


def test_biases_and_batchnorm_may_be_left_out_of_larc():
    config = configure({"method": "byol", "exclude_bias_bn": True, "recipe": "demo"})
    method = build_method(config, "meta")
    adapted, plain = parameter_groups(config, method)
    dims = [{p.dim() for p in group["params"]} for group in (adapted, plain)]
    assert dims == [{2, 4}, {1}]
    assert plain["weight_decay"] == plain["trust_coefficient"] == 0


def test_gradient_norms_are_in_the_order_of_the_groups():
    """As the optimizer takes them, not as the method has its parameters."""
    config = configure({"method": "byol", "exclude_bias_bn": True, "recipe": "demo"})
    method = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    for i, p in enumerate(method.parameters(), 1):          # weight, bias, weight, bias
        p.grad = torch.zeros_like(p)
        p.grad.view(-1)[0] = i
    run = Run(method, method, torch.device("cpu"), torch.float32,
              torch.amp.GradScaler("cpu", enabled=False),
              LARC(parameter_groups(config, method), 0.1), config)
    verdict = Rollback(run, Signals()).vote(0, torch.zeros(()), (torch.zeros(1),))
    assert verdict.finite and verdict.gradient_norms.tolist() == [1, 3, 2, 4]


def test_what_a_method_cannot_take_is_refused(classes, tmp_path, capsys):
    def said(method, *more):
        return refuse(capsys, *options(method, classes, tmp_path / "no", *more))

    assert "--method byol takes no --epsilon" in said("byol", "--epsilon=0.1")
    needs = "byol needs crops of an image: exactly two, of one size"
    assert needs in said("byol", "--crops=2x32+2x17")
    assert "--plan counts SwAV's step" in said("byol", "--plan")
    assert "--shard is for swav" in said("byol", "--shard")
    write_pictures(tmp_path / "flat", 9)
    write_pictures(tmp_path / "single" / "one", 9)
    for folder in ("flat", "single"):
        assert "needs images in class folders, two or more" in refuse(
            capsys, *options("supervised", tmp_path / folder, tmp_path / "no"))
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method, sign", [
    ("simclr", {"loss_over_ln_candidates": 1.0}), ("mocov2", {"loss_over_ln_keys": 1.0}),
    ("byol", {"effective_rank": 1.0}), ("barlow_twins", {"correlation_diagonal": 0.01}),
    ("dino", {"outputs_used": 0.01}), ("deepcluster_v2", {"clusters_used": 0.01}),
    ("supervised", {"loss_over_ln_k": 1.0})])
def test_the_watchdog_knows_each_methods_signs(method, sign, capsys):
    config = configure({"method": method, "recipe": "demo", "lr": 0.1, "strength": 1.0})
    watchdog = Watchdog(config)
    for step in range(50, 500, 50):
        watchdog.look({"step": step, "effective_rank": 20.0})
    assert capsys.readouterr().out == ""
    for step in range(50, 500, 50):
        watchdog.look({"step": step, "effective_rank": 20.0} | sign)
    said = capsys.readouterr().out
    assert said.count("warning") == 1 and "--strength 0.2 (now 1)" in said
