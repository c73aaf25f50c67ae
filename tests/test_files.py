"""Every file that a command writes: one of the user's by that name is refused, and stays.

The files of a run's folder are in training/test_resume.py.
"""
import json

import pytest

import bench.__main__
import data.demo
import data.images
import evaluate
import weights.__main__
from methods.build import build_method
from recipes.command_line import configure
from swav import SwAV
from tests.helpers import write_pictures
from weights.atomic import load, save

EVALUATE = ["--arch=regnety_100mf", "--size=32", "--workers=0", "--device=cpu"]
FEATURES = [evaluate.main, "features", "random", *EVALUATE, "--data={photos}", "--out={out}/f.npy"]
FINETUNE = [evaluate.main, "finetune", "random", *EVALUATE, "--data={sets}", "--out={out}",
            "--epochs=1", "--batch-size=2", "--recipe=finetune"]
CLUSTERS = [evaluate.main, "clusters", "{model}", *EVALUATE, "--data={photos}"]
KNN = [evaluate.main, "knn", "random", *EVALUATE, "--data={sets}", "--sheet={out}/knn.png"]
WRITTEN = [                             # the file, and the command that would write it
    *((f"f{suffix}", FEATURES) for suffix in (".npy", ".ok.npy", ".txt", ".json")),
    *((name, FINETUNE) for name in ("checkpoint.pt", "best.pt", "last.pt", "config.json")),
    ("clusters.csv", [*CLUSTERS, "--out={out}/clusters.csv"]),
    ("gallery", [*CLUSTERS, "--html={out}/gallery"]),
    ("clusters.png", [*CLUSTERS, "--out={out}/new.csv", "--sheet={out}/clusters.png"]),
    ("knn.png", KNN),
    *((name, [weights.__main__.main, "{model}", "--to", what, f"{{out}}/{name}"])
      for what, name in (("timm", "out.pth"), ("hf", "hf"), ("onnx", "out.onnx"),
                         ("card", "card.md"))),
    ("000000.tar", [data.images.main, "pack", "{photos}", "{out}"]),
    ("demo.png", [data.demo.main, "{out}/demo.png"]),
    ("bench.json", [bench.__main__.main, "sinkhorn", "--out={out}/bench.json"]),
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("places")
    write_pictures(folder / "photos", 4)
    for split in ("train", "val"):
        for name in ("rose", "tulip"):
            write_pictures(folder / "sets" / split / name, 2)
    model = build_method(configure({"recipe": "demo", "head": "16-8", "prototypes": 4}))
    assert isinstance(model, SwAV)
    save(folder / "model.pt", model.state_dict())
    return {"photos": folder / "photos", "sets": folder / "sets", "model": folder / "model.pt"}


def arguments(command, places, out):
    main, *words = command
    return main, [word.format(out=out, **places) for word in words]


@pytest.mark.parametrize("name, command", WRITTEN, ids=lambda value: value if isinstance(
    value, str) else "")
def test_a_file_of_the_users_stays(name, command, places, tmp_path, capsys):
    (tmp_path / name).write_text("mine")
    main, words = arguments(command, places, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and name.split(".")[0] in error or str(tmp_path) in error
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_force_replaces_but_not_the_source(places, tmp_path, capsys):
    main, words = arguments([*CLUSTERS, "--out={out}/c.csv", "--sheet={out}/c.png"], places,
                            tmp_path)
    for name in ("c.csv", "c.png"):
        (tmp_path / name).write_text("mine")
    main([*words, "--force"])
    assert (tmp_path / "c.csv").read_text().startswith("name,prototype")
    names = tmp_path / "list.csv"
    names.write_text(f"{places['photos']}/0000.png\n")
    for source, out in ((names, names), (places["photos"], places["photos"] / "0000.csv")):
        with pytest.raises(SystemExit):
            main([*words, "--force", f"--data={source}", f"--out={out}"])
        assert "is the source itself, or lies in it" in capsys.readouterr().err
    for option in (f"--out={places['model']}", f"--sheet={places['model']}"):
        with pytest.raises(SystemExit):
            main([*words, "--force", option])
        assert "needs a name that ends in" in capsys.readouterr().err
    main, source = weights.__main__.main, str(places["model"])
    (tmp_path / "out.pth").write_text("mine")
    main([source, "--to", "timm", str(tmp_path / "out.pth"), "--force"])
    before = places["model"].read_bytes()
    (tmp_path / "link.pt").symlink_to(source)
    for out in (source, str(tmp_path / "link.pt")):
        with pytest.raises(SystemExit):
            main([source, "--to", "timm", out, "--force"])
        assert "is the source itself" in capsys.readouterr().err
    assert places["model"].read_bytes() == before


def test_its_own_files_go_on(places, tmp_path, capsys):
    """Features and fine-tuning of the same input: what is there is kept, what is lost is made."""
    for command, names in ((FEATURES, ("f.txt", "f.ok.npy")), (FINETUNE, ("best.pt", "last.pt"))):
        main, words = arguments(command, places, tmp_path / names[0])
        (tmp_path / names[0]).mkdir()
        main(words)
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        for name in names:
            (tmp_path / names[0] / name).unlink()
        main(words)
        assert json.loads(capsys.readouterr().out.splitlines()[-1]) == result
        assert all((tmp_path / names[0] / name).exists() for name in names)
    (tmp_path / "best.pt" / "checkpoint.pt").unlink()   # a product without its checkpoint
    product = load(tmp_path / "best.pt" / "best.pt")
    with pytest.raises(SystemExit):
        main(words)
    assert "no checkpoint to go on from" in capsys.readouterr().err and product
