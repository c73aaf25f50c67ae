"""Each file of the method works copied alone into an empty folder; its docstring's usage runs."""
import shutil
import sys
from itertools import dropwhile, takewhile
from pathlib import Path

import pytest

from tests.helpers import ROOT, write_pictures

IMPORTS = """
import torch
from torch.nn import functional as F
from {name} import *
"""
SETUP = {
    "swav": "from torch import nn\n"
            "class Trunk(nn.Module):\n"
            "    num_features = 3\n"
            "    def forward(self, x): return x.mean((2, 3))\n"
            "trunk, large, small = Trunk(), torch.randn(4, 3, 8, 8), torch.randn(12, 3, 4, 4)\n",
    "larc": "model = torch.nn.Linear(3, 2)\nloss = model(torch.ones(1, 3)).sum()\n",
}


def usage(name):
    """The first indented lines of a module's docstring: its usage."""
    lines = (ROOT / f"{name}.py").read_text().split('"""')[1].splitlines()
    indented = dropwhile(lambda line: not line.startswith("    "), lines)
    return "\n".join(line[4:] for line in takewhile(lambda line: line.startswith("    "), indented))


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder to import from, without the project's own or any module of it."""
    def modules_in(folder):
        return [name for name, module in sys.modules.items()
                if Path(getattr(module, "__file__", None) or "/").is_relative_to(folder)]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(
        path for path in sys.path if Path(path).resolve() != ROOT)])
    for name in modules_in(ROOT):
        monkeypatch.delitem(sys.modules, name)
    yield tmp_path
    for name in modules_in(tmp_path):
        del sys.modules[name]


@pytest.mark.parametrize("name", ["regnet", "sinkhorn", "swav", "multicrop", "larc"])
def test_a_file_of_the_method_works_alone(alone, name):
    write_pictures(alone, 1, ".jpg", (300, 200))
    (alone / "0000.jpg").rename(alone / "picture.jpg")
    needs = {name, *(["sinkhorn"] if name == "swav" else [])}
    for file in needs:
        shutil.copy(ROOT / f"{file}.py", alone)
    assert usage(name)
    exec(IMPORTS.format(name=name) + SETUP.get(name, "") + usage(name), {})
    for file in needs:
        assert Path(sys.modules[file].__file__).parent == alone
    loaded = {module.split(".")[0] for module in sys.modules}
    assert not loaded & {"data", "recipes", "train", "distributed"}
