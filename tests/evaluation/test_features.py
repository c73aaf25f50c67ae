"""evaluation/features.py: preprocessing against torchvision's, batches, ranks and depths."""
import io

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms

from data.images import open_images
from evaluation.features import BATCH, CenterCrops, Depths, Preprocessing, extract
from evaluation.task import load_trunk
from methods.build import build_trunk


class One:
    """A dataset of one image."""

    def __init__(self, image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        self.data = buffer.getvalue()

    def __getitem__(self, i):
        return self.data


@pytest.mark.parametrize("size, ratio, bicubic, published", [
    (28, 0.875, False, [transforms.Resize(32), transforms.CenterCrop(28)]),
    (38, 1.0, True, [transforms.Resize(38, transforms.InterpolationMode.BICUBIC),
                     transforms.CenterCrop(38)]),
    (30, 0, False, [transforms.Resize([30, 30])])])
def test_images_are_resized_and_cut_as_published(size, ratio, bicubic, published):
    """ImageNet's 256 and 224 pixels, the fine-tuned SEER's 384, VOC07's whole image; in small."""
    noise = numpy.random.default_rng(0).integers(0, 256, (61, 90, 3), dtype=numpy.uint8)
    image = Image.fromarray(noise)
    expected = transforms.Compose([*published, transforms.PILToTensor()])(image)
    for crops in (CenterCrops(One(image), size, ratio, bicubic),
                  Preprocessing(size, ratio, bicubic).center_crops(One(image))):
        crop, ok = crops[0]
        assert ok and torch.equal(crop, expected)


def test_an_image_that_may_not_be_read_is_called_unreadable(capsys):
    class Closed:
        def name(self, i):
            return "a.png"

        def __getitem__(self, i):
            raise PermissionError(13, "Permission denied", "/photos/a.png")
    assert not CenterCrops(Closed(), 8)[0][1]
    assert capsys.readouterr().err == "left out a.png: unreadable: Permission denied\n"


def test_images_are_normalised_with_the_mean_and_std_given():
    preprocessing = Preprocessing(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    image = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    (features,), ok = extract(torch.nn.Flatten(), [(image, True)] * 2,
                              **preprocessing.normalisation)
    expected = (image / 255 - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(features, expected.flatten().expand(2, -1))
    assert ok.all()


class Row(torch.nn.Module):
    """Remembers how many images it was given at once."""
    seen = ()

    def forward(self, images):
        self.seen = (*self.seen, len(images))
        return [images.mean((2, 3)), images.flatten(1)[:, :5]]


def test_the_network_always_sees_as_many_images():
    """So the end of the set changes no digit; nor does the number of ranks (test_ranks.py)."""
    network = Row()
    images = [(torch.full((3, 4, 4), i, dtype=torch.uint8), True) for i in range(BATCH + 3)]
    (means, rows), ok = extract(network, images)
    assert network.seen == (BATCH, BATCH) and ok.all() and rows.shape == (BATCH + 3, 5)
    assert means.argsort(0)[:, 0].tolist() == list(range(BATCH + 3))


def test_features_that_are_not_finite_are_refused():
    images = [(torch.full((3, 4, 4), i, dtype=torch.uint8), True) for i in (0, 1)]
    for value in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="not finite: the network is damaged"):
            extract(torch.nn.Threshold(-2.1, value), images)    # the first image is black


@pytest.mark.cuda
def test_features_on_a_gpu(shades):
    crops = CenterCrops(open_images(shades), 48)
    trunk, *_ = load_trunk("random", "regnety_200mf")
    (expected,), _ = extract(trunk, crops)
    (features,), ok = extract(trunk, crops, device="cuda", workers=2)
    assert ok.all()
    torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("arch", ["regnety_100mf", "regnety_400mf", "resnet50"])
def test_depths_are_means_of_the_stages(arch):
    trunk, images = build_trunk(arch).eval(), torch.randn(2, 3, 64, 64)
    depths = Depths(trunk)
    with torch.no_grad():
        *stages, pooled = Depths(trunk, [*depths.stages, "avgpool"])(images)
        torch.testing.assert_close(pooled, trunk(images))
        whole = stages[-1].view(2, -1, 2).mean(2)           # two cells of the same size
    torch.testing.assert_close(whole, pooled, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="unknown depth res9; there is res2"):
        Depths(trunk, ["res9"])


def test_features_in_bf16_halve_the_convolutions_alone():
    torch.manual_seed(0)
    images = [(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), True) for _ in range(3)]
    trunk = build_trunk("regnety_100mf")
    (expected,), _ = extract(trunk, images)
    (features,), _ = extract(trunk, images, dtype=torch.bfloat16)
    assert features.dtype == torch.float32 and not torch.equal(features, expected)
    assert (features - expected).norm() < 0.02 * expected.norm()
    for module in trunk.modules():
        for x in module._parameters.values():
            half = isinstance(module, torch.nn.Conv2d)
            assert x is None or x.dtype == (torch.bfloat16 if half else torch.float32)
