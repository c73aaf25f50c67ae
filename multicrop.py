"""Multi-crop: encoded image -> crops of several sizes -> augmented, normalised batches.

Paper: SwAV (arXiv 2006.09882, section 3.3 and appendix A.3); the photometric augmentation is
SimCLR's (arXiv 2002.05709, appendix A). The work is shared by a CPU and the device:

    from PIL import Image
    from multicrop import MultiCrop, Photometric, parse_crops
    Image.effect_noise((640, 480), 50).save("image.jpg")             # or an image of yours
    crop = MultiCrop(parse_crops("2x224+4x96"))
    crops, params = crop(open("image.jpg", "rb").read(), seed=7)     # uint8, on a CPU worker
    images = Photometric()(crops[0], params[0])                      # float32, in batch, anywhere

A worker decodes the image once, draws all boxes and augmentations, and cuts and resizes the crops
(antialiased, uint8). Flip, colour jitter, grayscale, blur, solarize and normalisation then run for
a whole batch on the device. Everything random is drawn in the worker from `seed` alone, so crops
and parameters are the same on any machine, in any process.

Differs from the reference (facebookresearch/swav: torchvision transforms on PIL images):
- crops are resized by torch's antialiased bilinear filter, which is PIL's but for its rounding (at
  most 3/255), and several times as fast;
- a JPEG that is large enough for all of its crops is decoded at a half, a quarter or an eighth of
  its size: boxes move by up to half a pixel of the smaller image, and crops of 12-megapixel
  images differ by 1.8/255 on average (those of `python -m bench input`);
- augmentation is float32 in [0, 1]; PIL rounds to 8 bits after each operation;
- grayscale is float32 with the same weights; hue turns by the exact angle, not in 1/255 steps;
- blur is a Gaussian of standard deviation sigma in [0.1, 2], truncated at 6 pixels, reflected at
  the borders. PIL's GaussianBlur(radius=sigma) approximates the same Gaussian by three box
  filters, repeats border pixels and rounds. On noise, its difference to this one, in 1/255 (the
  border of 6 pixels apart; `tests/test_multicrop.py` measures this table):

      sigma                       0.1    0.25   0.5    1.0    1.5    2.0
      mean absolute difference    0.5    8.0    1.0    0.8    0.9    0.5
      largest difference          6.0    28.7   4.5    3.5    4.5    2.8

- transparent pixels are laid on white; 16-bit images are scaled to 8 bits, not clipped;
- normalisation is ImageNet's (std 0.229, 0.224, 0.225); the reference's first number is 0.228.

Shapes: N crops of one size, V crops of an image, P parameters of a crop's augmentation.
"""
import functools
import io
import itertools
import math
import random
import re
from typing import Callable, NamedTuple, Sequence

import numpy
import torch
from PIL import Image, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor, nn
from torch.nn import functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Columns of params. Flip and grayscale: 0 or 1. Factors: 1 is no change. Hue: share of a full
# turn. Sigma: pixels, 0 is no blur. Four say at which of four turns each operation of the jitter
# comes (a permutation of 0..3: brightness, contrast, saturation, hue). Solarize: 0 or 1.
PARAMS = ("flip", "brightness", "contrast", "saturation", "hue", "gray", "sigma",
          "brightness_turn", "contrast_turn", "saturation_turn", "hue_turn", "solarize")
NEUTRAL = (0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 0.0)      # changes nothing
MAX_PIXELS = 89_478_485                             # of an image: where PIL begins to warn
BLUR_RADIUS = 6                                     # pixels: three times the largest sigma
MAX_COUNT, MAX_SIZE = 100, 2048                     # of the crops of one size; pixels


# What makes a stored image upright, by EXIF's orientation; from 5 on rows become columns.
UPRIGHT = {2: Transpose.FLIP_LEFT_RIGHT, 3: Transpose.ROTATE_180, 4: Transpose.FLIP_TOP_BOTTOM,
           5: Transpose.TRANSPOSE, 6: Transpose.ROTATE_270, 7: Transpose.TRANSVERSE,
           8: Transpose.ROTATE_90}


class CropSpec(NamedTuple):
    count: int
    size: int                                       # pixels, square
    scale: tuple[float, float]                      # share of the image's area, from and to


def parse_crops(text: str) -> list[CropSpec]:
    """"2x224+4x96" or "2x160@0.14-1+4x96@0.05-0.14" -> [CropSpec, ...].

    Without a scale, crops of the first size cover 0.14 to 1 of the image's area and others 0.05
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
        if not (0 < count <= MAX_COUNT and BLUR_RADIUS < size <= MAX_SIZE
                and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(f"crops {text!r}: {part!r} needs a count of 1 to {MAX_COUNT}, a size "
                             f"of {BLUR_RADIUS + 1} to {MAX_SIZE:,} pixels and 0 < FROM <= TO <= 1")
        specs.append(CropSpec(count, size, scale))
    return specs


def parse_channels(text: str) -> tuple[float, float, float]:
    """"0.485,0.456,0.406" -> (0.485, 0.456, 0.406)."""
    try:
        red, green, blue = map(float, text.split(","))
        return red, green, blue
    except ValueError:
        raise ValueError(f"mean or std {text!r} is not RED,GREEN,BLUE, as in 0.485,0.456,0.406"
                         ) from None


class BadImage(ValueError):
    """An image that cannot be used. cause: empty, no picture, too large, truncated or damaged."""

    def __init__(self, cause: str, detail):
        super().__init__(f"{cause}: {detail}")
        self.cause = cause


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded image -> upright RGB image, of an animation the first frame. Raises BadImage for a
    broken one, and for one of more than max_pixels."""
    return load(read_header(data, max_pixels))


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Encoded image -> a PIL image of known size and kind, not decoded yet. Raises BadImage."""
    if not data:
        raise BadImage("empty", "0 bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:              # whose own message names a memory address
        raise BadImage("no picture", f"{len(data)} bytes of no known kind") from None
    except Image.DecompressionBombError as error:
        raise BadImage("too large", error) from None
    except Exception as error:                  # decoders raise nearly anything
        raise _undecodable(error, data) from None
    if image.width * image.height > max_pixels:
        raise BadImage("too large", f"{image.width} x {image.height} pixels")
    return image


@functools.cache
def _formats() -> list[str]:
    """Formats that are read; PIL knows others, some of which start programs (EPS)."""
    Image.init()
    return [kind for kind in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000",
                              "AVIF") if kind in Image.OPEN]


def orientation(image: Image.Image) -> int:
    """EXIF's 1 to 8: how the stored image is to be turned; 1 where it does not say."""
    try:
        turn = image.getexif().get(0x0112)
        return turn if turn in UPRIGHT else 1   # a damaged note may hold anything
    except Exception:                           # a damaged note does no harm
        return 1


def load(image: Image.Image) -> Image.Image:
    """Decode a PIL image whose header was read -> RGB, made upright. Raises BadImage."""
    try:
        image.load()
        turn = orientation(image)                       # now, for PIL itself turns a TIFF
        if image.mode.startswith(("I", "F")):           # one channel of more than 8 bits
            wide = numpy.asarray(image).astype(numpy.float32)
            clear = wide == image.info.get("transparency", -1)
            if image.mode.startswith("I;16") or image.format == "PPM" or wide.max() > 255:
                wide = wide / 257                       # 16 bits: 65535 / 257 = 255
            elif image.mode == "F" and wide.max() <= 1:
                wide = wide * 255
            wide[clear] = 255                           # white
            image = Image.fromarray(wide.round().clip(0, 255).astype(numpy.uint8))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image if image.mode == "RGB" else image.convert("RGB")   # which would copy it
        return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image
    except Exception as error:                          # decoders raise nearly anything
        raise _undecodable(error) from None


def _undecodable(error: Exception, data: bytes = b"") -> BadImage:
    """Truncated, where the decoder says so or, of a WebP, the length in its header."""
    cut = any(word in str(error).lower() for word in ("truncated", "incomplete", "end of"))
    cut |= data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    return BadImage("truncated" if cut else "damaged", error)


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
    """One image's crops and the parameters of their augmentation.

    specs: from parse_crops.  strength: scales the colour jitter; 1 is SwAV's (brightness, contrast
    and saturation by up to 0.8, hue by up to 0.2); or a function of the image's position in the
    stream, for a strength that changes over the run.  jitter, gray, blur, flip, solarize:
    probabilities; of blur and solarize also one for each crop (BYOL: 1, 0.1 and 0, 0.2), of which
    the last one is that of all further crops.
    max_pixels: of an image; larger ones are not decoded.
    """

    def __init__(self, specs: Sequence[CropSpec], strength: float | Callable[[int], float] = 1.0,
                 jitter: float = 0.8, gray: float = 0.2, blur: float | Sequence[float] = 0.5,
                 flip: float = 0.5, max_pixels: int = MAX_PIXELS,
                 solarize: float | Sequence[float] = 0.0):
        self.specs, self.max_pixels, self.strength = list(specs), max_pixels, strength
        self.jitter, self.gray, self.flip = jitter, gray, flip
        self.blur, self.solarize = (numpy.atleast_1d(p).tolist() for p in (blur, solarize))

    def __call__(self, data: bytes, seed: int,
                 position: int = 0) -> tuple[list[Tensor], list[Tensor]]:
        """data: an encoded image.  seed: all randomness.  position: in the stream of images.

        Returns, per size, uint8 crops (count, 3, size, size) and float32 params (count, P). Raises
        BadImage.
        """
        image, rng = read_header(data, self.max_pixels), random.Random(seed)
        scalable = image.format in ("JPEG", "MPO")      # at a half, a quarter, an eighth
        if not scalable:
            image = load(image)
        upright = image.size[::-1] if scalable and orientation(image) >= 5 else image.size
        boxes, params, crops, shrink, number = [], [], [], 1, itertools.count()
        for count, _, scale in self.specs:
            boxes.append([random_box(*upright, scale, rng) for _ in range(count)])
            params.append(torch.tensor([self.draw(rng, position, next(number)) for _ in boxes[-1]]))
        if scalable:
            shrink = self.shrink(boxes)
            if shrink > 1:
                image.draft(None, (image.width // shrink, image.height // shrink))
            image = load(image)
        pixels = torch.from_numpy(numpy.array(image))                    # (H, W, 3)
        for (count, size, _), places in zip(self.specs, boxes):
            cut = torch.empty(count, 3, size, size, dtype=torch.uint8)
            for crop, box in zip(cut, places):
                left, top, right, bottom = (round(edge / shrink) for edge in box)
                part = pixels[top:bottom, left:right].contiguous()      # (h, w, 3)
                part = part.permute(2, 0, 1)[None]
                crop.copy_(F.interpolate(part, (size, size), mode="bilinear", antialias=True)[0])
            crops.append(cut)
        return crops, params

    def shrink(self, boxes: list[list[tuple]]) -> int:
        """How many times smaller a JPEG may be decoded: the most that leaves each crop as many
        pixels as it is to have."""
        return next((by for by in (8, 4, 2) if all(
            round(box[end] / by) - round(box[start] / by) >= spec.size
            for spec, places in zip(self.specs, boxes)
            for box in places for start, end in ((0, 2), (1, 3)))), 1)

    def draw(self, rng: random.Random, position: int = 0, crop: int = 0) -> list[float]:
        """The augmentation of an image's crop, in the order of PARAMS."""
        strength = self.strength(position) if callable(self.strength) else self.strength
        jitter, colour = rng.random() < self.jitter, 0.8 * strength
        factors = [rng.uniform(max(0.0, 1 - colour), 1 + colour) for _ in range(3)]
        hue = rng.uniform(-0.2, 0.2) * strength
        turns = rng.sample(range(4), 4)
        blurred, solarized = (p[min(crop, len(p) - 1)] for p in (self.blur, self.solarize))
        flip, gray, blur = (rng.random() < p for p in (self.flip, self.gray, blurred))
        sigma = rng.uniform(0.1, 2.0)
        solarize = solarized > 0 and rng.random() < solarized
        return [float(flip), *(factors if jitter else [1.0] * 3), hue if jitter else 0.0,
                float(gray), sigma if blur else 0.0, *map(float, turns), float(solarize)]


class Photometric(nn.Module):
    """Photometric augmentation and normalisation of a batch of crops.

    forward(crops uint8 (N, 3, s, s), params float32 (N, P)) -> float32 (N, 3, s, s).
    Crops may lie on any device; params should stay on the CPU, where it is decided, without
    waiting for the device, what is done to which crops.
    """

    def __init__(self, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, crops: Tensor, params: Tensor) -> Tensor:
        out = torch.empty(crops.shape, device=crops.device)
        # on a CPU one crop after the other: it stays in the processor's cache, and has one order
        size = 1 if crops.device.type == "cpu" else max(1, len(crops))
        with torch.autocast(crops.device.type, enabled=False):
            for x, p, y in zip(crops.split(size), params.split(size), out.split(size)):
                torch.sub(augment(x, p), self.mean, out=y).div_(self.std)
        return out


def augment(crops: Tensor, params: Tensor) -> Tensor:
    """uint8 (N, 3, s, s), params (N, P) -> augmented float32 in 0..1."""
    x = crops.contiguous() / 255
    p = dict(zip(PARAMS, params.cpu().numpy().T))                        # each (N,), on the host
    x = _apply(lambda x, _: x.flip(3), x, p["flip"], p["flip"] > 0)
    for turn in range(4):
        for name, (operation, neutral) in JITTER.items():
            now = (p[f"{name}_turn"] == turn) & (p[name] != neutral)
            x = _apply(operation, x, p[name], now)
    x = _apply(lambda x, _: x.copy_(_luma(x)), x, p["gray"], p["gray"] > 0)
    x = _apply(_blur, x, p["sigma"], p["sigma"] > 0)
    return _apply(_solarize, x, p["solarize"], p["solarize"] > 0)


def _apply(operation: Callable, x: Tensor, values: numpy.ndarray, chosen: numpy.ndarray) -> Tensor:
    """operation(crops, a value each) on the chosen crops; it may change what it is given."""
    rows = numpy.flatnonzero(chosen)
    if len(rows) == 0:
        return x
    column = torch.from_numpy(values[rows]).to(x.device, non_blocking=True).view(-1, 1, 1, 1)
    if len(rows) == len(x):
        return operation(x, column)
    at = torch.from_numpy(rows).to(x.device, non_blocking=True)
    x[at] = operation(x[at], column)
    return x


def _luma(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)                                                # each (N, s, s)
    return torch.add(0.2989 * r, g, alpha=0.587).add_(b, alpha=0.114).unsqueeze(1)


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return x.mul_(factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _luma(x.mean((2, 3), keepdim=True))                           # of the gray crop
    return x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    gray = _luma(x).mul_(1 - factor)
    return x.mul_(factor).add_(gray).clamp_(0, 1)


def _hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by a share of the circle, keeping value and saturation of HSV."""
    r, g, b = x.unbind(1)                                                # each (N, s, s)
    value = x.amax(1)
    chroma = value - x.amin(1)
    # the hue in sixths of the circle, times chroma: which formula holds, the largest channel says
    not_r, not_g = (value - r).sign_(), (value - g).sign_()              # 0 where it is the largest
    other = torch.lerp(torch.add(b - r, chroma, alpha=2), torch.add(r - g, chroma, alpha=4), not_g)
    sixth = torch.lerp(g - b, other, not_r).div_(chroma.clamp(min=1e-12))
    # back in closed form: a channel is value where the hue is within a sixth of its own, and falls
    # by chroma over the next sixth; `away` is the distance from the opposite hue, over 2 .. 0
    opposite = torch.arange(3.0, -2.0, -2.0, device=x.device).view(3, 1, 1)      # 3, 1, -1
    away = sixth.unsqueeze(1) + (6 * turn + opposite)
    away.sub_(torch.round(away / 6), alpha=6).abs_().neg_().add_(2).clamp_(0, 1)
    return away.mul_(chroma.unsqueeze(1)).neg_().add_(value.unsqueeze(1))


# of each: what it does, and the value with which it does nothing
JITTER = {"brightness": (_brightness, 1.0), "contrast": (_contrast, 1.0),
          "saturation": (_saturation, 1.0), "hue": (_hue, 0.0)}


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian, each crop its own sigma; 13 taps, reflected at the borders.

    Sums of the padded crops, shifted in one dimension of memory: what a shift carries over the end
    of a row, or of a channel, falls into the padding.
    """
    padded = F.pad(x, [BLUR_RADIUS] * 4, mode="reflect")                 # (N, 3, s + 12, s + 12)
    flat, blurred = padded.flatten(1), torch.empty_like(padded).flatten(1)
    taps = torch.arange(BLUR_RADIUS + 1.0, device=x.device)
    kernel = torch.exp(-0.5 * (taps / sigma.view(-1, 1)) ** 2)           # (N, 7): one half
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - kernel[:, :1])
    for step in (1, padded.shape[3]):                                    # along rows, along columns
        first, last = BLUR_RADIUS * step, flat.shape[1] - BLUR_RADIUS * step
        length = last - first
        inner = torch.mul(flat[:, first:last], kernel[:, :1], out=blurred[:, first:last])
        for i in range(1, BLUR_RADIUS + 1):
            left, right = flat[:, first - i * step:], flat[:, first + i * step:]
            inner.addcmul_(left[:, :length] + right[:, :length], kernel[:, i:i + 1])
        flat, blurred = blurred, flat
    inside = slice(BLUR_RADIUS, -BLUR_RADIUS)
    return flat.view(padded.shape)[:, :, inside, inside]


def _solarize(x: Tensor, _) -> Tensor:
    """Values of a half and more are inverted (BYOL, arXiv 2006.07733, appendix B)."""
    return torch.where(x < 0.5, x, 1 - x)
