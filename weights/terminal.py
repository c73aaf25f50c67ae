"""Terminal: what the command lines of all programs share: ranges, one sentence for an error, pipes.

    parser.add_argument("--size", type=number_in(int, 8, 4096))
    with one_sentence("evaluate.py"):                   # around all that a tool's main does
        raise ValueError("no such folder")              # evaluate.py: error: no such folder
    outlive_terminal()                                  # train.py: goes on without its terminal

Needs Python alone. It is in this folder because this one works without the others.
"""
import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def one_sentence(program: str) -> Iterator[None]:
    """An error of the block is one sentence on stderr, and exit status 2. Where the output's reader
    has left (`| head`) the program ends without a word, with status 1."""
    try:
        try:
            yield
        finally:
            print(end="", flush=True)           # after --help too
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)          # Python flushes again at its end
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        sys.exit(1)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        print(f"{program}: error: {reason(error)}", file=sys.stderr)
        sys.exit(2)


def reason(error: BaseException) -> str:
    """An error in one line of words: without the operating system's number, without the traceback
    that the error of a worker process carries."""
    if isinstance(error, OSError) and error.strerror:
        words = str(error.strerror)
        words = words[:1].lower() + words[1:]
        return words if error.filename is None else f"{os.fsdecode(error.filename)}: {words}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if worker := re.match(r"Caught (\w+) in \w+ worker", lines[0]):
        lines = [re.sub(rf"^[\w.]*{worker[1]}: ", "", lines[-1])]
    return re.sub(r"\[(Errno|WinError) -?\d+\] ", "", lines[0])


def span(low: float, high: float) -> str:
    """A range in words: "1 to 4,096"."""
    return " to ".join(f"{x:,}" if isinstance(x, int) else f"{x:g}" for x in (low, high))


def number_in(kind: type, low: float, high: float, or_else: float | None = None) -> Callable:
    """For argparse: text -> an int or float from low to high, or or_else."""
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high and value != or_else:
            what = "a whole number" if kind is int else "a number"
            also = "" if or_else is None else f"{or_else:g}, or "
            raise argparse.ArgumentTypeError(f"{text!r}: needs {also}{what} from "
                                             f"{span(low, high)}")
        return value
    return parse


class Text(argparse.Action):
    """For argparse: text that is not empty, as that of an unset variable is."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if "" in (values if isinstance(values, list) else [values]):
            raise argparse.ArgumentError(self, "is empty: leave it out, or name something")
        setattr(namespace, self.dest, values)


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
    """A run goes on without its terminal, or its pipe (`python train.py | head -2`): from then on
    it writes into nothing. For this process alone; its children inherit the streams as they were.
    """
    for number in range(3):         # one that is closed (`>&-`) would be the next file opened
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout, sys.stderr = (Output(stream or open(os.devnull, "w"))
                              for stream in (sys.stdout, sys.stderr))
