"""data/retrieval.py: published layouts, made by hand, and files that are none."""
import os
import pickle

import numpy
import pytest
from PIL import Image

from data.retrieval import Joined, open_benchmark


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / name)


def test_copydays_attacks_belong_to_originals_by_their_names(tmp_path):
    write(tmp_path, "original/200000.jpg", "original/200100.jpg", "strong/200101.jpg",
          "strong/200002.jpg", "strong/200003.jpg", "crops/10/200000.jpg", "jpeg/3/200105.jpg",
          "distractors/999900.jpg")
    benchmark = open_benchmark(str(tmp_path))
    database = [benchmark.database.name(i) for i in range(2)]
    assert len(benchmark.database) == 2 and len(benchmark.queries) == 5
    assert list(benchmark.protocols) == ["crops/10", "jpeg/3", "strong"]
    found = {benchmark.queries.name(i): (name, [database[p] for p in truths[i].positives])
             for name, truths in benchmark.protocols.items() for i in range(5)
             if truths[i].positives}
    assert found == {
        "crops/10/200000.jpg": ("crops/10", ["200000.jpg"]),
        "jpeg/3/200105.jpg": ("jpeg/3", ["200100.jpg"]),
        **{f"strong/{name}.jpg": ("strong", [f"{name[:4]}00.jpg"])
           for name in ("200101", "200002", "200003")}}
    assert all(truth.junk == [] for truths in benchmark.protocols.values() for truth in truths)
    with open(tmp_path / "strong" / "200002.jpg", "rb") as file:
        assert file.read() in [benchmark.queries[i] for i in range(5)]
    write(tmp_path, "strong/300001.jpg")
    with pytest.raises(ValueError, match="300001.jpg has no original"):
        open_benchmark(str(tmp_path))


TRUTH = {"imlist": ["a", "b", "c", "d", "e"], "qimlist": ["q1", "q2"], "gnd": [
    {"bbx": [0.0, 1.0, 5.0, 6.0], "easy": [0, 2], "hard": [1], "junk": [4]},
    {"bbx": [0.0, 1.0, 5.0, 6.0], "easy": [], "hard": [3], "junk": []}]}


@pytest.mark.parametrize("make, protocol", [(list, 2), (list, 4), (numpy.array, 2)])
def test_revisited_oxford_has_three_protocols(tmp_path, make, protocol):
    truth = TRUTH | {"gnd": [{key: make(value) for key, value in query.items()}
                             for query in TRUTH["gnd"]]}
    (tmp_path / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol))
    write(tmp_path, *(f"jpg/{name}.jpg" for name in "abcde"), "jpg/q1.jpg", "jpg/q2.jpg")
    benchmark = open_benchmark(str(tmp_path))
    assert [benchmark.database.name(i) for i in (0, 4)] == ["jpg/a.jpg", "jpg/e.jpg"]
    assert benchmark.queries.name(1) == "jpg/q2.jpg" and len(benchmark.queries[1]) > 100
    sets = {name: [(set(truth.positives), set(truth.junk)) for truth in truths]
            for name, truths in benchmark.protocols.items()}
    assert sets == {"easy": [({0, 2}, {1, 4}), (set(), {3})],
                    "medium": [({0, 1, 2}, {4}), ({3}, set())],
                    "hard": [({1}, {0, 2, 4}), ({3}, set())]}


class Harmful:
    def __reduce__(self):
        return os.system, ("touch harmed",)


@pytest.mark.parametrize("content, expected", [
    (pickle.dumps(TRUTH | {"imlist": Harmful()}), "holds a posix.system"),
    (b"nothing", "is not the ground truth"), (pickle.dumps([1]), "is not the ground truth"),
    (pickle.dumps({"imlist": ["a"]}), "is not the ground truth"),
    (pickle.dumps(TRUTH | {"imlist": ["a"]}), "does not fit its own lists")])
def test_a_file_that_is_no_ground_truth_is_refused(tmp_path, monkeypatch, content, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gnd_x.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=expected):
        open_benchmark(".")
    assert not (tmp_path / "harmed").exists()


def test_another_folder_is_told_of_attack(tmp_path):
    for source in ("", str(tmp_path)):
        with pytest.raises(ValueError, match="for images of your own add --attack"):
            open_benchmark(source)


def test_sets_are_joined(tmp_path):
    write(tmp_path, "original/200000.jpg", "strong/200001.jpg", "strong/200002.jpg")
    benchmark = open_benchmark(str(tmp_path))
    joined = Joined([benchmark.database, benchmark.queries])
    assert [joined.name(i) for i in range(len(joined))] == [
        "200000.jpg", "strong/200001.jpg", "strong/200002.jpg"]
    assert joined[2] == benchmark.queries[1]
    with pytest.raises(IndexError):
        joined[3]
