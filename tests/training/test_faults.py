"""A run that is killed, signalled, starved of disk or of a rank: in the end it is the same run."""
import functools
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from tests.helpers import (
    ROOT,
    SMALL,
    environment,
    equal,
    log_of,
    refuse,
    run,
    write_pictures,
)
from training import signals, writer
from training.monitor import Monitor
from training.writer import newest
from weights.atomic import load, save

STEPS = 24


def command(photos, out, *options, ranks=1):
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, str(ROOT / "train.py"), f"--data={photos}", f"--out={out}", *SMALL,
            f"--steps={STEPS}", "--save-every=2", "--queue=8", "--workers=1", "--micro-batch=1",
            "--crops=2x48+2x36", *options]


def start(*arguments, **options):
    return subprocess.Popen(command(*arguments, **options), stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.PIPE, start_new_session=True, env=environment())


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
    states = [load(out / "checkpoint.pt") for out in (one, other)]
    for key in ("step", "model", "optimizer", "queue", "pending"):
        assert equal(states[0][key], states[1][key]), key
    assert log_of(one) == log_of(other)


@pytest.fixture(scope="module")
def whole(few_photos, tmp_path_factory):
    """Number of ranks -> a run that was never interrupted, made when it is first asked for."""
    @functools.cache
    def run_on(ranks):
        out = tmp_path_factory.mktemp("whole") / "run"
        finish(few_photos, out, ranks=ranks)
        return out

    return run_on


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


def family_of(process):
    """A process and all below it: torchrun's ranks are in sessions of their own."""
    family = [process.pid]
    for pid in family:
        family += children(pid)
    return family


def kill_all(process, family):
    """SIGKILL them all, and wait until they are gone."""
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.communicate()
    while any(runs(pid) for pid in family):
        time.sleep(0.005)


def kill_at_random(photos, out, whole, ranks, kills, rng):
    """SIGKILL a run, its workers and its launcher, `kills` times at random, every second time in
    the next save; then let it finish. Returns how many files were cut off."""
    saving = 0
    for kill in range(kills):
        for cut in out.glob("*.tmp"):
            cut.unlink()
        process = start(photos, out, ranks=ranks)
        when_at(out, rng.randrange(STEPS - 8), process)
        if kill % 2 and step_of(out) < STEPS - 4:       # else no save may be left to be cut off
            when_at(out, step_of(out) + 1, process)     # its ranks and workers are there
            family = family_of(process)                 # first: a save takes but milliseconds
            when_saving(out, process)
        else:
            time.sleep(rng.random() * 0.1)
            family = family_of(process)
        assert process.poll() is None, process.communicate()[1]
        kill_all(process, family)
        saving += bool(list(out.glob("*.pt.tmp")))
    finish(photos, out, ranks=ranks)
    same_run(out, whole(ranks))
    return saving


@pytest.mark.long
@pytest.mark.parametrize("ranks, kills", [(1, 4), (2, 2)])
def test_a_run_killed_many_times(few_photos, tmp_path, whole, ranks, kills):
    saving = kill_at_random(few_photos, tmp_path / "run", whole, ranks, kills, random.Random(ranks))
    print(f"{kills} kills on {ranks} ranks, {saving} of them in the middle of a save")
    assert saving


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_worker_that_dies_is_named_and_none_outlives_its_run(few_photos, tmp_path):
    process = start(few_photos, tmp_path / "run", "--steps=2000")
    when_at(tmp_path / "run", 2, process)
    worker, = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    # torch says "(pid 12) is killed" or "(pid(s) 12) exited", as it learns of it
    assert process.returncode == 2, errors
    assert re.search(rf"DataLoader worker .*\b{worker}\)", errors), errors
    assert "Traceback" not in errors
    process = start(few_photos, tmp_path / "run", "--steps=2000")
    when_at(tmp_path / "run", 4, process)
    worker, = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)        # the run alone; its worker is to notice
    process.communicate()
    for _ in range(200):
        if not Path(f"/proc/{worker}").exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"worker {worker} is still there")


@pytest.mark.long
@pytest.mark.parametrize("name, ranks", [
    ("SIGTERM", 1), ("SIGTERM", 2), ("SIGINT", 1), ("SIGUSR1", 1),
    ("SIGHUP", 1)])
def test_a_signal_saves_the_run_and_leaves(few_photos, tmp_path, whole, name, ranks):
    out = tmp_path / "run"
    process = start(few_photos, out, "--save-every=1000", ranks=ranks)
    when_at(out, 3, process)
    family = [process.pid, *children(process.pid)]
    for pid in reversed(family) if ranks == 1 else family:      # as a scheduler does: to all
        os.kill(pid, getattr(signal, name))
    _, errors = process.communicate(timeout=120)
    while any(runs(pid) for pid in family):             # where torchrun has died, the ranks follow
        time.sleep(0.01)
    assert ranks == 2 or process.returncode == signals.INTERRUPTED, errors
    assert 3 <= load(out / "checkpoint.pt")["step"] < STEPS
    assert f"{name} after step" in errors or ranks == 2
    assert ranks == 2 or "Traceback" not in errors
    finish(few_photos, out, ranks=ranks)
    same_run(out, whole(ranks))


@pytest.mark.long
def test_a_run_outlives_its_pipe(few_photos, tmp_path, whole):
    """As in `python train.py | head -1`, and where a terminal is closed."""
    out = tmp_path / "run"
    process = start(few_photos, out)
    assert process.stdout.readline().startswith("data: 12 images")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    same_run(out, whole(1))


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
def test_a_rank_that_dies_takes_the_other_down(few_photos, tmp_path):
    process = start(few_photos, tmp_path / "run", "--steps=2000", ranks=2)
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
    with signals.Signals() as noted, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert noted.seen == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.mark.long
def test_a_second_run_is_kept_out_and_a_crash_opens_the_folder(few_photos, tmp_path, capsys):
    out = tmp_path / "run"
    process = start(few_photos, out)
    when_at(out, 1, process)
    try:
        assert "another run is at work in" in refuse(capsys, *command(few_photos, out)[2:])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    finish(few_photos, out)


# --------------------------------------------------------------------------- damaged and full
@pytest.mark.long
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(few_photos, tmp_path, whole):
    out = tmp_path / "run"
    process = start(few_photos, out)
    when_at(out, 9, process)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate()
    last, kept = newest(out)
    assert kept.name == "checkpoint-000000008.pt"
    last.write_bytes(last.read_bytes()[:-100])
    process = start(few_photos, out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "is damaged" in errors and "going on from" in errors and kept.name in errors
    same_run(out, whole(1))


@pytest.mark.long
def test_a_run_on_a_full_disk_goes_on_and_says_so(few_photos, tmp_path):
    """All writing fails after a few steps; once there is room again, the rest is there."""
    out = tmp_path / "run"
    script = (f"import resource, signal, sys\nsys.path[:0] = [{str(ROOT)!r}]\nimport train\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              "def full(bytes):\n"
              "    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes, resource.RLIM_INFINITY))\n"
              "from training.monitor import Watchdog\n"
              "look = Watchdog.look\n"
              "Watchdog.look = lambda self, entry: (\n"
              "    full(2000) if entry['step'] == 4 else full(-1) if entry['step'] == 9 else 0,\n"
              "    look(self, entry))\n"
              "train.main(sys.argv[1:])\n")
    argv = [sys.executable, "-c", script, *command(few_photos, out)[2:], "--workers=0",
            "--steps=12"]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, env=environment())
    assert result.returncode == 0, result.stderr
    assert re.search(r"(checkpoint|trunk)\.pt could not be saved", result.stderr)
    assert "log.jsonl could not be written" in result.stderr
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 13))
    assert any(line["failed_saves"] for line in log)
    assert load(out / "checkpoint.pt")["step"] == 12


@pytest.mark.long
def test_a_run_keeps_the_settings_it_began_with(few_photos, tmp_path, capsys):
    """Recipe small measures the images: when one goes bad, the same command still goes on."""
    folder = tmp_path / "some"
    write_pictures(folder, 9)
    argv = [f"--data={folder}", f"--out={tmp_path / 'run'}", "--recipe=small", "--workers=0",
            "--batch-size=4", "--device=cpu", "--save-every=2"]
    train.main([*argv, "--steps=4"])
    began = load(tmp_path / "run" / "checkpoint.pt")
    save(tmp_path / "run" / "checkpoint.pt", began | {"step": 2})
    (folder / "0003.png").write_bytes(b"")
    train.main([*argv, "--steps=4"])
    assert load(tmp_path / "run" / "checkpoint.pt")["config"] == began["config"]
    assert "lr was" in refuse(capsys, *argv, "--steps=4", "--lr=0.01")


def test_a_run_whose_saves_fail_goes_on_says_so_and_ends_with_an_error(
        few_photos, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError("disk full")
    monkeypatch.setattr(writer, "save", fail)
    error = refuse(capsys, f"--data={few_photos}", f"--out={tmp_path / 'run'}", *SMALL, "--steps=6",
                   "--save-every=2")
    assert "disk full" in error and "holds the run as it was before" in error
    assert log_of(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.long
def test_torchrun_restarts_a_run_whose_ranks_die(few_photos, tmp_path, whole):
    """With --max-restarts: two ranks are killed in turn, and the run ends as if they were not."""
    out = tmp_path / "run"
    line = command(few_photos, out, ranks=2)
    line.insert(line.index("--standalone"), "--max-restarts=3")
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               start_new_session=True, env=environment())
    for step, choose in ((3, max), (8, min)):
        when_at(out, step, process)
        os.kill(choose(children(process.pid)), signal.SIGKILL)
    try:
        _, errors = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    same_run(out, whole(2))


@pytest.mark.long
def test_watching_a_run_changes_nothing_of_it(few_photos, tmp_path, whole):
    """--probe, on class folders and without labels; --log-every; TensorBoard where there is one."""
    for name in ("a", "b"):
        write_pictures(tmp_path / "classes" / name, 5)
    (tmp_path / "classes" / "a" / "broken.jpg").write_bytes(b"no")
    for what, folder in (("knn", tmp_path / "classes"), ("retrieved", few_photos)):
        out = tmp_path / what
        finish(few_photos, out, f"--probe={folder}", "--probe-every=10", "--log-every=3")
        states = [load(run / "checkpoint.pt") for run in (out, whole(1))]
        assert equal(states[0]["model"], states[1]["model"])
        log = log_of(out)
        assert [line["step"] for line in log] == [3, 6, 9, 10, 12, 15, 18, 20, 21, 24]
        assert [line["step"] for line in log if what in line] == [10, 20, 24]
        assert all(0 <= line[what] <= 100 for line in log if what in line)
        assert log[0]["ln_k"] == pytest.approx(2.4849, abs=1e-4)
        if importlib.util.find_spec("tensorboard"):
            assert list(out.glob("events.out.tfevents*"))


# ------------------------------------------------------------------ the same, quick: one process
def test_a_run_that_gets_a_signal_saves_and_goes_on_bitwise(
        few_photos, tmp_path, monkeypatch, capsys):
    options = ["--steps=6", "--queue=8"]
    run(few_photos, tmp_path / "whole", *options)
    step = Monitor.step

    def signalled(self, number, *rest):
        step(self, number, *rest)
        if number == 1:                         # looked at after the next step
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(Monitor, "step", signalled)
        run(few_photos, tmp_path / "run", *options)
    assert stop.value.code == signals.INTERRUPTED
    assert "SIGTERM after step 3: the run is saved" in capsys.readouterr().err
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 3
    run(few_photos, tmp_path / "run", *options)
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.long
def test_a_damaged_checkpoint_gives_way_to_the_one_before(few_photos, tmp_path, capsys):
    out = tmp_path / "run"
    run(few_photos, out, "--steps=4", "--save-every=2", "--queue=8")
    before = load(out / "checkpoint.pt")
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:-100])
    run(few_photos, out, "--steps=4", "--save-every=2", "--queue=8")
    printed = capsys.readouterr()
    assert "is damaged" in printed.err and "checkpoint-000000002.pt" in printed.err
    assert "resumed after step 2" in printed.out
    after = load(out / "checkpoint.pt")
    assert all(equal(before[key], after[key]) for key in ("step", "model", "optimizer", "queue"))


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
input()
"""


def test_a_folder_in_use_is_refused_until_its_process_ends(few_photos, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(out / ".lock")], text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    assert "another run is at work in" in refuse(capsys, *command(few_photos, out)[2:])
    other.kill()
    other.wait()
    run(few_photos, out, "--steps=1")


def test_a_worker_that_dies_ends_the_run_with_a_sentence(few_photos, tmp_path, capsys, monkeypatch):
    step = Monitor.step

    def killing(self, number, *rest):
        step(self, number, *rest)
        os.kill(self.batches.batches._workers[0].pid, signal.SIGKILL)

    monkeypatch.setattr(Monitor, "step", killing)
    error = refuse(capsys, f"--data={few_photos}", f"--out={tmp_path / 'run'}", *SMALL,
                   "--steps=200", "--workers=1")
    assert error.startswith("train.py: error: DataLoader worker (pid")      # and not a traceback


@pytest.mark.long
def test_a_probe_changes_nothing_of_a_run(few_photos, tmp_path):
    run(few_photos, tmp_path / "plain", "--steps=4")
    run(few_photos, tmp_path / "probed", "--steps=4", f"--probe={few_photos}", "--probe-every=2")
    states = [load(tmp_path / name / "checkpoint.pt") for name in ("plain", "probed")]
    assert equal(states[0]["model"], states[1]["model"])
    assert [line["step"] for line in log_of(tmp_path / "probed") if "retrieved" in line] == [2, 4]
