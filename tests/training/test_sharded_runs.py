"""Sharded runs: killed, resumed on other ranks and whole, damaged; what their folder is good for.

The ranks are forks of one process that has imported the program: a start takes a second.
"""
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
from training import signals
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
    assert "in shards over 2 ranks" in result.stdout
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


@pytest.mark.parametrize("kills", [pytest.param(5, marks=pytest.mark.long),
                                   pytest.param(10, marks=pytest.mark.measured)])
def test_a_sharded_run_killed_many_times(few_photos, tmp_path, ranks, finished, kills):
    """By SIGKILL of both ranks, every second time in a save, a few milliseconds after it began."""
    out, rng, saving = tmp_path / "run", random.Random(0), 0
    for kill in range(kills):
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
    assert kill > 3 and saving
    ranks.run(2, out, *command(few_photos, out, "--shard"))
    same_run(out, finished)
    assert {path.name for path in out.glob("checkpoint*")} == {
        "checkpoint", "checkpoint-000000010"}


# Until a step, then SIGTERM on rank 0. What was loaded and which positions of the stream were read
# go into files.
RECORD = """
import signal, torch, train
from data.stream import Stream
from torch.distributed.tensor import DTensor
from training.monitor import Monitor

def whole(tree):
    if isinstance(tree, dict):
        return {{key: whole(value) for key, value in tree.items()}}
    return tree.full_tensor() if isinstance(tree, DTensor) else tree

def recorded(run, state, load=train.load_run_state):
    load(run, state)
    loaded = [whole(run.method.state_dict()), whole(run.optimizer.state_dict()["state"])]
    if run.rank == 0:
        torch.save(loaded, {out!r} + ".loaded")

def read(self, position, get=Stream.__getitem__):
    with open({out!r} + ".positions", "a") as file:
        file.write(str(position) + "\\n")
    return get(self, position)

def stepped(self, step, *rest, do=Monitor.step):
    do(self, step, *rest)
    if step + 2 == {stop} < {STEPS} and self.run.rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)

train.load_run_state, Stream.__getitem__, Monitor.step = recorded, read, stepped
"""


@pytest.mark.long
@pytest.mark.parametrize("parts", [[(2, 4), (1, 7), (2, STEPS)], [(4, 5), (2, STEPS)]], ids=str)
def test_a_run_goes_on_with_other_ranks(few_photos, tmp_path, ranks, parts):
    """Sharded where there are several, whole on one: the same weights at the hand-over, and the
    same stream of images."""
    out, done, before = tmp_path / "run", 0, {}
    for world, stop in parts:
        positions = tmp_path / "run.positions"
        positions.unlink(missing_ok=True)
        ranks.start(world, out, *command(few_photos, out, *["--shard"] * (world > 1)),
                    patch=RECORD.format(out=str(out), stop=stop, STEPS=STEPS))
        codes, texts = ranks.wait()
        after = state_of(newest(out)[0])
        assert codes == [0 if stop == STEPS else signals.INTERRUPTED] * world, "\n".join(texts)
        if done:
            assert f"resumed after step {done}" in texts[0]
            model, momentum = torch.load(f"{out}.loaded")
            assert equal(model, before["model"])
            assert equal(momentum, before["optimizer"]["state"])
        read = [int(line) for line in positions.read_text().split()]
        asked = set(range(4 * done, 4 * after["step"]))
        # the loader is a step ahead, and each rank looks at 0
        assert asked <= set(read) <= asked | {0} | set(range(4 * after["step"], 4 * stop + 4))
        assert all(read.count(position) == 1 for position in asked - {0})
        assert stop - 1 <= after["step"] <= stop        # some leave in the middle of a step
        assert newest(out)[0].is_dir() == (world > 1)
        before, done = after, after["step"]
    assert [line["step"] for line in log_of(out)] == list(range(1, STEPS + 1))
    kept = newest(out)
    assert [open_checkpoint(path)["step"] for path in kept] == [STEPS, STEPS - 2]
    assert {path.name for path in out.glob("checkpoint*")} == {path.name for path in kept}


# ---------------------------------------------------------------------------------------- products
@pytest.mark.long
def test_a_sharded_runs_folder_is_a_runs_folder(finished):
    state = load_whole(finished / "checkpoint")
    trunk = {name.removeprefix("trunk."): x for name, x in state["model"].items()
             if name.startswith("trunk.")}
    assert equal(load(finished / "trunk.pt"), trunk)
    network, config, _ = load_trunk(str(finished))
    assert equal(dict(network.state_dict()), {name: trunk[name] for name in network.state_dict()})
    assert config["arch"] == "regnety_100mf"
    torchvision = pytest.importorskip("torchvision.models.regnet")
    params = torchvision.BlockParams.from_init_params(8, 24, 24.48, 2.54, 8, se_ratio=0.25)
    theirs = torchvision.RegNet(params)
    theirs.fc = torch.nn.Identity()
    theirs.load_state_dict(load(finished / "trunk.pt"))


@pytest.mark.long
def test_a_sharded_runs_weights_begin_another_run(few_photos, tmp_path, ranks, finished):
    model = load_whole(finished / "checkpoint")["model"]
    for world, source, parts in ((2, finished / "checkpoint", "the trunk, head, prototypes"),
                                 (1, finished / "checkpoint", "the trunk, head, prototypes"),
                                 (2, finished / "trunk.pt", "the trunk; new: head, prototypes")):
        out = tmp_path / f"{world}-{source.name}"
        text = ranks.run(world, out, *command(few_photos, out, f"--init={source}", "--steps=1",
                                              "--lr=0", *["--shard"] * (world > 1)))
        assert f"starts from {source}: {parts}" in text
        after = state_of(newest(out)[0])["model"]
        # prototypes are normalised again
        same = [name for name, x in after.items() if torch.equal(x, model[name])
                or name == "prototypes.weight" and (x - model[name]).abs().max() < 1e-6]
        weights = [name for name in model if "running" not in name and "num_batches" not in name]
        expected = [name for name in weights if "new" not in parts or name.startswith("trunk.")]
        assert set(expected) <= set(same) and len(expected) > 20


@pytest.mark.long
def test_evaluate_takes_a_sharded_runs_folder(few_photos, tmp_path, ranks, finished):
    out = tmp_path / "knn"
    text = ranks.run(1, out, "evaluate.py", "knn", finished, "--workers=0", "--device=cpu")
    assert 0 <= json.loads(text.splitlines()[-1])["top1"] <= 100
    for i, source in enumerate((finished, finished / "checkpoint")):
        ranks.run(1, out, "evaluate.py", "clusters", source, f"--data={few_photos}", "--workers=0",
                  f"--out={tmp_path / f'{i}.csv'}", "--device=cpu")
    tables = [(tmp_path / f"{i}.csv").read_text() for i in range(2)]
    assert tables[0] == tables[1] and tables[0].count("\n") > len(open_images(few_photos)) - 2


@pytest.mark.long
def test_a_finished_run_gets_back_its_products_and_a_greater_length(
        few_photos, tmp_path, ranks, finished):
    """In either form, from a sharded checkpoint and from a whole one."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    trunk = load(out / "trunk.pt")
    for world in 2, 1:
        for product in "trunk.pt", "prototypes.png":
            (out / product).unlink()
        ranks.run(world, out, *command(few_photos, out, *["--shard"] * (world > 1)))
        assert equal(load(out / "trunk.pt"), trunk) and (out / "prototypes.png").exists()
    for world, steps in (2, STEPS + 2), (1, STEPS + 4), (2, STEPS + 6):
        before = load(out / "trunk.pt")
        text = ranks.run(world, out, *command(few_photos, out, f"--steps={steps}",
                                              *["--shard"] * (world > 1)))
        assert f"extended from {steps - 2} to {steps} steps" in text
        assert equal(load(out / f"trunk-{steps - 2}.pt"), before)
        assert newest(out)[0].is_dir() == (world > 1)
        if world == 1:                      # finished whole, looked at in shards
            (out / "prototypes.png").unlink()
            ranks.run(2, out, *command(few_photos, out, f"--steps={steps}", "--shard"))
            assert (out / "prototypes.png").exists()


# ---------------------------------------------------------------------------------------- faults
@pytest.mark.long
@pytest.mark.parametrize("name", ["tensors/__1_0.distcp", "state.pt", "tensors/.metadata", SUMS])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
        few_photos, tmp_path, ranks, finished, name):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    path = out / "checkpoint" / name
    path.write_bytes(path.read_bytes()[:-30])
    ranks.start(2, out, *command(few_photos, out, "--shard", "--keep=9"))
    codes, texts = ranks.wait()
    assert codes == [0, 0], "\n".join(texts)
    assert "checkpoint is damaged" in texts[0] and "resumed after step 8" in texts[0]
    assert f"going on from {out / 'checkpoint-000000008'}" in texts[0]
    same_run(out, finished)


FULL = """
from training.monitor import Monitor
import torch.distributed.checkpoint as dcp
def written(self, *rest, do=dcp.FileSystemWriter.write_data):
    if full and rank == 1:
        raise OSError(28, "No space left on device", "/disk")
    return do(self, *rest)
def stepped(self, step, *rest, do=Monitor.step):
    global full
    full = step + 1 in (4, 6)
    do(self, step, *rest)
full = False
dcp.FileSystemWriter.write_data, Monitor.step = written, stepped
"""


@pytest.mark.long
def test_a_run_of_which_one_rank_cannot_write_goes_on(few_photos, tmp_path, ranks, finished):
    out = tmp_path / "run"
    ranks.run(2, out, *command(few_photos, out, "--shard"), patch=FULL)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    failed = [error for line in lines for error in line["failed_saves"]]
    sentence = f"{out / 'checkpoint'} could not be saved: /disk: no space left on device"
    assert failed == [sentence] * 2
    states = [load_whole(run / "checkpoint") for run in (out, finished)]
    assert all(equal(states[0][key], states[1][key]) for key in KEYS)
    assert not list(out.glob("*.tmp"))


LOST = """
import signal
import torch.distributed.checkpoint as dcp
def written(self, *rest, do=dcp.FileSystemWriter.write_data):
    global saves
    saves += 1
    if saves == {save} and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return do(self, *rest)
saves = 0
dcp.FileSystemWriter.write_data = written
"""


@pytest.mark.long
@pytest.mark.parametrize("save", [1, 2, STEPS // 2])
def test_a_rank_lost_in_a_save_ends_the_other_with_a_sentence(
        few_photos, tmp_path, ranks, finished, save):
    """The last save is that at the run's end, for which it waits."""
    out, began = tmp_path / "run", time.monotonic()
    ranks.start(2, out, *command(few_photos, out, "--shard"), patch=LOST.format(save=save))
    codes, texts = ranks.wait()
    assert codes[1] == -signal.SIGKILL and codes[0] == 2, texts[0]
    assert time.monotonic() - began < 60
    assert "train.py: error: rank 0: " in texts[0] and "Traceback" not in texts[0], texts[0]
    assert "another rank is gone" in texts[0]
    kept = newest(out)
    assert [open_checkpoint(path)["step"] for path in kept] == [
        2 * (save - i) for i in (1, 2) if save > i]
    ranks.run(2, out, *command(few_photos, out, "--shard"))
    same_run(out, finished)
    assert not list(out.glob("*.tmp"))


@pytest.mark.long
def test_another_network_is_refused_in_a_sentence(few_photos, tmp_path, ranks, finished):
    for options in (["--arch=regnety_200mf", "--crops=2x64+2x48"], ["--head=32-24"]):
        ranks.start(2, tmp_path / "run", *command(few_photos, finished, "--shard", *options))
        codes, texts = ranks.wait()
        errors = [line for line in texts[0].splitlines() if "error" in line]
        assert codes == [2, 2] and "Traceback" not in texts[0]
        name = options[0].removeprefix("--").partition("=")[0]
        assert len(errors) == 1 and f"{name} was" in errors[0] and "another run" in errors[0]
