"""Terminal: a run outlives the terminal, or the pipe, that it writes to.

    outlive_terminal()                      # then `python train.py | head -2`, or a closed ssh

Python ends a program whose output has nowhere to go. A run writes into nothing from then on; its
log.jsonl is written as before.
"""
import os
import sys


class Output:
    """A text stream that goes on, into nothing, once the other end is closed."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action) -> None:
        try:
            action()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)


def outlive_terminal() -> None:
    """For this process; its children inherit the same streams, and must see to themselves."""
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
