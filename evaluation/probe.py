"""A probe: one number of what a trunk has learned, on the same images each time, while it trains.

    views = MultiCrop(parse_crops("2x64@0.25-1"))
    probe = Probe(open_images("flowers/val"), views, Photometric())
    probe(trunk)                                        # {"knn": 61.3}

It changes nothing of a run: no random number is drawn, and the trunk is in training again after it.

Shapes: N images, C features.
"""
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from data.images import open_images
from data.stream import fault_of, permute
from distributed.hardware import autocast
from evaluation.features import CenterCrops
from evaluation.knn import knn_top1
from evaluation.metrics import per_cent
from multicrop import NEUTRAL, MultiCrop, Photometric

PROBED = 1024                            # images, at most


class Probe:
    """The images are decoded once.

    images: in class folders: {"knn": per cent of their second half that the votes of the first half
    class aright}; else {"retrieved": per cent of the images of which one augmented view is nearest
    to the other one, among the other views of all}.
    views: what cuts and augments them, a MultiCrop of two crops of one size.
    photometric: on the device of the trunk.  dtype: of autocast.
    Raises ValueError where fewer than two images can be read.
    """

    def __init__(self, images, views: MultiCrop, photometric: Photometric, dtype=torch.float32):
        self.photometric, self.dtype = photometric, dtype
        center_crops = CenterCrops(images, views.specs[0].size)
        labels = images.labels
        labelled = labels is not None and len(images.classes) > 1

        def look(i: int):
            if labelled:
                image, ok = center_crops[i]
                return (image[None], torch.tensor([NEUTRAL]), int(labels[i])) if ok else None
            try:
                (crops,), (params,) = views(images[i], seed=i)
                return crops, params, -1
            except Exception as error:           # decoders raise nearly anything on damaged files
                print("left out", fault_of(error, images.name(i)), file=sys.stderr)

        chosen = [permute(i, len(images), 0) for i in range(min(PROBED, len(images)))]
        with ThreadPoolExecutor() as pool:
            seen = [one for one in pool.map(look, chosen) if one]
        if len(seen) < 2:
            raise ValueError("a probe needs at least two images that can be read")
        crops, params, labels = zip(*seen)
        self.crops, self.params = torch.cat(crops), torch.cat(params)    # (N or 2N, 3, s, s)
        self.labels = torch.tensor(labels) if labelled else None

    @torch.no_grad()
    def __call__(self, trunk: nn.Module) -> dict[str, float]:
        training, device, features = trunk.training, self.photometric.mean.device, []
        trunk.eval()
        for crops, params in zip(self.crops.split(64), self.params.split(64)):
            with autocast(device, self.dtype):
                features.append(trunk(self.photometric(crops.to(device), params)).float().cpu())
        trunk.train(training)
        features = torch.cat(features)
        if self.labels is not None:
            half = len(features) // 2
            return {"knn": knn_top1(features[:half], self.labels[:half], features[half:],
                                    self.labels[half:])}
        one, other = F.normalize(features, dim=1).unflatten(0, (-1, 2)).unbind(1)        # (N, C)
        return {"retrieved": per_cent((one @ other.t()).argmax(1), torch.arange(len(one)))}


def open_probe(config, device: torch.device, dtype: torch.dtype) -> Probe:
    """--probe. Its images are cut as the run's first crops are. config: a recipes.config.Config.
    Raises ValueError for a folder of train and val."""
    if all(Path(config.probe, split).is_dir() for split in ("train", "val")):
        raise ValueError(f"--probe {config.probe} holds train and val; name one of them")
    views = MultiCrop([config.crops[0]._replace(count=2)], config.strength, gray=config.gray,
                      blur=config.blur, max_pixels=config.max_pixels)
    photometric = Photometric(config.mean, config.std).to(device)
    return Probe(open_images(config.probe), views, photometric, dtype)
