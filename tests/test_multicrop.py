"""multicrop.py against torchvision: boxes, crops, each augmentation, and their distributions."""
import io
import random
import re

import numpy
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms
from torchvision.transforms import functional as TF1
from torchvision.transforms.v2 import functional as TF

import multicrop
from multicrop import PARAMS, BadImage, CropSpec, MultiCrop, Photometric, decode, parse_crops


def picture(width=90, height=60, mode="RGB", seed=0):
    rng = numpy.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=numpy.uint8))
    return coarse.resize((width, height), Image.BICUBIC).convert(mode)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------ parsing
def test_crops_are_written_as_in_the_papers():
    assert parse_crops("2x224+4x96") == [CropSpec(2, 224, (0.14, 1)), CropSpec(4, 96, (0.05, 0.14))]
    assert parse_crops("2x160@0.2-.9+4x96@0.05-0.14") == [
        CropSpec(2, 160, (0.2, 0.9)), CropSpec(4, 96, (0.05, 0.14))]


@pytest.mark.parametrize("text", ["", "224", "2x", "2x224+", "2y224", "0x224", "2x4", "2x224@1-0.5",
                                  "2x224@0-1", "2x224@0.5-2", "-2x224"])
def test_what_does_not_parse_is_named(text):
    with pytest.raises(ValueError, match="crops"):
        parse_crops(text)


# ------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("mode, format", [
    ("L", "PNG"), ("L", "JPEG"), ("RGB", "PNG"), ("RGB", "BMP"), ("P", "PNG"), ("P", "GIF"),
    ("1", "PNG"), ("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("RGB", "WEBP")])
def test_modes_without_transparency_look_as_pil_shows_them(mode, format):
    image = picture(mode=mode)
    options = dict(lossless=True) if format == "WEBP" else {}
    data = encoded(image, format, **options)
    expected = Image.open(io.BytesIO(data)).convert("RGB")
    assert decode(data).mode == "RGB"
    numpy.testing.assert_array_equal(numpy.asarray(decode(data)), numpy.asarray(expected))
    difference = numpy.asarray(decode(data), float) - numpy.asarray(image.convert("RGB"), float)
    assert abs(difference).mean() < 6           # what JPEG may lose; an inverted image is far off


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparent_pixels_are_white(mode):
    image = Image.new("RGBA", (20, 10), (0, 0, 255, 0))
    image.paste((255, 0, 0, 255), (10, 0, 20, 10))
    data = encoded(image.convert(mode) if mode != "P" else image.quantize(4))
    got = numpy.asarray(decode(data))
    assert (got[:, :10] == 255).all()
    assert (got[:, 10:] == (76 if mode == "LA" else [255, 0, 0])).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format):
    ramp = numpy.linspace(0, 65535, 64).astype(numpy.uint16).reshape(8, 8)
    got = numpy.asarray(decode(encoded(Image.fromarray(ramp), format)))[..., 0]
    numpy.testing.assert_array_equal(got, (ramp / 257).round())


@pytest.mark.parametrize("values, mode", [
    (numpy.linspace(0, 1, 64), "F"), (numpy.arange(64) * 4.0, "F"), (numpy.arange(64) * 4, "I")])
def test_other_single_channels_keep_their_range(values, mode):
    image = Image.fromarray(values.reshape(8, 8).astype({"F": "float32", "I": "int32"}[mode]))
    got = numpy.asarray(decode(encoded(image, "TIFF")))[..., 0]
    expected = values * (255 if values.max() <= 1 else 1)
    numpy.testing.assert_allclose(got, expected.reshape(8, 8), atol=0.51)


@pytest.mark.parametrize("format, options", [
    ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True}),
    ("JPEG", {"quality": 100, "subsampling": 0})])
def test_all_exif_orientations_are_turned_upright(format, options):
    """Decoded, and before boxes are drawn: the crops are those of the upright picture."""
    upright, crop = picture(48, 24), MultiCrop(parse_crops("2x16@0.3-1+2x12@0.1-0.3"))
    expected = crop(encoded(upright), seed=4)[0]
    back = {2: Image.FLIP_LEFT_RIGHT, 3: Image.ROTATE_180, 4: Image.FLIP_TOP_BOTTOM,
            5: Image.TRANSPOSE, 6: Image.ROTATE_90, 7: Image.TRANSVERSE, 8: Image.ROTATE_270}
    for orientation in range(1, 11):                                # stored as the camera held it
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = upright.transpose(back[orientation]) if orientation in back else upright
        data = encoded(stored, format, exif=exif, **options)
        got, limit = numpy.asarray(decode(data), int), 6 * (format == "JPEG")
        assert got.shape == (24, 48, 3)
        assert abs(got - numpy.asarray(upright, int)).max() <= limit
        for ours, plain in zip(crop(data, seed=4)[0], expected):
            assert (ours.int() - plain.int()).abs().max() <= limit, orientation


def test_broken_pictures_raise():
    for data, cause in ((b"", "empty"), (b"no picture", "no picture"),
                        (encoded(picture(), "JPEG")[:300], "truncated")):
        with pytest.raises(BadImage, match=f"^{cause}: ") as error:
            decode(data)
        assert error.value.cause == cause


# ---------------------------------------------------------------------------------------- crops
def test_crops_are_torchvisions_antialiased_resized_crops(monkeypatch):
    boxes, draw = [], multicrop.random_box
    monkeypatch.setattr(multicrop, "random_box", lambda *a: boxes.append(draw(*a)) or boxes[-1])
    image = picture(90, 60)
    crops, params = MultiCrop(parse_crops("2x32+3x16"))(encoded(image), seed=3)
    assert [c.shape for c in crops] == [(2, 3, 32, 32), (3, 3, 16, 16)]
    assert [c.dtype for c in crops] == [torch.uint8] * 2
    assert [p.shape for p in params] == [(2, len(PARAMS)), (3, len(PARAMS))]
    for crop, (left, top, right, bottom) in zip([*crops[0], *crops[1]], boxes, strict=True):
        place = top, left, bottom - top, right - left, [crop.shape[1]] * 2
        assert torch.equal(crop, TF.resized_crop(TF.pil_to_tensor(image), *place, antialias=True))
        pils = TF.pil_to_tensor(TF1.resized_crop(image, *place, antialias=True))
        assert (crop.int() - pils.int()).abs().max() <= 3


def test_everything_follows_from_the_seed():
    crop, data = MultiCrop(parse_crops("2x32+3x16")), encoded(picture())
    one, same, other = crop(data, 5), crop(data, 5), crop(data, 6)
    for a, b, c in zip(one[0] + one[1], same[0] + same[1], other[0] + other[1]):
        assert torch.equal(a, b) and not torch.equal(a, c)


def distance(a, b):
    """Kolmogorov-Smirnov distance of two samples, relative to its 0.1 % critical value."""
    a, b = numpy.sort(a), numpy.sort(b)
    at = numpy.concatenate([a, b])
    below_a, below_b = (numpy.searchsorted(x, at, "right") / len(x) for x in (a, b))
    gap = abs(below_a - below_b)
    return gap.max() / (1.95 * ((len(a) + len(b)) / (len(a) * len(b))) ** 0.5)


@pytest.mark.parametrize("width, height, scale", [(500, 375, (0.14, 1.0)), (60, 90, (0.05, 0.14)),
                                                  (400, 40, (0.5, 1.0)), (20, 300, (0.14, 1.0))])
def test_boxes_are_distributed_as_torchvisions(width, height, scale):
    n, rng = 4000, random.Random(1)
    torch.manual_seed(1)
    image = Image.new("L", (width, height))
    theirs = [transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
              for _ in range(n)]
    theirs = numpy.array([(left, top, left + w, top + h) for top, left, h, w in theirs], float)
    ours = numpy.array([multicrop.random_box(width, height, scale, rng) for _ in range(n)], float)
    assert (ours[:, :2] >= 0).all() and (ours[:, 2] <= width).all() and (ours[:, 3] <= height).all()
    for measure in (lambda b: b[:, 0], lambda b: b[:, 1], lambda b: b[:, 2], lambda b: b[:, 3],
                    lambda b: (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1]),
                    lambda b: (b[:, 2] - b[:, 0]) / (b[:, 3] - b[:, 1])):
        assert distance(measure(ours), measure(theirs)) < 1


def test_a_shifted_box_distribution_would_be_noticed():
    rng = random.Random(1)
    ours, shifted = (numpy.array([multicrop.random_box(500, 375, scale, rng)[0]
                                  for _ in range(4000)], float)
                     for scale in ((0.14, 1.0), (0.2, 1.0)))
    assert distance(ours, shifted) > 1


@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_colours_are_distributed_as_torchvisions(strength):
    n, rng, crop = 4000, random.Random(2), MultiCrop([], strength)
    torch.manual_seed(2)
    s = 0.8 * strength
    jitter = transforms.ColorJitter(s, s, s, 0.2 * strength)
    theirs = [jitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
              for _ in range(n)]
    ours = [dict(zip(PARAMS, crop.draw(rng))) for _ in range(n)]
    jittered = [p for p in ours if p["hue"] != 0]
    assert abs(len(jittered) / n - 0.8) < 0.025
    for p in ours:
        assert p["hue"] != 0 or p["brightness"] == p["contrast"] == p["saturation"] == 1
    for i, name in enumerate(("brightness", "contrast", "saturation", "hue"), 1):
        assert distance([p[name] for p in jittered], [t[i] for t in theirs]) < 1, name
    orders = [tuple(p[f"{name}_turn"] for name in ("brightness", "contrast", "saturation", "hue"))
              for p in ours]
    counts = numpy.array([orders.count(order) for order in set(orders)])
    assert len(counts) == 24 and ((counts - n / 24) ** 2 / (n / 24)).sum() < 49.7     # chi2, 0.1 %
    for name, share in (("flip", 0.5), ("gray", 0.2)):
        assert abs(sum(p[name] for p in ours) / n - share) < 0.026, name
    sigmas = [p["sigma"] for p in ours if p["sigma"]]
    assert abs(len(sigmas) / n - 0.5) < 0.026
    assert distance(sigmas, numpy.random.default_rng(0).uniform(0.1, 2, n)) < 1


def test_crops_differ_in_blur_and_solarize():
    """BYOL's: the first crop is always blurred, the second is solarized now and then."""
    crop, plain = MultiCrop([], blur=(1.0, 0.0), solarize=(0.0, 0.2)), MultiCrop([], blur=1.0)
    rngs = random.Random(0), random.Random(0)
    first, second = ([dict(zip(PARAMS, crop.draw(rngs[0], 0, i))) for _ in range(2000)]
                     for i in (0, 1))
    assert all(p["sigma"] and not p["solarize"] for p in first)
    assert not any(p["sigma"] for p in second)
    assert abs(sum(p["solarize"] for p in second) / 2000 - 0.2) < 0.03
    # where nothing is solarized, nothing is drawn for it: older runs go on as they were
    assert first == [dict(zip(PARAMS, plain.draw(rngs[1]))) for _ in range(2000)]
    third = [dict(zip(PARAMS, crop.draw(rngs[0], 0, 2))) for _ in range(100)]
    assert not any(p["sigma"] for p in third) and any(p["solarize"] for p in third)     # as the 2nd


# --------------------------------------------------------------------------------- augmentation
NEUTRAL = dict(flip=0.0, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0, gray=0.0, sigma=0.0,
               brightness_turn=0.0, contrast_turn=1.0, saturation_turn=2.0, hue_turn=3.0,
               solarize=0.0)


def reference(crop, p):
    """One crop, one parameter after another, by torchvision's v2 functional in float32."""
    x = crop.float() / 255
    if p["flip"]:
        x = TF.horizontal_flip(x)
    jitter = "brightness", "contrast", "saturation", "hue"
    for name in sorted(jitter, key=lambda name: p[f"{name}_turn"]):
        x = getattr(TF, f"adjust_{name}")(x, p[name])
    if p["gray"]:
        x = TF.rgb_to_grayscale(x, 3)
    if p["sigma"]:
        x = TF.gaussian_blur(x, [13, 13], [p["sigma"]] * 2)
    return TF.solarize(x, 0.5) if p["solarize"] else x


def check(crops, settings):
    params = torch.tensor([[p[name] for name in PARAMS] for p in settings])
    ours = Photometric((0, 0, 0), (1, 1, 1))(crops, params)
    for out, crop, row in zip(ours, crops, params.tolist()):
        torch.testing.assert_close(out, reference(crop, dict(zip(PARAMS, row))), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, values", [
    ("flip", [0, 1]), ("brightness", [0, 0.2, 1, 1.8]), ("contrast", [0, 0.2, 1, 1.8]),
    ("saturation", [0, 0.2, 1, 1.8]), ("hue", [-0.5, -0.2, -0.01, 0.01, 0.2, 0.5]),
    ("gray", [0, 1]), ("sigma", [0, 0.1, 0.25, 0.5, 1, 2]), ("solarize", [0, 1])])
@pytest.mark.parametrize("kind", ["noise", "flat", "edges"])
def test_each_operation_equals_torchvisions(name, values, kind):
    torch.manual_seed(0)
    noise = torch.randint(0, 256, (len(values), 3, 24, 24), dtype=torch.uint8)
    crops = {"noise": noise, "flat": noise[:, :1].expand_as(noise),       # gray: no hue at all
             "edges": (noise > 127) * 255}[kind].to(torch.uint8)          # ties of hue, saturated
    check(crops, [NEUTRAL | {name: float(value)} for value in values])


def test_all_operations_in_all_orders_equal_torchvisions():
    crop, rng = MultiCrop([], 1.0, jitter=1.0, solarize=0.5), random.Random(0)
    settings = [dict(zip(PARAMS, crop.draw(rng))) for _ in range(200)]
    torch.manual_seed(0)
    check(torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8), settings)


def test_normalisation_and_types():
    crops = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    params = torch.tensor([[NEUTRAL[name] for name in PARAMS]] * 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = Photometric()(crops, params)
    expected = TF.normalize(crops.float() / 255, multicrop.IMAGENET_MEAN, multicrop.IMAGENET_STD)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_the_table_of_differences_to_pils_blur_is_as_measured():
    rows = {label: list(map(float, numbers.split())) for label, numbers in re.findall(
        r"^ +(sigma|mean absolute difference|largest difference) +([\d. ]+)$",
        multicrop.__doc__, re.M)}
    noise = numpy.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=numpy.uint8)
    x = torch.from_numpy(noise).permute(2, 0, 1)[None].float()
    inside = slice(6, -6)
    for i, sigma in enumerate(rows["sigma"]):
        blurred = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(sigma))
        theirs = torch.from_numpy(numpy.array(blurred)).permute(2, 0, 1).float()
        ours = multicrop._blur(x.clone(), torch.tensor([sigma]))[0]
        gap = (ours - theirs).abs()[:, inside, inside]
        assert rows["mean absolute difference"][i] == pytest.approx(gap.mean().item(), abs=0.06)
        assert rows["largest difference"][i] == pytest.approx(gap.max().item(), abs=0.06)


def test_normalised_is_augmented_less_mean_over_std():
    crop, rng = MultiCrop([]), random.Random(1)
    params = torch.tensor([crop.draw(rng) for _ in range(8)])
    crops = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    before, mean, std = crops.clone(), (0.1, 0.2, 0.3), (0.5, 1.0, 2.0)
    expected = TF.normalize(multicrop.augment(crops, params), mean, std)
    torch.testing.assert_close(Photometric(mean, std)(crops, params), expected, rtol=0, atol=1e-6)
    assert torch.equal(crops, before)           # what is augmented again must be as it was


@pytest.mark.cuda
def test_on_cuda_it_equals_the_cpu():
    crop, rng = MultiCrop([]), random.Random(0)
    params = torch.tensor([crop.draw(rng) for _ in range(64)])
    crops = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(Photometric().cuda()(crops.cuda(), params).cpu(),
                               Photometric()(crops, params), rtol=0, atol=1e-5)
