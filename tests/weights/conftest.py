"""What the tests of this room share: the tiny RegNets of regnet_tiny.pt, and files of weights."""
import pytest
import torch

from regnet import RegNet, RegNetParams
from swav import SwAV
from tests.helpers import ORACLES

TINY = torch.load(ORACLES / "regnet_tiny.pt", weights_only=True)


def _tiny(kind="regnet_y"):
    torch.manual_seed(1)
    return RegNet(RegNetParams(**TINY[kind]["params"])).eval()


@pytest.fixture
def tiny():
    """tiny(kind) -> the trunk, with random weights."""
    return _tiny


@pytest.fixture
def tiny_swav():
    """tiny_swav(kind) -> a SwAV on it."""
    return lambda kind="regnet_y": SwAV(
        _tiny(kind), TINY[kind]["head_dims"][1:], TINY[kind]["num_prototypes"]).eval()


@pytest.fixture
def put(tmp_path):
    """put(content, name) -> the path of a file with that content."""
    def write(content, name="file.pt"):
        torch.save(content, tmp_path / name)
        return tmp_path / name
    return write
