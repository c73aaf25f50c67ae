"""Multi-crop: encoded picture -> crops of several sizes -> distorted, normalised batches.

Paper: SwAV (arXiv 2006.09882, section 3.3 and appendix A.3); the distortion is SimCLR's (arXiv
2002.05709, appendix A). The work is cut in two where it is cheapest to cut:

    crop = MultiCrop(parse_crops("2x224+4x96"))
    crops, params = crop(open("picture.jpg", "rb").read(), seed=7)   # uint8, on a CPU worker
    images = Photometric()(crops[0], params[0])                      # float32, in batch, anywhere

A worker decodes the picture once, draws all boxes and distortions, and cuts and resizes the crops
(antialiased, uint8). Flip, colour jitter, grayscale, blur and normalisation then run for a whole
batch on the device. Everything random is drawn in the worker from `seed` alone, so crops and
parameters are the same on any machine, in any process.

Differs from the reference (facebookresearch/swav: torchvision transforms on PIL pictures):
- distortion is float32 in [0, 1]; PIL rounds to 8 bits after each operation;
- grayscale is float32 with the same weights; hue turns by the exact angle, not in 1/255 steps;
- blur is a Gaussian of standard deviation sigma in [0.1, 2], truncated at 6 pixels, reflected at
  the borders. PIL's GaussianBlur(radius=sigma) approximates the same Gaussian by three box
  filters, repeats border pixels and rounds. On noise, its difference to this one, in 1/255 (the
  border of 6 pixels apart; `tests/test_multicrop.py` measures this table):

      sigma                       0.1    0.25   0.5    1.0    1.5    2.0
      mean absolute difference    0.5    8.0    1.0    0.8    0.9    0.5
      largest difference          6.0    28.7   4.5    3.5    4.5    2.8

- transparent pixels are laid on white; 16-bit pictures are scaled to 8 bits, not clipped;
- normalisation is ImageNet's (std 0.229, 0.224, 0.225); the reference's first number is 0.228.

Shapes: N crops of one size, V crops of a picture, P parameters of a crop's distortion.
"""
import io
import math
import random
import re
from typing import Callable, NamedTuple, Sequence

import numpy
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Columns of params. Flip and grayscale: 0 or 1. Factors: 1 is no change. Hue: share of a full
# turn. Sigma: pixels, 0 is no blur. The last four say at which of four turns each operation of
# the jitter comes (a permutation of 0..3: brightness, contrast, saturation, hue).
PARAMS = ("flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma",
          "brightness_turn", "contrast_turn", "saturation_turn", "hue_turn")
BLUR_RADIUS = 6                                     # pixels: three times the largest sigma


class CropSpec(NamedTuple):
    count: int
    size: int                                       # pixels, square
    scale: tuple[float, float]                      # share of the picture's area, from and to


def parse_crops(text: str) -> list[CropSpec]:
    """"2x224+4x96" or "2x160@0.14-1+4x96@0.05-0.14" -> [CropSpec, ...].

    Without a scale, crops of the first size cover 0.14 to 1 of the picture's area and others 0.05
    to 0.14 (SwAV). Raises ValueError for anything else.
    """
    specs = []
    for i, part in enumerate(text.split("+")):
        match = re.fullmatch(r"(\d+)x(\d+)(?:@(\d*\.?\d+)-(\d*\.?\d+))?", part.strip())
        if not match:
            raise ValueError(f"crops {text!r}: {part!r} is not COUNTxSIZE or "
                             f"COUNTxSIZE@FROM-TO, as in 2x224+4x96 or 2x160@0.14-1+4x96@0.05-0.14")
        count, size = int(match[1]), int(match[2])
        scale = (float(match[3]), float(match[4])) if match[3] else (
            (0.14, 1.0) if i == 0 else (0.05, 0.14))
        if count < 1 or size <= BLUR_RADIUS or not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"crops {text!r}: {part!r} needs a count of at least 1, a size of "
                             f"more than {BLUR_RADIUS} pixels and 0 < FROM <= TO <= 1")
        specs.append(CropSpec(count, size, scale))
    return specs


def decode(data: bytes) -> Image.Image:
    """Encoded picture -> upright RGB picture. Raises ValueError, or what PIL raises, for a broken
    one."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:                  # whose own message names a memory address
        raise ValueError(f"{len(data)} bytes that are no known kind of picture") from None
    image = ImageOps.exif_transpose(image)          # loads it
    if image.mode.startswith(("I", "F")):           # one channel of more than 8 bits
        wide = numpy.asarray(image).astype(numpy.float32)
        if image.mode.startswith("I;16") or wide.max() > 255:
            wide = wide / 257                       # 16 bits: 65535 / 257 = 255
        elif image.mode == "F" and wide.max() <= 1:
            wide = wide * 255
        image = Image.fromarray(wide.round().clip(0, 255).astype(numpy.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def random_box(width: int, height: int, scale: tuple[float, float],
               rng: random.Random) -> tuple[int, int, int, int]:
    """Box (left, top, right, bottom) by the distribution of torchvision's RandomResizedCrop:
    area uniform in scale, aspect ratio log-uniform in 3/4..4/3, place uniform; after ten boxes
    that do not fit, the largest central one of an admitted ratio."""
    low, high = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(low), math.log(high)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class MultiCrop:
    """One picture's crops and the parameters of their distortion.

    specs: from parse_crops.  strength: scales the colour jitter; 1 is SwAV's (brightness, contrast
    and saturation by up to 0.8, hue by up to 0.2); or a function of the picture's position in the
    stream, for a strength that changes over the run.  jitter, gray, blur, flip: probabilities.
    """

    def __init__(self, specs: Sequence[CropSpec], strength: float | Callable[[int], float] = 1.0,
                 jitter: float = 0.8, gray: float = 0.2, blur: float = 0.5, flip: float = 0.5):
        self.specs = list(specs)
        self.strength, self.jitter, self.gray, self.blur, self.flip = (
            strength, jitter, gray, blur, flip)

    def __call__(self, data: bytes, seed: int,
                 position: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """data: an encoded picture.  seed: all randomness.  position: in the stream of pictures.

        Returns, per size, uint8 crops (count, 3, size, size) and float32 params (count, P).
        """
        image, rng = decode(data), random.Random(seed)
        crops, params = [], []
        for count, size, scale in self.specs:
            cut = []
            for _ in range(count):
                box = random_box(*image.size, scale, rng)
                cut.append(numpy.asarray(image.crop(box).resize((size, size), Image.BILINEAR)))
            crops.append(torch.from_numpy(numpy.stack(cut)).permute(0, 3, 1, 2).contiguous())
            params.append(torch.tensor([self.draw(rng, position) for _ in range(count)]))
        return crops, params

    def draw(self, rng: random.Random, position: int = 0) -> list[float]:
        """One crop's distortion, in the order of PARAMS."""
        strength = self.strength(position) if callable(self.strength) else self.strength
        jitter, colour = rng.random() < self.jitter, 0.8 * strength
        factors = [rng.uniform(max(0.0, 1 - colour), 1 + colour) for _ in range(3)]
        hue = rng.uniform(-0.2, 0.2) * strength
        turns = rng.sample(range(4), 4)
        flip, gray, blur = (rng.random() < p for p in (self.flip, self.gray, self.blur))
        sigma = rng.uniform(0.1, 2.0)
        return [float(flip), *(factors if jitter else [1.0] * 3), hue if jitter else 0.0,
                float(gray), sigma if blur else 0.0, *map(float, turns)]


class Photometric(nn.Module):
    """Distort and normalise a batch of crops.

    forward(crops uint8 (N, 3, s, s), params float32 (N, P)) -> float32 (N, 3, s, s).
    Crops may lie on any device; params should stay on the CPU, where it is decided, without
    waiting for the device, which crops need hue and blur.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, crops: Tensor, params: Tensor) -> Tensor:
        with torch.autocast(crops.device.type, enabled=False):
            p = dict(zip(PARAMS, params.cpu().t()))                      # each (N,), on the host
            x = crops.float() / 255
            x = _flip(x, p["flip"])
            x = _jitter(x, p)
            x = _blend(x, _gray(x), 1 - p["gray"])
            x = _blur(x, p["sigma"])
            return (x - self.mean) / self.std


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device, like.dtype, non_blocking=True).view(-1, 1, 1, 1)


def _flip(x: Tensor, flip: Tensor) -> Tensor:
    return torch.where(_column(flip, x) > 0, x.flip(3), x)


def _gray(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)                                                # each (N, s, s)
    return (0.2989 * r + 0.587 * g + 0.114 * b).unsqueeze(1)


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor 1 is x and 0 is other; beyond 1 leads away from other."""
    factor = _column(factor, x)
    return (x * factor + other * (1 - factor)).clamp(0, 1)


def _jitter(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Brightness, contrast, saturation and hue, each crop in its own order.

    The first three are one operation: away from black, from the crop's mean gray, or from its
    gray version. So at each of four turns one blend serves the whole batch, whatever the order.
    """
    for turn in range(4):
        now = {name: p[f"{name}_turn"] == turn
               for name in ("brightness", "contrast", "saturation", "hue")}
        factor = torch.ones_like(p["hue"])
        for name in ("brightness", "contrast", "saturation"):
            factor = torch.where(now[name], p[name], factor)
        gray = _gray(x)                                                  # (N, 1, s, s)
        other = (_column(now["contrast"], x) * gray.mean((1, 2, 3), keepdim=True)
                 + _column(now["saturation"], x) * gray)
        x = _blend(x, other, factor)
        rows = (now["hue"] & (p["hue"] != 0)).nonzero()[:, 0]
        if len(rows):
            at = rows.to(x.device, non_blocking=True)
            x[at] = _turn_hue(x[at], p["hue"][rows])
    return x


def _turn_hue(x: Tensor, hue: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, keeping value and saturation of HSV."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)                     # (N, s, s)
    r, g, b = x.unbind(1)
    span = chroma.clamp(min=1e-12)
    sixth = torch.where(r == value, (g - b) / span,                      # -1..5, in sixths
                        torch.where(g == value, (b - r) / span + 2, (r - g) / span + 4))
    sixth = sixth + 6 * _column(hue, x)[:, 0]
    # the closed form of HSV -> RGB: each channel falls from value by chroma over two sixths
    k = (sixth.unsqueeze(1) + torch.tensor([5.0, 3.0, 1.0], device=x.device).view(3, 1, 1)) % 6
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(k, 4 - k).clamp(0, 1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian, each crop its own sigma; 13 taps, reflected at the borders."""
    rows = sigma.nonzero()[:, 0]
    if len(rows):
        taps = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1.0)
        kernel = torch.softmax(-0.5 * (taps / sigma[rows, None]) ** 2, dim=1)   # (n, 13)
        kernel = kernel.to(x.device, non_blocking=True).repeat_interleave(3, 0)
        at = rows.to(x.device, non_blocking=True)
        y = F.pad(x[at], [BLUR_RADIUS] * 4, mode="reflect")
        y = y.flatten(0, 1).unsqueeze(0)             # (1, n*3, s+12, s+12): a channel a filter
        y = F.conv2d(y, kernel[:, None, None, :], groups=y.shape[1])
        y = F.conv2d(y, kernel[:, None, :, None], groups=y.shape[1])
        x[at] = y.view(len(rows), *x.shape[1:])
    return x
