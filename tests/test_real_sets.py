"""The labelled sets, on hand-made pictures: none twice, none with two labels; fetching again."""
import zipfile
from pathlib import Path

import numpy
import pytest
from PIL import Image

from tests import real_sets


def picture(seed):
    return Image.fromarray(numpy.random.default_rng(seed).integers(
        0, 256, (16, 16, 3), dtype=numpy.uint8))


def given(*seeds_of_classes):
    for name, seeds in zip("ab", seeds_of_classes):
        for i, seed in enumerate(seeds):
            image = Image.new("RGB", (16, 16), "gray") if seed is None else picture(seed)
            yield name, None, Path(f"packages/{name}/{i}.png"), image


def test_each_picture_once_and_none_of_two_classes_or_of_one_colour():
    found = real_sets.distinct(given([0, 1, 0, None, 2], [3, 2, 4]), ".png")
    assert [(name, path.name) for name, _, path, _ in found] == [
        ("a", "0.png"), ("a", "1.png"), ("b", "0.png"), ("b", "2.png")]


def test_equal_once_encoded_is_equal():
    images = [Image.linear_gradient("L").convert("RGB") for _ in range(2)]
    images[1].putpixel((8, 8), (9, 9, 9))               # was 8: lost in a JPEG
    pictures = [("a", None, Path("a"), image) for image in images]
    lengths = [len(real_sets.distinct(pictures, suffix)) for suffix in (".png", ".jpg")]
    assert lengths == [2, 1]


def test_splits_follow_what_is_left(tmp_path):
    out = tmp_path / "things"
    pictures = list(given([0, 0, 1, 2, 3, 4, 5, 6, 7, 8], [9, 10]))
    real_sets.write([(name, None, tmp_path / path, image) for name, _, path, image in pictures],
                    out, at_least=3, at_most=8)
    written = sorted(path.relative_to(out).as_posix() for path in out.glob("*/*/*"))
    assert written == [f"train/a/{i:04d}.png" for i in (0, 1, 2, 4, 5, 6)] + [
        "val/a/0003.png", "val/a/0007.png"]             # of 9 different ones 8; b has too few
    assert (out / "sources.txt").read_text().split()[:2] == ["a/0.png", "a/2.png"]


def test_fetch_gets_what_is_missing_and_names_it_last(tmp_path, monkeypatch):
    asked = []

    def run(folder, *command):
        asked.append(command[-1])
        if command[0] == "apt-get":
            (folder / f"{command[-1]}_1.deb").touch()
        elif command[0] == "dpkg":
            (folder / command[-1]).mkdir()
            if command[-1] == "broken.part":
                raise ValueError("interrupted")
        else:
            with zipfile.ZipFile(folder / "a_wheel-1.0-py3.whl", "w") as wheel:
                wheel.writestr("module.py", "")

    monkeypatch.setattr(real_sets, "run", run)
    (tmp_path / "there").mkdir()
    real_sets.fetch(tmp_path, ["there", "ours"], ["a-wheel==1.0"])
    assert asked == ["ours", "ours.part", "a-wheel==1.0"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_wheel", "ours", "there"]
    with pytest.raises(ValueError, match="interrupted"):
        real_sets.fetch(tmp_path, ["broken"])
    assert not (tmp_path / "broken").exists()


def test_a_failed_command_is_told(tmp_path):
    with pytest.raises(ValueError, match="failed: false here"):
        real_sets.run(tmp_path, "false", "here")
