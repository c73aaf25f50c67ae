"""training/rollback.py: a NaN in a pixel or a gradient, on one rank of two; and too many."""
import os

import pytest
import torch

import train
from data.images import open_images
from methods.build import build_method
from recipes.command_line import configure, parse_arguments
from tests.helpers import SMALL, equal, log_of, run_ranks
from training.rollback import NotFinite, Rollback
from training.run import Run
from training.signals import Signals
from weights.atomic import load


class Spoiled:
    """A model whose forward makes a NaN of a pixel, or of a gradient, in given steps."""

    def __init__(self, network, rank, faults):
        self.network, self.rank, self.faults, self.step = network, rank, faults, -1

    def __call__(self, crops):
        self.step += 1
        what = self.faults.get(self.step, {}).get(self.rank)
        if what == "pixel":
            crops = [crop.clone() for crop in crops]
            crops[0][0, 0, 0, 0] = float("nan")
        embeddings, scores = self.network(crops)
        if what == "gradient":
            scores.register_hook(lambda grad: grad * float("nan"))
        return embeddings, scores

    def __getattr__(self, name):
        return getattr(self.network, name)


def spoiled_run(rank, world, photos, out, faults, options):
    """train.train on this rank, with faults in given steps; what is left of it."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    return spoiled(rank, world, photos, out, faults, options)


def spoiled(rank, world, photos, out, faults, options):
    given = parse_arguments([f"--data={photos}", f"--out={out}", *SMALL, "--queue=8", *options])
    images = open_images(str(photos))
    run = train.setup(configure(given, world, images), images)
    run.wrapped = Spoiled(run.wrapped, rank, faults)
    try:
        train.train(run)
    except train.Stop as stop:
        return str(stop)
    return run.method.state_dict(), run.method.queue.embeddings


CONSTANT = ["--lr=50", "--final-lr=1", "--warmup=0", "--save-every=1"]


def check_no_trace(out, results):
    """Weights, statistics and queue are those from before the fourth step, which was bad."""
    before = load(out / "checkpoint-000000003.pt")
    for rank, (weights, queue) in enumerate(results):
        expected = before["queue"]["embeddings"][:, rank::len(results)]
        assert torch.equal(queue, expected)
        assert equal({name: value for name, value in weights.items() if "running" not in name},
                     {name: value for name, value in before["model"].items()
                      if "running" not in name})
    assert equal(results[0][0], before["model"])            # rank 0's statistics are saved
    last = log_of(out)[-1]
    assert last["step"] == 4 and last["skipped"] == 1 and "loss" not in last
    assert load(out / "checkpoint.pt")["step"] == 4


@pytest.mark.parametrize("what", ["pixel", "gradient"])
def test_a_bad_number_leaves_no_trace(few_photos, tmp_path, what):
    """The step is as if it had not been."""
    result = spoiled(0, 1, few_photos, tmp_path / "run", {3: {0: what}}, ["--steps=4", *CONSTANT])
    check_no_trace(tmp_path / "run", [result])


@pytest.mark.long
@pytest.mark.parametrize("what", ["gradient", "pixel"])
def test_a_bad_number_on_one_rank_leaves_no_trace_on_any(few_photos, tmp_path, what):
    out = tmp_path / "run"
    results = run_ranks(spoiled_run, tmp_path, 2, str(few_photos), str(out), {3: {1: what}},
                        ["--steps=4", *CONSTANT])
    check_no_trace(out, results)


def test_training_goes_on_after_a_bad_step_and_ends_after_many(few_photos, tmp_path):
    options = ["--steps=8", "--max-bad-steps=3"]
    weights, _ = spoiled(0, 1, few_photos, tmp_path / "some",
                         {2: {0: "pixel"}, 3: {0: "gradient"}, 5: {0: "pixel"}}, options)
    assert all(value.isfinite().all() for value in weights.values())
    assert [line["skipped"] for line in log_of(tmp_path / "some")] == [0, 0, 1, 1, 0, 1, 0, 0]
    ended = spoiled(0, 1, few_photos, tmp_path / "many",
                    {step: {0: "pixel"} for step in (2, 3, 4)}, [*options, "--save-every=2"])
    assert "3 steps in a row, the last of them 5" in ended
    assert f"the last good checkpoint was kept: --init {tmp_path / 'many'}" in ended


@pytest.mark.long
def test_the_rank_of_a_bad_number_is_named(few_photos, tmp_path):
    first, second = run_ranks(spoiled_run, tmp_path, 2, str(few_photos), str(tmp_path / "many"),
                              {step: {1: "pixel"} for step in (2, 3, 4)},
                              ["--steps=8", "--max-bad-steps=3"])
    assert first == second and "3 steps in a row, the last of them 5" in first
    assert "on rank 1; no checkpoint was saved yet: begin again" in first


def test_undo_restores_what_a_forward_pass_changes():
    method = build_method(configure({"recipe": "demo", "queue": 4}))
    run = Run(method, method, torch.device("cpu"), torch.float32,
              torch.amp.GradScaler("cpu", enabled=False), config=configure({"recipe": "demo"}))
    rollback = Rollback(run, Signals())
    rollback.remember()
    before = {name: value.clone() for name, value in method.named_buffers()}
    outputs = method([torch.full((4, 3, 64, 64), float("inf")), torch.zeros(8, 3, 32, 32)])
    method.targets(outputs, 0)
    assert not equal(before, dict(method.named_buffers()))
    rollback.undo()
    assert equal(before, dict(method.named_buffers()))
    assert method.queue.filled == 0 and (method.queue.embeddings == 0).all()


def test_the_last_good_checkpoint_of_a_sharded_run_is_named(tmp_path):
    assert "no checkpoint was saved yet" in str(NotFinite("NaN", tmp_path))
    (tmp_path / "checkpoint").mkdir()
    assert f"was kept: --init {tmp_path / 'checkpoint'} with" in str(NotFinite("NaN", tmp_path))
