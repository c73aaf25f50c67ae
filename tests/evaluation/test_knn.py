"""evaluation/knn.py against its definition, and from the command line."""
import json
import math

import pytest
import torch
from PIL import Image

import evaluate
from data.labelled import open_splits
from data.stream import permute
from evaluation.features import CenterCrops, extract
from evaluation.knn import knn, knn_top1, neighbours, vote
from evaluation.task import TILE, load_trunk
from regnet import ARCHS, RegNet
from tests.evaluation.conftest import QUICK, RANDOM
from weights.atomic import save


def test_knn_equals_its_definition():
    torch.manual_seed(0)
    features, queries = torch.randn(60, 5), torch.randn(23, 5)
    labels = torch.randint(0, 4, (60,))
    for chunk in (0, 1, 7, 1000):
        similarities, nearest = neighbours(features, queries, 100, chunk)
        for k, temperature in ((1, 0.1), (5, 0.07), (60, 1.0), (100, 0.5), (20, 0.002)):
            expected = []
            for q in queries.double():
                similarity = [(torch.dot(q, f) / q.norm() / f.norm()).item()
                              for f in features.double()]
                votes = [0.0] * 4
                for i in sorted(range(60), key=lambda i: -similarity[i])[:k]:
                    votes[labels[i]] += math.exp((similarity[i] - max(similarity)) / temperature)
                expected.append(votes.index(max(votes)))
            predicted = vote(similarities[:, :k], labels[nearest[:, :k]], temperature, 4)
            assert predicted.tolist() == expected
            assert knn(features, labels, queries, k, temperature, chunk).tolist() == expected
    truth = torch.tensor(expected)          # of k = 20
    truth[:2] += 1
    assert knn_top1(features, labels, queries, truth, 20, 0.002) == round(100 * 21 / 23, 2)


def test_class_folders_alone_are_split_and_it_is_said(classes, capsys):
    evaluate.main(["knn", *RANDOM, "--data", str(classes / "train"), *QUICK, "--k=3"])
    printed, told = capsys.readouterr()
    result = json.loads(printed)
    assert (result["top1"], result["train"], result["val"]) == (100, 20, 4)
    assert "a fifth of each class, chosen by a hash of the names, is val: 4 of 24 images" in told


def test_knn_from_the_command_line(classes, tmp_path, command):
    options = ["--data", classes, *QUICK]
    result = command("knn", *RANDOM, *options, "--k=3,1", "--temperature=0.1,1", "--sheet",
                     tmp_path / "sheet.png", "--rows=4", "--columns=2")
    assert result["top1"] == 100 and (result["train"], result["val"], result["k"]) == (24, 10, 3)
    assert [(row["k"], row["temperature"]) for row in result["all"]] == [
        (3, 0.1), (3, 1), (1, 0.1), (1, 1)]
    assert Image.open(tmp_path / "sheet.png").height > 4 * TILE
    trunk = RegNet(ARCHS["regnety_100mf"])
    save(tmp_path / "trunk.pt", trunk.state_dict())
    first = command("knn", tmp_path / "trunk.pt", "--arch=regnety_100mf", *options)
    # one of the first class: the labels of the others do not move
    (classes / "val" / "blue" / "0.png").write_bytes(b"")
    second = command("knn", tmp_path / "trunk.pt", *options)
    assert (second["top1"], second["val"], second["left_out"]) == (100, 9, 1)
    kept = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert kept == [first, second] and len(first["sha256"]) == 16


def test_the_sheet_names_classes_and_scores(shades, tmp_path, monkeypatch, command):
    drawn = []
    monkeypatch.setattr("evaluation.knn.sheet", lambda *arguments: drawn.append(arguments))
    result = command("knn", *RANDOM, "--data", shades, *QUICK, "--k=5", "--sheet",
                     tmp_path / "sheet.png", "--rows=36", "--columns=3")
    (path, said, rows, heads), = drawn
    assert path == str(tmp_path / "sheet.png") and len(rows) == 36
    assert heads == ["query", "", "neighbour 1", "neighbour 2", "neighbour 3"]
    assert said.startswith("kNN with k = 5 and temperature 0.1: top-1 "
                           f"{result['top1']:.1f} % on 36 held-out images.\nUnder a query")
    assert "one of 48 training images: its class, and its cosine similarity" in said
    train, val = open_splits(shades)
    trunk, *_ = load_trunk("random", "regnety_100mf")
    (x,), (q,) = (extract(trunk, CenterCrops(split.images, 32))[0] for split in (train, val))
    similarity, nearest = neighbours(x, q, 5)
    for row, i in zip(rows, [permute(i, 36, 0) for i in range(36)]):
        query, gap, *others = row.tiles
        voted = vote(similarity[i:i + 1], train.labels[nearest[i:i + 1]], 0.1, 6).item()
        truth = val.labels[i].item()
        assert gap is None and query.text == [f"{truth}", f"vote: {voted}"]         # classes 0 to 5
        assert query.right == (voted == truth)
        for tile, j, cosine in zip(others, nearest[i].tolist(), similarity[i].tolist()):
            label = train.labels[j].item()
            assert tile.right == (label == truth) and tile.text[0] == f"{label}"
            assert float(tile.text[1]) == pytest.approx(cosine, abs=6e-4)
    assert {tile.right for row in rows for tile in row.tiles if tile} == {True, False}
    assert len(others) == 3
