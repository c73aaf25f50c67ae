"""evaluation/duplicates.py: the rule, the groups, and planted duplicates that are found again."""
import csv
import json
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import evaluate
from data.images import open_images
from evaluation import duplicates
from evaluation.duplicates import (
    Group,
    choose_threshold,
    draw,
    from_first,
    groups,
    kept_of,
    nearest_similarities,
    whiten,
    write_kept,
)
from tests.evaluation.conftest import QUICK, RANDOM
from tests.evaluation.test_retrieve import write_blocks
from tests.helpers import torchrun


def planted(count, copies, size=48, noise=0.05):
    """Random vectors, and noisy copies of the first of them behind."""
    torch.manual_seed(0)
    x = torch.randn(count, size)
    return F.normalize(torch.cat([x, x[:copies] + noise * torch.randn(copies, size)]), dim=1)


def test_the_nearest_other_is_not_the_image_itself():
    x = torch.cat([planted(30, 5), planted(30, 5)[:1].expand(3, -1)])       # image 0 four times
    exact = x @ x.t()
    exact.fill_diagonal_(-2)
    torch.testing.assert_close(nearest_similarities(x), exact.amax(1))


def test_groups_are_connected_components():
    for seed in range(5):
        torch.manual_seed(seed)
        x = F.normalize(torch.randn(60, 3), dim=1)
        near = (x @ x.t() >= 0.98).tolist()
        left, expected = set(range(60)), []
        while left:
            component, waiting = set(), [min(left)]
            while waiting:
                i = waiting.pop()
                component.add(i)
                waiting += [j for j in range(60) if near[i][j] and j not in component]
            left -= component
            expected.append(sorted(component))
        expected = sorted((group for group in expected if len(group) > 1),
                          key=lambda group: (-len(group), group[0]))
        assert groups(x, nearest_similarities(x), 0.98) == expected
        assert len(expected) > 3 and len(expected[0]) > 2
    same = torch.ones(500, 1)
    assert groups(same, nearest_similarities(same), 1.0) == [[*range(500)]]
    assert groups(x, nearest_similarities(x), 1.1) == []


def test_the_threshold_by_hand():
    # log distances: median -2, upper quartile -1.5
    logs = torch.tensor([-9.0, -2.5, -2.0, -1.5, -1.0], dtype=torch.float64)
    assert choose_threshold(1 - logs.exp()) == pytest.approx(1 - numpy.exp(-2 - 3 * 0.5))
    moved = logs.clone()
    moved[0] = -3                           # a duplicate less: it was in the lower half, and stays
    assert choose_threshold(1 - moved.exp()) == pytest.approx(choose_threshold(1 - logs.exp()))
    assert choose_threshold(torch.ones(9)) == 1 - 1e-4      # of equal images all are duplicates
    assert choose_threshold(torch.tensor([0.2, 0.3, 0.3, 0.4])) == 0.9


@pytest.mark.parametrize("copies", [0, 20, 100])
def test_the_rule_finds_planted_vectors_and_no_others(copies):
    x = planted(400, copies)
    similarity = nearest_similarities(x)
    found = groups(x, similarity, choose_threshold(similarity))
    assert found == [[i, 400 + i] for i in range(copies)]


@pytest.mark.parametrize("count, copies", [(500, 500), (500, 260)])
def test_exact_copies_are_found_however_many_there_are(count, copies):
    x = planted(count, copies, noise=0)
    similarity = nearest_similarities(x)
    assert len(groups(x, similarity, choose_threshold(similarity))) == copies


def test_a_threshold_of_1_finds_all_exact_copies():
    x = planted(500, 500, size=1024, noise=0)
    similarity = nearest_similarities(x)
    assert 0 < (similarity < 1).sum() < 1000                # to rounding
    assert groups(x, similarity, 1.0) == [[i, 500 + i] for i in range(500)]
    assert all(kept_of(x[[i, 500 + i]], 1.0) == [True, False] for i in range(500))


def test_equal_images_are_one_group():
    x = F.normalize(torch.randn(64), dim=0).repeat(400, 1)
    x[::3] *= 1 + 1e-7                      # rounding
    white = whiten(x, 1024)
    similarity = nearest_similarities(white)
    assert groups(white, similarity, choose_threshold(similarity)) == [[*range(400)]]


def test_of_a_chain_those_are_kept_that_are_not_near_a_kept_one():
    angles = torch.arange(30) * numpy.arccos(0.991)         # 0.964 to the next but one
    x = torch.stack([angles.cos(), angles.sin()], 1)
    group, = groups(x, nearest_similarities(x), 0.99)
    assert group == [*range(30)] and kept_of(x, 0.99) == [True, False] * 15
    assert kept_of(x[::2], 0.99) == [True] * 15 and kept_of(x[:3], 0.9) == [True, False, False]


def test_the_sheet_shows_the_first_and_then_the_least_similar(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(duplicates, "sheet", lambda path, said, rows: drawn.extend(rows))
    task = SimpleNamespace(options=SimpleNamespace(rows=5, columns=3, sheet="x.png"),
                           tile=lambda images, i: i)
    images = SimpleNamespace(name=str)
    group = Group([7, 4, 5, 6], [1.0, 0.99, 0.95, 0.8], [True, False, False, True])
    draw(task, images, [group], {"groups": 1, "images": 9, "threshold": 0.9, "duplicates": 2})
    assert [tile.text for tile in drawn[0].tiles] == [
        ["7", "1.0000, kept"], ["6", "0.8000, kept"], ["5", "0.9500"]]


def test_whitening_makes_components_equal_where_images_suffice():
    torch.manual_seed(0)
    x = torch.randn(1000, 40) * torch.logspace(0, 2, 40)
    white = whiten(x, 1024)
    assert white.shape == (1000, 40)
    assert (white.std(0) / white.std()).sub(1).abs().max() < 0.1
    assert whiten(x, 35).shape == (1000, 35) and whiten(x[:300], 1024).shape == (300, 37)
    torch.testing.assert_close(whiten(x[:255], 1024), F.normalize(x[:255], dim=1))
    assert whiten(x, 24).shape == (1000, 24)            # as many as are asked for
    narrow = whiten(x[:, -20:], 1024)                   # of a stage with few channels
    assert (narrow.std(0) / narrow.std()).sub(1).abs().max() < 0.1


def test_the_largest_file_is_first_and_then_the_nearest():
    x = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.3], [1.0, 0.1], [1.0, 0.2]]), dim=1)
    group, cosines = from_first(x, [5, 6, 9, 6].__getitem__, [0, 1, 2, 3])
    assert group[0] == 2 and set(group[1:3]) == {0, 3} and group[3] == 1
    assert cosines == sorted(cosines, reverse=True) and cosines[0] == 1
    assert cosines[3] == pytest.approx((x[1] @ x[2]).item())


def test_planted_images_are_found_and_left_out_of_the_list(tmp_path, command, refused, capsys):
    folder = write_blocks(tmp_path / "photos", 30)
    twins = {}
    for i, name in enumerate(["200000", "200400", "200900"]):
        image = Image.open(folder / f"{name}.png").convert("RGB")
        twin = f"twin {i}.jpg"
        image.resize((40, 33)).save(folder / twin, quality=40)
        twins[twin] = f"{name}.png"
    (folder / "broken.png").write_bytes(b"no")
    out = tmp_path / "found.csv"
    options = ["duplicates", *RANDOM, *QUICK, "--data", folder, "--out", out, "--pool=mean"]
    result = command(*options, "--sheet", tmp_path / "sheet.png")
    assert (result["images"], result["left_out"]) == (33, 1)
    assert (result["groups"], result["duplicates"]) == (3, 3)
    rows = list(csv.DictReader(open(out)))
    pairs = {frozenset(row["name"] for row in rows if row["group"] == group)
             for group in ("1", "2", "3")}
    assert pairs == {frozenset(pair) for pair in twins.items()} and len(rows) == 6
    for first, second in zip(rows[::2], rows[1::2]):
        assert float(first["similarity"]) == 1
        assert result["threshold"] <= float(second["similarity"]) < 1
        sizes = [(folder / row["name"]).stat().st_size for row in (first, second)]
        assert sizes[0] >= sizes[1]
    kept = open_images(result["keep"])
    names = {kept.name(i).rpartition("/")[2] for i in range(len(kept))}
    everything = {path.name for path in folder.iterdir()}
    assert names == everything - {"broken.png"} - {row["name"] for row in rows[1::2]}
    assert len(kept[0]) > 0 and Image.open(tmp_path / "sheet.png").width >= 600
    for path in (out, tmp_path / "found.keep.txt"):
        assert "is there already" in refused(*options)
        path.unlink()
    assert [row["kept"] for row in rows] == ["1", "0"] * 3
    evaluate.main([*map(str, options), "--threshold=1", f"--sheet={tmp_path}/none.png"])
    printed = capsys.readouterr()
    assert '"groups": 0' in printed.out and "no near-duplicates were found" in printed.err
    assert "one depth" in refused(*options, "--force", "--depths=res3,avgpool")
    assert "ends in .csv" in refused(*options, f"--out={tmp_path}/x.txt")


def test_no_older_list_of_images_to_keep_is_left(tmp_path, capsys):
    Image.new("L", (2, 2)).save(tmp_path / "a\nb.png")
    for images in (open_images(tmp_path), [b"of a tar file"]):
        path = tmp_path / "found.keep.txt"
        path.write_text("older")
        assert write_kept(path, images, [0]) is None and not path.exists()
        assert "no list of images to keep" in capsys.readouterr().err


@pytest.mark.measured
def test_two_ranks_find_what_one_does(tmp_path, command):
    folder = write_blocks(tmp_path / "photos", 150)
    for i in range(6):
        image = Image.open(folder / f"{2000 + i}00.png").convert("RGB")
        image.resize((40, 33)).save(folder / f"twin {i}.jpg", quality=40)
    options = [*RANDOM, *QUICK, "--data", str(folder)]
    for argv in (["retrieve", *options, "--attack", "--queries=5", "--whiten", str(folder),
                  "--components=40"],
                 ["duplicates", *options, f"--out={tmp_path / 'd.csv'}", "--force"]):
        alone = command(*argv)
        table = (tmp_path / "d.csv").read_text() if argv[0] == "duplicates" else ""
        result = torchrun("evaluate.py", *argv)
        assert result.returncode == 0, result.stderr
        printed, = map(json.loads, result.stdout.splitlines())
        assert printed.keys() == alone.keys()
        if table:
            assert printed == alone and alone["groups"] >= 6
            assert (tmp_path / "d.csv").read_text() == table
        else:                           # whitening is a sum of two shares: to rounding
            assert printed["map"] == pytest.approx(alone["map"], abs=0.5)
