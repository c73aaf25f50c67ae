"""Resumed runs equal uninterrupted ones; ranks and micro-batches equal the joined batch."""
import os

import pytest
import torch

import train
from distributed.ranks import mean_over_ranks
from distributed.wrap import wrap
from larc import LARC
from methods.build import build_method
from recipes.command_line import configure
from tests.helpers import SMALL, equal, log_of, run, run_ranks, torchrun
from train import step_gradients
from training import monitor
from training.run import Run
from weights.atomic import load, save


@pytest.mark.parametrize("stops, more", [((5,), ["--micro-batch=2", "--queue-start=6"]), *(
    pytest.param((2, 5, 8), more, marks=pytest.mark.long)
    for more in ([], ["--micro-batch=2", "--queue-start=6"]))])
def test_resumed_equals_uninterrupted_bitwise(photos, tmp_path, monkeypatch, stops, more):
    options = [f"--steps={stops[-1] + 3}", "--save-every=3", "--queue=12",
               "--freeze-prototypes=4", *more]
    run(photos, tmp_path / "whole", *options)

    def stop_at(step):
        def stop(_, entry, __):
            if entry["step"] == step:
                raise KeyboardInterrupt
        return stop

    for step in stops:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(monitor, "progress", stop_at(step))
            run(photos, tmp_path / "parts", *options)
    run(photos, tmp_path / "parts", *options, "--workers=1")
    whole, parts = (load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for key in ("step", "model", "optimizer", "scaler", "queue"):
        assert equal(whole[key], parts[key]), key
    assert whole["queue"]["filled"] == 12
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")


@pytest.mark.long
def test_checkpointing_changes_no_bit_of_a_run(photos, tmp_path, capsys):
    """A run goes on with another size of micro-batch, and with checkpointing or without."""
    options = ["--steps=4", "--save-every=2", "--micro-batch=2"]
    run(photos, tmp_path / "plain", *options)
    run(photos, tmp_path / "checkpointed", *options, "--checkpoint-activations")
    plain, again = (load(tmp_path / name / "checkpoint.pt")
                    for name in ("plain", "checkpointed"))
    assert equal(plain["model"], again["model"]) and equal(plain["optimizer"], again["optimizer"])
    save(tmp_path / "plain" / "checkpoint.pt", plain | {"step": 3})
    capsys.readouterr()
    run(photos, tmp_path / "plain", "--steps=4", "--micro-batch=4", "--checkpoint-activations")
    assert "batch 4 = 1 rank x 1 x 4" in capsys.readouterr().out
    *_, before, after = log_of(tmp_path / "plain")
    assert (before["step"], after["step"]) == (3, 4) and after["loss"] < 1.5 * before["loss"]


def config_of(queue=16):
    return configure({"recipe": "demo", "head": "32-16", "prototypes": 12, "crops": "2x32+2x16",
                      "queue": queue, "queue_start": 3, "freeze_prototypes": 1})


def steps_on_ranks(rank, world, steps, micro_batches=1):
    """Steps on this rank's part of joined batches, BatchNorm in eval mode, fp32."""
    cpu = torch.device("cpu")
    method = build_method(config_of(), world=world).eval()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = Run(method, wrap(method, cpu), cpu, torch.float32, scaler)
    optimizer, losses = LARC(method.parameters(), lr=1.0, weight_decay=1e-4), []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        joined = [torch.randn(count, 8, 3, size, size, generator=generator)
                  for count, size in ((2, 32), (2, 16))]                 # (count, B, 3, s, s)
        of_rank = [c.chunk(world, 1)[rank].chunk(micro_batches, 1) for c in joined]
        optimizer.zero_grad(set_to_none=world == 1)             # as the loop does
        loss, _ = step_gradients(run, step, [[c.flatten(0, 1) for c in crops]
                                             for crops in zip(*of_rank)])
        method.before_step(step)
        optimizer.step()
        method.after_step(step)
        losses.append(mean_over_ranks(loss).item())
    return losses, method.state_dict()


def check_equal(results, losses, expected):
    for got, weights in results:
        assert got == pytest.approx(losses, abs=1e-5)
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.long
def test_micro_batches_equal_the_joined_batch():
    losses, expected = steps_on_ranks(0, 1, 5)
    check_equal([steps_on_ranks(0, 1, 5, micro_batches=4)], losses, expected)
    fresh = build_method(config_of()).state_dict()
    assert any((v - expected[k]).abs().max() > 1e-2 for k, v in fresh.items())


@pytest.mark.long
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path, micro_batches):
    results = run_ranks(steps_on_ranks, tmp_path, 2, 5, micro_batches)
    check_equal(results, *steps_on_ranks(0, 1, 5))


@pytest.mark.long
def test_torchrun_trains_and_resumes_on_another_number_of_ranks(photos, tmp_path):
    out = tmp_path / "run"
    options = [f"--data={photos}", f"--out={out}", *SMALL, "--steps=8", "--queue=8"]
    result = torchrun(*options)
    assert result.returncode == 0, result.stderr
    assert "batch 4 = 2 ranks x 1 x 2" in result.stdout
    named = {fault["name"] for line in log_of(out) for fault in line["bad"]}
    assert named == {"empty.jpg", "truncated.jpg", os.path.join("more", "text.png")}
    state = load(out / "checkpoint.pt")
    assert state["queue"]["embeddings"].shape == (2, 8, 16) and state["queue"]["filled"] == 8
    # the same run, taken back by a step and finished by one process
    save(out / "checkpoint.pt", state | {"step": 7})
    train.main(options)
    assert [line["step"] for line in log_of(out)] == list(range(1, 9))


@pytest.mark.long
def test_a_batch_the_ranks_do_not_divide_is_refused(photos, tmp_path):
    result = torchrun(f"--data={photos}", f"--out={tmp_path / 'run'}", *SMALL, "--batch-size=5",
                      "--steps=1")
    errors = [line for line in result.stderr.splitlines() if line.startswith("train.py: error")]
    assert errors == ["train.py: error: --batch-size 5 is not divisible by 2 processes; 4 is"]
    assert not (tmp_path / "run").exists()



def test_a_configuration_is_saved_as_text(photos, tmp_path, capsys):
    """As in checkpoints from before the configuration held values, which so resume too."""
    run(photos, tmp_path / "run", "--steps=2")
    state = load(tmp_path / "run" / "checkpoint.pt")
    written = {"crops": "2x32+2x16", "head": "32-16", "mean": "0.485,0.456,0.406",
               "std": "0.229,0.224,0.225", "lr": 9.6, "arch": "regnety_100mf"}
    assert {name: state["config"][name] for name in written} == written
    assert set(map(type, state["config"].values())) <= {str, int, float, bool, type(None)}
    save(tmp_path / "run" / "checkpoint.pt", state | {"step": 1})
    run(photos, tmp_path / "run", "--steps=2")
    assert "resumed after step 1" in capsys.readouterr().out
