"""evaluate.py, labelled.py and finetune.py: protocols from the command line, and what they rest on."""
import csv
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from ranks import run_ranks
from test_images import write_pictures
from torchvision import transforms

import checkpoint
import evaluate
import finetune
import train
from images import open_images
from labelled import BATCH, Centred, Depths, extract, open_labelled, open_splits
from multicrop import IMAGENET_MEAN, IMAGENET_STD
from recipes import configure
from regnet import ARCHS, RegNet
from scale import build_trunk
from weights import from_ours

ROOT = Path(evaluate.__file__).parent
RANDOM = ["random", "--arch=regnety_100mf"]
QUICK = ["--size=32", "--workers=0", "--device=cpu"]


@pytest.fixture
def classes(tmp_path):
    """Red and blue pictures: what an untrained network tells apart too."""
    folder = tmp_path / "colours"
    for split, count in (("train", 12), ("val", 5)):
        for colour in ("red", "blue"):
            for i in range(count):
                place = folder / split / colour / f"{i}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                shade = Image.new("RGB", (40, 50), colour)
                Image.blend(shade, Image.new("RGB", (40, 50), "white"), i / 50).save(place)
    return folder


@pytest.fixture
def shades(tmp_path):
    """Six classes that overlap: an untrained network tells apart some of them."""
    folder, rng = tmp_path / "shades", numpy.random.default_rng(0)
    for split, count in (("train", 8), ("val", 6)):
        for k, colour in enumerate(rng.integers(0, 256, (6, 3))):
            (folder / split / f"{k}").mkdir(parents=True)
            for i in range(count):
                mixed = 0.25 * colour + 0.75 * rng.integers(0, 256, 3)
                Image.new("RGB", (40, 50), tuple(mixed.astype(int).tolist())).save(
                    folder / split / f"{k}" / f"{i}.png")
    return folder


def normalised(images, *how, numbers=None):
    """Centred pictures, with ImageNet's means; numbers: of which; none: all."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    numbers = range(len(images)) if numbers is None else numbers
    return torch.stack([(Centred(images, *how)[i][0] / 255 - mean) / std for i in numbers])


def command(capsys, *argv):
    evaluate.main([*map(str, argv)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


# ------------------------------------------------------------------------------------- pictures
class One:
    """A dataset of one picture."""

    def __init__(self, image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        self.data = buffer.getvalue()

    def __getitem__(self, i):
        return self.data


@pytest.mark.parametrize("size, ratio, bicubic, published", [
    (28, 0.875, False, [transforms.Resize(32), transforms.CenterCrop(28)]),
    (38, 1.0, True, [transforms.Resize(38, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(38)]),
    (30, 0, False, [transforms.Resize([30, 30])])])
def test_pictures_are_resized_and_cut_as_published(size, ratio, bicubic, published):
    """ImageNet's 256 and 224 pixels, the fine-tuned SEER's 384, VOC07's whole picture; in small."""
    noise = numpy.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=numpy.uint8)
    image = Image.fromarray(noise)
    picture, ok = Centred(One(image), size, ratio, bicubic)[0]
    assert ok and torch.equal(picture, transforms.Compose([*published, transforms.PILToTensor()])(image))


def test_lists_of_paths_and_labels(tmp_path):
    write_pictures(tmp_path / "some pictures", 3)
    (tmp_path / "train.txt").write_text("some pictures/0000.png dog\nsome pictures/0001.png cat,dog\n\n")
    (tmp_path / "val.txt").write_text("some pictures/0002.png\tcat\nsome pictures/0000.png dog")
    train, val = open_splits(str(tmp_path))
    assert train.classes == val.classes == ["cat", "dog"] and train.several and val.several
    assert not open_labelled(tmp_path / "val.txt").several
    assert train.is_of.tolist() == [[False, True], [True, True]] and val.labels.tolist() == [0, 1]
    assert train.images[1] == (tmp_path / "some pictures" / "0001.png").read_bytes()
    assert open_labelled(tmp_path / "val.txt", ["dog", "cow", "cat"]).labels.tolist() == [2, 0]
    for text, expected in (("a.jpg", "without a path and a label"), ("a.jpg cow", "not known: \\['cow'\\]")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=expected):
            open_labelled(tmp_path / "bad.txt", ["dog"])


def test_splits_must_have_the_same_classes(classes):
    write_pictures(classes / "val" / "green", 1)
    with pytest.raises(ValueError, match="green"):
        open_splits(str(classes))
    with pytest.raises(ValueError, match="a folder for each class"):
        open_labelled(classes / "val" / "green")
    assert len(open_images(classes)) == 35


class Row(torch.nn.Module):
    """Remembers how many pictures it was shown at once."""
    seen = ()

    def forward(self, images):
        self.seen = (*self.seen, len(images))
        return [images.mean((2, 3)), images.flatten(1)[:, :5]]


def outputs_of_rank(rank, count):
    return extract(Row(), [(torch.full((3, 4, 4), i, dtype=torch.uint8), i % 7 > 0) for i in range(count)])


def test_the_network_always_sees_as_many_pictures(tmp_path):
    """So neither the end of the set nor the number of ranks moves a digit."""
    network = Row()
    pictures = [(torch.full((3, 4, 4), i, dtype=torch.uint8), True) for i in range(BATCH + 3)]
    (means, rows), ok = extract(network, pictures)
    assert network.seen == (BATCH, BATCH) and ok.all() and rows.shape == (BATCH + 3, 5)
    assert means.argsort(0)[:, 0].tolist() == list(range(BATCH + 3))
    alone = outputs_of_rank(0, 11)
    for outputs, ok in run_ranks(outputs_of_rank, tmp_path, 11):
        assert torch.equal(ok, alone[1]) and all(map(torch.equal, outputs, alone[0]))


@pytest.mark.cuda
def test_features_on_a_gpu(shades):
    centred = Centred(open_images(shades), 48)
    trunk, *_ = evaluate.load_trunk("random", "regnety_200mf")
    (expected,), _ = extract(trunk, centred)
    (features,), ok = extract(trunk, centred, device="cuda", workers=2)
    assert ok.all()
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


def test_pictures_are_normalised_as_in_the_run():
    config = dataclasses.asdict(configure({"mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"}))
    picture = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    (features,), ok = extract(torch.nn.Flatten(), [(picture, True)] * 2, **evaluate.normalisation(config))
    expected = (picture / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(features, expected.flatten().expand(2, -1))
    assert ok.all() and evaluate.normalisation({}) == {}


@pytest.mark.parametrize("arch", ["regnety_100mf", "regnety_400mf", "resnet50"])
def test_depths_are_means_of_the_stages(arch):
    trunk, images = build_trunk(arch).eval(), torch.randn(2, 3, 64, 64)
    depths = Depths(trunk)
    with torch.no_grad():
        *stages, pooled = Depths(trunk, [*depths.stages, "avgpool"])(images)
        torch.testing.assert_close(pooled, trunk(images))
        whole = stages[-1].view(2, -1, 2).mean(2)           # two cells of the same size
    torch.testing.assert_close(whole, pooled, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown depth res9; there is res2"):
        Depths(trunk, ["res9"])


# ------------------------------------------------------------------------------------ protocols
def test_knn_from_the_command_line(classes, tmp_path, capsys):
    options = ["--data", classes, *QUICK]
    result = command(capsys, "knn", *RANDOM, *options, "--k=3,1", "--temperature=0.1,1", "--sheet",
                     tmp_path / "sheet.png", "--rows=4", "--columns=2")
    assert result["top1"] == 100 and (result["train"], result["val"], result["k"]) == (24, 10, 3)
    assert [(row["k"], row["temperature"]) for row in result["all"]] == [(3, 0.1), (3, 1), (1, 0.1), (1, 1)]
    side = evaluate.TILE + 4
    assert Image.open(tmp_path / "sheet.png").size == (4 * side + 8, 4 * (side + 4) + 4)
    trunk = RegNet(ARCHS["regnety_100mf"])
    checkpoint.save(tmp_path / "trunk.pt", trunk.state_dict())
    first = command(capsys, "knn", tmp_path / "trunk.pt", "--arch=regnety_100mf", *options)
    (classes / "val" / "blue" / "0.png").write_bytes(b"")           # of the first class: no label slips
    second = command(capsys, "knn", tmp_path / "trunk.pt", *options)
    assert (second["top1"], second["val"], second["left_out"]) == (100, 9, 1)
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert kept == [first, second] and len(first["sha256"]) == 16


def test_linear_from_the_command_line(classes, tmp_path, capsys):
    options = ["--seed=1", "--data", classes, *QUICK]
    result = command(capsys, "linear", *RANDOM, *options, "--depths=res3,avgpool")
    assert result["top1"] == 100 and [row["depth"] for row in result["all"]] == ["res3", "avgpool"]
    assert result["protocol"] == "linear" and "k" not in result
    result = command(capsys, "linear", *RANDOM, *options, "--sgd", "--epochs=12", "--batch-size=8", "--lr=1",
                     "--depths=res4,avgpool", f"--out={tmp_path / 'sgd'}")
    assert result["top1"] == 100 and [row["depth"] for row in result["all"]] == ["res4", "avgpool"]


def test_lowshot_of_one_label_and_of_several(classes, tmp_path, capsys):
    result = command(capsys, "lowshot", *RANDOM, "--data", classes, *QUICK, "--shots=1,4,40", "--draws=3")
    assert (result["shots"], result["top1"]) == (4, 100) and len(result["all"]) == 2
    for split in ("train", "val"):
        names = sorted((classes / split).glob("*/*.png"))
        (classes / f"{split}.txt").write_text("".join(
            f"{split}/{name.parent.name}/{name.name} {name.parent.name},any\n" for name in names))
    result = command(capsys, "lowshot", *RANDOM, "--data", classes, *QUICK, "--shots=6", "--draws=2")
    assert result["map"] == 100 and "top1" not in result
    with pytest.raises(SystemExit):
        evaluate.main(["knn", *RANDOM, "--data", str(classes), *QUICK])
    assert "one label each" in capsys.readouterr().err


def test_draws_have_so_many_pictures_of_each_class():
    is_of = torch.zeros(60, 3, dtype=torch.bool)
    is_of[torch.arange(60), torch.arange(60) % 3] = True
    draws = [evaluate.drawn(is_of, 4, seed) for seed in range(3)]
    assert all(is_of[draw].sum(0).tolist() == [4, 4, 4] for draw in draws)
    assert draws[0].tolist() != draws[1].tolist() and draws[0].tolist() == evaluate.drawn(is_of, 4, 0).tolist()


def test_some_of_the_labels(classes, tmp_path):
    train, _ = open_splits(str(classes))
    some = evaluate.some_labels(train, "0.25")
    assert some.is_of.sum(0).tolist() == [3, 3]
    names = [some.images.name(i) for i in range(6)]
    assert names == [evaluate.some_labels(train, "0.25").images.name(i) for i in range(6)]
    assert evaluate.some_labels(train, "0.001").is_of.sum(0).tolist() == [1, 1]
    (tmp_path / "list.txt").write_text("red/7.png\nblue/9.png\n")
    some = evaluate.some_labels(train, str(tmp_path / "list.txt"))
    assert [some.images.name(i) for i in range(2)] == ["blue/9.png", "red/7.png"] and some.labels.tolist() == [0, 1]
    for wrong in ("7.png\n", "red/7.png\nred/99.png\n"):            # of two classes; not there
        (tmp_path / "list.txt").write_text(wrong)
        with pytest.raises(ValueError, match="not there, or not the only ones"):
            evaluate.some_labels(train, str(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="neither a share"):
        evaluate.some_labels(train, "2")


TUNE = ["--epochs=8", "--batch-size=8", "--lr=0.5", "--recipe=finetune"]


def test_finetune_and_classify(classes, tmp_path, capsys, monkeypatch):
    """An interrupted fine-tuning ends as one that was not; and its network classifies."""
    options = [*RANDOM, "--data", classes, *QUICK, *TUNE]
    whole = command(capsys, "finetune", *options, f"--out={tmp_path / 'whole'}")
    assert whole["best"] > 50 and whole["recipe"]["epochs"] == 8
    save = checkpoint.save

    def once(path, state):
        save(path, state)
        if Path(path).name == "checkpoint.pt":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint, "save", once)
        evaluate.main([*map(str, ["finetune", *options, f"--out={tmp_path / 'parts'}"])])
    assert checkpoint.load(tmp_path / "parts" / "checkpoint.pt")["step"] == 3      # of 24
    parts = command(capsys, "finetune", *options, f"--out={tmp_path / 'parts'}")
    assert parts["top1"] == whole["top1"]
    one, other = (checkpoint.load(tmp_path / name / "last.pt") for name in ("whole", "parts"))
    assert all(map(torch.equal, one.values(), other.values()))
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, ["finetune", *options, "--epochs=4", f"--out={tmp_path / 'parts'}"])])
    assert "holds another run" in capsys.readouterr().err

    result = command(capsys, "classify", tmp_path / "whole", "--data", classes / "val", *QUICK[1:])
    assert result["top1"] == whole["best"] and result["top5"] == 100 and result["size"] == 32
    write_pictures(tmp_path / "other" / "trunk", 1)
    with pytest.raises(SystemExit):                                 # another trunk is another run
        evaluate.main([*map(str, ["finetune", *options, "--seed=1", f"--out={tmp_path / 'whole'}"])])
    assert "holds another run" in capsys.readouterr().err
    (classes / "val" / "blue").rename(tmp_path / "blue")            # a folder of some of the classes
    result = command(capsys, "classify", tmp_path / "whole", "--data", classes / "val", *QUICK[1:])
    assert (result["top1"], result["classes"], result["present"]) == (100, 2, 1)


@pytest.mark.parametrize("layout", ["vissl", "torchvision"])
def test_classify_an_official_layout(shades, tmp_path, capsys, layout):
    """A classifier of eight classes, as VISSL and torchvision store it; the folder has six of them."""
    torch.manual_seed(0)
    model = finetune.Finetuned(build_trunk("regnety_100mf"), 8).eval()
    torch.nn.init.normal_(model.fc.weight)
    path = tmp_path / ("seer_ft.torch" if layout == "vissl" else "tuned.pth")
    torch.save(from_ours(model.tensors(), layout), path)
    names = ["5", "none", "3", "0", "absent", "1", "4", "2"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    result = command(capsys, "classify", path, "--data", shades / "val", "--workers=0", "--device=cpu",
                     f"--classes={tmp_path / 'names.txt'}", *(["--size=48"] if layout == "vissl" else ["--size=32"]))
    size, ratio, bicubic = (48, 1.0, True) if layout == "vissl" else (32, 0.875, False)   # SEER's; the usual
    assert (result["size"], result["crop_ratio"], result["bicubic"]) == (size, ratio, bicubic)
    images = open_images(shades / "val")
    with torch.no_grad():
        (scores,) = model(normalised(images, size, ratio, bicubic))
    top1 = top5 = 0
    for row, label in zip(scores, images.labels):
        ranked = [names[k] for k in row.argsort(descending=True) if names[k] in images.classes]
        top1, top5 = top1 + (ranked[0] == str(label)), top5 + (str(label) in ranked[:5])
    assert 0 < top1 < 36 and 0 < top5 < 36
    assert (result["top1"], result["top5"]) == (round(top1 / 0.36, 2), round(top5 / 0.36, 2))
    assert (result["classes"], result["present"], result["val"]) == (8, 6, 36)


def test_the_learning_rate_follows_the_recipe():
    published = finetune.RECIPES["finetune"]
    assert [round(published.lr_at(epoch), 6) for epoch in (0, 29.9, 30, 60, 90, 100)] == [
        0.1, 0.1, 0.01, 0.001, 0.0001, 0.00001]
    shorter = published._replace(epochs=10.5, batch_size=512)
    assert [round(shorter.lr_at(epoch), 6) for epoch in (2.9, 3, 6)] == [0.2, 0.02, 0.002]


def tune_on_ranks(rank, folder, out, stop_early=False):
    """BatchNorm in eval mode: the same step on any number of ranks."""
    train, val = open_splits(folder)
    torch.manual_seed(0)
    model = finetune.Finetuned(build_trunk("regnety_100mf"), len(train.classes))
    model.train = lambda mode=True: torch.nn.Module.train(model, False)
    recipe = finetune.RECIPES["few"]._replace(epochs=2, batch_size=8, size=32, lr=2)
    if stop_early:
        finetune.checkpoint.save = saved_once
    fresh = model.fc.weight.clone()
    reached = finetune.fit(model, train, val, recipe, Path(out))
    assert (model.fc.weight - fresh).abs().max() > 0.01
    return reached, model.state_dict()


def tune_in_turn(rank, folder, outs):
    return [tune_on_ranks(rank, folder, out) for out in outs]


def saved_once(path, state, save=checkpoint.save):
    save(path, state)
    if Path(path).name == "checkpoint.pt":
        raise KeyboardInterrupt


def test_two_ranks_tune_as_one(shades, tmp_path, monkeypatch):
    """Also where two go on with what one began."""
    reached, weights = tune_on_ranks(0, str(shades), tmp_path / "one")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune.checkpoint, "save", checkpoint.save)         # put back afterwards
        tune_on_ranks(0, str(shades), tmp_path / "begun", stop_early=True)
    assert checkpoint.load(tmp_path / "begun" / "checkpoint.pt")["step"] == 6       # of 12
    for of_rank in run_ranks(tune_in_turn, tmp_path, str(shades), [str(tmp_path / "two"), str(tmp_path / "begun")]):
        for got, tuned in of_rank:
            assert got == reached
            for name, value in weights.items():
                torch.testing.assert_close(tuned[name], value, rtol=1e-4, atol=1e-5, msg=name)


def tune_plainly(rank, folder, out):
    train, val = open_splits(folder)
    torch.manual_seed(0)
    model = finetune.Finetuned(build_trunk("regnety_100mf"), 2)
    recipe = finetune.RECIPES["few"]._replace(epochs=2, batch_size=8, size=32)
    finetune.fit(model, train, val, recipe, Path(out))
    return model.tensors()


def test_what_two_ranks_measure_is_the_network_that_is_saved(classes, tmp_path):
    """Each had running statistics of its own; rank 0's are saved, and those that all measure with."""
    ranks = run_ranks(tune_plainly, tmp_path, str(classes), str(tmp_path / "run"))
    saved = checkpoint.load(tmp_path / "run" / "last.pt")
    for tensors in ranks:
        assert all(torch.equal(tensors[name], value) for name, value in saved.items())


# -------------------------------------------------------------------------- features and clusters
def test_features_go_to_a_file_and_are_resumed(classes, tmp_path, capsys):
    out = tmp_path / "new" / "features.npy"
    options = [*RANDOM, *QUICK, f"--data={classes}", f"--out={out}"]
    (classes / "val" / "red" / "broken.png").write_bytes(b"no")
    result = command(capsys, "features", *options)
    assert (result["pictures"], result["features"], result["left_out"]) == (35, 152, 1)
    images, features = open_images(classes), numpy.load(out, mmap_mode="r")
    names = out.with_suffix(".txt").read_text().splitlines()
    assert names == [images.name(i) for i in range(35)] and features.shape == (35, 152)
    ok = numpy.load(out.with_suffix(".ok.npy"))
    assert [name for name, good in zip(names, ok) if good < 0] == ["val/red/broken.png"]
    trunk, *_ = evaluate.load_trunk("random", "regnety_100mf")
    (expected,), _ = extract(trunk, Centred(images, 32))
    torch.testing.assert_close(torch.from_numpy(features[ok > 0]), expected[ok > 0])
    # interrupted: some rows are not there yet
    partly = numpy.lib.format.open_memmap(out, "r+")
    partly[5:], partly[:5] = 0, 7
    done = numpy.lib.format.open_memmap(out.with_suffix(".ok.npy"), "r+")
    done[5:] = 0
    del partly, done
    command(capsys, "features", *options)
    again = numpy.load(out)
    assert (again[:5] == 7).all() and numpy.allclose(again[5:][ok[5:] > 0], expected[5:][ok[5:] > 0])
    assert numpy.isnan(again[ok < 0]).all()
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, ["features", *RANDOM, *QUICK[1:], "--size=48", f"--data={classes}", f"--out={out}"])])
    assert "holds other features" in capsys.readouterr().err


def test_clusters_are_the_nearest_prototypes(classes, tmp_path, capsys):
    out = tmp_path / "run"
    train.main([f"--data={classes}", f"--out={out}", "--recipe=demo", "--crops=2x32+2x16", "--steps=2",
                "--batch-size=4", "--workers=0", "--device=cpu", "--prototypes=7", "--head=16-8"])
    capsys.readouterr()
    result = command(capsys, "clusters", out, f"--data={classes}", *QUICK[1:], f"--out={tmp_path / 'c.csv'}",
                     f"--sheet={tmp_path / 'sheet.png'}")
    rows = list(csv.DictReader(open(tmp_path / "c.csv")))
    assert (result["pictures"], result["prototypes"], len(rows)) == (34, 7, 34)
    state = checkpoint.load(out / "checkpoint.pt")
    model = train.fresh_model(configure({"recipe": "demo", "prototypes": 7, "head": "16-8"})).eval()
    model.load_state_dict(state["model"])
    images = open_images(classes)
    for i in (0, 20, 33):
        picture = normalised(images, 32, numbers=[i])
        with torch.no_grad():
            _, scores = model([picture])
        assert rows[i]["name"] == images.name(i) and int(rows[i]["prototype"]) == scores.argmax().item()
        assert float(rows[i]["confidence"]) == pytest.approx((scores / 0.1).softmax(1).max().item(), abs=1e-3)
    assert Image.open(tmp_path / "sheet.png").width > 300
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, ["clusters", out / "trunk.pt", f"--data={classes}", *QUICK[1:]])])
    assert "holds no prototypes" in capsys.readouterr().err


def protocols_of_rank(rank, *commands):
    return [evaluate.PROTOCOLS[argv[0]](evaluate.Given(evaluate.parse(argv))) for argv in commands]


def test_two_ranks_write_what_one_writes(shades, tmp_path):
    """Features, also where two go on with what one began, and clusters, byte by byte. (Trained by SGD, the
    probes' BatchNorm has its own half of each batch, as in VISSL: there the ranks agree with each other.)"""
    run = tmp_path / "run"
    train.main([f"--data={shades}", f"--out={run}", "--recipe=demo", "--crops=2x32+2x16", "--steps=2",
                "--batch-size=4", "--workers=0", "--device=cpu", "--prototypes=7", "--head=16-8"])
    (shades / "val" / "3" / "1.png").write_bytes(b"no")

    def argv(what, out, *more):
        return [what, str(run), f"--data={shades}", f"--out={tmp_path / out}", *QUICK[1:], *more]

    sgd = "--sgd", "--epochs=6", "--batch-size=12", "--lr=1", "--depths=res2,avgpool"
    features, clusters, linear = protocols_of_rank(
        0, argv("features", "one.npy"), argv("clusters", "one.csv"), argv("linear", "one", *sgd))
    assert (features["pictures"], features["left_out"]) == (84, 1) and clusters["used"] > 1
    for name in (".npy", ".ok.npy", ".txt", ".json"):
        shutil.copy(tmp_path / f"one{name}", tmp_path / f"begun{name}")
    done = numpy.lib.format.open_memmap(tmp_path / "begun.ok.npy", "r+")
    rows = numpy.lib.format.open_memmap(tmp_path / "begun.npy", "r+")
    done[30:70], rows[30:70] = 0, 7
    del done, rows

    both = run_ranks(protocols_of_rank, tmp_path, argv("features", "two.npy"), argv("features", "begun.npy"),
                     argv("clusters", "two.csv"), argv("linear", "two", *sgd))
    assert both[0] == both[1]
    two, begun, of_two, by_sgd = both[0]
    assert [row | {"out": ""} for row in (two, begun, of_two)] == [
        row | {"out": ""} for row in (features, features, clusters)]
    for name in (".npy", ".ok.npy", ".txt", ".json"):
        for out in ("two", "begun"):
            assert (tmp_path / f"{out}{name}").read_bytes() == (tmp_path / f"one{name}").read_bytes(), (out, name)
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert [row["depth"] for row in by_sgd["all"]] == ["res2", "avgpool"]
    assert all(100 / 6 < row["best"] < 100 for row in (by_sgd, linear))
    assert abs(by_sgd["best"] - linear["best"]) < 25


def test_two_ranks_print_what_one_prints(shades, capsys):
    argv = ["knn", *RANDOM, "--data", str(shades), *QUICK, "--k=5"]
    alone = command(capsys, *argv)
    assert 100 / 6 < alone["top1"] < 100
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             str(ROOT / "evaluate.py"), *argv], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert [json.loads(line) for line in result.stdout.splitlines()] == [alone]


@pytest.mark.parametrize("argv, expected", [
    (["knn", "nowhere.pt"], "neither a file nor the name of an official one"),
    (["knn", "{trunk}", "--k=0"], "--k of at least 1"),
    (["knn", "random", "--arch=regnety_100mf", "--device=foo"], "foo"),
    (["knn", "random"], "random needs --arch"),
    (["knn", "random", "--arch=regnety_100mf", "--data=nowhere"], "no such folder"),
    (["knn", "{trunk}", "--crop-ratio=2"], "--crop-ratio from 0 to 1"),
    (["linear", "{trunk}", "--depths=res7"], "unknown depth res7; there is res2, res3, res4, avgpool"),
    (["classify", "{trunk}"], "holds no classifier"), (["classify", "random", "--arch=regnety_100mf"], "no classifier"),
    (["lowshot", "{trunk}", "--draws=0"], "at least 1"), (["clusters", "{trunk}", "--columns=0"], "at least 1"),
    (["clusters", "{trunk}"], "holds no prototypes"),
    (["finetune", "{trunk}", "--labels=some"], "neither a share, as 0.01, nor a list"),
    (["knn", "{trunk}", "--arch=regnety_200mf"], "holds regnety_100mf, not regnety_200mf")])
def test_bad_input_gets_one_sentence(tmp_path, capsys, argv, expected):
    checkpoint.save(tmp_path / "trunk.pt", RegNet(ARCHS["regnety_100mf"]).state_dict())
    with pytest.raises(SystemExit) as stop:
        evaluate.main([word.format(trunk=tmp_path / "trunk.pt") for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and "Traceback" not in error
