"""Features: images preprocessed as published protocols do, and what a frozen network makes of them.

    crops = CenterCrops(open_images("flowers/val"), 224)    # uint8 squares
    (features,), ok = extract(trunk, crops, workers=8)      # (N, C); ok: which could be read
    maps = Depths(trunk, ["res4", "avgpool"])               # a network, for features at two depths

Under torchrun each rank takes a share of the images, and all ranks get the result. A network always
sees BATCH images at once; the last batch is zero-padded. So results do not depend on the number of
ranks.

Shapes: B images of a batch, N of a set, C features.
"""
import sys
from typing import Iterator, NamedTuple, Sequence

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from data.stream import fault_of
from distributed.fsdp import is_sharded
from distributed.hardware import autocast, layout
from distributed.ranks import gather_lists, my_share
from multicrop import IMAGENET_MEAN, IMAGENET_STD, decode
from weights import preprocessing

BATCH = 64                               # images at once


class Preprocessing(NamedTuple):
    """From an image to a network's input. The short side is resized to size / crop_ratio, then the
    central square of `size` pixels is cut.

    256 and 224 pixels (ratio 0.875, bilinear) for most published numbers; 384 and 384 (ratio 1,
    bicubic) for SEER's fine-tuned networks. Ratio 0: the whole image is resized to a square,
    whatever its shape (VOC07's SVMs).
    """
    size: int = 224                      # pixels
    crop_ratio: float = 0.875
    bicubic: bool = False
    mean: tuple[float, ...] = IMAGENET_MEAN      # of each channel, those of the pretraining
    std: tuple[float, ...] = IMAGENET_STD

    @property
    def geometry(self) -> dict:
        """Size, ratio and filter, by their names in results and checkpoints."""
        return {"size": self.size, "crop_ratio": self.crop_ratio, "bicubic": self.bicubic}

    @property
    def normalisation(self) -> dict[str, tuple[float, ...]]:
        """Mean and std, as options of `extract` and of multicrop.Photometric."""
        return {"mean": self.mean, "std": self.std}

    def center_crops(self, images) -> "CenterCrops":
        return CenterCrops(images, self.size, self.crop_ratio, self.bicubic)


SEER_FINETUNED = Preprocessing(**preprocessing.SEER_FINETUNED)


class CenterCrops(Dataset):
    """Image i -> its central square, uint8 (3, size, size), and whether it could be read; black
    where not.

    images: [i] -> bytes, .name(i).  size, crop_ratio, bicubic: as of Preprocessing.
    """

    def __init__(self, images, size: int, crop_ratio: float = 0.875, bicubic: bool = False):
        self.images, self.size = images, size
        self.resize = round(size / crop_ratio) if crop_ratio else [size, size]
        self.filter = InterpolationMode.BICUBIC if bicubic else InterpolationMode.BILINEAR

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, bool]:
        try:
            image = decode(self.images[i])
        except Exception as error:           # a file system's errors too
            print("left out", fault_of(error, self.images.name(i)), file=sys.stderr)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        return TF.pil_to_tensor(self.fit(image)), True

    def fit(self, image: Image.Image) -> Image.Image:
        image = TF.resize(image, self.resize, self.filter)
        return TF.center_crop(image, self.size)


class WholeImages(CenterCrops):
    """Image i -> all of it, uint8 (3, h, w), its longer side resized to `size`, and whether it
    could be read. They go through `extract` one at a time (batch=1)."""

    def fit(self, image: Image.Image) -> Image.Image:
        scale = self.size / max(image.size)
        return TF.resize(image, [max(1, round(side * scale)) for side in image.size[::-1]],
                         self.filter)


@torch.no_grad()
def in_batches(network: nn.Module, images: Sequence[tuple[Tensor, bool]], device="cpu",
               workers: int = 0, mean=IMAGENET_MEAN, std=IMAGENET_STD, desc: str = "features",
               dtype: torch.dtype = torch.float32,
               batch: int = BATCH) -> Iterator[tuple[list[Tensor], Tensor]]:
    """A batch at a time: the network's outputs in eval mode, a list of float32 tensors on the CPU,
    and which images could be read (B,).

    network: normalised images -> a tensor (B, ...), or a list of them.  images: CenterCrops, or a
    list of what they give.  mean, std: of each channel.  dtype: of autocast; in bfloat16
    the weights of convolutions are turned into it, in place: half the memory.  batch: images at
    once; 1: they may differ in shape.
    """
    memory_format = layout(torch.device(device))
    for module in network.modules() if dtype != torch.float32 else ():
        if isinstance(module, nn.Conv2d):
            module.to(device, dtype)
    if not is_sharded(network):
        network.to(device, memory_format=memory_format)
    network.eval()
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
    loader = DataLoader(images, batch, num_workers=workers)
    for pixels, ok in tqdm(loader, desc=desc, disable=not sys.stderr.isatty()):
        count = len(pixels)
        full = pixels.new_zeros(batch, *pixels.shape[1:])
        full[:count] = pixels
        full = full.to(device).to(torch.float32, memory_format=memory_format)
        with autocast(torch.device(device), dtype):
            output = network(full.div_(255).sub_(mean).div_(std))
        outputs = output if isinstance(output, list) else [output]
        yield [x[:count].float().cpu() for x in outputs], ok


def extract(network: nn.Module, images: Sequence[tuple[Tensor, bool]],
            **options) -> tuple[list[Tensor], Tensor]:
    """All batches in one: each output of the network (N, C), and which images could be read (N,).

    images, options: as for in_batches. Raises ValueError where no image could be read, and for
    features that are not finite.
    """
    share = my_share(len(images))
    batches = list(in_batches(network, Subset(images, share), **options)) if share else []
    if is_sharded(network):         # all ranks gather its weights, so all go forward as often
        for _ in range(max(gather_lists([len(batches)])) - len(batches)):
            list(in_batches(network, Subset(images, [0]), **options))
    outputs = [torch.cat(parts) for parts in zip(*(out for out, _ in batches))]
    ok = torch.cat([ok for _, ok in batches]) if batches else torch.zeros(0, dtype=torch.bool)
    ranks = gather_lists([(outputs, ok)])
    if len(ranks) > 1:
        outputs = [torch.cat(parts) for parts in zip(*(out for out, _ in ranks if out))]
        ok = torch.cat([ok for _, ok in ranks])
    if not ok.any():
        raise ValueError("no image could be read")
    if not all(x.isfinite().all() for x in outputs):
        raise ValueError("features are not finite: the network is damaged")
    return outputs, ok


class Depths(nn.Module):
    """A trunk's features at several depths: images -> list of (B, C * cells).

    depths: of res2, res3, ..., the stages, whose maps are averaged over two cells, one above the
    other, and avgpool: the last stage's map, averaged over one cell. (VISSL has other cells for
    each network: of the 256GF (2, 1) and (1, 2), of the 32GF (7, 1) and (3, 1).) Raises ValueError
    for an unknown depth.
    """
    CELLS = (2, 1)

    def __init__(self, trunk: nn.Module, depths: Sequence[str] = ("avgpool",)):
        super().__init__()
        self.trunk, self.depths = trunk, list(depths)
        self.stages = [f"res{i + 2}" for i in range(len(getattr(trunk, "trunk_output", range(4))))]
        unknown = set(depths) - {*self.stages, "avgpool"}
        if unknown or not depths:
            raise ValueError(f"unknown depth {', '.join(sorted(unknown)) or 'none'}; there is "
                             f"{', '.join(self.stages)}, avgpool")

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.depths == ["avgpool"]:
            return [self.trunk(images)]
        return [nn.functional.adaptive_avg_pool2d(
            x, 1 if depth == "avgpool" else self.CELLS).flatten(1)
            for depth, x in zip(self.depths, self.maps(images))]

    def maps(self, images: Tensor) -> list[Tensor]:
        """Of each depth the map itself (B, C, H, W); of avgpool the last stage's."""
        maps = dict(zip(self.stages, stage_maps(self.trunk, images)))
        maps["avgpool"] = maps[self.stages[-1]]
        return [maps[depth] for depth in self.depths]


def stage_maps(trunk: nn.Module, images: Tensor) -> list[Tensor]:
    """One map a stage, of a RegNet or of torchvision's ResNet."""
    if hasattr(trunk, "forward_stages"):
        return trunk.forward_stages(images)
    x, maps = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images)))), []
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        x = stage(x)
        maps.append(x)
    return maps
