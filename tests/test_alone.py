"""The usage in a docstring runs as it stands, imports included, in an empty folder.

That of each file of the method runs with a copy of this file alone. Of the other folders' files it
runs where it needs no images, run or download: those of EXAMPLES; elsewhere it is a fragment, or a
command of the shell.
"""
import ast
import re
import shutil
import sys
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT

METHOD = ["regnet", "sinkhorn", "swav", "multicrop", "larc", "methods/supervised",
          *(pytest.param(f"methods/{name}", marks=pytest.mark.long) for name in (
              "simclr", "mocov2", "byol", "barlow_twins", "dino", "deepcluster_v2"))]
EXAMPLES = ["evaluation/knn", "evaluation/linear", "evaluation/metrics", "figures/sheets",
            "weights/atomic", "weights/names"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On tensors as small as these it is as fast, and on a busy machine several times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def usage(name):
    """The first indented lines of a module's docstring, up to a command of the shell."""
    lines = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text())).splitlines()
    indented = dropwhile(lambda line: not line.startswith("    "), lines)
    code = takewhile(lambda line: re.match("    (?!python )", line), indented)
    return "\n".join(line[4:] for line in code)


def run_usage(name):
    """The shapes that its comments give to what a line assigns are right, too."""
    code, names = usage(name), {}
    assert f"from {name.replace('/', '.')} import" in code
    exec(code, names)
    shapes = re.findall(r"^(\w+)(?:, \w+)* = .*# \((\d+(?:, \d+)*)\)", code, re.M)
    for variable, shape in shapes:
        assert list(names[variable].shape) == [int(size) for size in shape.split(", ")]


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder to import from, without the project's own or any module of it."""
    ours = {path.stem for path in ROOT.iterdir() if not path.name.startswith(".")}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(
        path for path in sys.path if Path(path).resolve() != ROOT)])
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            del sys.modules[name]


@pytest.mark.parametrize("name", METHOD)
def test_a_file_of_a_method_works_alone(alone, name):
    needs = {name, *(["sinkhorn"] if name == "swav" else [])}
    for file in needs:
        (alone / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / f"{file}.py", alone / f"{file}.py")
    run_usage(name)
    for file in needs:
        assert Path(sys.modules[file.replace("/", ".")].__file__) == alone / f"{file}.py"
    loaded = {module.split(".")[0] for module in sys.modules}
    assert not loaded & {"data", "recipes", "train", "distributed"}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_in_an_empty_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_usage(name)
