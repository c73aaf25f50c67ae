"""The README's commands and snippets run as written, shortened by --steps."""
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_images import write_pictures

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
COMMANDS = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()
            if line.strip() and "pip install" not in line]
SHORT = {  # what a command is given so that it ends in seconds: less of the same
    "regnety_256gf": ["--arch=regnety_200mf", "--batch-size=4", "--crops=2x48+2x32", "--head=16-8",
                      "--prototypes=8", "--device=cpu"],
    "regnety_400mf": ["--batch-size=4", "--device=cpu"],
}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project beside the pictures its README speaks of, and a finished demo run."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    write_pictures(folder / "photos", 12)
    for split in ("train", "val"):
        for name in ("rose", "tulip"):
            write_pictures(folder / "flowers" / split / name, 4)
    run(folder, "python train.py --batch-size 8 --workers 0 --steps 2")
    run(folder, "python train.py --data photos/ --out runs/mine --batch-size 8 --workers 0 --steps 2")
    return folder


def run(folder, line):
    words = shlex.split(line, comments=True)
    launcher = {"python": [sys.executable],
                "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}[words[0]]
    words = ["2" if before == "--nproc_per_node" else word for before, word in zip(words, words[1:])]
    if "train.py" in words and "--steps" not in words:
        words += ["--steps", "2", "--workers", "0", "--out", f"runs/test{abs(hash(line))}"]
        words += [w for name, extra in SHORT.items() if name in line for w in extra]
    if "evaluate.py" in words:
        words += ["--workers", "0"]
    result = subprocess.run(launcher + words, cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, checkout):
    if "bench.py" in line:
        pytest.skip("a benchmark: minutes, and no result to check")
    output = run(checkout, line)
    if "evaluate.py" in line:
        assert output.splitlines()[-1].startswith("{")


@pytest.mark.parametrize("block", [block for kind, block in BLOCKS if kind == "python"],
                         ids=lambda block: block.splitlines()[-1][:30])
def test_snippet(block, checkout):
    result = subprocess.run([sys.executable, "-c", block], cwd=checkout, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_requirements_and_licence_are_as_the_readme_says():
    assert {re.split("[><=]", line)[0] for line in (ROOT / "requirements.txt").read_text().split()} == {
        "torch", "torchvision", "numpy", "pillow", "tqdm", "pytest"}
    assert (ROOT / "LICENSE").read_text().startswith("MIT")
