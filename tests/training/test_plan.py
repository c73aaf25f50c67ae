"""training/plan.py: what fits where, and the plan as a command."""
import functools
import os
import re

import pytest
import torch

import train
from distributed import hardware
from recipes.command_line import configure
from recipes.config import with_length
from tests.helpers import ROOT
from tests.training.test_cost import COST, SIZES, cost_of, of_sizes
from training import plan
from training.cost import memory, work
from training.step_time import passes, step_time

GB = 1e9
PASSES = functools.cache(passes)


@pytest.fixture(autouse=True)
def counted_once(monkeypatch):
    """A network is counted once for all tests."""
    monkeypatch.setattr(plan, "cost", COST)
    monkeypatch.setattr(plan, "passes", PASSES)


# ------------------------------------------------------------------------- what fits where
def fitted(limit, arch="regnety_256gf", ranks=512, **given):
    return plan.fit(configure({"arch": arch} | given), ranks, limit * GB, torch.bfloat16)


@pytest.mark.long
def test_the_micro_batch_is_the_largest_that_fits():
    config = fitted(80)
    assert (config.micro_batch, config.checkpoint_activations) == (16, False)   # a whole share
    config = fitted(80, ranks=8)
    assert (config.micro_batch, config.checkpoint_activations) == (32, False)
    config = fitted(40, ranks=8)                # where 16 do not fit, activation checkpointing
    assert (config.micro_batch, config.checkpoint_activations) == (32, True)
    assert fitted(40, ranks=8, checkpoint_activations=False).micro_batch == 8
    assert fitted(80, ranks=8, micro_batch=64).checkpoint_activations
    given = configure({"arch": "regnety_10b", "micro_batch": 1, "checkpoint_activations": True,
                       "shard": False})
    assert plan.fit(given, 8, 1.0, torch.bfloat16) == given                  # one insists
    of = cost_of("regnety_256gf")
    for checkpointing in (False, True):
        for limit in (40, 80, 140):
            chosen = plan.largest_micro_batch(of, config, checkpointing, 8, limit * GB)
            sums = {n: sum(memory(of, config, n, checkpointing, 8).values())
                    for n in (chosen, 2 * chosen)}
            assert sums[chosen] <= 0.9 * limit * GB < sums[2 * chosen]


def test_a_share_that_cannot_be_cut_is_refused():
    config = configure({"arch": "regnety_16gf", "batch_size": 8191})
    with pytest.raises(ValueError, match="8191 images; it has room for 2.. at once, but no "
                       "number from 2 to that divides them; take 8192"):
        plan.fit(config, 1, 80 * GB, torch.bfloat16)


@pytest.mark.long
def test_a_network_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="regnety_10b needs 1[13][0-9] GB on every device for one "
                       "image at a time, and 90% of 80 GB are there; a smaller --arch"):
        fitted(80, "regnety_10b", ranks=8, shard=False)
    with pytest.raises(ValueError, match="are there; a larger --shard-group or a smaller --arch"):
        fitted(24, "regnety_10b", ranks=64, batch_size=8192)


SMALL = {"arch": "regnety_100mf", "batch_size": 8192, "crops": "2x64+4x32", "head": "16-8",
         "prototypes": 10}


def sharding(limit, ranks=8, **given):
    """shard and shard_group, as fit decides them."""
    config = configure(SMALL | given)
    config = plan.fit(config, ranks, limit, torch.bfloat16)
    return config.shard, config.shard_group


@pytest.mark.long
def test_weights_are_sharded_where_one_image_has_no_room():
    config = configure(SMALL | {"device": "cpu"})
    whole = min(sum(memory(COST(config, torch.bfloat16), config, 1, checkpointing, 8).values())
                for checkpointing in (False, True)) / plan.ROOM
    assert sharding(1.001 * whole, device="cpu") == (False, 0)
    assert sharding(0.999 * whole, device="cpu") == (True, 8)
    assert sharding(0.999 * whole, 64, device="cpu", batch_size=65536) == (True, 8)     # a node's
    assert sharding(1e10, shard=True) == (True, 8)                            # as asked for
    assert sharding(1e10, 64, shard=True, shard_group=40) == (True, 32)
    assert sharding(1e10, 1, shard=True) == (False, 0)
    assert sharding(1e10, shard=True, shard_group=1, micro_batch=1) == (False, 1)
    with pytest.raises(ValueError, match="are there; a smaller --arch fits"):
        sharding(0.999 * whole, device="cpu", shard=False)
    with pytest.raises(ValueError, match="a sharded network cannot be compiled: leave out"):
        sharding(0.999 * whole, device="cpu", compile=True)


def test_the_ranks_of_a_node_are_those_there_are(monkeypatch):
    """torchrun says how many; a group of shards is a node's."""
    config = configure({"recipe": "demo", "shard": True}, 8)
    monkeypatch.setattr(plan, "rank_and_world", lambda: (0, 8))
    for local, group in (("4", 4), ("8", 8)):
        monkeypatch.setitem(os.environ, "LOCAL_WORLD_SIZE", local)
        assert plan.fit_ranks(config, torch.device("cpu"), torch.float32).shard_group == group


def test_a_plan_says_what_it_decides_about_shards():
    asked = configure({"recipe": "demo", "shard": True})
    said = [plan.shard_text(asked, plan.choose_shards(None, asked, ranks, 0, None), ranks)
            for ranks in (1, 8, 64)]
    assert said == ["--shard does nothing: a group has one rank",
                    "weights, gradients and momentum in shards over 8 ranks",
                    "weights, gradients and momentum in shards over 8 ranks, 8 replicas"]
    by_itself = plan.shard_text(configure({"recipe": "demo"}), plan.choose_shards(
        None, asked, 8, 0, None), 8)
    assert by_itself == said[1] + ", for whole ones have no room (--shard)"


def test_a_demo_run_is_not_cut_up():
    config = plan.fit(configure({}), 1, hardware.memory_of(torch.device("cpu")), torch.float32)
    assert (config.micro_batch, config.checkpoint_activations) == (128, False)


# ----------------------------------------------------------------------------- as a command
@pytest.mark.long
@pytest.mark.parametrize("arch", of_sizes())
def test_a_plan_is_printed(arch, capsys):
    train.main(["--plan", f"--arch={arch}", "--gpus=8", "--gpu-memory=80", "--tflops=790"])
    text = capsys.readouterr().out
    assert text.startswith(f"recipe seer: {arch}, ")
    for part in ("weights, float32", "momentum",
                 "activations of the trunk", "TFLOP an image", "no checkpointing",
                 " checkpointing", "SyncBatchNorm's buffers", "NCCL's buffers", "images/s"):
        assert part in text
    sharded = arch == "regnety_10b"
    assert ("gradients = communication buffers" in text) != sharded
    assert ("float32 shards" in text) == ("in shards over 8 ranks" in text) == sharded
    train.main(["--plan", f"--arch={arch}", "--gpus=8", "--gpu-memory=80", "--no-shard"])
    assert ("does not fit" in capsys.readouterr().out) == sharded


@pytest.mark.long
def test_the_plan_of_the_headline(capsys):
    train.main(["--plan"])
    text = capsys.readouterr().out
    rows = {line[:42].strip(): line[42:].split() for line in text.splitlines() if line[42:].strip()}
    assert rows["batch = GPUs x micro-batches x images"][:5] == ["8", "x", "32", "x", "32"]
    spent = float(rows["TFLOP an image, all passes"][0])
    of = cost_of("regnety_256gf")
    assert spent == pytest.approx(work(of, accumulating=True), abs=5e-4)
    config = with_length(configure({"arch": "regnety_256gf", "device": "cuda"}, 8), 1_281_167)
    step = step_time(of, PASSES(config, torch.bfloat16), config, 32, False, 8)
    rate = float(rows["images/s"][0])
    assert rate == pytest.approx(8192 / step.total, abs=0.6)
    assert rows["utilisation: share of the TFLOP/s"][0] == f"{rate * spent / (8 * 790):.0%}"
    assert float(rows["days"][0]) == pytest.approx(1e9 / rate / 86400, abs=0.06)
    milliseconds = [float(values[0].replace(",", "")) for name, values in rows.items()
                    if name.startswith("ms a step: ")]
    assert float(rows["ms a step, sum"][0].replace(",", "")) == pytest.approx(
        sum(milliseconds), abs=0.5)
    cores = float(rows["cores a GPU for images of 500 x 375"][0])
    assert cores == pytest.approx(rate / 8 * 2.0 / 1e3, abs=0.006) and 0.1 < cores < 0.2
    assert float(rows["cores a GPU for images of 12 megapixels"][0]) == pytest.approx(
        20 * cores, rel=0.05)
    assert float(rows["GB sent a step: gradients"][0]) == pytest.approx(
        2 * 7 / 8 * 4 * of.params / GB, abs=6e-4)
    parts = [float(values[0]) for name, values in rows.items()
             if name.startswith(("weights", "gradients", "momentum", "activations", "head,",
                                 "crops,", "SyncBatchNorm's", "NCCL's"))]
    assert float(rows["sum, of at most 72"][0]) == pytest.approx(sum(parts), abs=0.05)


def rows_of(text: str, column: int = 0) -> dict[str, str]:
    """Values of a printed plan's column, by the rows' names."""
    rows = {row[:42].strip(): row[42 + 18 * column:][:18].strip() for row in text.splitlines()[4:]}
    return rows | {name.partition(",")[0].partition(" =")[0]: value for name, value in rows.items()}


@pytest.mark.long
def test_the_plans_of_the_docs_are_the_plans():
    page = (ROOT / "docs" / "scale.md").read_text()
    table = [line for line in page.splitlines()
             if re.match(r"\|.*\| (no|checkpointing) \|", line)]
    assert len(table) == 2 * len(SIZES)
    for i, arch in enumerate(SIZES):
        text = plan.plan(configure({"arch": arch}, 8), gpu_memory=192 if "10b" in arch else 80)
        for column, line in enumerate(table[2 * i:2 * i + 2]):
            rows = rows_of(text, column)
            cells = [cell.strip() for cell in line.split("|")][4:-1]
            assert cells == [
                rows["activations of the trunk"], rows["sum"], rows["batch"].removeprefix("8 x "),
                rows["TFLOP an image, all passes"], rows["images/s"], rows["days"],
                f"{rows['GB sent a step: gradients']}, {rows['GB sent a step: SyncBatchNorm']}"]


PREDICTED = ["regnety_16gf", "regnety_32gf", "regnety_128gf", "regnety_256gf"]


def predicted_row(arch: str, gpus: int) -> str:
    """A row of the docs' table of predicted steps."""
    rows = rows_of(plan.plan(configure({"arch": arch}, gpus), gpus=gpus))
    return "| " + " | ".join([
        arch.removeprefix("regnety_").upper(), rows["batch"], rows["ms a step"],
        rows["ms a step: convolutions and linear layers"], rows["ms a step: BatchNorm"],
        rows["ms a step: element by element"], rows["ms a step: augmentation, codes, loss"],
        rows["ms a step: casts, gradient sums, LARC"],
        rows["ms a step: SyncBatchNorm and Sinkhorn"], rows["ms of gradients' all-reduce"],
        rows["utilisation: share of the TFLOP/s"],
        rows["images/s"], rows["days"], rows["cores a GPU for images of 500 x 375"],
        rows["cores a GPU for images of 12 megapixels"]]) + " |"


MACHINES = ((8, 80, 7936), (8, 141, 7936), (64, 80, 7936), (512, 80, 8192))     # GPUs, GB, batch


def sharded_rows(gpus: int, gb: int, batch: int) -> list[str]:
    """Rows of the docs' table of sharded runs of the 10B, without and with checkpointing."""
    text = plan.plan(configure({"arch": "regnety_10b", "batch_size": batch, "shard": True,
                                "device": "cuda"}, gpus), gpus=gpus, gpu_memory=gb)
    lines = []
    for column in (0, 1):
        rows = rows_of(text, column)
        lines.append("| " + " | ".join([
            f"{gpus} x {gb}{', checkpointing' * column}", rows["weights, float32 shards"],
            rows["gathered weights of two units"], rows["gradients of two units"],
            rows["activations of the trunk"], rows["sum"], rows["batch"],
            *(rows[f"GB sent a step: {name}"] for name in (
                "all-gather, weights", "reduce-scatter, gradients", "all-reduce, replicas")),
            rows["ms of gathers and scatters"], rows["ms a step"],
            rows["utilisation: share of the TFLOP/s"], rows["images/s"], rows["days"]]) + " |")
    return lines


@pytest.mark.long
def test_the_sharded_plans_of_the_docs_are_the_plans():
    page = (ROOT / "docs" / "sharded.md").read_text().splitlines()
    for machine in MACHINES:
        for row in sharded_rows(*machine):
            assert row in page


@pytest.mark.long
@pytest.mark.parametrize("arch", [
    pytest.param(arch, marks=() if arch == "regnety_256gf" else pytest.mark.long)
    for arch in PREDICTED])
def test_the_predictions_of_the_docs_are_the_plans(arch):
    page = (ROOT / "docs" / "scale.md").read_text().splitlines()
    for gpus in (8, 64, 512):
        assert predicted_row(arch, gpus) in page


@pytest.mark.long
def test_what_to_expect_of_a_gpus_steps_is_the_plans():
    page = (ROOT / "docs" / "gpu.md").read_text()
    for size, images in (("16gf", 64), ("32gf", 64), ("128gf", 32), ("256gf", 16)):
        config = configure({"arch": f"regnety_{size}", "batch_size": images, "micro_batch": images})
        rows = rows_of(plan.plan(config, gpus=1))
        assert (f"| {size.upper()}, {images} | {rows['ms a step']} | "
                f"{rows['utilisation: share of the TFLOP/s']} | {rows['sum']} |") in page


def test_cores_are_written_without_an_exponent():
    assert [plan.short(x) for x in (0.1666, 3.44, 99.4, 151.2, 1234.5)] == [
        "0.17", "3.4", "99", "151", "1,234"]


@pytest.mark.long
def test_a_plan_follows_what_is_given(tmp_path, capsys):
    train.main(["--plan", "--arch=regnety_16gf", "--gpus=4", "--micro-batch=8", "--batch-size=256",
                "--images=1000000"])
    text = capsys.readouterr().out
    assert "1,000,192 images in 3,907 steps of 256, on 4 GPUs" in text and "4 x 8 x 8" in text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["demo", *(
    pytest.param(recipe, marks=pytest.mark.long)
    for recipe in ("small", "swav", "swav-bs256", "seer"))])
def test_a_plan_is_of_the_recipes_own_trunk(recipe, capsys):
    train.main(["--plan", f"--recipe={recipe}"])
    arch = configure({"recipe": recipe}).arch
    assert capsys.readouterr().out.startswith(f"recipe {recipe}: {arch}, ")


@pytest.mark.long
def test_a_plan_is_in_the_runs_precision(capsys):
    rows = {}
    for precision in ("bf16", "fp32"):
        train.main(["--plan", f"--precision={precision}", "--micro-batch=8", "--no-pad-widths"])
        rows[precision] = {line[:42].strip(): line[42:60].strip()
                           for line in capsys.readouterr().out.splitlines()}
    name = "activations of the trunk"
    assert float(rows["fp32"][name]) == pytest.approx(2 * float(rows["bf16"][name]), rel=0.01)
    assert float(rows["fp32"]["weights cast for autocast"]) == 0


@pytest.mark.parametrize("argv, expected", [
    (["--gpus=0"], "--gpus: '0': needs a whole number from 1 to 100,000"),
    (["--gpus=3"], "--batch-size 8192 is not divisible by 3 processes"),
    (["--tflops=0"], "--tflops: '0': needs"), (["--gpu-memory=nan"], "--gpu-memory: 'nan': needs"),
    (["--explain"], "not allowed with argument"), (["--bandwidth=-1"], "needs a number"),
    (["--nvlink=0"], "--nvlink: '0': needs"), (["--network=inf"], "--network: 'inf': needs"),
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
