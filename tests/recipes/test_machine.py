"""recipes/machine.py: the way to compute that is taken, by a stand-in clock; what a run keeps."""
import dataclasses
import json
import math
from unittest import mock

import pytest
import torch

import train
from distributed.padding import PaddedBlock
from methods.build import build_trunk
from recipes import machine
from recipes.command_line import configure
from recipes.machine import PASSES, Variant, choose, one_pass, prepared
from regnet import ARCHS, RegNetParams
from tests.helpers import SMALL, equal, run_ranks, write_pictures
from weights.atomic import load

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
OPEN = [option for option in SMALL if not option.startswith(("--channels-last", "--threads"))]
ODD = RegNetParams(3, 16, 10.0, 2.0, 5)


@pytest.fixture(autouse=True)
def as_before():
    threads, benchmark = torch.get_num_threads(), torch.backends.cudnn.benchmark
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = benchmark


def config_of(arch="regnety_256gf", micro_batch=4, **given):
    config = configure({"arch": arch, "recipe": "demo"} | given)
    return dataclasses.replace(config, micro_batch=micro_batch)


class StandIn:
    """A clock, and passes that take `seconds(variant)` by it, of no trunk at all."""

    def __init__(self, seconds):
        self.seconds, self.now, self.passes = seconds, 0.0, []

    def __call__(self):
        return self.now

    def one_pass(self, variant, *_):
        assert torch.backends.cudnn.benchmark == variant.cudnn_benchmark
        self.passes.append(variant)
        if self.seconds(variant) == math.inf:
            raise torch.OutOfMemoryError("no room")
        self.now += self.seconds(variant)

    def choose(self, config, device=CUDA):
        with mock.patch.object(machine, "prepared", lambda config, device, way: (way, [], [])), \
                mock.patch.object(machine, "one_pass", self.one_pass), \
                mock.patch.object(torch.cuda, "reset_peak_memory_stats"):
            config, text = choose(config, device, torch.bfloat16, clock=self)
        chosen = Variant(config.channels_last, config.pad_widths, config.cudnn_benchmark)
        assert torch.backends.cudnn.benchmark == chosen.cudnn_benchmark
        assert not text or [line for line in text.splitlines() if line.endswith("  chosen")] == [
            line for line in text.splitlines() if line.split("   ")[0].strip() == str(chosen)]
        return chosen, text


@pytest.mark.parametrize("layout, padded, searched, chosen", [
    (0.5, 0.5, 0.8, (True, True, True)), (2.0, 0.5, 1.0, (False, True, False)),
    (0.5, 2.0, 2.0, (True, False, False)), (0.95, 1.01, 1.01, (False, False, False)),
    (1.01, 0.95, 0.9, (False, True, True))])         # together more than a tenth faster
def test_the_fastest_way_is_taken(layout, padded, searched, chosen):
    def seconds(way):
        return 0.5 * (layout if way.channels_last else 1) * (padded if way.pad_widths else 1) * (
            searched if way.cudnn_benchmark else 1)

    clock = StandIn(seconds)
    assert clock.choose(config_of())[0] == chosen
    assert len(clock.passes) == 5 * (1 + PASSES) == 4 * len(set(clock.passes))
    best = min(set(clock.passes[:16]), key=seconds)
    assert clock.passes[-1] == best._replace(cudnn_benchmark=True)


def test_padding_may_pay_in_one_layout_alone():
    """So all combinations are tried: neither change by itself is faster."""
    chosen, text = StandIn(lambda way: 0.5 if way[:2] == (True, True) else 1 + way[0]).choose(
        config_of())
    assert chosen == (True, True, False)
    assert "  channels-last, padded                         500.0 ms  chosen\n" in text
    assert "  channels-last                                2000.0 ms\n" in text
    assert "4 images, measured in " in text


@pytest.mark.parametrize("arch, device, given, tried", [
    ("regnety_16gf", "cuda", {}, [(0, 0, 0), (1, 0, 0), (0, 0, 1)]),        # no width is odd
    ("regnety_256gf", "cuda", {"channels_last": True}, [(1, 0, 0), (1, 1, 0), (1, 0, 1)]),
    ("regnety_256gf", "cuda", {"channels_last": False, "pad_widths": True},
     [(0, 1, 0), (0, 1, 1)]),
    ("regnety_256gf", "cuda", {"channels_last": True, "pad_widths": True,
                               "cudnn_benchmark": False}, []),
    ("regnety_100mf", "cpu", {}, [(1, 0, 0), (0, 0, 0)]),
    ("regnety_100mf", "cpu", {"pad_widths": True}, [(1, 1, 0), (0, 1, 0)]),
    ("regnety_100mf", "cpu", {"channels_last": False}, []),
    ("regnety_256gf", "cpu", {}, []),                                       # it would take minutes
    ("regnety_256gf", "mps", {}, [])])
def test_only_what_is_open_and_can_matter_is_tried(arch, device, given, tried):
    clock = StandIn(lambda way: 1.0)
    chosen, text = clock.choose(config_of(arch, **given), torch.device(device))
    assert list(dict.fromkeys(clock.passes)) == [Variant(*map(bool, way)) for way in tried]
    assert bool(text) == bool(tried) and bool(clock.now) == bool(tried)
    assert chosen == (given.get("channels_last", device == "cpu"), given.get("pad_widths", False),
                      False)


@pytest.mark.parametrize("seconds, passes, tried", [(1.0, 4, 5), (5.0, 2, 5), (13.0, 2, 2),
                                                    (31.0, 2, 1)])
def test_it_ends_in_time(seconds, passes, tried):
    clock = StandIn(lambda way: seconds)
    chosen, _ = clock.choose(config_of())
    assert chosen == (False, False, False)
    assert len(clock.passes) == passes * tried and clock.now <= max(machine.LIMIT, 2 * seconds)


def test_what_has_no_room_is_not_taken():
    chosen, text = StandIn(lambda way: 1.0 if way.channels_last else math.inf).choose(config_of())
    assert chosen == (True, False, False) and text.count("does not run") == 2
    chosen, _ = StandIn(lambda way: math.inf).choose(config_of())
    assert chosen == (False, False, False)


def test_passes_are_of_the_runs_own_trunk_and_crops(monkeypatch):
    """In both layouts, with what was asked for. The smallest network is given odd widths."""
    monkeypatch.setitem(ARCHS, "regnety_100mf", ODD)
    config = dataclasses.replace(config_of("regnety_100mf", 3, crops="2x48+1x32", pad_widths=True),
                                 checkpoint_activations=True)
    seen, state, one_pass = [], torch.get_rng_state(), machine.one_pass

    def spy(trunk, crops, *rest):
        seen.append((trunk, crops))
        return one_pass(trunk, crops, *rest)

    monkeypatch.setattr(machine, "one_pass", spy)
    choose(config, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    for (trunk, crops), form in zip((seen[0], seen[-1]),
                                    (torch.channels_last, torch.contiguous_format)):
        assert [tuple(x.shape) for x in crops] == [(6, 3, 48, 48), (3, 3, 32, 32)]
        weights = [p for p in trunk.parameters() if p.dim() == 4]
        assert all(x.is_contiguous(memory_format=form) for x in (*crops, *weights))
        assert trunk.params == ODD and all(isinstance(b, PaddedBlock) for b in trunk.blocks())
        assert {type(stage).__name__ for stage in trunk.trunk_output} == {"CheckpointedStage"}
        assert all(p.grad is not None for p in trunk.parameters())


@pytest.mark.parametrize("asked, there, threads", [(0, 6, 6), (3, 6, 3)])
def test_on_a_cpu_all_processors_compute(monkeypatch, asked, there, threads):
    monkeypatch.setattr(machine, "processors", lambda: there)
    config, _ = choose(config_of("regnety_100mf", channels_last=True, threads=asked), CPU,
                       torch.float32)
    assert config.threads == torch.get_num_threads() == threads


def decide_on_a_rank(rank):
    """Each rank would decide otherwise, and has other processors."""
    machine.fastest = lambda *_: (Variant(rank == 0, rank == 1, rank == 0), f"table of rank {rank}")
    machine.processors = lambda: 1 + rank
    config, text = choose(config_of("regnety_100mf"), CPU, torch.float32)
    return (config.channels_last, config.pad_widths, config.cudnn_benchmark, config.threads,
            torch.get_num_threads(), torch.backends.cudnn.benchmark, text)


@pytest.mark.long
def test_rank_0_decides_for_all(tmp_path):
    assert run_ranks(decide_on_a_rank, tmp_path) == 2 * [
        (True, False, True, 1, 1, True, "table of rank 0")]


# ------------------------------------------------------------------------------------ a whole run
def run(tmp_path, out, *options):
    if not (tmp_path / "photos").exists():
        write_pictures(tmp_path / "photos", 8)
    train.main([f"--data={tmp_path / 'photos'}", f"--out={tmp_path / out}", *options])
    return load(tmp_path / out / "checkpoint.pt")


@pytest.mark.long
def test_a_run_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    """Measured, killed after two steps and resumed where all would be decided otherwise, it is
    bitwise the run that was told."""
    monkeypatch.setattr(machine, "GAIN", 1e9)                   # the usual way, whatever the clock
    monkeypatch.setattr(machine, "processors", lambda: 1)
    told = run(tmp_path, "told", *SMALL, "--steps=4")
    assert "chosen" not in capsys.readouterr().out
    run(tmp_path, "measured", *OPEN, "--steps=4", "--save-every=2", "--keep=9")
    printed = capsys.readouterr().out
    assert printed.count("  chosen\n") == 1 and "does not run" not in printed
    config = json.loads((tmp_path / "measured" / "config.json").read_text())["config"]
    kept = {"channels_last": True, "pad_widths": False, "cudnn_benchmark": False, "threads": 1}
    assert config.items() >= kept.items()
    for path in (tmp_path / "measured").glob("checkpoint*.pt"):
        if load(path)["step"] > 2:
            path.unlink()
    monkeypatch.setattr(machine, "processors", lambda: 2)
    monkeypatch.setattr(machine, "measure", None)               # nothing is measured again
    again = run(tmp_path, "measured", *OPEN, "--steps=4")
    assert equal(again["model"], told["model"]) and again["config"].items() >= kept.items()


@pytest.mark.long
def test_a_padded_run_is_the_run_and_may_be_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHS, "regnety_100mf", ODD)
    plain = run(tmp_path, "plain", *SMALL, "--steps=2")
    padded = run(tmp_path, "padded", *SMALL, "--steps=2", "--pad-widths")
    assert padded["config"]["pad_widths"] and not plain["config"]["pad_widths"]
    torch.testing.assert_close(padded["model"], plain["model"], rtol=1e-3, atol=1e-4)
    on = run(tmp_path, "padded", *SMALL, "--steps=3")
    assert on["config"]["pad_widths"]
    off = run(tmp_path, "padded", *SMALL, "--steps=4", "--no-pad-widths", "--no-channels-last")
    assert not off["config"]["pad_widths"] and not off["config"]["channels_last"]


@pytest.mark.cuda
def test_on_a_gpu_the_losers_leave_no_memory():
    before, state = torch.cuda.memory_allocated(), torch.cuda.get_rng_state()
    config, text = choose(config_of("regnety_400mf", 8), CUDA, torch.bfloat16)
    assert torch.cuda.memory_allocated() == before and "chosen" in text
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert None not in (config.channels_last, config.cudnn_benchmark) and not config.pad_widths


@pytest.mark.parametrize("checkpointing", [False, True])
def test_shards_are_measured_at_full_depth_with_the_weights_of_two_blocks(monkeypatch,
                                                                          checkpointing):
    """Padded or not. Sharded weights are contiguous, whatever the layout of the crops."""
    monkeypatch.setitem(ARCHS, "regnety_100mf", RegNetParams(6, 16, 8.0, 2.5, 5))
    config = dataclasses.replace(config_of("regnety_100mf", 2, crops="2x32"), shard=True,
                                 checkpoint_activations=checkpointing)
    stages, counts = ARCHS["regnety_100mf"].stages(), []
    for padded in (False, True):
        trunk, (crops,), _ = prepared(config, CPU, Variant(True, padded, False))
        assert [len(stage) for stage in trunk.trunk_output] == [stage.depth for stage in stages]
        assert all(isinstance(block, PaddedBlock) == padded for block in trunk.blocks())
        calls = []
        for block in trunk.blocks():
            block.register_forward_pre_hook(lambda *_: calls.append(None))
        one_pass(trunk, [crops], CPU, torch.float32)
        assert len(calls) == (1 + checkpointing) * len(trunk.blocks())
        weights = [p for p in trunk.parameters() if p.dim() == 4]
        assert all(p.is_contiguous() and p.grad is not None for p in weights)
        assert crops.is_contiguous(memory_format=torch.channels_last)
        counts.append(sum(p.numel() for p in weights))
    with torch.device("meta"):
        blocks = [block for stage in build_trunk("regnety_100mf").trunk_output
                  for block in list(stage)[:2]]
    stem = trunk.stem[0].weight.numel()
    assert counts == 2 * [stem + sum(p.numel() for block in blocks for p in block.parameters()
                                     if p.dim() == 4)]
