"""evaluation/attacks.py: what each attack leaves of an image, and that the seed says all."""
import io

import numpy
import pytest
from PIL import Image

from data.images import open_images
from evaluation.attacks import ATTACKS, GRAY, LONGEST, Attacked
from multicrop import decode


@pytest.fixture
def images(tmp_path):
    rng = numpy.random.default_rng(0)
    for i in range(3):
        blocks = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=numpy.uint8))
        blocks.resize((80, 60), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
    return open_images(tmp_path)


def test_the_seed_the_image_and_the_attack_say_all(images):
    first, again, other = (Attacked(images, chosen, seed) for chosen, seed in (
        ([2, 0], 7), ([0], 7), ([2, 0], 8)))
    assert len(first) == 2 * len(ATTACKS)
    changed = set()
    for i, name in enumerate(ATTACKS):
        at = len(ATTACKS) + i
        assert (first.attack(at), first.source(at)) == (name, 0)
        assert first.name(at) == f"0.png ({name})"
        assert first[at] == again[i] == first[at]       # of image 0, whichever others are chosen
        assert first[at] != first[i]
        changed |= {name} if other[at] != first[at] else set()
    assert changed == {"crop", "rotation", "text", "crop, rotation, gray", "text, quarter, jpeg"}


def test_what_an_attack_leaves(images):
    whole = numpy.asarray(decode(images[1])).astype(float)
    left = {name: decode(Attacked(images, [1], 0)[i]) for i, name in enumerate(ATTACKS)}
    pixels = {name: numpy.asarray(image).astype(float) for name, image in left.items()}
    assert left["crop"].size == (36, 27)                # 80 and 60 by the root of 0.2
    inside = [pixels["crop"] == whole[y:y + 27, x:x + 36] for y in range(34) for x in range(45)]
    assert sum(map(numpy.all, inside)) == 1
    assert left["rotation"].width > 80 and left["rotation"].height > 60
    assert (pixels["rotation"][0, 0] == GRAY).all()
    buffer = io.BytesIO()
    decode(images[1]).save(buffer, "JPEG", quality=5)
    assert (pixels["jpeg"] == numpy.asarray(Image.open(buffer).convert("RGB"))).all()
    share = (pixels["text"] != whole).any(2).mean()
    assert 0.1 < share < 0.7 and left["text"].size == (80, 60)
    assert numpy.abs(numpy.diff(pixels["blur"], axis=1)).mean() < 0.8 * numpy.abs(
        numpy.diff(whole, axis=1)).mean()
    for name in ("gray", "crop, rotation, gray"):
        assert (pixels[name] == pixels[name][:, :, :1]).all()
    assert left["quarter"].size == left["text, quarter, jpeg"].size == (20, 15)


def test_small_images_can_be_attacked(tmp_path):
    Image.new("L", (1, 3)).save(tmp_path / "tiny.png")
    copies = Attacked(open_images(tmp_path), [0], 0)
    for i in range(len(copies)):
        assert min(decode(copies[i]).size) >= 1


def test_a_long_screenshot_can_be_rotated(tmp_path):
    Image.new("L", (300, 16_000)).save(tmp_path / "screenshot.png")     # rotated: 100 megapixels
    copies = Attacked(open_images(tmp_path), [0], 0)
    for i, name in enumerate(ATTACKS):
        assert max(decode(copies[i]).size) <= LONGEST + 38              # its shorter side is 38
    assert decode(copies[[*ATTACKS].index("gray")]).size == (38, LONGEST)
