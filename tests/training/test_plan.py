"""training/plan.py against published figures, and against what a step keeps."""
import functools
import os
import re
from dataclasses import replace

import pytest
import torch

import train
from distributed import hardware
from distributed.wrap import wrap
from methods.build import build_method
from recipes.command_line import configure
from swav import swav_codes, swav_loss
from tests.helpers import ROOT
from training import plan

MIB, GB = 2 ** 20, 1e9
BENCHMARK, SEER = "2x160+4x96", "2x224+4x96"
SIZES = ["regnety_32gf", "regnety_64gf", "regnety_128gf", "regnety_256gf", "regnety_10b"]




def of_sizes(*columns):
    """A case a size, with its values of the columns; the quick suite has SEER's."""
    rows = zip(SIZES, *columns)
    return [pytest.param(*row, marks=() if row[0] == "regnety_256gf" else pytest.mark.long)
            for row in rows]


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """A network is counted once for all tests."""
    monkeypatch.setattr(plan, "cost", COST)


COST = functools.cache(plan.cost)


def cost_of(arch, crops=SEER, dtype=torch.bfloat16):
    return plan.cost(configure({"arch": arch, "crops": crops}), dtype)


# ---------------------------------------------------------------------- the plan, against figures
@pytest.mark.parametrize("arch, small, again, large", of_sizes(
    [.342, .679, 1.350, 2.689, 19.664], [.455, .905, 1.798, 3.583, 26.215],
    [.531, 1.056, 2.099, 4.183, 30.61]))
def test_flops_of_training(arch, small, again, large):
    """TFLOP an image: 2x160+4x96, the same with activation checkpointing, 2x224+4x96."""
    of = cost_of(arch, BENCHMARK)
    assert round(plan.work(of), 3) == small
    assert round(plan.work(of, checkpointing=True), 3) == again
    assert plan.work(cost_of(arch)) == pytest.approx(large, abs=0.0051 if large > 10 else 0.00051)


@pytest.mark.parametrize("arch, whole, stored, computed", of_sizes(
    [227, 319, 543, 766, 2068], [30, 41, 69, 95, 250], [21, 29, 46, 65, 174]))
def test_activations(arch, whole, stored, computed):
    """MiB an image in bf16. Small parts that are kept once for a batch weigh half in two crops, so
    the whole lies up to a per cent lower. With checkpointing the largest block is counted with its
    output's gradient, and the stored part without the output of the last block: the same sum."""
    of = cost_of(arch, BENCHMARK)
    assert 0.985 * whole < of.activations / MIB < whole + 0.5
    assert (of.inputs + of.block) / MIB == pytest.approx(stored + computed, rel=0.04)
    assert of.inputs / MIB == pytest.approx(stored, rel=0.08)


@pytest.mark.parametrize("arch, million", of_sizes(
    [141.334, 276.458, 637.420, 1272.156, 9323.935]))
def test_parameters(arch, million):
    assert cost_of(arch).trunk_params / 1e6 == pytest.approx(million, abs=5e-4)


@pytest.mark.parametrize("arch", ["regnety_200mf", "regnetx_200mf",
                                  pytest.param("resnet50", marks=pytest.mark.long)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_counted_without_memory_is_what_a_step_keeps(arch, checkpointing):
    """On meta tensors against real ones, the storages that autograd holds after a forward pass."""
    crops, kept = "2x64+2x32", {}
    config = configure({"recipe": "demo", "arch": arch, "crops": crops, "head": "16-8",
                        "prototypes": 4})
    model = build_method(config)
    wrap(model, torch.device("cpu"), checkpoint_activations=checkpointing)
    model.to(memory_format=torch.contiguous_format)
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor      # held: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [model.trunk(torch.randn(2, 3, spec.size, spec.size))
                   for spec in config.crops]
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    of = cost_of(arch, crops, torch.float32)
    assert len(outputs) == 2
    assert (of.inputs if checkpointing else of.activations) == measured


def test_head_scores_and_loss_are_what_a_step_keeps():
    """Counted beside what autograd holds between forward and backward, in float32; the two
    gradients of the scores come later."""
    config = configure({"recipe": "demo", "head": "64-32", "prototypes": 300, "crops": "2x64+2x32"})
    model, kept, pictures = build_method(config), {}, 8
    model.trunk = torch.nn.AdaptiveAvgPool2d(1)             # so that only the head's part is held
    model.head[0] = torch.nn.Linear(3, 64)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    forward = model.forward
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = [torch.randn(2 * pictures, 3), torch.randn(2 * pictures, 3)]
        model.trunk = torch.nn.Identity()
        _, scores = forward(features)
        loss = swav_loss(scores, swav_codes(scores, 4), 4)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + scores.nbytes
    of = plan.cost(config, torch.float32)
    planned = plan.memory(of, replace(config, batch_size=pictures), pictures, False, 1,
                           torch.float32)["head, scores and loss"]
    gradients, joined = 2 * 4 * 4 * pictures * 300, 4 * 2 * pictures * 300
    assert loss.requires_grad and held == pytest.approx(planned - gradients - joined, rel=0.02)


def test_traffic_of_a_small_case():
    """Two GPUs, so that a ring sends each byte once: by hand."""
    config = configure({"recipe": "demo", "arch": "regnety_100mf", "head": "16-8", "prototypes": 10,
                        "crops": "2x64+4x32", "batch_size": 8, "sync_bn_group": 2})
    of = plan.cost(config)
    assert (len(of.norms), of.head_norms) == (1 + 3 * 8 + 3, [16])
    assert sum(of.norms) == 32 + 3 * (24 + 2 * 64 + 5 * 152) + 24 + 64 + 152
    sent = plan.traffic(of, config, 4, False, 2)
    assert sent["gradients"] == 4 * of.params and sent["Sinkhorn"] == 4 * 2 * 10 * 3
    one_pass, one_back = 4 * (2 * sum(of.norms) + 28), 4 * 2 * sum(of.norms)
    head_pass, head_back = 4 * (2 * 16 + 1), 4 * 2 * 16
    assert sent["SyncBatchNorm"] == 2 * one_pass + 2 * one_back + head_pass + head_back
    for all_crops, first in ((None, 2), (False, 1)):        # sizes; and checkpointing: twice two
        config = replace(config, codes_from_all_crops=all_crops)
        accumulating = plan.traffic(of, config, 2, True, 2)["SyncBatchNorm"]
        assert accumulating == 2 * ((4 + first) * one_pass + 2 * one_back + 2 * head_pass
                                    + head_back)
        once = plan.cost(config).flops if first == 2 else plan.cost(config).first_flops
        added = plan.work(plan.cost(config), accumulating=True) - plan.work(plan.cost(config))
        assert added == pytest.approx(2e-12 * once) and (once == of.flops) == (first == 2)
    assert plan.traffic(of, replace(config, sync_bn_group=0), 4, False, 2)["SyncBatchNorm"] == 0


# ------------------------------------------------------------------------- what fits where
def fitted(limit, arch="regnety_256gf", ranks=512, **given):
    return plan.fit(configure({"arch": arch} | given), ranks, limit * GB, torch.bfloat16)


def test_the_micro_batch_is_the_largest_that_fits():
    config = fitted(80)
    assert (config.micro_batch, config.checkpoint_activations) == (16, False)   # a whole share
    config = fitted(80, ranks=8)
    assert (config.micro_batch, config.checkpoint_activations) == (32, False)
    config = fitted(40, ranks=8)                # where 16 do not fit, activation checkpointing
    assert (config.micro_batch, config.checkpoint_activations) == (32, True)
    assert fitted(40, ranks=8, checkpoint_activations=False).micro_batch == 8
    assert fitted(80, ranks=8, micro_batch=64).checkpoint_activations
    given = configure({"arch": "regnety_10b", "micro_batch": 1, "checkpoint_activations": True})
    assert plan.fit(given, 8, 1.0, torch.bfloat16) == given                  # one insists
    of = cost_of("regnety_256gf")
    for checkpointing in (False, True):
        for limit in (40, 80, 140):
            chosen = plan.largest_micro_batch(of, config, checkpointing, 8, limit * GB)
            sums = {n: sum(plan.memory(of, config, n, checkpointing, 8).values())
                    for n in (chosen, 2 * chosen)}
            assert sums[chosen] <= 0.9 * limit * GB < sums[2 * chosen]


def test_a_share_that_cannot_be_cut_is_refused():
    config = configure({"arch": "regnety_16gf", "batch_size": 8191})
    with pytest.raises(ValueError, match="8191 images; it has room for 2.. at once, but no "
                       "number from 2 to that divides them; take 8192"):
        plan.fit(config, 1, 80 * GB, torch.bfloat16)


def test_a_network_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="regnety_10b needs 1[13][0-9] GB on every device for one "
                       "image at a time, and 90% of 80 GB are there; a smaller --arch"):
        fitted(80, "regnety_10b", ranks=8)


def test_a_demo_run_is_not_cut_up():
    config = plan.fit(configure({}), 1, hardware.memory_of(torch.device("cpu")), torch.float32)
    assert (config.micro_batch, config.checkpoint_activations) == (128, False)


# ----------------------------------------------------------------------------- as a command
@pytest.mark.parametrize("arch", of_sizes())
def test_a_plan_is_printed(arch, capsys):
    train.main(["--plan", f"--arch={arch}", "--gpus=8", "--gpu-memory=80", "--tflops=790"])
    text = capsys.readouterr().out
    assert text.startswith(f"recipe seer: {arch}, ")
    for part in ("weights, float32", "gradients = communication buffers", "momentum",
                 "activations of the trunk", "TFLOP an image", "no checkpointing",
                 " checkpointing"):
        assert part in text
    assert ("does not fit" in text) == (arch == "regnety_10b")
    assert ("images/s" in text) != (arch == "regnety_10b")


def test_the_plan_of_the_headline(capsys):
    train.main(["--plan"])
    text = capsys.readouterr().out
    rows = {line[:42].strip(): line[42:].split() for line in text.splitlines() if line[42:].strip()}
    assert rows["batch = GPUs x micro-batches x images"][:5] == ["8", "x", "32", "x", "32"]
    spent = float(rows["TFLOP an image, all passes"][0])
    of = cost_of("regnety_256gf")
    assert spent == pytest.approx(plan.work(of, accumulating=True), abs=5e-4)
    rate = 8 * 790 * 0.4 / spent
    assert float(rows["images/s"][0]) == pytest.approx(rate, abs=0.6)
    assert float(rows["days"][0]) == pytest.approx(1e9 / rate / 86400, abs=0.06)
    assert float(rows["GB sent a step: gradients"][0]) == pytest.approx(
        2 * 7 / 8 * 4 * of.params / GB, abs=6e-4)
    parts = [float(values[0]) for name, values in rows.items()
             if name.startswith(("weights", "gradients", "momentum", "activations", "head,",
                                 "crops,"))]
    assert float(rows["sum, of at most 72"][0]) == pytest.approx(sum(parts), abs=0.05)


@pytest.mark.long
def test_the_plans_of_the_docs_are_the_plans():
    page = (ROOT / "docs" / "scale.md").read_text()
    table = [line for line in page.splitlines()
             if re.match(r"\|.*\| (no|checkpointing) \|", line)]
    assert len(table) == 2 * len(SIZES)
    for i, arch in enumerate(SIZES):
        text = plan.plan(configure({"arch": arch}, 8), gpu_memory=192 if "10b" in arch else 80)
        for column, line in enumerate(table[2 * i:2 * i + 2]):
            rows = {row[:42].strip(): row[42 + 18 * column:][:18].strip()
                    for row in text.splitlines()[4:]}
            cells = [cell.strip() for cell in line.split("|")][4:]
            assert cells[:-2] == [
                rows["activations of the trunk"],
                next(value for name, value in rows.items() if name.startswith("sum")),
                rows["batch = GPUs x micro-batches x images"].removeprefix("8 x "),
                rows["TFLOP an image, all passes"], rows["images/s"], rows["days"]]


def test_a_plan_follows_what_is_given(tmp_path, capsys):
    train.main(["--plan", "--arch=regnety_16gf", "--gpus=4", "--micro-batch=8", "--batch-size=256",
                "--images=1000000"])
    text = capsys.readouterr().out
    assert "1,000,192 images in 3,907 steps of 256, on 4 GPUs" in text and "4 x 8 x 8" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["demo", "small", *(
    pytest.param(recipe, marks=pytest.mark.long) for recipe in ("swav", "swav-bs256", "seer"))])
def test_a_plan_is_of_the_recipes_own_trunk(recipe, capsys):
    train.main(["--plan", f"--recipe={recipe}"])
    arch = configure({"recipe": recipe}).arch
    assert capsys.readouterr().out.startswith(f"recipe {recipe}: {arch}, ")


@pytest.mark.long
def test_a_plan_is_in_the_runs_precision(capsys):
    rows = {}
    for precision in ("bf16", "fp32"):
        train.main(["--plan", f"--precision={precision}", "--micro-batch=8"])
        rows[precision] = {line[:42].strip(): line[42:60].strip()
                           for line in capsys.readouterr().out.splitlines()}
    name = "activations of the trunk"
    assert float(rows["fp32"][name]) == pytest.approx(2 * float(rows["bf16"][name]), rel=0.01)
    assert float(rows["fp32"]["weights cast for autocast"]) == 0


def test_the_queue_takes_part_in_the_codes():
    """Scores and codes (A, L, K) of L earlier images, float32, on each of two ranks."""
    config = configure({"queue": 1000})
    counted = plan.cost(config)
    with_queue, without = (plan.memory(counted, replace(config, queue=queue), 8, False, 2)
                           for queue in (1000, 0))
    name = "head, scores and loss"
    assert with_queue[name] - without[name] == 2 * 2 * 500 * config.prototypes * 4
    assert with_queue | {name: 0} == without | {name: 0}


@pytest.mark.parametrize("argv, expected", [
    (["--gpus=0"], "--gpus: '0': needs a whole number from 1 to 100,000"),
    (["--gpus=3"], "--batch-size 8192 is not divisible by 3 processes"),
    (["--tflops=0"], "--tflops: '0': needs"), (["--gpu-memory=nan"], "--gpu-memory: 'nan': needs"),
    (["--explain"], "not allowed with argument"), (["--utilisation=-1"], "needs a number"),
    (["--micro-batch=3"], "--micro-batch 3 does not divide the 1024 images of a process; 2 does"),
    (["--arch=regnety_257gf"], "unknown arch"), (["--data=nowhere"], "no such folder")])
def test_a_plan_that_cannot_be_made(argv, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--plan", *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and "Traceback" not in error


def test_memory_of_a_cpu_is_shared_by_its_ranks(monkeypatch):
    whole = hardware.memory_of(torch.device("cpu"))
    monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", "4")
    assert hardware.memory_of(torch.device("cpu")) == whole / 4
