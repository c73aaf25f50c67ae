"""data/labelled.py: class folders, lists, the demo's splits, and parts of them."""
import hashlib

import pytest

from data.images import open_images
from data.labelled import one_hot, open_labelled, open_splits
from tests.helpers import write_pictures


@pytest.fixture
def classes(tmp_path):
    """train and val with red and blue: 3 + 3 and 2 + 2 images."""
    for split, count in (("train", 3), ("val", 2)):
        for name in ("red", "blue"):
            write_pictures(tmp_path / "colours" / split / name, count)
    return tmp_path / "colours"


def test_folders_of_classes(classes):
    train, val = open_splits(str(classes))
    assert train.classes == val.classes == ["blue", "red"] and not train.multilabel
    assert (train.labels.tolist(), val.labels.tolist()) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    assert train.targets.tolist() == [[True, False]] * 3 + [[False, True]] * 3
    assert open_labelled(classes / "val", ["red", "green", "blue"]).labels.tolist() == [2, 2, 0, 0]


def test_lists_of_paths_and_labels(tmp_path):
    write_pictures(tmp_path / "some pictures", 3)
    (tmp_path / "train.txt").write_text(
        "# a comment\nsome pictures/0000.png dog\nsome pictures/0001.png cat,dog\n\n")
    (tmp_path / "val.txt").write_bytes(
        b"some pictures/0002.png\tcat \r\nsome pictures/0000.png dog")
    train, val = open_splits(str(tmp_path))
    assert train.classes == val.classes == ["cat", "dog"] and train.multilabel and val.multilabel
    assert not open_labelled(tmp_path / "val.txt").multilabel
    assert train.targets.tolist() == [[False, True], [True, True]]
    assert val.labels.tolist() == [0, 1]
    assert train.images[1] == (tmp_path / "some pictures" / "0001.png").read_bytes()
    assert open_labelled(tmp_path / "val.txt", ["dog", "cow", "cat"]).labels.tolist() == [2, 0]
    for text, expected in (("a.jpg", "without a path and a label"),
                           ("a.jpg cow", "not known: \\['cow'\\]")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(ValueError, match=expected):
            open_labelled(tmp_path / "bad.txt", ["dog"])


def test_splits_must_have_the_same_classes(classes):
    write_pictures(classes / "val" / "green", 1)
    with pytest.raises(ValueError, match="green"):
        open_splits(str(classes))
    with pytest.raises(ValueError, match="a folder for each class"):
        open_labelled(classes / "val" / "green")
    assert len(open_images(classes)) == 11


def test_class_folders_without_train_and_val_are_split(tmp_path):
    """The rule, written again: of each class the fifth of the smallest hashes, at least one of two;
    no other image moves when one is added to another class."""
    for name, count in (("red", 11), ("blue", 3), ("green", 1)):
        write_pictures(tmp_path / name, count)

    def names(part):
        return {part.images.name(i) for i in range(len(part.targets))}
    train, val = open_splits(str(tmp_path))
    assert train.classes == val.classes == ["blue", "green", "red"]
    every = [f"{name}/{i:04}.png" for name, n in (("red", 11), ("blue", 3)) for i in range(n)]
    order = sorted(every, key=lambda name: hashlib.sha256(name.encode()).digest())
    expected = {*[name for name in order if name[:3] == "red"][:2],
                [name for name in order if name[:4] == "blue"][0]}
    assert names(val) == expected and names(train) == {*every, "green/0000.png"} - expected
    for part in (train, val):
        assert [part.images.name(i).split("/")[0] for i in range(len(part.targets))] == [
            part.classes[label] for label in part.labels]
    write_pictures(tmp_path / "green", 2)
    assert names(open_splits(str(tmp_path))[1]) - {"green/0000.png", "green/0001.png"} == expected
    (tmp_path / "list.txt").write_text("".join(f"{name} {name[:3]}\n" for name in every))
    assert len(open_splits(str(tmp_path / "list.txt"))[1].targets) == 3


def test_what_is_missing_for_a_split_is_named(classes, tmp_path):
    with pytest.raises(ValueError, match="holds train and neither val nor val.txt"):
        (classes / "val").rename(tmp_path / "held out")
        open_splits(str(classes))
    with pytest.raises(ValueError, match="needs a folder for each class: .*red/CLASS/.*; or train "
                                         "and val, each with such folders or as a list"):
        open_splits(str(classes / "train" / "red"))
    with pytest.raises(ValueError, match="no class has two"):
        write_pictures(tmp_path / "ones" / "red", 1)
        open_splits(str(tmp_path / "ones"))


def test_a_subset_keeps_names_and_classes(classes):
    train, _ = open_splits(str(classes))
    some = train.subset([4, 0])
    assert [some.images.name(i) for i in range(2)] == [train.images.name(i) for i in (4, 0)]
    assert some.images[0] == train.images[4] and len(some.images) == 2
    assert some.labels.tolist() == [1, 0] and some.classes == train.classes


def test_the_demo_has_one_label_an_image():
    train, val = open_splits("")
    assert (len(train.images), len(val.images)) == (4096, 1024) and train.classes == val.classes
    for split in (train, val):
        assert split.labels.tolist() == split.images.labels.tolist() and not split.multilabel
        assert (split.targets.sum(1) == 1).all()
    assert one_hot([["a"], ["b", "a"]], ["b", "a"]).tolist() == [[False, True], [True, True]]
