"""Each file of the method works copied alone into an empty folder; its docstring's usage runs."""
import os
import shutil
import subprocess
import sys
from itertools import dropwhile, takewhile

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


ALONE = """
import sys
for name, needs, script in {cases!r}:
    for file in needs:
        sys.modules.pop(file, None)
    sys.path[0] = name
    try:
        exec(script, {{}})
    except Exception as error:
        raise SystemExit(f"{{name}}: {{error!r}}")
    assert not {{"data", "recipes", "train"}} & set(sys.modules), name
    sys.path_importer_cache.clear()
"""


def test_the_files_of_the_method_work_alone(tmp_path):
    """Each in a folder that holds nothing else, one folder after the other."""
    write_pictures(tmp_path, 1, ".jpg", (300, 200))
    (tmp_path / "0000.jpg").rename(tmp_path / "picture.jpg")
    cases = []
    for name in ("regnet", "sinkhorn", "swav", "multicrop", "larc"):
        needs = [name, *(["sinkhorn"] if name == "swav" else [])]
        (tmp_path / name).mkdir()
        for file in needs:
            shutil.copy(ROOT / f"{file}.py", tmp_path / name)
        assert usage(name)
        cases.append((name, needs, IMPORTS.format(name=name) + SETUP.get(name, "") + usage(name)))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run([sys.executable, "-c", ALONE.format(cases=cases)], cwd=tmp_path,
                            env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
