"""train.py --init: a run starts from a file of weights. (Few imports: each rank repeats them.)"""
import os

import pytest
import torch

from regnet import ARCHS, RegNet
from tests.helpers import run, run_ranks, write_pictures
from training.checkpoint import start_from
from weights.names import from_ours


def test_a_run_starts_from_weights(tmp_path, put, capsys):
    photos = tmp_path / "photos"
    options = ["--arch=regnety_200mf", "--crops=2x64+2x48", "--lr=0", "--steps=1"]
    write_pictures(photos, 8)
    source = put(RegNet(ARCHS["regnety_400mf"]).state_dict())
    with pytest.raises(SystemExit):
        run(photos, tmp_path / "wrong", *options, f"--init={source}")
    assert "holds regnety_400mf, the model is regnety_200mf" in capsys.readouterr().err
    trunk = RegNet(ARCHS["regnety_200mf"])
    source = put(from_ours(trunk.state_dict(), "pycls"))
    run(photos, tmp_path / "run", *options, f"--init={source}")
    assert "the trunk; new: head, prototypes" in capsys.readouterr().out
    trained = torch.load(tmp_path / "run" / "trunk.pt")
    for name, value in trunk.named_parameters():                    # lr 0: as they came
        assert torch.equal(trained[name], value), name


def starts(rank, folder):
    """What --init makes of a good and a bad file on this rank: the stem's sum, and the error."""
    os.environ["LOCAL_RANK"] = str(rank)
    trunk = RegNet(ARCHS["regnety_200mf"])
    start_from(f"{folder}/good.pt", trunk, rank)
    try:
        start_from(f"{folder}/bad.pt", trunk, rank)
    except ValueError as error:
        return trunk.stem[0].weight.sum().item(), str(error)


@pytest.mark.long
def test_two_ranks_start_alike_or_fail_alike(tmp_path, put):
    trunk = RegNet(ARCHS["regnety_200mf"])
    put(trunk.state_dict(), "good.pt")
    (tmp_path / "bad.pt").write_bytes(b"no")
    first, second = run_ranks(starts, tmp_path, str(tmp_path))
    assert first == second and first[0] == trunk.stem[0].weight.sum().item()
    assert "bad.pt is damaged" in first[1]
