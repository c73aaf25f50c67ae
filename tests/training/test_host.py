"""The host waits for the device once a step: what it reads of tensors is counted."""
import subprocess
import sys
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train
from data.images import open_images
from data.loader import Augment, Loader
from recipes.command_line import configure, parse_arguments
from tests.helpers import ROOT, SMALL, run, run_ranks
from training import rollback
from training.rollback import Rollback
from weights.atomic import load

ATEN = torch.ops.aten
NAMES = {"tolist", "cpu", "numpy", "__array__"}
# of values, or of a size that depends on them; item(), bool() and float() are the first
OPERATORS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN._unique2, ATEN.equal}


class Names(TorchFunctionMode):
    """On a CPU these are no operators."""
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in NAMES
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        indices = args[1] if function.overloadpacket in (ATEN.index, ATEN.index_put_) else ()
        masked = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += masked or function.overloadpacket in OPERATORS
        return function(*args, **(kwargs or {}))


class Reads:
    """Counts what would wait for a GPU."""

    def __enter__(self):
        self.modes = Names(), Operators()
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    @property
    def count(self):
        return sum(mode.count for mode in self.modes)

    def without(self, method):
        """The method, not counted."""
        def uncounted(*args, **kwargs):
            before = [mode.count for mode in self.modes]
            try:
                return method(*args, **kwargs)
            finally:
                for mode, count in zip(self.modes, before):
                    mode.count = count
        return uncounted


@pytest.mark.parametrize("read", [
    lambda x: x.tolist(), lambda x: bool(x[0] > 0), lambda x: x[x > 1], lambda x: x.cpu(),
    lambda x: x.unique(), lambda x: x[0].item(), lambda x: 1 + float(x[0]), lambda x: x.numpy(),
    lambda x: None if x.sum() else 1, lambda x: range(3)[x[1].int()],
    lambda x: x.index_put_([x > 1], x[0])])
def test_reads_are_counted(read):
    x = torch.arange(3.0)
    with Reads() as reads:
        x * 2
        assert reads.count == 0
        reads.without(read)(x)
        assert reads.count == 0
        read(x)
    assert reads.count == 1


def reads_of_steps(rank, photos, out, options, more=lambda x: None):
    """What the host reads in each step. Left out is what is no device's: decoding, the parameters
    of the augmentation, signals. more(loss): done in each step besides."""
    counts = []

    def remember(self):
        counts.append(reads.count)
        return before(self)

    def vote(self, step, loss, *args):
        more(loss)
        return voted(self, step, loss, *args)

    before, voted = Rollback.remember, Rollback.vote
    with Reads() as reads, mock.patch.multiple(Rollback, remember=remember, vote=vote), \
            mock.patch.object(rollback, "on_any_rank", reads.without(rollback.on_any_rank)), \
            mock.patch.object(Loader, "fetch", reads.without(Loader.fetch)), \
            mock.patch.object(Augment, "__call__", reads.without(Augment.__call__)):
        given = parse_arguments([f"--data={photos}", f"--out={out}", *SMALL, "--steps=6",
                                 "--log-every=100", "--save-every=100", *options])
        images, world = open_images(photos), dist.get_world_size() if dist.is_initialized() else 1
        train.train(train.setup(configure(given, world, images), images))
    return [after - before for before, after in zip(counts, counts[1:])]


SYNC_BN = ["--head-bn", "--sync-bn-group=2", "--queue=8"]


@pytest.mark.parametrize("options", [pytest.param(SYNC_BN, marks=pytest.mark.long),
                                     [*SYNC_BN, "--micro-batch=2"]])
def test_the_host_waits_once_a_step(few_photos, tmp_path, options):
    assert reads_of_steps(0, str(few_photos), tmp_path / "run", options) == [1] * 5


@pytest.mark.long
def test_one_more_read_is_found(few_photos, tmp_path):
    assert reads_of_steps(0, str(few_photos), tmp_path / "run", SYNC_BN, Tensor.item) == [2] * 5


@pytest.mark.long
@pytest.mark.parametrize("options", [SYNC_BN, [*SYNC_BN, "--micro-batch=1"]])
def test_of_several_ranks_too(few_photos, tmp_path, options):
    assert run_ranks(reads_of_steps, tmp_path, str(few_photos), str(tmp_path / "run"), options) == [
        [1] * 5] * 2


@pytest.mark.cuda
@pytest.mark.parametrize("options", [SYNC_BN, [*SYNC_BN, "--micro-batch=2"]])
def test_a_gpu_is_waited_for_once_a_step(few_photos, tmp_path, options):
    """By PyTorch's own count."""
    counts, before = [], Rollback.remember

    def remember(self):
        torch.cuda.set_sync_debug_mode("warn")
        counts.append(len(caught))
        return before(self)

    with warnings.catch_warnings(record=True) as caught, \
            mock.patch.object(Rollback, "remember", remember):
        warnings.simplefilter("always")
        try:
            run(few_photos, tmp_path / "run", "--device=cuda", "--steps=8", "--log-every=100",
                "--save-every=100", *options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    steps = [after - before for before, after in zip(counts, counts[1:])]
    assert steps[2:] == [1] * 5, [str(warning.message) for warning in caught]


@pytest.mark.cuda
def test_ranks_on_nccl_train_save_and_resume(few_photos, tmp_path):
    """Two GPUs, or what there is: SyncBatchNorm, accumulation, a save, and the run goes on."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={min(2, torch.cuda.device_count())}", "train.py",
               f"--data={few_photos}", f"--out={tmp_path / 'run'}", *SMALL[:-1], *SYNC_BN,
               "--device=cuda", "--micro-batch=1"]
    for steps, code in ((2, 0), (4, 0)):
        done = subprocess.run([*command, f"--steps={steps}"], cwd=ROOT, capture_output=True,
                              text=True, timeout=300)
        assert done.returncode == code, done.stderr
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 4
