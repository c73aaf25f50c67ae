"""Sharded runs: killed, resumed on other ranks and whole, damaged; what their folder is good for.

The ranks are forks of one process that has imported the program: a start takes a second.
"""
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from data.images import open_images
from evaluation.task import load_trunk
from tests.helpers import ROOT, SMALL, environment, equal, log_of, torchrun
from training.resume import open_checkpoint
from training.writer import newest
from weights.atomic import load
from weights.sharded import SUMS, load_whole

STEPS = 12
FORKS = f"""
import faulthandler, json, os, socket, sys
sys.path[:0] = [{str(ROOT)!r}]
import torch, torch.distributed.fsdp
import evaluate, train
for line in sys.stdin:
    world, patch, out, program, *argv = json.loads(line)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        if pid := os.fork():
            pids.append(pid)
            continue
        os.dup2(os.open(f"{{out}}.rank{{rank}}", os.O_CREAT | os.O_TRUNC | os.O_RDWR), 1)
        os.dup2(1, 2)
        if world > 1:
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                               LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="localhost",
                               MASTER_PORT=str(port))
        code = 1
        try:
            exec(patch)
            (train if program == "train.py" else evaluate).main(argv)
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            import traceback
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps(pids), flush=True)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
"""


class Ranks:
    """Starts a program on some ranks, and waits for it."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True, env=environment())

    def start(self, world, out, *argv, patch=""):
        """-> the ranks' process ids. patch: Python that each rank runs first."""
        self.world, self.out = world, out
        line = json.dumps([world, patch, str(out), *map(str, argv)])
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def wait(self):
        """-> exit statuses, what the ranks wrote."""
        codes = json.loads(self.process.stdout.readline())
        return codes, [open(f"{self.out}.rank{rank}").read() for rank in range(self.world)]

    def run(self, world, out, *argv, patch=""):
        """Returns what rank 0 wrote; all must succeed."""
        self.start(world, out, *argv, patch=patch)
        codes, texts = self.wait()
        assert codes == [0] * world, "\n".join(texts)
        return texts[0]


@pytest.fixture(scope="module")
def ranks():
    ranks = Ranks()
    yield ranks
    ranks.process.kill()
    ranks.process.wait()


def command(photos, out, *options):
    return ["train.py", f"--data={photos}", f"--out={out}", *SMALL, f"--steps={STEPS}",
            "--save-every=2", "--queue=8", "--freeze-prototypes=3", *options]


@pytest.fixture(scope="module")
def finished(few_photos, tmp_path_factory):
    """A sharded run of two ranks that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    result = torchrun(*command(few_photos, out, "--shard", "--save-every=4", "--keep=9"))
    assert result.returncode == 0, result.stderr
    assert "weights in shards over 2 ranks" in result.stdout
    return out


def state_of(path):
    return load_whole(path) if path.is_dir() else load(path)


KEYS = "step", "model", "optimizer", "queue", "pending"


def same_run(one, other):
    states = [state_of(newest(out)[0]) for out in (one, other)]
    for key in KEYS:
        assert equal(states[0][key], states[1][key]), key
    assert log_of(one) == log_of(other)


def step_of(out):
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


@pytest.mark.long
def test_a_sharded_run_killed_ten_times(few_photos, tmp_path, ranks, finished):
    """By SIGKILL of both ranks, every second time in a save, a few milliseconds after it began."""
    out, rng, saving = tmp_path / "run", random.Random(0), 0
    for kill in range(10):
        shutil.rmtree(out / "checkpoint.tmp", ignore_errors=True)
        pids = ranks.start(2, out, *command(few_photos, out, "--shard"))
        before, aside = step_of(out), out / "checkpoint.tmp"
        while kill % 2 and not aside.exists() or not kill % 2 and step_of(out) <= before:
            assert os.path.exists(f"/proc/{pids[0]}/fd"), ranks.wait()
            time.sleep(0.001)
            if step_of(out) < before:
                before = step_of(out)               # lines of lost steps are dropped
        time.sleep(rng.random() * 0.05)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert ranks.wait()[0] == [-signal.SIGKILL] * 2
        saving += aside.exists()
        if step_of(out) > STEPS - 5:
            break
    print(f"{kill + 1} kills, {saving} of them in the middle of a save")
    assert kill > 3 and saving > 1
    ranks.run(2, out, *command(few_photos, out, "--shard"))
    same_run(out, finished)
    assert {path.name for path in out.glob("checkpoint*")} == {
        "checkpoint", "checkpoint-000000010"}
