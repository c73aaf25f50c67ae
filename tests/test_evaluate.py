"""evaluate.py: kNN against brute force, and the command on class folders."""
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_images import write_pictures
from torchvision import transforms

import checkpoint
import evaluate
from evaluate import Centred, fit_linear, knn, linear_probe
from images import open_images
from recipes import configure
from regnet import ARCHS, RegNet


def test_knn_equals_its_definition():
    torch.manual_seed(0)
    features, queries = torch.randn(60, 5), torch.randn(23, 5)
    labels = torch.randint(0, 4, (60,))
    for k, temperature in ((1, 0.1), (5, 0.07), (60, 1.0), (100, 0.5)):
        expected = []
        for q in queries.double():
            similarity = [(torch.dot(q, f) / q.norm() / f.norm()).item() for f in features.double()]
            votes = [0.0] * 4
            for i in sorted(range(60), key=lambda i: -similarity[i])[:k]:
                votes[labels[i]] += math.exp(similarity[i] / temperature)
            expected.append(votes.index(max(votes)))
        for chunk in (1, 7, 1000):
            assert knn(features, labels, queries, k, temperature, chunk).tolist() == expected


def test_linear_equals_an_independent_solver():
    """scikit-learn's solutions, stored with the script that made them (data/make_linear.py)."""
    stored = json.loads((Path(__file__).parent / "data" / "linear.json").read_text())
    features, queries = (torch.tensor(stored[name], dtype=torch.float64) for name in ("features", "queries"))
    labels = torch.tensor(stored["labels"])
    std = features.std(0)
    std[-1] = 1                                                 # the constant one
    standardised = (features - features.mean(0)) / std
    start = None
    for decay, expected in stored["fits"].items():
        fresh = fit_linear(standardised, labels, 4, float(decay), tolerance=1e-9)
        start = fit_linear(standardised, labels, 4, float(decay), start, tolerance=1e-9)
        for weights in (fresh, start):
            weights[-1] -= weights[-1].mean()
            torch.testing.assert_close(weights, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        single = fit_linear(standardised.float(), labels, 4, float(decay))
        single[-1] -= single[-1].mean()
        torch.testing.assert_close(single, torch.tensor(expected), rtol=1e-2, atol=1e-2)
    for dtype in (torch.float32, torch.float64):
        predicted, decay = linear_probe(features.to(dtype), labels, queries.to(dtype),
                                        [float(decay) for decay in stored["fits"]])
        assert predicted.tolist() == stored["predicted"] and decay == stored["chosen"]


def test_pictures_are_resized_and_cut_as_torchvision_does():
    class One:
        def __getitem__(self, i):
            import io
            buffer = io.BytesIO()
            image.save(buffer, "PNG")
            return buffer.getvalue()

    image = Image.radial_gradient("L").resize((90, 61)).convert("RGB")
    published = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(28),
                                    transforms.PILToTensor()])
    picture, ok = Centred(One(), 28)[0]
    assert ok and torch.equal(picture, published(image))


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


def command(capsys, *argv):
    evaluate.main([*map(str, argv)])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_linear_from_the_command_line(classes, capsys):
    result = command(capsys, "linear", "random", "--arch=regnety_100mf", "--seed=1", "--data", classes,
                     "--size=32", "--workers=0", "--device=cpu")
    assert result["top1"] == 100 and result["weight_decay"] in evaluate.WEIGHT_DECAYS
    assert result["protocol"] == "linear" and "k" not in result


def test_the_command_ends_with_one_json_object(classes, tmp_path, capsys):
    options = ["--data", classes, "--size=32", "--k=3", "--workers=0", "--device=cpu"]
    result = command(capsys, "knn", "random", "--arch=regnety_100mf", *options)
    assert result["top1"] == 100 and (result["train"], result["val"], result["k"]) == (24, 10, 3)
    trunk = RegNet(ARCHS["regnety_100mf"])
    checkpoint.save(tmp_path / "trunk.pt", trunk.state_dict())
    assert command(capsys, "knn", tmp_path / "trunk.pt", "--arch=regnety_100mf", *options)["top1"] == 100
    (classes / "val" / "red" / "0.png").write_bytes(b"")
    result = command(capsys, "knn", tmp_path / "trunk.pt", "--arch=regnety_100mf", *options)
    assert (result["top1"], result["val"], result["left_out"]) == (100, 9, 1)


@pytest.mark.parametrize("argv, expected", [
    (["knn", "nowhere.pt"], "neither a file nor the name of an official one"),
    (["knn", "{trunk}", "--k=0"], "needs --k >= 1"),
    (["knn", "random", "--arch=regnety_100mf", "--device=foo"], "foo"),
    (["knn", "random"], "random needs --arch"),
    (["knn", "random", "--arch=regnety_100mf", "--data=nowhere"], "no such folder"),
    (["knn", "{trunk}", "--arch=regnety_200mf"], "holds regnety_100mf, not regnety_200mf")])
def test_bad_input_gets_one_sentence(tmp_path, capsys, argv, expected):
    checkpoint.save(tmp_path / "trunk.pt", RegNet(ARCHS["regnety_100mf"]).state_dict())
    with pytest.raises(SystemExit) as stop:
        evaluate.main([word.format(trunk=tmp_path / "trunk.pt") for word in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and expected in error and "Traceback" not in error


def test_pictures_are_normalised_as_in_the_run():
    config = dataclasses.asdict(configure({"mean": "0.1,0.2,0.3", "std": "0.5,0.6,0.7"}))
    picture = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    features, ok = evaluate.extract_features(torch.nn.Flatten(), [(picture, True)] * 2,
                                             **evaluate.normalisation(config))
    expected = (picture / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(features, expected.flatten().expand(2, -1))
    assert ok.all() and evaluate.normalisation({}) == {}


def test_splits_must_have_the_same_classes(classes, tmp_path):
    write_pictures(classes / "val" / "green", 1)
    with pytest.raises(ValueError, match="green"):
        evaluate.open_splits(str(classes))
    assert len(open_images(classes)) == 35
