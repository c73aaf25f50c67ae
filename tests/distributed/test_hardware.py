"""distributed/hardware.py: a rank's share of its machine's processors."""
import pytest

from distributed.hardware import share_of

ALL = set(range(64))


def ranks(*affinities, machine="one"):
    return [(machine, set(affinity)) for affinity in affinities]


@pytest.mark.parametrize("mine, affinities, share", [
    (ALL, ranks(*[ALL] * 8), 8),                                            # not bound
    (range(8, 16), ranks(*(range(8 * i, 8 * i + 8) for i in range(8))), 8),     # to its own
    (range(32), ranks(*[range(32)] * 4, *[range(32, 64)] * 4), 8),          # to one of two sockets
    (ALL, ranks(*[ALL] * 8) + ranks(*[ALL] * 8, machine="two"), 8),         # two machines
    (ALL, ranks(*[ALL] * 2, range(32)), 32 // 3 + 16),                      # some bound, some not
    ({3}, ranks(*[{3}] * 8), 1),
    (range(49), ranks(*[range(49)] * 49), 1)])
def test_a_machine_is_divided_once(mine, affinities, share):
    assert share_of(("one", set(mine)), affinities) == share
