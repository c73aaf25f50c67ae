"""evaluation/finetune.py and supervised.py: labels, recipes, resuming, and classify."""
import json
import shutil

import pytest
import torch

from data.images import open_images
from data.labelled import open_splits
from evaluation import supervised
from evaluation.features import Preprocessing
from evaluation.finetune import Finetuned, some_labels
from evaluation.linear import linear_probe
from evaluation.supervised import RECIPES, fit
from methods.build import build_trunk
from tests.evaluation.conftest import QUICK, RANDOM, normalised
from weights.atomic import load, save
from weights.names import from_ours


def test_some_of_the_labels(classes, tmp_path):
    train, _ = open_splits(str(classes))
    some = some_labels(train, "0.25")
    assert some.targets.sum(0).tolist() == [3, 3]
    names = [some.images.name(i) for i in range(6)]
    assert names == [some_labels(train, "0.25").images.name(i) for i in range(6)]
    assert some_labels(train, "0.001").targets.sum(0).tolist() == [1, 1]
    (tmp_path / "list.txt").write_text("red/7.png\nblue/9.png\n")
    some = some_labels(train, str(tmp_path / "list.txt"))
    assert [some.images.name(i) for i in range(2)] == ["blue/9.png", "red/7.png"]
    assert some.labels.tolist() == [0, 1]
    for wrong in ("7.png\n", "red/7.png\nred/99.png\n"):            # of two classes; not there
        (tmp_path / "list.txt").write_text(wrong)
        with pytest.raises(ValueError, match="not there, or not the only ones"):
            some_labels(train, str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="neither a share"):
        some_labels(train, "2")


def test_the_learning_rate_follows_the_recipe():
    published = RECIPES["finetune"]
    assert [round(published.lr_at(epoch), 6) for epoch in (0, 29.9, 30, 60, 90, 100)] == [
        0.1, 0.1, 0.01, 0.001, 0.0001, 0.00001]
    shorter = published._replace(epochs=10.5, batch_size=512)
    assert [round(shorter.lr_at(epoch), 6) for epoch in (2.9, 3, 6)] == [0.2, 0.02, 0.002]


def test_fc_begins_as_the_linear_probe():
    torch.manual_seed(0)
    model = Finetuned(build_trunk("regnety_100mf"), 5)
    labels = torch.arange(60) % 4                           # none of the last class
    features = 3 + torch.randn(60, 152) * torch.rand(152)
    features[:, 0] = 7.0
    features[:, 1:5] = 4 * torch.eye(4)[labels]
    queries = features + 0.1 * torch.randn_like(features)
    model.start_as_probe(features, labels)
    with torch.no_grad():
        predicted = model.fc(queries).argmax(1)
    assert predicted.equal(linear_probe(features, labels, queries)[0])
    assert 0.5 < (predicted == labels).float().mean()


def test_few_images_keep_the_statistics(classes, tmp_path, command, monkeypatch):
    """Of a trunk that has learned. Without learning it is the linear probe."""
    torch.manual_seed(0)
    trunk = build_trunk("regnety_100mf")
    trunk(torch.randn(32, 3, 32, 32))
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    options = [tmp_path / "trunk.pth", "--data", classes, *QUICK]
    probe = command("linear", *options)["top1"]
    begun, start = [], Finetuned.start_as_probe

    def start_and_note(model, *features_and_labels):
        start(model, *features_and_labels)
        begun.append(model.fc.weight.detach().clone())

    monkeypatch.setattr(Finetuned, "start_as_probe", start_and_note)
    still = command("finetune", *options, "--lr=0", "--epochs=1", f"--out={tmp_path / 'still'}")
    assert still["top1"] == probe > 50
    assert load(tmp_path / "still" / "last.pt")["fc.weight"].equal(begun[0])
    tuned = command("finetune", *options, "--epochs=2", "--precision=bf16",
                    f"--out={tmp_path / 'tuned'}")
    assert (tuned["recipe"]["lr"], tuned["recipe"]["batch_size"]) == (0.0125, tuned["train"])
    before, after = trunk.state_dict(), load(tmp_path / "tuned" / "last.pt")
    assert all(before[name].equal(after[name]) == ("running" in name or "batches" in name)
               for name in before)
    assert {x.dtype for x in after.values()} == {torch.float32, torch.int64}


def test_recipe_small_needs_a_trunk_that_has_learned(classes, tmp_path, refused):
    options = ["--data", classes, *QUICK, f"--out={tmp_path / 'out'}"]
    assert "has learned" in refused("finetune", *RANDOM, *options, "--recipe=small")
    (tmp_path / "list.txt").write_text("# none\n")
    assert "names no image" in refused("finetune", *RANDOM, *options,
                                       f"--labels={tmp_path / 'list.txt'}")


@pytest.mark.long
def test_a_new_trunk_moves_its_statistics(shades, tmp_path, command):
    result = command("finetune", *RANDOM, "--data", shades, *QUICK, "--labels=0.1",
                     f"--out={tmp_path}")
    assert result["recipe"]["lr"] == 0.05 and result["recipe"]["batch_size"] == result["train"] < 64
    assert result["recipe"]["epochs"] == 160                    # each of one batch
    mean = load(tmp_path / "last.pt")["stem.1.running_mean"]
    assert mean.abs().min() > 0


@pytest.mark.long
def test_finetune_and_classify(classes, tmp_path, command, refused, monkeypatch):
    """What goes on from a checkpoint ends as the whole fine-tuning; its network classifies."""
    options = [*RANDOM, "--data", classes, *QUICK, "--epochs=8", "--batch-size=4", "--lr=0.5",
               "--recipe=finetune"]

    def save_and_copy(path, state):
        save(path, state)
        if state.get("step") == 36:                         # of 48: as if it ended here
            shutil.copytree(tmp_path / "whole", tmp_path / "parts")

    with monkeypatch.context() as patch:
        patch.setattr(supervised, "save", save_and_copy)
        whole = command("finetune", *options, f"--out={tmp_path / 'whole'}")
    assert whole["best"] > 50 and whole["recipe"]["epochs"] == 8
    assert load(tmp_path / "parts" / "checkpoint.pt")["step"] == 36
    parts = command("finetune", *options, f"--out={tmp_path / 'parts'}")
    assert parts["top1"] == whole["top1"]
    one, other = (load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(map(torch.equal, one.values(), other.values()))
    for change in ("--epochs=4", "--seed=1"):               # with another seed, another trunk
        assert "holds another run" in refused("finetune", *options, change,
                                              f"--out={tmp_path / 'parts'}")

    classify = ["classify", tmp_path / "whole", "--data", classes / "val", *QUICK[1:]]
    result = command(*classify)
    assert (result["top1"], result["top5"], result["size"]) == (whole["best"], 100, 32)
    (classes / "val" / "blue").rename(tmp_path / "blue")    # a folder of some of the classes
    result = command(*classify)
    assert (result["top1"], result["classes"], result["present"]) == (100, 2, 1)


@pytest.mark.parametrize("layout", ["vissl", "torchvision"])
def test_classify_an_official_layout(shades, tmp_path, command, layout):
    """A classifier of eight classes, as VISSL and torchvision store it; the folder has six."""
    torch.manual_seed(0)
    model = Finetuned(build_trunk("regnety_100mf"), 8).eval()
    torch.nn.init.normal_(model.fc.weight)
    path = tmp_path / ("seer_ft.torch" if layout == "vissl" else "tuned.pth")
    torch.save(from_ours(model.tensors(model.state_dict()), layout), path)
    names = ["5", "none", "3", "0", "absent", "1", "4", "2"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    # SEER's preprocessing, and the usual one
    geometry = (48, 1.0, True) if layout == "vissl" else (32, 0.875, False)
    result = command("classify", path, "--data", shades / "val", "--workers=0", "--device=cpu",
                     f"--classes={tmp_path / 'names.txt'}", f"--size={geometry[0]}")
    assert (result["size"], result["crop_ratio"], result["bicubic"]) == geometry
    images = open_images(shades / "val")
    with torch.no_grad():
        (scores,) = model(normalised(images, *geometry))
    top1 = top5 = 0
    for row, label in zip(scores, images.labels):
        ranked = [names[k] for k in row.argsort(descending=True) if names[k] in images.classes]
        top1, top5 = top1 + (ranked[0] == str(label)), top5 + (str(label) in ranked[:5])
    assert 0 < top1 < 36 and 0 < top5 < 36
    assert (result["top1"], result["top5"]) == (round(top1 / 0.36, 2), round(top5 / 0.36, 2))
    assert (result["classes"], result["present"], result["val"]) == (8, 6, 36)


def test_a_checkpoint_from_before_augment_goes_on(shades, tmp_path):
    """It has the recipe's field under its old name, `distort`."""
    def tuned(recipe):
        train, val = open_splits(str(shades))
        model = Finetuned(build_trunk("regnety_100mf"), 6)
        reached = fit(model, train, val, recipe, tmp_path, Preprocessing(32))
        return reached, model.tensors(model.state_dict())

    recipe, path = RECIPES["few"]._replace(epochs=1, batch_size=16), tmp_path / "checkpoint.pt"
    reached, tensors = tuned(recipe)
    state = load(path)
    held = state["settings"]["recipe"]
    held["distort"] = held.pop("augment")
    save(path, state)
    again, loaded = tuned(recipe)                           # finished: no step is left
    assert again == reached and all(torch.equal(loaded[name], x) for name, x in tensors.items())
    with pytest.raises(ValueError, match="holds another run"):
        tuned(recipe._replace(augment=True))
    config = json.loads((tmp_path / "config.json").read_text())["config"]
    assert config["recipe"]["size"] == 32 and config["mean"] == "0.485,0.456,0.406"
