"""evaluation/task.py: the preprocessing that goes with a checkpoint."""
from pathlib import Path
from types import SimpleNamespace

import pytest

import evaluate
from evaluation.features import SEER_FINETUNED, Preprocessing
from evaluation.task import EvalTask, choose_preprocessing
from multicrop import IMAGENET_MEAN, IMAGENET_STD
from recipes.command_line import configure
from weights.official import OFFICIAL

# a fine-tuned run's config.json as it was written before `distort` became `augment`
TUNED = {"recipe": {"epochs": 15, "batch_size": 256, "lr": 0.1, "milestones": [30, 60, 90, 100],
                    "gamma": 0.1, "weight_decay": 0.0, "momentum": 0.9, "size": 96, "area": 0.08,
                    "distort": True, "crop_ratio": 0.9, "bicubic": True},
         "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"}
OURS = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7)}
SEER_FILE = OFFICIAL["seer_ft_regnety_32gf"].url.rpartition("/")[2]


@pytest.mark.parametrize("config, path, options, expected", [
    # nothing known: ImageNet's usual; the demo's images are not cut
    ({}, None, ["--data=x"], Preprocessing(224, 0.875, False, IMAGENET_MEAN, IMAGENET_STD)),
    ({}, None, [], Preprocessing(224, 1.0)),
    # a run of train.py, as its config.json and checkpoint.pt hold it: text
    ({"crops": "2x160@0.14-1+4x96", "recipe": "seer", "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"},
     "trunk.pt", ["--data=x"], Preprocessing(160, 0.875, False, **OURS)),
    (TUNED, "best.pt", ["--data=x"], Preprocessing(96, 0.9, True, **OURS)),
    # SEER's fine-tuned networks: by the file's own name, or by the last part of its URL
    ({}, "seer_ft_regnety_32gf.torch", ["--data=x"], SEER_FINETUNED),
    ({}, "seer_ft.torch", ["--data=x"], SEER_FINETUNED),
    ({}, SEER_FILE, ["--data=x"], SEER_FINETUNED),
    ({}, "seer_regnety_32gf.torch", ["--data=x"], Preprocessing()),
    ({}, "seer_ft_runs/trunk.pt", ["--data=x"], Preprocessing()),   # a folder's name says nothing
    ({"crops": "2x64+4x32", "mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"}, "trunk.pt",
     ["--recipe=finetune384"], Preprocessing(384, 1.0, True, **OURS)),
    # the options come last
    (TUNED, "best.pt", ["--size=32", "--crop-ratio=0", "--no-bicubic"],
     Preprocessing(32, 0.0, False, **OURS)),
    ({}, "seer_ft.torch", ["--size=48"], Preprocessing(48, 1.0, True))])
def test_preprocessing_follows_the_checkpoint_and_the_options(config, path, options, expected):
    options = evaluate.parse(["finetune", "x", *options])
    assert choose_preprocessing(config, path and Path(path), options) == expected


def test_the_network_has_its_folders_name_from_inside_that_folder(tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for path, name in ((Path("checkpoint.pt"), "mine"), (folder / "trunk.pt", "mine"),
                       (Path("x.torch"), "x")):
        task = EvalTask(None, None, "", None, {}, SimpleNamespace(path=path), None)
        assert task.name() == name


def test_preprocessing_is_that_of_a_run():
    config = configure({"mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"})
    chosen = choose_preprocessing(config.as_dict(), None, evaluate.parse(["knn", "x", "--data=x"]))
    assert chosen == Preprocessing(config.crops[0].size, mean=config.mean, std=config.std)
