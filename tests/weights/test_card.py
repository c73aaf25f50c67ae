"""weights/card.py: a page holds what a run's folder holds, and says what it does not."""
import json

import pytest

from methods.build import build_trunk
from weights.__main__ import main
from weights.atomic import file_digest, save
from weights.card import after

CONFIG = {"data": "/home/someone/photos", "out": "/home/someone/runs/mine", "recipe": "small",
          "init": "seer_regnety_32gf", "method": "swav", "arch": "regnety_100mf", "steps": 40,
          "batch_size": 128, "crops": "2x64+4x32", "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7",
          "lr": 4.8, "probe": "/home/someone/probe", "epsilon": 0.03,
          "cache": "/home/someone/cache"}
MEASURED = [{"protocol": "knn", "top1": 71.25},
            {"protocol": "duplicates", "out": "/home/someone/found.csv", "groups": 3,
             "keep": "C:\\Users\\someone\\found.keep.txt"},
            {"protocol": "retrieve", "map": 62.5, "whiten": "/home/someone/others/",
             "distractors": "/home/someone/more", "protocols": {"strong": {"map": 62.5}},
             "all": [{"depth": "/home/someone"}]},
            {"protocol": "clusters", "out": "/home/someone/c.csv", "used": 7},
            {"protocol": "knn", "sha256": "of another file", "top1": 99.5}]
LOG = [{"step": step, "images": 128 * step, "skipped": int(step in (18, 20)),
        "replaced": {"truncated": 1} if step < 5 else {}}
       | ({"loss": 4.0 - step / 100, "loss_over_ln_k": 1 - step / 1000} if step != 20 else {})
       for step in range(1, 41)]                # step 20 was bad: its line has no loss


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    save(folder / "trunk.pt", build_trunk("regnety_100mf").state_dict())
    (folder / "config.json").write_text(json.dumps({"config": CONFIG,
                                                    "environment": {"torch": "2.14"}}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG) + '{"st')
    (folder / "loss.png").write_bytes(b"picture")
    (folder / "results.json").write_text(json.dumps({"trained trunk": {"knn": 62.3, "linear": 66}}))
    (folder / "results.jsonl").write_text("".join(json.dumps(
        {"checkpoint": "/home/someone/runs/mine", "sha256": file_digest(folder / "trunk.pt"),
         "data": "/home/someone/flowers/"} | line) + "\n" for line in MEASURED))
    return folder


def test_a_card_holds_what_the_folder_holds(run, tmp_path):
    out = tmp_path / "card" / "README.md"
    out.parent.mkdir()
    main([str(run), "--to", "card", str(out)])
    text = out.read_text()
    assert out.with_name("loss.png").read_bytes() == b"picture" and "](loss.png)" in text
    for held in ("# mine\n", "regnety_100mf, 372,790 parameters", "40 steps, 5,120 images",
                 "`photos`", "4 (truncated)", "| lr | 4.8 |", "epsilon: 0.03", 'probe: "probe"',
                 "torch 2.14", "| 1 | 128 | 3.99 | 0.999 |", "| 40 | 5120 | 3.6 | 0.96 |",
                 "not finite: 2", "| trained trunk | 62.3 | 66 |", "| knn | flowers | top1 71.25 |",
                 'cache: "cache"', '| clusters | flowers | out "c.csv", used 7 |',
                 '| duplicates | flowers | out "found.csv", groups 3, keep "found.keep.txt" |',
                 '| retrieve | flowers | map 62.5, whiten "others", '
                 'distractors "more" |',
                 "(0.1, 0.2, 0.3)", "(0.5, 0.6, 0.7)", "first crops had 64",
                 "`seer_regnety_32gf`, whose licence is: SEER License Agreement"):
        assert held in text, held
    assert "someone" not in text and "99.5" not in text
    assert text.count("To be filled in by the owner") == 2
    main([str(run), "--to", "card", str(out), "--force", "--licence", "CC BY 4.0"])
    assert "## Licence\n\nCC BY 4.0\n" in out.read_text()
    assert out.read_text().count("To be filled in by the owner") == 1
    assert after(LOG[:1]) == " for 1 step, 128 images"


def test_a_card_needs_a_run_and_keeps_to_its_files(run, tmp_path, capsys):
    (tmp_path / "loss.png").write_text("mine")
    for change, words in (
            (lambda: None, "loss.png is there already"),
            ((run / "log.jsonl").unlink, "log.jsonl: no such file"),
            ((run / "config.json").unlink, "config.json: no such file")):
        change()
        with pytest.raises(SystemExit):
            main([str(run), "--to", "card", str(tmp_path / "card.md")])
        assert words in capsys.readouterr().err
    (run / "config.json").write_text('{"config": {"recipe": {"size": 96}, "mean": "0,0,0"}}')
    (run / "log.jsonl").write_text("")
    with pytest.raises(SystemExit):
        main([str(run), "--to", "card", str(tmp_path / "card.md")])
    assert "is not of a run of train.py" in capsys.readouterr().err
    assert (tmp_path / "loss.png").read_text() == "mine" and not (tmp_path / "card.md").exists()
    for words, sentence in (
            (["--to", "keras", "x"], "there is release, hf, onnx, card, torchvision"),
            (["--licence", "MIT"], "--licence is of --to card"),
            (["--to", "timm", "x", "--licence", "MIT"], "--licence is of --to card")):
        with pytest.raises(SystemExit):
            main([str(run), *words])
        assert sentence in capsys.readouterr().err
