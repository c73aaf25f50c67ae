"""distributed/ranks.py: how ranks leave."""
import pytest

from distributed import ranks


class Left(BaseException):
    pass


@pytest.mark.parametrize("error, code", [(SystemExit(2), 2), (RuntimeError("out of memory"), 1)])
def test_a_rank_with_an_error_does_not_wait_for_nccl(monkeypatch, capsys, error, code):
    """Its process ends before the group is destroyed; the error has been printed."""
    def leave(status):
        raise Left(status)

    def wait():
        raise AssertionError("waits for the other ranks")

    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.setattr(ranks.dist, "barrier", wait)
    monkeypatch.setattr(ranks.os, "_exit", leave)
    destroyed = []
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: destroyed.append(1))
    with pytest.raises(Left, match=str(code)):
        with ranks.leave_together():
            raise error
    assert ("out of memory" in capsys.readouterr().err) == isinstance(error, RuntimeError)


def test_ranks_without_an_error_wait_and_leave(monkeypatch):
    done = []
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "barrier", lambda: done.append("waited"))
    monkeypatch.setattr(ranks.dist, "destroy_process_group", lambda: done.append("left"))
    with ranks.leave_together():
        pass
    assert done == ["waited", "left"]
