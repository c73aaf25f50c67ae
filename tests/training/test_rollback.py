"""guard.py and checkpoint.Writer: kills, signals, damaged files, full disks and bad numbers."""
import importlib.util
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from test_images import write_pictures
from test_train import ROOT, SMALL, equal, log_of, refuse

import checkpoint
import guard
import train
from recipes import configure
from swav import Queue

STEPS = 24


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    write_pictures(folder, 11)
    (folder / "broken.jpg").write_bytes(b"no")
    return folder


def command(photos, out, *options, ranks=1):
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "train.py"), f"--data={photos}", f"--out={out}", *SMALL,
            f"--steps={STEPS}", "--save-every=2", "--queue=8", "--workers=1", "--micro-batch=1",
            "--crops=2x48+2x36", *options]


def start(*arguments, **options):
    return subprocess.Popen(command(*arguments, **options), stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finish(*arguments, **options):
    process = start(*arguments, **options)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def step_of(out):
    """The last step in a run's log."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def when_at(out, step, process):
    """Wait until a run's log has come to a step."""
    while process.poll() is None and step_of(out) < step:
        time.sleep(0.005)


def when_saving(out, process):
    """Wait until a run's checkpoint is being written."""
    while process.poll() is None and not (out / "checkpoint.pt.tmp").exists():
        time.sleep(0)


def same_run(one, other):
    states = [checkpoint.load(out / "checkpoint.pt") for out in (one, other)]
    for key in ("step", "model", "optimizer", "queue", "pending"):
        assert equal(states[0][key], states[1][key]), key
    assert log_of(one) == log_of(other)


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """A run that was never interrupted, on one rank and on two."""
    runs = {}
    for ranks in (1, 2):
        runs[ranks] = tmp_path_factory.mktemp("whole") / "run"
        finish(photos, runs[ranks], ranks=ranks)
    return runs


def children(pid):
    """Processes whose parent it is, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/status"):
        try:
            if f"\nPPid:\t{pid}\n" in path.read_text():
                found.append(int(path.parent.name))
        except OSError:                         # gone meanwhile
            pass
    return found


def runs(pid):
    """Whether a process is there, and not dead and waiting for its parent to notice."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def kill_all(process):
    """SIGKILL a process and all below it: torchrun's ranks are in sessions of their own."""
    family = [process.pid]
    for pid in family:
        family += children(pid)
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()
    while any(runs(pid) for pid in family):
        time.sleep(0.005)


def kill_at_random(photos, out, whole, ranks, kills, rng):
    """SIGKILL a run, its workers and its launcher, `kills` times at random, every second time in the
    next save; then let it finish. Returns how many files were cut off."""
    saving = 0
    for kill in range(kills):
        for cut in out.glob("*.tmp"):
            cut.unlink()
        process = start(photos, out, ranks=ranks)
        when_at(out, rng.randrange(STEPS - 8), process)
        if kill % 2 and step_of(out) < STEPS - 4:       # else no save may be left to be cut off
            when_saving(out, process)
        else:
            time.sleep(rng.random() * 0.1)
        assert process.poll() is None, process.communicate()[1]
        kill_all(process)
        saving += bool(list(out.glob("*.pt.tmp")))
    finish(photos, out, ranks=ranks)
    same_run(out, whole[ranks])
    return saving


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_ends_as_if_it_had_not_been(photos, tmp_path, whole, ranks):
    kill_at_random(photos, tmp_path / "run", whole, ranks, 2, random.Random(ranks))


@pytest.mark.long
@pytest.mark.parametrize("ranks, kills", [(1, 18), (2, 12)])
def test_a_run_killed_thirty_times(photos, tmp_path, whole, ranks, kills):
    saving = kill_at_random(photos, tmp_path / "run", whole, ranks, kills, random.Random(ranks))
    print(f"{kills} kills on {ranks} ranks, {saving} of them in the middle of a save")
    assert saving


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_worker_that_dies_is_named_and_none_outlives_its_run(photos, tmp_path):
    process = start(photos, tmp_path / "run", "--steps=2000")
    when_at(tmp_path / "run", 2, process)
    worker, = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and f"DataLoader worker (pid {worker}) is killed" in errors
    assert "Traceback" not in errors
    process = start(photos, tmp_path / "run", "--steps=2000")
    when_at(tmp_path / "run", 4, process)
    worker, = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)        # the run alone; its worker is to notice
    process.communicate()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")


@pytest.mark.parametrize("name, ranks", [
    ("SIGTERM", 1), ("SIGTERM", 2), *(pytest.param(*case, marks=pytest.mark.long) for case in (
        ("SIGINT", 1), ("SIGUSR1", 1), ("SIGUSR1", 2)))])
def test_a_signal_saves_the_run_and_leaves(photos, tmp_path, whole, name, ranks):
    out = tmp_path / "run"
    process = start(photos, out, "--save-every=1000", ranks=ranks)
    when_at(out, 3, process)
    family = [process.pid, *children(process.pid)]
    for pid in reversed(family) if ranks == 1 else family:      # as a scheduler does: to all
        os.kill(pid, getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    while any(runs(pid) for pid in family):             # where torchrun has died, the ranks follow
        time.sleep(0.01)
    assert ranks == 2 or process.returncode == guard.INTERRUPTED, errors
    assert 3 <= checkpoint.load(out / "checkpoint.pt")["step"] < STEPS
    assert f"{name} after step" in errors or ranks == 2
    assert ranks == 2 or "Traceback" not in errors
    finish(photos, out, ranks=ranks)
    same_run(out, whole[ranks])


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_rank_that_dies_takes_the_other_down(photos, tmp_path):
    process = start(photos, tmp_path / "run", "--steps=2000", ranks=2)
    when_at(tmp_path / "run", 2, process)
    ranks = children(process.pid)
    os.kill(max(ranks), signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1 and "another rank is gone" in errors
    assert time.monotonic() - began < 60 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def test_a_second_signal_leaves_at_once(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # a shell's & has it ignored
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with guard.Signals() as signals, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.seen == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_second_run_is_kept_out_and_a_crash_opens_the_folder(photos, tmp_path, capsys):
    out = tmp_path / "run"
    process = start(photos, out)
    when_at(out, 1, process)
    try:
        assert "another run is at work in" in refuse(capsys, *command(photos, out)[2:])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(photos, out)


# ------------------------------------------------------------------------------- bad numbers
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
    before, train.guard.join = train.guard.join, lambda *_: None        # it is initialised
    given = train.parse_arguments([f"--data={photos}", f"--out={out}", *SMALL, "--queue=8", *options])
    images = train.open_images(str(photos))
    run = train.setup(configure(given, world, images), images)
    train.guard.join = before
    run.wrapped = Spoiled(run.wrapped, rank, faults)
    with guard.Signals() as signals, checkpoint.Writer(run.out) as writer:
        try:
            train.train(run, signals, writer)
        except train.Stop as stop:
            return str(stop)
    return run.model.state_dict(), run.queue.embeddings


@pytest.mark.parametrize("what", ["pixel", "gradient"])
def test_a_bad_number_on_one_rank_is_survived_and_leaves_no_trace(photos, tmp_path, what):
    """The step is as if it had not been: weights, statistics and queue are those from before it."""
    results = {}
    for name, faults, steps in (("before", {}, 3), ("bad", {3: {1: what}}, 4)):
        results[name] = run_ranks(spoiled_run, tmp_path, 2, str(photos), str(tmp_path / name), faults,
                                  [f"--steps={steps}", "--lr=50", "--final-lr=1", "--warmup=0"])
    for (weights, queue), (expected, expected_queue) in zip(results["bad"], results["before"]):
        assert equal(weights, expected) and torch.equal(queue, expected_queue)
    last = log_of(tmp_path / "bad")[-1]
    assert last["step"] == 4 and last["skipped"] == 1 and "loss" not in last
    assert checkpoint.load(tmp_path / "bad" / "checkpoint.pt")["step"] == 4


def test_training_goes_on_after_a_bad_step_and_ends_after_many(photos, tmp_path):
    options = ["--steps=8", "--max-bad-steps=3"]
    (weights, _), _ = run_ranks(spoiled_run, tmp_path, 2, str(photos), str(tmp_path / "some"),
                                {2: {0: "pixel"}, 3: {1: "gradient"}, 5: {1: "pixel"}}, options)
    assert all(value.isfinite().all() for value in weights.values())
    assert [line["skipped"] for line in log_of(tmp_path / "some")] == [0, 0, 1, 1, 0, 1, 0, 0]
    first, second = run_ranks(spoiled_run, tmp_path, 2, str(photos), str(tmp_path / "many"),
                              {step: {1: "pixel"} for step in (2, 3, 4)}, options)
    assert first == second and "3 steps in a row, the last of them 5" in first
    assert f"on rank 1; the last good checkpoint was kept: --init {tmp_path / 'many'}" in first


def test_undo_restores_what_a_forward_pass_changes():
    model = train.fresh_model(configure({"recipe": "demo"}))
    queue = Queue(4, 64)
    undo = guard.Undo(model, queue)
    undo.remember()
    before = {name: value.clone() for name, value in model.named_buffers()}
    embeddings, _ = model([torch.full((4, 3, 64, 64), float("inf"))])
    queue.push(embeddings, 2)
    assert not equal(before, dict(model.named_buffers())) and queue.filled == 2
    undo.undo()
    assert equal(before, dict(model.named_buffers()))
    assert queue.filled == 0 and (queue.embeddings == 0).all()


# --------------------------------------------------------------------------- damaged and full
def test_a_bit_turned_anywhere_in_a_runs_checkpoint_is_recognised(tmp_path, whole):
    path, rng = tmp_path / "checkpoint.pt", random.Random(0)
    good = (whole[1] / "checkpoint.pt").read_bytes()
    path.write_bytes(good)
    assert checkpoint.load(path)["step"] == STEPS == torch.load(path, weights_only=True)["step"]
    for _ in range(200):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged, or not a checkpoint"):
            checkpoint.load(path)
    for length in (0, 1, 70, 71, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="is damaged, or not a checkpoint"):
            checkpoint.load(path)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(photos, tmp_path, whole, capsys):
    out = tmp_path / "run"
    process = start(photos, out)
    when_at(out, 9, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    last, kept = checkpoint.newest(out)
    assert kept.name == "checkpoint-000000008.pt"
    last.write_bytes(last.read_bytes()[:-100])
    process = start(photos, out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "is damaged" in errors and "going on from" in errors and kept.name in errors
    same_run(out, whole[1])


def test_a_damaged_checkpoint_does_not_take_the_place_of_a_good_one(tmp_path, monkeypatch):
    """The run went on from the older of two, and the next save fails."""
    with checkpoint.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.save({"step": step}, {})
    (tmp_path / "checkpoint.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch, checkpoint.Writer(tmp_path, step=None) as writer:
        patch.setattr(checkpoint, "save", lambda path, _: 1 / 0 if path.name == "checkpoint.pt" else None)
        writer.save({"step": 2}, {})
    assert writer.errors == ["division by zero"]
    assert checkpoint.load(checkpoint.newest(tmp_path)[1])["step"] == 1


def test_which_checkpoints_stay(tmp_path):
    with checkpoint.Writer(tmp_path, keep=3, keep_every=4) as writer:
        for step in range(1, 11):
            writer.save({"step": step}, {"weights": torch.ones(2)})
    assert [checkpoint.load(path)["step"] for path in checkpoint.newest(tmp_path)] == [10, 9, 8, 4]
    assert {path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"} == set()


def test_a_snapshot_is_saved_not_what_comes_after(tmp_path):
    weights = torch.ones(1000)
    with checkpoint.Writer(tmp_path) as writer:
        writer.save({"step": 1, "weights": weights}, {"weights": weights})
        weights.zero_()
    assert (checkpoint.load(tmp_path / "checkpoint.pt")["weights"] == 1).all()


def full_disk(folder):
    """In a process of its own: no file may grow beyond 200 kB."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with checkpoint.Writer(folder) as writer:
        writer.save({"step": 1, "weights": torch.ones(100)}, {})
        writer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        writer.save({"step": 2, "weights": torch.ones(1_000_000)}, {})
        writer.wait()
        print(writer.error)
        writer.save({"step": 3, "weights": torch.ones(100)}, {})
        writer.wait()
        print(repr(writer.error))


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    script = f"from test_guard import *\nfull_disk({str(tmp_path)!r})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True,
                            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    first, second = result.stdout.splitlines()
    assert "could not be saved" in first and second == "''", result.stderr
    assert checkpoint.load(tmp_path / "checkpoint.pt")["step"] == 3
    assert checkpoint.load(checkpoint.newest(tmp_path)[1])["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_run_on_a_full_disk_goes_on_and_says_so(photos, tmp_path):
    """All that it writes fails after a few steps, and once there is room again the rest is there."""
    out = tmp_path / "run"
    script = (f"import resource, signal, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport train\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "def full(bytes): resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))\n"
              "look = train.report.Watchdog.look\n"
              "train.report.Watchdog.look = lambda self, entry: (\n"
              "    full(2000) if entry['step'] == 4 else full(-1) if entry['step'] == 9 else 0, look(self, entry))\n"
              "train.main(sys.argv[1:])\n")
    result = subprocess.run([sys.executable, "-c", script, *command(photos, out)[2:], "--workers=0", "--steps=12"],
                            capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert "checkpoint.pt could not be saved" in result.stderr or "trunk.pt could not be saved" in result.stderr
    assert "log.jsonl could not be written" in result.stderr
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 13)) and any(line["failed_saves"] for line in log)
    assert checkpoint.load(out / "checkpoint.pt")["step"] == 12


def test_a_run_keeps_the_settings_it_began_with(photos, tmp_path, capsys):
    """Recipe small measures the pictures: when one goes bad, the same command still goes on."""
    folder = tmp_path / "some"
    write_pictures(folder, 9)
    argv = [f"--data={folder}", f"--out={tmp_path / 'run'}", "--recipe=small", "--workers=0", "--batch-size=4",
            "--device=cpu", "--save-every=2"]
    train.main([*argv, "--steps=4"])
    began = checkpoint.load(tmp_path / "run" / "checkpoint.pt")
    checkpoint.save(tmp_path / "run" / "checkpoint.pt", began | {"step": 2})
    (folder / "0003.png").write_bytes(b"")
    train.main([*argv, "--steps=4"])
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["config"] == began["config"]
    assert "lr was" in refuse(capsys, *argv, "--steps=4", "--lr=0.01")


def test_a_run_whose_saves_fail_goes_on_says_so_and_ends_with_an_error(photos, tmp_path, monkeypatch,
                                                                       capsys):
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(checkpoint, "save", fail)
    error = refuse(capsys, f"--data={photos}", f"--out={tmp_path / 'run'}", *SMALL, "--steps=6",
                   "--save-every=2")
    assert "disk full" in error and "holds the run as it was before" in error
    assert log_of(tmp_path / "run")[-1]["step"] == 6


def test_torchrun_restarts_a_run_whose_ranks_die(photos, tmp_path, whole):
    """With --max-restarts: two ranks are killed in turn, and the run ends as if they had not been."""
    out = tmp_path / "run"
    line = command(photos, out, ranks=2)
    line.insert(line.index("--standalone"), "--max-restarts=3")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    for step, choose in ((3, max), (8, min)):
        when_at(out, step, process)
        os.kill(choose(children(process.pid)), signal.SIGKILL)
    try:
        _, errors = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    same_run(out, whole[2])


def test_watching_a_run_changes_nothing_of_it(photos, tmp_path, whole):
    """--probe, on class folders and without labels; --log-every; TensorBoard where it is installed."""
    for name in ("a", "b"):
        write_pictures(tmp_path / "classes" / name, 5)
    (tmp_path / "classes" / "a" / "broken.jpg").write_bytes(b"no")
    for what, folder in (("knn", tmp_path / "classes"), ("retrieved", photos)):
        out = tmp_path / what
        finish(photos, out, f"--probe={folder}", "--probe-every=10", "--log-every=3")
        states = [checkpoint.load(run / "checkpoint.pt") for run in (out, whole[1])]
        assert equal(states[0]["model"], states[1]["model"])
        log = log_of(out)
        assert [line["step"] for line in log] == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24]
        assert [line["step"] for line in log if what in line] == [10, 20, 24]
        assert all(0 <= line[what] <= 100 for line in log if what in line)
        assert log[0]["ln_k"] == pytest.approx(2.4849, abs=1e-4)
        assert importlib.util.find_spec("tensorboard") is None or list(out.glob("events.out.tfevents*"))
