"""Pooling: from a stage's map to one descriptor of an image, for retrieval.

    import torch
    from evaluation.pooling import Descriptors, fit_whitening
    from regnet import ARCHS, RegNet
    trunk, images = RegNet(ARCHS["regnety_100mf"]).eval(), torch.randn(2, 3, 64, 96)
    descriptors, = Descriptors(trunk, ["res4"], "rmac")(images)         # (2, C), of unit norm
    # or whitened on images apart, CenterCrops or WholeImages of evaluation.features:
    #   whitenings = fit_whitening(Regions(trunk, ["res4"], "rmac"), crops, 1024, workers=8)
    #   Descriptors(trunk, ["res4"], "rmac", whitenings)

R-MAC (arXiv 1511.05879): maxima over square regions at three scales. GeM (arXiv 1711.02512): the
generalised mean over the map, of power 3. Mean: the usual average. Each region's vector is scaled
to unit norm, whitened where that is asked for, and scaled again; the descriptor is their sum,
scaled. GeM and mean have one region, the whole map.

Shapes: B images, C channels, H and W the map's cells, R regions, K components.
"""
from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset

from distributed.ranks import gather_lists, my_share
from evaluation.features import Depths, in_batches

LEVELS = 3                               # of R-MAC's regions
OVERLAP = 0.4                            # of neighbouring regions of the first level, about
POWER = 3.0                              # of GeM (the paper's; VISSL has 4)
POOLS = ("rmac", "gem", "mean")
COMPONENTS = 1024                        # of the whitening, at most (SEER's)


def regions(height: int, width: int, levels: int = LEVELS) -> list[tuple[int, int, int]]:
    """R-MAC's regions of a map: first row, first column, side; 14 at three levels of a square.

    At level l a side is 2 / (l + 1) of the shorter one. There are l regions along that, and more
    along the longer: so many that those of level 1 overlap by about OVERLAP.
    """
    short, long = sorted((height, width))
    more = 0
    if long > short:
        more = min(range(1, 7), key=lambda m: abs(1 - (long - short) / m / short - OVERLAP))
    found = []
    for level in range(1, levels + 1):
        if side := 2 * short // (level + 1):         # none in a map of one cell
            rows, columns = (level + more * (length > short) for length in (height, width))
            found += [(y * (height - side) // max(rows - 1, 1),
                       x * (width - side) // max(columns - 1, 1), side)
                      for y in range(rows) for x in range(columns)]
    return found


def pool(maps: Tensor, how: str) -> Tensor:
    """(B, C, H, W) -> one vector of unit norm for each region, (B, R, C).  how: of POOLS."""
    maps = maps.float()
    if how == "rmac":
        vectors = torch.stack([maps[:, :, y:y + side, x:x + side].amax((2, 3))
                               for y, x, side in regions(*maps.shape[2:])], 1)
    elif how == "gem":
        vectors = maps.clamp(min=1e-6).pow(POWER).mean((2, 3)).pow(1 / POWER)[:, None]
    else:
        vectors = maps.mean((2, 3))[:, None]
    return F.normalize(vectors, dim=2)


class Regions(nn.Module):
    """images -> vectors of the regions at each depth, (B, R, C).  depths: as of features.Depths;
    avgpool is the last stage. Raises ValueError for an unknown depth."""

    def __init__(self, trunk: nn.Module, depths: Sequence[str], how: str):
        super().__init__()
        self.maps, self.how = Depths(trunk, depths), how

    def forward(self, images: Tensor) -> list[Tensor]:
        return [pool(maps, self.how) for maps in self.maps.maps(images)]


class Whitening(nn.Module):
    """Vectors (..., C) -> (..., K), of mean 0 and with all components of variance 1."""

    def __init__(self, mean: Tensor, projection: Tensor):
        super().__init__()
        self.register_buffer("mean", mean)               # (C,)
        self.register_buffer("projection", projection)   # (C, K)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return (x - self.mean) @ self.projection


def whitening(count: int, total: Tensor, products: Tensor, components: int) -> Whitening:
    """From a number of vectors, their sum (C,) and the sum of their outer products (C, C), float64.

    components: of the largest variance; those of none, to rounding, are left out.
    """
    mean = total / count
    variance, axes = torch.linalg.eigh(products / count - torch.outer(mean, mean))  # rising
    kept = (variance > 1e-10 * variance[-1]).nonzero()[:, 0].flip(0)[:components]
    return Whitening(mean.float(), (axes[:, kept] / variance[kept].sqrt()).float())


def fit_whitening(network: Regions, images: Sequence[tuple[Tensor, bool]], components: int,
                  **options) -> list[Whitening]:
    """PCA whitening of the vectors of all regions of some images, one for each depth.

    images, options: as of features.in_batches. Under torchrun each rank takes a share. The vectors
    are not kept, only sums. Raises ValueError where no image could be read.
    """
    sums, share = [], my_share(len(images))
    for outputs, ok in in_batches(network, Subset(images, share), desc="whitening",
                                  **options) if share else ():
        vectors = [x[ok].flatten(0, 1).double() for x in outputs]
        new = [(len(x), x.sum(0), x.t() @ x) for x in vectors]
        sums = [tuple(map(sum, zip(*pair))) for pair in zip(sums, new)] if sums else new
    ranks = [sums for sums in gather_lists([sums]) if sums]
    depths = [tuple(map(sum, zip(*parts))) for parts in zip(*ranks)]
    if not depths or depths[0][0] < 2:
        raise ValueError("whitening needs images that can be read")
    return [whitening(*depth, components) for depth in depths]


class Descriptors(Regions):
    """images -> a descriptor of unit norm at each depth, (B, C), or (B, K) where it is whitened."""

    def __init__(self, trunk: nn.Module, depths: Sequence[str], how: str,
                 whitenings: Sequence[Whitening] = ()):
        super().__init__(trunk, depths, how)
        self.whitenings = nn.ModuleList(whitenings)

    def forward(self, images: Tensor) -> list[Tensor]:
        vectors = super().forward(images)
        if self.whitenings:
            vectors = [F.normalize(whiten(x), dim=2) for whiten, x in zip(self.whitenings, vectors)]
        return [F.normalize(x.sum(1), dim=1) for x in vectors]
