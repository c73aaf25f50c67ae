"""evaluation/pooling.py: regions by hand, descriptors and whitening against their definitions."""
import numpy
import pytest
import torch
from torch.nn import functional as F

from evaluation.pooling import POOLS, Descriptors, Regions, fit_whitening, pool, regions
from methods.build import build_trunk


def test_the_regions_of_small_maps():
    assert regions(3, 3) == [(0, 0, 3), *((y, x, 2) for y in (0, 1) for x in (0, 1)),
                             *((y, x, 1) for y in (0, 1, 2) for x in (0, 1, 2))]
    assert [side for *_, side in regions(7, 7)] == [7] + [4] * 4 + [3] * 9
    # 6 x 9: two along the longer side overlap by half, three by 3/4; half is nearer to 0.4
    assert regions(6, 9, 2) == [(0, 0, 6), (0, 3, 6),
                                *((y, x, 4) for y in (0, 2) for x in (0, 2, 5))]
    assert sorted(regions(9, 6)) == sorted((y, x, side) for x, y, side in regions(6, 9))
    # 4 x 10: three overlap by 1/4, four by 1/2, five by 5/8
    assert regions(4, 10, 1) == [(0, x, 4) for x in (0, 2, 4, 6)]
    assert regions(1, 1) == [(0, 0, 1)]                 # of the finer levels there is nothing
    # 32 x 43, of a picture of 1,024 pixels: the first level's overlap is 1 - 11 / 32 = 0.66
    assert len(regions(32, 43)) == 2 + 6 + 12


def test_pooling_equals_its_definition():
    torch.manual_seed(0)
    maps = torch.rand(2, 5, 4, 6)
    for b in range(2):
        expected = []
        for y, x, side in regions(4, 6):
            vector = numpy.array([max(maps[b, c, y + i, x + j].item() for i in range(side)
                                      for j in range(side)) for c in range(5)])
            expected.append(vector / numpy.linalg.norm(vector))
        numpy.testing.assert_allclose(pool(maps, "rmac")[b], expected, rtol=1e-5)
        cells = maps[b].flatten(1).double().numpy()
        for how, vector in (("gem", (cells ** 3).mean(1) ** (1 / 3)), ("mean", cells.mean(1))):
            numpy.testing.assert_allclose(pool(maps, how)[b], [vector / numpy.linalg.norm(vector)],
                                          rtol=1e-5)


@pytest.fixture(scope="module")
def trunk():
    torch.manual_seed(0)
    return build_trunk("regnety_100mf").eval()


@torch.no_grad()
@pytest.mark.parametrize("how", POOLS)
def test_descriptors_are_whitened_sums_of_regions(trunk, how):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (80, 3, 32, 32), dtype=torch.uint8)
    crops = [(image, i != 3) for i, image in enumerate(pixels)]     # one could not be read
    unit = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    whitenings = fit_whitening(Regions(trunk, ["res3", "avgpool"], how), crops, 6, **unit)
    images = pixels[:5] / 255
    plain = Descriptors(trunk, ["res3", "avgpool"], how)(images)
    whitened = Descriptors(trunk, ["res3", "avgpool"], how, whitenings)(images)
    for stage, x, w in zip((1, -1), plain, whitened):
        maps = trunk.forward_stages(pixels / 255)[stage]
        vectors = pool(maps, how)                                   # (80, R, C)
        torch.testing.assert_close(x, F.normalize(vectors[:5].sum(1), dim=1))
        read = numpy.delete(vectors.double().numpy(), 3, 0).reshape(-1, vectors.shape[2])
        mean = read.mean(0)
        _, scale, axes = numpy.linalg.svd(read - mean, full_matrices=False)
        components = axes[:6].T / scale[:6] * len(read) ** 0.5
        expected = (vectors[:5].double().numpy() - mean) @ components
        expected /= numpy.linalg.norm(expected, axis=2, keepdims=True)
        expected = expected.sum(1)
        expected /= numpy.linalg.norm(expected, axis=1, keepdims=True)
        # axes have either sign, so compare the similarities
        numpy.testing.assert_allclose(w @ w.t(), expected @ expected.T, atol=1e-3)


def test_whitened_vectors_are_uncorrelated_and_of_variance_one(trunk):
    torch.manual_seed(0)
    crops = [(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8), True) for _ in range(100)]
    network = Regions(trunk, ["avgpool"], "mean")
    whiten, = fit_whitening(network, crops, 10 ** 5)
    with torch.no_grad():
        images = torch.stack([image for image, _ in crops]).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406),
                                                             (0.229, 0.224, 0.225)))
        x, = network((images - mean) / std)
    white = whiten(x[:, 0]).double()
    assert white.shape[1] <= 99                         # as many as the images have, and no more
    kept = white[:, :20]
    torch.testing.assert_close(kept.t() @ kept / 100, torch.eye(20).double(), atol=0.02, rtol=0)
    with pytest.raises(ValueError, match="whitening needs images that can be read"):
        fit_whitening(network, [(crops[0][0], False)], 4)
