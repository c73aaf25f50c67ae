"""distributed/agreement.py: one bit of one weight, on one rank of two."""
import os

import pytest
import torch
from torch import nn

import train
from data.images import open_images
from distributed import agreement
from distributed.fsdp import shard_mesh
from distributed.wrap import wrap
from recipes.command_line import configure, parse_arguments
from tests.helpers import SMALL, run_ranks, write_pictures
from tests.test_step import CPU, tiny
from weights.atomic import load


def flip(x, i, bit):
    """One bit of the i-th number, in place."""
    where = tuple(index.item() for index in torch.unravel_index(torch.tensor(i), x.shape))
    x.detach().view(agreement.INTEGERS[x.element_size()])[where] ^= 1 << bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_any_bit_changes_a_checksum(dtype):
    x = torch.arange(40).reshape(5, 8).to(dtype)
    sums = {agreement.checksum(x).item()}
    assert agreement.checksum(x.t()).item() in sums                 # in any layout
    for bit in range(8 * x.element_size() - 1):
        flip(x, 13, bit)
        sums.add(agreement.checksum(x).item())
        flip(x, 13, bit)
    assert len(sums) == 8 * x.element_size()


@pytest.mark.parametrize("ranks", [2, 5])
def test_the_first_tensor_and_the_rank_are_named(ranks, monkeypatch):
    """As gathered from models that take the ranks' places."""
    models = [tiny(head_bn=True) for _ in range(ranks)]

    def gather(parts, _):
        for part, model in zip(parts, models):
            part.copy_(torch.stack([*map(agreement.checksum,
                                         agreement.shared_tensors(model).values())]))

    monkeypatch.setattr(agreement, "rank_and_world", lambda: (0, ranks))
    monkeypatch.setattr(agreement.dist, "all_gather", gather)
    models[1].trunk.stem[1].running_mean.add_(1)                    # a rank's own
    assert agreement.disagreement(models[0]) == ""
    flip(models[1].prototypes.weight, 5, 0)
    flip(models[1].head[0].bias, 3, 30)
    told = agreement.disagreement(models[0])
    assert "head.0.bias of rank " in told and f"(2 of {len(gathered_names(models[0]))}" in told
    assert "rank 1 is" in told or ranks == 2
    models[1].trunk.stem[1].num_batches_tracked.add_(1)
    assert "(3 of " in agreement.disagreement(models[0])            # a buffer that must agree


def gathered_names(model):
    return [name for name in model.state_dict() if "running" not in name]


def test_a_single_rank_agrees_with_itself():
    assert agreement.disagreement(nn.Linear(2, 2)) == ""


def sharded_and_flipped(rank, group):
    """What is said of a sharded network: as it is, then with another bit in a part of rank 1, in
    its whole prototypes, and in rank 1's running statistics, which are its own."""
    model = tiny()
    wrap(model, CPU, mesh=shard_mesh(CPU, group))
    told = [agreement.disagreement(model)]
    for x, i, bit in ((model.trunk.stem[0].weight.to_local(), 4, 0),
                      (model.prototypes.weight, 5, 30), (model.trunk.stem[1].running_mean, 0, 3)):
        if rank == 1:
            flip(x, i, bit)
        told.append(agreement.disagreement(model))
        if rank == 1:
            flip(x, i, bit)
    return told


@pytest.mark.long
@pytest.mark.parametrize("group, world", [(2, 4), (0, 2)])
def test_replicas_of_shards_are_compared(group, world, tmp_path):
    """On 4 ranks in groups of 2, a part that is not that of the other group; where there is one
    copy, its parts differ, and none is compared."""
    ranks = run_ranks(sharded_and_flipped, tmp_path, group, world=world)
    assert all(told == ranks[0] for told in ranks)
    sound, part, prototypes, own = ranks[0]
    assert sound == own == "" and "prototypes.weight of rank " in prototypes
    if group:       # of two that differ none is usual
        assert "trunk.stem.0.weight of rank 1 " in part or "trunk.stem.0.weight of rank 3 " in part
        assert "prototypes.weight of rank 1 " in prototypes and "(1 of " in part
    else:
        assert part == ""


def drifting(rank, photos, out):
    """Why a run ends of which rank 1 has another bit after its fourth step."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    images = open_images(photos)
    given = parse_arguments([f"--data={photos}", f"--out={out}", *SMALL, "--steps=8",
                             "--save-every=1"])
    run = train.setup(configure(given, 2, images), images)
    after_step = run.method.after_step

    def drift(step):
        after_step(step)
        if rank == 1 and step == 3:
            flip(run.method.trunk.stem[0].weight, 0, 0)

    run.method.after_step = drift
    try:
        train.train(run)
    except train.Stop as stop:
        return str(stop)


@pytest.mark.long
def test_a_run_ends_when_a_bit_differs(tmp_path):
    write_pictures(tmp_path / "photos", 11)
    told, other = run_ranks(drifting, tmp_path, str(tmp_path / "photos"), str(tmp_path / "run"))
    assert told == other and "trunk.stem.0.weight of rank" in told and "at step 4" in told
    assert load(tmp_path / "run" / "checkpoint.pt")["step"] == 3
