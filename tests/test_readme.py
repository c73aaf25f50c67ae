"""The README's and the docs' commands and snippets run as written, shortened by --steps.

All that start a process are long; quick are one snippet, in this process, and the requirements."""
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from data.images import open_images
from data.shards import pack
from tests.helpers import ROOT, environment, write_pictures

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
TEXTS = {page: (ROOT / page).read_text() for page in PAGES}
SHORT = {  # what a command is given so that it ends in seconds: less of the same
    "regnety_256gf": ["--arch=regnety_200mf", "--batch-size=4", "--crops=2x48+2x32", "--head=16-8",
                      "--prototypes=8", "--device=cpu"],
    "regnety_400mf": ["--batch-size=4", "--device=cpu"],
}


def blocks(page, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```", TEXTS[page], re.M | re.S)


COMMANDS, SEEN = [], set()
for page in PAGES:
    lines = [line for block in blocks(page, "sh") for line in block.splitlines() if line.strip()]
    new = [line for line in dict.fromkeys(lines) if line not in SEEN and "pip install" not in line]
    COMMANDS += new
    SEEN |= set(new)
SNIPPETS = [block for page in PAGES for block in blocks(page, "python")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the project beside the pictures its README speaks of, and a finished demo run."""
    folder = tmp_path_factory.mktemp("checkout")
    for file in ROOT.glob("*.py"):
        shutil.copy(file, folder)
    for room in ROOT.glob("*/__init__.py"):
        if room.parent.name != "tests":
            shutil.copytree(room.parent, folder / room.parent.name,
                            ignore=shutil.ignore_patterns("__pycache__"))
    for name, many, few in (("demo", '"train": 4096, "val": 1024', '"train": 240, "val": 96'),
                            ("scenes", '"train": 2000, "val": 300', '"train": 200, "val": 4')):
        path = folder / "data" / f"{name}.py"           # fewer images, the same in all else
        assert path.read_text().count(f"SPLITS = {{{many}}}") == 1
        path.write_text(path.read_text().replace(many, few))
    write_pictures(folder / "photos", 12)
    for split in ("train", "val"):
        for name in ("rose", "tulip"):
            write_pictures(folder / "flowers" / split / name, 4)
    pack(open_images(folder / "photos"), folder / "shards", 10 ** 4)
    short = "--batch-size 8 --workers 0 --steps 2"
    lines = f"python train.py {short}", f"python train.py --data photos/ --out runs/mine {short}"
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda line: run(folder, line), lines))
    return folder


def run(folder, line):
    words = shlex.split(line, comments=True)
    launcher = {"python": [sys.executable], "torchrun": [
        sys.executable, "-m", "torch.distributed.run", "--standalone"]}[words[0]]
    words = ["2" if before == "--nproc_per_node" else word
             for before, word in zip(words, words[1:])]
    if "train.py" in words and not {"--steps", "--plan"} & set(words):
        words += ["--steps", "2", "--workers", "0", "--out", f"runs/test{abs(hash(line))}"]
        words += [w for name, extra in SHORT.items() if name in line for w in extra]
    if "evaluate.py" in words:
        words += ["--workers", "0"] + ["--epochs", "2"] * ("finetune" in words)
        words += ["--steps", "2"] * ("detect" in words)
    result = subprocess.run(launcher + words, cwd=folder, capture_output=True, text=True,
                            timeout=300, env=environment(PYTHONPATH=""))
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.long
@pytest.mark.parametrize("line", COMMANDS)
def test_command(line, checkout):
    if "-m bench" in line:
        pytest.skip("a benchmark: minutes, and no result to check")
    if " detect " in line:
        pytest.importorskip("faster_coco_eval")
    output = run(checkout, line)
    if "evaluate.py" in line:
        assert output.splitlines()[-1].startswith("{")


@pytest.mark.long
@pytest.mark.parametrize("block", SNIPPETS, ids=lambda block: block.splitlines()[-1][:30])
def test_snippet(block, checkout):
    result = subprocess.run([sys.executable, "-c", block], cwd=checkout, capture_output=True,
                            text=True, env=environment(PYTHONPATH=""))
    assert result.returncode == 0, result.stderr


def test_a_step_of_your_own():
    block, = (block for block in blocks("README.md", "python") if "LARC" in block)
    exec(block, {})


@pytest.mark.long
def test_the_slurm_script_trains_on_two_machines(checkout, tmp_path):
    """Both of them this one: srun and scontrol are stand-ins, torchrun's two agents are real."""
    script = next(block for page in PAGES for block in blocks(page, "bash") if "#SBATCH" in block)
    assert len(script.splitlines()) < 20
    for name, text in (("scontrol", "echo localhost"),
                       ("srun", 'for _ in 1 2; do "$@" & done; wait -n && wait -n'),
                       ("torchrun", f'exec {sys.executable} -m torch.distributed.run "$@"')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        port = listener.getsockname()[1]
    out = tmp_path / "run"
    short = f"{out} --steps 2 --workers 0 --micro-batch 1 " + " ".join(SHORT["regnety_256gf"])
    for old, new in {":29500": f":{port}", "--nproc_per_node 8": "--nproc_per_node 1",
                     "/shared/photos": "photos", "/shared/runs/256gf": short}.items():
        assert old in script
        script = script.replace(old, new)
    result = subprocess.run(["bash", "-c", script], cwd=checkout, capture_output=True, text=True,
                            timeout=300, env=os.environ | {
                                "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
                                "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "7",
                                "SLURM_JOB_NODELIST": "node[1-2]", "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    assert "batch 4 = 2 ranks x 2 x 1" in result.stdout and result.stdout.count("recipe") == 1
    assert (out / "trunk.pt").exists()


def test_the_words_of_the_method_are_explained_before_they_are_used():
    before, explained = TEXTS["README.md"].split("\nThe K *prototypes* are ")
    assert not re.findall(r"\bprototypes?\b|\bcodes?\b|\bK\b", before)
    explained = " ".join(explained.split("\n\n")[0].split())
    assert len(re.findall(r"\.( |$)", explained)) == 2, "two sentences"
    for words in ("learned unit vectors", "the *code* of a crop is its soft assignment to them",
                  "K numbers that sum to one", "Sinkhorn-Knopp", "know nothing", "loss ln K"):
        assert words in explained


def test_requirements_and_licence_are_as_the_readme_says():
    needed = (ROOT / "requirements.txt").read_text().split()
    assert {re.split("[><=]", line)[0] for line in needed} == {
        "torch", "torchvision", "numpy", "pillow", "tqdm", "pytest"}
    assert (ROOT / "LICENSE").read_text().startswith("MIT")


@pytest.mark.parametrize("page, most", [("README.md", 170), ("CONTRIBUTING.md", 40), *(
    (page, 200) for page in PAGES[1:])])
def test_pages_are_short_and_name_files_that_are_there(page, most):
    text = (ROOT / page).read_text()
    assert len(text.splitlines()) <= most
    for target in re.findall(r"""(?:\]\(|src=")(?!http)([^)"#]+)""", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
    for room, name in re.findall(r"`((?:[a-z_]+/)+)([a-z_]+\.\w+)`", text):
        assert room.startswith("runs/") or (ROOT / room / name).exists(), f"{page}: {room}{name}"
