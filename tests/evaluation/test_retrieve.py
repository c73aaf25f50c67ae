"""evaluation/retrieve.py: protocols by hand, and from the command line."""
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from data.images import open_images
from data.retrieval import Benchmark, Truth
from evaluation.attacks import ATTACKS
from evaluation.features import CenterCrops, WholeImages, extract
from evaluation.pooling import Descriptors
from evaluation.retrieve import attacked, draw, measure
from evaluation.task import load_trunk
from tests.evaluation.conftest import RANDOM

HERE = ["--workers=0", "--device=cpu"]


def write_blocks(folder, count, first=0, size=(48, 40)):
    """Images of a few random colours each, which an untrained network tells apart."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        rng = numpy.random.default_rng(i)
        blocks = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=numpy.uint8))
        blocks.resize(size, Image.Resampling.BICUBIC).save(folder / f"{2000 + i}00.png")
    return folder


def test_protocols_by_hand():
    """Two queries; the angles of five images say in which order they are found."""
    angles = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]]).t()
    database = torch.cat([angles.cos(), angles.sin()], 1)           # of the first: 0 1 2 3 4
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])                # of the second: 4 3 2 1 0
    protocols = {"easy": [Truth([1, 3], [0, 4]), Truth()],
                 "medium": [Truth([1, 3, 4], [0]), Truth([0], [3])],
                 "hard": [Truth([4], [0, 1, 3]), Truth([4])], "none": [Truth(), Truth([], [1])]}
    outcomes = measure(database, queries, protocols)
    assert list(outcomes) == ["easy", "medium", "hard"]
    # easy, the first query: ranked 1 2 3: ranks 0 and 2
    assert outcomes["easy"].queries == [0] and outcomes["easy"].first == [0]
    assert outcomes["easy"].summary()["map"] == pytest.approx(
        100 * (1 + (1 / 2 + 2 / 3) / 2) / 2, abs=0.01)
    # medium: ranked 1 2 3 4: ranks 0, 2, 3; ranked 4 2 1 0: rank 3
    first = (1 + (1 / 2 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2) / 3
    assert outcomes["medium"].precisions == pytest.approx([first, (0 + 1 / 4) / 2])
    assert outcomes["medium"].first == [0, 3] and outcomes["medium"].summary() == {
        "map": round(50 * (first + 1 / 8), 2), "recall_at_1": 50.0, "queries": 2}
    # hard: ranked 2 4: rank 1; rank 0
    assert outcomes["hard"].precisions == pytest.approx([1 / 4, 1])
    # image 4 and the first query could not be read
    outcomes = measure(database, queries, protocols, torch.tensor([1, 1, 1, 1, 0]).bool(),
                       torch.tensor([False, True]))
    assert list(outcomes) == ["medium"] and outcomes["medium"].first == [2]


def test_whole_images_keep_their_shape(tmp_path):
    write_blocks(tmp_path, 1, size=(50, 30))
    write_blocks(tmp_path, 1, 1, size=(20, 80))
    images = open_images(tmp_path)
    shapes = [WholeImages(images, 40)[i][0].shape for i in (0, 1)]
    assert shapes == [(3, 24, 40), (3, 40, 10)]
    means = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    (x,), ok = extract(means, WholeImages(images, 40), batch=1, mean=(0.0,) * 3, std=(1.0,) * 3)
    expected = [WholeImages(images, 40)[i][0].double().mean((1, 2)) / 255 for i in (0, 1)]
    torch.testing.assert_close(x.double(), torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_attacked_images_are_searched_among_all(tmp_path, command, monkeypatch):
    drawn = []
    monkeypatch.setattr("evaluation.retrieve.sheet", lambda *arguments: drawn.append(arguments))
    folder = write_blocks(tmp_path / "photos", 12)
    (folder / "broken.png").write_bytes(b"no")
    result = command("retrieve", *RANDOM, "--size=32", *HERE, "--attack", "--queries=4", "--data",
                     folder, "--sheet", tmp_path / "sheet.png", "--columns=2", "--rows=5")
    assert list(result["protocols"]) == list(ATTACKS)
    assert (result["database"], result["left_out"]) == (12, 1)
    trunk, *_ = load_trunk("random", "regnety_100mf")
    images = open_images(folder)
    benchmark, network = attacked(images, 4, 0), Descriptors(trunk, ["avgpool"], "rmac")
    (x,), ok = extract(network, CenterCrops(images, 32))
    (q,), read = extract(network, CenterCrops(benchmark.queries, 32))
    assert result["queries"] == int(read.sum())
    failed, cosines = 0, q @ x.t()
    for k, name in enumerate(ATTACKS):
        precisions, right = [], []
        for i in range(k, len(q), len(ATTACKS)):
            if read[i]:
                similarity = cosines[i].tolist()
                own = similarity[benchmark.queries.source(i)]
                rank = sum(other > own for other, seen in zip(similarity, ok) if seen)
                precisions.append(1 if rank == 0 else 1 / (rank + 1) / 2)
                right.append(rank == 0)
        assert result["protocols"][name] == {
            "map": pytest.approx(100 * numpy.mean(precisions), abs=0.01),
            "recall_at_1": round(100 * numpy.mean(right), 2), "queries": len(right)}
        failed += len(right) - sum(right)
    assert result["map"] == pytest.approx(numpy.mean(
        [row["map"] for row in result["protocols"].values()]), abs=0.01)
    (_, said, rows, heads), = drawn
    assert f"among 12 images, {failed} do not find" in said and failed > 5
    assert heads == ["query", "right", "", "wrong 1", "wrong 2"] and len(rows) == 5
    for row in rows:
        query, own, gap, *wrong = row.tiles
        assert query.text[0].startswith(images.name(images_number(images, query.text[0])))
        assert own.right and own.text[0] != "rank 1" and [tile.right for tile in wrong] == [
            False] * 2
        assert float(wrong[0].text[1]) >= float(own.text[1])


def test_the_sheet_shows_neither_right_images_nor_broken_ones_as_wrong(monkeypatch):
    drawn = []
    monkeypatch.setattr("evaluation.retrieve.sheet", lambda *arguments: drawn.append(arguments))
    task = SimpleNamespace(options=SimpleNamespace(rows=5, columns=10, sheet="x.png"),
                           tile=lambda images, i: i)
    images = SimpleNamespace(name=str)
    database = F.normalize(torch.tensor([[1.0, 0.1], [1, 0.9], [1, 0], [1, 0.05], [1, 0.8]]), dim=1)
    benchmark = Benchmark(images, images, {"strong": [Truth([1, 2, 4], [3])]})
    readable = torch.tensor([True, True, False, True, True])        # 2, a right one, is broken
    queries = torch.tensor([[1.0, 0.0]])
    outcomes = measure(database, queries, benchmark.protocols, readable)
    draw(task, benchmark, outcomes, database, queries, readable)
    (_, said, (row,), heads), = drawn
    assert [tile and tile.image for tile in row.tiles] == [0, 4, None, 0]
    assert "among 4 images, 1 do not" in said and heads[-1] == "wrong 1"


def images_number(images, said):
    return next(i for i in range(len(images)) if said.startswith(images.name(i)))


def test_copydays_and_depths_from_the_command_line(tmp_path, command, refused):
    folder = tmp_path / "copydays"
    write_blocks(folder / "original", 6)
    for i in range(6):                          # half a size, and one that is another image's
        image = Image.open(folder / "original" / f"{2000 + i}00.png")
        (folder / "strong").mkdir(exist_ok=True)
        image.resize((24, 20)).save(folder / "strong" / f"{2000 + i}01.png")
    for block, source in (("crops/10", 3), ("crops/50", 4)):
        (folder / block).mkdir(parents=True)
        Image.open(folder / "original" / f"{2000 + source}00.png").save(
            folder / block / "200302.png")
    more = write_blocks(tmp_path / "more", 5, 50)
    options = ["retrieve", *RANDOM, "--size=64", *HERE, "--data", folder]
    result = command(*options, "--depths=res3,avgpool", "--distractors", more, "--pool=gem")
    assert (result["queries"], result["database"], result["size"]) == (8, 11, 64)
    assert result["protocols"]["crops/10"]["map"] == 100            # the image itself
    assert result["protocols"]["crops/50"]["recall_at_1"] == 0
    assert result["map"] == result["protocols"]["strong"]["map"]
    assert [row["depth"] for row in result["all"]] == ["res3", "avgpool"]
    assert result["map"] == max(row["map"] for row in result["all"]) > 50
    whitened = command(*options, "--whiten", more, "--components=3")
    assert whitened["components"] == 3 and whitened["whiten"] == str(more)
    assert "--crop-ratio is of --attack" in refused(*options, "--crop-ratio=1")
    assert "--components is of --whiten" in refused(*options, "--components=3")
    assert "add --attack" in refused("retrieve", *RANDOM, *HERE, "--data", more)
    assert "--attack is of retrieve" in refused("knn", *RANDOM, "--attack")
