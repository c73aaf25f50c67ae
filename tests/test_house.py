"""The layout: what lies at the top, which way imports go, how long files and functions are."""
import ast
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

METHOD = ["regnet", "sinkhorn", "swav", "multicrop", "larc"]
# an arrow runs from what is used to its users: a room imports itself and what it may use, no other
ARROWS = {
    **{name: {"sinkhorn"} if name == "swav" else set() for name in METHOD},
    "weights": {*METHOD},                   # works when it is copied alone: all others may use it
    **{name: {*METHOD, "weights"} for name in ("data", "distributed")},
}
ARROWS["figures"] = {*METHOD, "weights", "data"}            # the tour shows the built-in images
ARROWS["methods"] = {*ARROWS}
ARROWS["recipes"] = ARROWS["evaluation"] = {*ARROWS}
ARROWS["training"] = {*ARROWS}
ARROWS["train"] = {*ARROWS} - {"train"}
ARROWS["evaluate"] = {*ARROWS} - {"training", "train"}
ARROWS["bench"] = {*ARROWS} - {"evaluate"}
ARROWS["hubconf"] = {"regnet", "weights"}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py")
               if not {".venv", "runs", "sets", "tests"} & set(path.relative_to(ROOT).parts))
# training reaches evaluation for the probe and the closing table alone; all in all for these names
EVALUATION_IN_TRAINING = {"evaluation.probe", "evaluation.summary"}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules that a file imports, at the top or anywhere inside."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_top_holds_the_method_and_two_programs():
    """And hubconf.py, which torch.hub finds nowhere else."""
    top = {*METHOD, "train", "evaluate", "hubconf"}
    assert {path.stem for path in ROOT.glob("*.py")} == top
    rooms = {path.parts[0] for path in FILES if len(path.parts) > 1}
    assert rooms == {*ARROWS} - top


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_arrows(path):
    room = path.parts[0].removesuffix(".py")
    used = {name.partition(".")[0] for name in imported(path)} & {*ARROWS}
    assert used - {room} <= ARROWS[room]
    if room in ("training", "train"):
        reached = {name for name in imported(path) if name.startswith("evaluation.")}
        assert {".".join(name.split(".")[:2]) for name in reached} <= EVALUATION_IN_TRAINING
    if room in METHOD:
        assert not imported(path) & {"argparse", "os"}


@pytest.mark.parametrize("path", [path for path in FILES if path.parts[0] == "methods" and
                                  path.stem not in ("__init__", "build")], ids=str)
def test_a_method_is_one_short_file_that_needs_torch_alone(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 150
    assert {name.partition(".")[0] for name in imported(path)} <= {
        "torch", *sys.stdlib_module_names}
    assert "\nDiffers from the reference (" in text and "\nShapes: " in text


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_fits_on_a_few_screens_and_a_function_on_one(path):
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= (260 if str(path) == "train.py" else 400)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"
    if path.name == "__init__.py":
        assert len(ast.parse(text).body) == 1, "a docstring, and nothing that is run"
    else:
        assert ast.get_docstring(ast.parse(text)), "a file opens with its contract"


def test_the_loop_fits_on_one_screen():
    functions = {node.name: node for node in ast.parse((ROOT / "train.py").read_text()).body
                 if isinstance(node, ast.FunctionDef)}
    lines = [functions[name].end_lineno - functions[name].lineno + 1
             for name in ("step_gradients", "train")]
    assert sum(lines) <= 80


def test_the_benchmark_calls_the_products_own_step():
    assert "train.step_gradients" in imported(Path("bench/step.py"))
