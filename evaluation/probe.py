"""Measure a trunk while it trains: in one number, on the same pictures each time.

    views = MultiCrop(parse_crops("2x64@0.25-1"))
    probe = Probe(open_images("flowers/val"), views, Photometric())
    probe(trunk)                                        # {"knn": 61.3}

It changes nothing of a run: no random number is drawn, and the trunk is in training again after it.

Shapes: N pictures, C features.
"""
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torch.nn import functional as F

from classifiers import knn, per_cent
from images import permute
from labelled import Centred
from multicrop import NEUTRAL, MultiCrop, Photometric

PROBED = 1024                            # pictures, at most


class Probe:
    """What a trunk knows, in one number, while it trains. The pictures are decoded once.

    images: in class folders: {"knn": per cent of their second half that the votes of the first half
    class aright}; else {"retrieved": per cent of the pictures of which one distorted view is nearest
    to the other one, among the other views of all}.
    views: what cuts and distorts them, a MultiCrop of two crops of one size.
    photometric: on the device of the trunk.  dtype: of autocast.
    Raises ValueError where fewer than two pictures can be read.
    """

    def __init__(self, images, views: MultiCrop, photometric: Photometric, dtype=torch.float32):
        self.photometric, self.dtype = photometric, dtype
        centred = Centred(images, views.specs[0].size)
        labels = images.labels
        labelled = labels is not None and len(images.classes) > 1

        def look(i: int):
            if labelled:
                picture, ok = centred[i]
                return (picture[None], torch.tensor([NEUTRAL]), int(labels[i])) if ok else None
            try:
                (crops,), (params,) = views(images[i], seed=i)
                return crops, params, -1
            except Exception as error:           # decoders raise nearly anything on damaged files
                print(f"left out {images.name(i)}: {error}", file=sys.stderr)

        some = [permute(i, len(images), 0) for i in range(min(PROBED, len(images)))]
        with ThreadPoolExecutor() as pool:
            seen = [one for one in pool.map(look, some) if one]
        if len(seen) < 2:
            raise ValueError("a probe needs at least two pictures that can be read")
        crops, params, labels = zip(*seen)
        self.crops, self.params = torch.cat(crops), torch.cat(params)    # (N or 2N, 3, s, s)
        self.labels = torch.tensor(labels) if labelled else None

    @torch.no_grad()
    def __call__(self, trunk: nn.Module) -> dict[str, float]:
        training, device, features = trunk.training, self.photometric.mean.device, []
        trunk.eval()
        for crops, params in zip(self.crops.split(64), self.params.split(64)):
            with torch.autocast(device.type, self.dtype, enabled=self.dtype != torch.float32):
                features.append(trunk(self.photometric(crops.to(device), params)).float().cpu())
        trunk.train(training)
        features = torch.cat(features)
        if self.labels is not None:
            half = len(features) // 2
            predicted = knn(features[:half], self.labels[:half], features[half:])
            return {"knn": per_cent(predicted, self.labels[half:])}
        one, other = F.normalize(features, dim=1).unflatten(0, (-1, 2)).unbind(1)        # (N, C)
        return {"retrieved": per_cent((one @ other.t()).argmax(1), torch.arange(len(one)))}
