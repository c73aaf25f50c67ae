"""Signals: a run that is asked to end saves, and leaves with status 75.

    with Signals() as signals:
        for step in steps:
            ...
            if signals.seen:            # the name of the first signal, or None
                save()
                raise Interrupted(f"{signals.seen} after step {step + 1}")

A step of a single micro-batch is finished first. Of one of several the work so far is dropped, so
that a run obeys within the time of a micro-batch (rollback.py).
"""
import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

INTERRUPTED = 75            # exit status of a run that a signal has ended (sysexits: try again)
NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
GRACE = 5.0                 # seconds
PR_SET_PDEATHSIG = 1        # of Linux' prctl: the signal that comes when the parent dies


class Stop(Exception):
    """The run cannot go on; the message says why, and what to try."""


class Interrupted(Exception):
    """A signal came, and the run was saved."""


class StepDropped(Exception):
    """A signal came between two micro-batches of a step."""


class Signals:
    """SIGTERM, SIGINT, SIGHUP (a closed terminal) and SIGUSR1 are noted in `seen`, and answered
    with a line. A second one has its default effect. Under nohup, SIGHUP stays ignored.

    Under torchrun a second signal counts only after GRACE seconds, for a scheduler may signal both
    torchrun and its ranks, and torchrun passes on what it gets. If torchrun dies, its ranks get a
    SIGTERM (Linux).
    """

    def __init__(self):
        self.seen, self.before, self.when = None, {}, 0.0
        self.grace = GRACE if "TORCHELASTIC_RUN_ID" in os.environ else 0.0

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():       # elsewhere it is an error
            if self.grace and sys.platform == "linux":
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            for name in NAMES:
                number = getattr(signal, name, None)
                if number and not (name == "SIGHUP"
                                   and signal.getsignal(number) is signal.SIG_IGN):
                    self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _note(self, number, frame) -> None:
        if self.seen is None:
            self.seen, self.when = signal.Signals(number).name, time.monotonic()
            if int(os.environ.get("RANK", 0)) == 0:
                with contextlib.suppress(OSError):          # the terminal may be gone
                    os.write(2, f"\n{self.seen}: saving after this step, or micro-batch of it; "
                                "again to leave at once\n".encode())
        elif time.monotonic() - self.when >= self.grace:
            self.__exit__()
            os.kill(os.getpid(), number)


def ignore_signals(worker: int) -> None:
    """worker_init_fn of a DataLoader: a signal to the whole process group must not end the workers
    of a run that wants to finish its step; but they end with the run, however it dies (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
