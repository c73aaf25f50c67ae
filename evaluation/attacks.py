"""Attacks: what people do to a copy of an image, for copy detection on images of one's own.

    from data.images import open_images
    from evaluation.attacks import ATTACKS, Attacked
    copies = Attacked(open_images("photos/"), [0, 5], seed=0)   # encoded images, for CenterCrops
    len(copies), copies.name(3)             # 18: each of two images under each attack
    copies.attack(3), copies.source(3)      # ("rotation", 5)

They are after CopyDays' strong attacks (Douze et al., CIVR 2009), which were made by hand; these
are drawn, from the seed, the image's number and the attack alone. The same pixels on any machine
whose PIL has the same JPEG library.
"""
import io
import math
import random
import string
from typing import Sequence

from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.stream import mix
from multicrop import decode

GRAY = (128, 128, 128)                  # what a rotation leaves empty
LONGEST = 2048                          # pixels of a side: a rotated screenshot is still readable


def crop(image: Image.Image, rng: random.Random) -> Image.Image:
    """To a fifth of the area, of the same shape, anywhere."""
    width, height = (max(1, round(side * math.sqrt(0.2))) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


def rotation(image: Image.Image, rng: random.Random) -> Image.Image:
    """By 15 to 45 degrees, either way; the corners are gray."""
    angle = rng.uniform(15, 45) * rng.choice((-1, 1))
    return image.rotate(angle, Image.Resampling.BILINEAR, expand=True, fillcolor=GRAY)


def jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    """Quality 5."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=5)
    return Image.open(buffer).convert("RGB")


def text(image: Image.Image, rng: random.Random) -> Image.Image:
    """Three lines of random letters across the image, each a fifth of its height."""
    image, size = image.copy(), max(1, image.height // 5)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    for line in range(3):
        letters = "".join(rng.choices(string.ascii_uppercase, k=1 + 2 * image.width // size))
        colour = tuple(rng.randrange(256) for _ in range(3))
        pen.text((-rng.randrange(size), (0.5 + 1.5 * line) * size), letters, colour, font)
    return image


def blur(image: Image.Image, rng: random.Random) -> Image.Image:
    """Gaussian, of standard deviation a fifteenth of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) / 15))


def gray(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.convert("L").convert("RGB")


def quarter(image: Image.Image, rng: random.Random) -> Image.Image:
    """A quarter of each side."""
    return image.resize([max(1, side // 4) for side in image.size], Image.Resampling.BILINEAR)


ATTACKS = {"crop": (crop,), "rotation": (rotation,), "jpeg": (jpeg,), "text": (text,),
           "blur": (blur,), "gray": (gray,), "quarter": (quarter,),
           "crop, rotation, gray": (crop, rotation, gray),
           "text, quarter, jpeg": (text, quarter, jpeg)}


class Attacked:
    """Some images, of at most LONGEST pixels a side, under all attacks: of each image one after the
    other, as bytes of PNG.

    images: [i] -> bytes, .name(i).  chosen: which of them.
    """

    def __init__(self, images, chosen: Sequence[int], seed: int):
        self.images, self.chosen, self.seed = images, list(chosen), seed

    def __len__(self) -> int:
        return len(self.chosen) * len(ATTACKS)

    def attack(self, i: int) -> str:
        return list(ATTACKS)[i % len(ATTACKS)]

    def source(self, i: int) -> int:
        """The number of the image that it was."""
        return self.chosen[i // len(ATTACKS)]

    def name(self, i: int) -> str:
        return f"{self.images.name(self.source(i))} ({self.attack(i)})"

    def __getitem__(self, i: int) -> bytes:
        source, buffer = self.source(i), io.BytesIO()
        image = decode(self.images[source])
        image.thumbnail((LONGEST, LONGEST))                 # smaller ones stay as they are
        rng = random.Random(mix(self.seed, source, i % len(ATTACKS)))
        for change in ATTACKS[self.attack(i)]:
            image = change(image, rng)
        image.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()
