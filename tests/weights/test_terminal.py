"""weights/terminal.py: what all command lines share, and that all tools do have it."""
import argparse
import ast
import os
import re
import subprocess
import sys

import pytest

from data.stream import NoReadableImage
from tests.helpers import ROOT, environment, write_pictures
from weights.terminal import Text, number_in, one_sentence, reason

TOOLS = {"evaluate.py": ["evaluate.py"], "bench/__main__.py": ["-m", "bench"],
         "weights/__main__.py": ["-m", "weights"], "data/images.py": ["-m", "data.images"],
         "data/demo.py": ["-m", "data.demo"]}
CAUGHT = ("Caught NoReadableImage in DataLoader worker process 0.\nOriginal Traceback (most recent "
          "call last):\n  File \"x.py\", line 1, in y\ndata.stream.NoReadableImage: no image: a: b")


@pytest.mark.parametrize("error, sentence", [
    (ValueError("no such folder"), "no such folder"), (RuntimeError("one\ntwo"), "one"),
    (KeyError(), "KeyError"), (NoReadableImage(CAUGHT), "no image: a: b"),
    (PermissionError(13, "Permission denied", "a/b.txt"), "a/b.txt: permission denied"),
    (FileNotFoundError(2, "No such file or directory", b"b.txt"),
     "b.txt: no such file or directory"),
    (OSError(28, "No space left on device"), "no space left on device"),
    (OSError("no regular file"), "no regular file"),
    (ValueError("x is no run: [Errno 2] No such file: 'x'"), "x is no run: No such file: 'x'")])
def test_an_error_in_a_line_of_words(error, sentence, capsys):
    assert reason(error) == sentence
    if isinstance(error, KeyError):                     # a fault of the program's own: a traceback
        return
    with pytest.raises(SystemExit) as stop, one_sentence("tool"):
        raise error
    assert stop.value.code == 2 and capsys.readouterr().err == f"tool: error: {sentence}\n"


@pytest.mark.parametrize("argv, expected", [
    (["--size=8"], 8), (["--share=0"], 0.0), (["--share=0.5"], 0.5), (["--name=a b"], "a b"),
    ([], ""),
    (["--size=7"], "argument --size: '7': needs a whole number from 8 to 4,096"),
    (["--size=4097"], "'4097'"), (["--size=9.0"], "'9.0'"), (["--size=" + "9" * 5000], "'999"),
    (["--share=0.01"], "argument --share: '0.01': needs 0, or a number from 0.1 to 1"),
    (["--share=nan"], "'nan'"), (["--share=-inf"], "'-inf'"), (["--share="], "''"),
    (["--name="], "argument --name: is empty")])
def test_options_outside_their_range(argv, expected, capsys):
    parser = argparse.ArgumentParser("tool", usage="tool [options]", allow_abbrev=False)
    parser.add_argument("--size", type=number_in(int, 8, 4096))
    parser.add_argument("--share", type=number_in(float, 0.1, 1, or_else=0))
    parser.add_argument("--name", action=Text, default="")
    if not isinstance(expected, str) or expected in ("a b", ""):
        assert expected in vars(parser.parse_args(argv)).values()
        return
    with pytest.raises(SystemExit):
        parser.parse_args(argv)
    usage, sentence = capsys.readouterr().err.splitlines()
    assert usage == "usage: tool [options]" and expected in sentence


def with_closed_output(*command, **more):
    """What a program whose output nobody reads any more leaves: its status, and its stderr."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, *command], stdout=write, stderr=subprocess.PIPE,
                              text=True, env=environment(**more), cwd=ROOT, timeout=300)
    finally:
        os.close(write)
    return done.returncode, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("block", ["print(1)", "print('x' * 10 ** 6)", "print(1); sys.exit(2)"])
def test_a_tool_whose_reader_has_left_ends_quietly(block, unbuffered):
    """No traceback, and nothing of Python's own at its end."""
    script = (f"import sys\nfrom weights.terminal import one_sentence\n"
              f"with one_sentence('tool'):\n    {block}\nsys.exit(3)\n")
    status, error = with_closed_output("-c", script, PYTHONUNBUFFERED=unbuffered)
    assert (status, error) == (1, "")


@pytest.mark.long
@pytest.mark.parametrize("tool, argv", [
    ("weights/__main__.py", []), ("weights/__main__.py", ["--help"]),
    ("bench/__main__.py", ["order", "--repeats=1", "--out={folder}/bench.json"]),
    ("data/images.py", ["pack", "{folder}/photos", "{folder}/packed"]),
    ("evaluate.py", ["knn", "{folder}/trunk.pt", "--data={folder}/photos", "--size=32",
                     "--workers=2", "--device=cpu"])])
def test_all_tools_end_quietly(tool, argv, tmp_path):
    """And what evaluate.py has measured is kept: its file is written first."""
    from regnet import ARCHS, RegNet
    from weights.atomic import save
    save(tmp_path / "trunk.pt", RegNet(ARCHS["regnety_100mf"]).state_dict())
    for name in "ab":
        write_pictures(tmp_path / "photos" / name, 5)
    status, error = with_closed_output(*TOOLS[tool], *(x.format(folder=tmp_path) for x in argv),
                                       PYTHONUNBUFFERED="")
    assert status == 1 and not re.search("Traceback|Exception|Errno|rror:", error)
    assert (tmp_path / "results.jsonl").exists() == (tool == "evaluate.py")


@pytest.mark.parametrize("path", [*TOOLS, "recipes/command_line.py"])
def test_every_command_line_is_made_alike(path):
    """No abbreviations of options, a usage of one line; an error, and a closed pipe, as above."""
    nodes = [*ast.walk(ast.parse((ROOT / path).read_text()))]
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    for call in calls:
        if getattr(call.func, "attr", "") in ("ArgumentParser", "add_parser"):
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            assert given["allow_abbrev"].value is False and len(given["usage"].value) < 80
    if path in TOOLS:
        main, = [node for node in nodes if getattr(node, "name", "") == "main"]
        block = main.body[-1]
        assert len(main.body) == 1 and isinstance(block, ast.With)
        assert block.items[0].context_expr.func.id == "one_sentence"
