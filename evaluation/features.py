"""Pictures with labels, as published protocols show them to a network, and its features of them.

    train, val = open_splits("flowers/")               # flowers/train/CLASS/*.jpg, flowers/val/...
    centred = Centred(val.images, 224)                 # uint8 squares
    (features,), ok = extract(trunk, centred, workers=8)

Labels are class folders, or lists: DIR/train.txt and DIR/val.txt with a path and its labels a line,
"images/0001.jpg dog" or, of several labels, "images/0001.jpg dog,person". Under torchrun each rank
takes a share of the pictures, and all have the result. The network always sees BATCH pictures at
once, the last time some of them black: so neither a setting nor the number of ranks moves a digit.

Shapes: N pictures, C features, K classes.
"""
import os
import sys
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF
from tqdm import tqdm

from demo import DemoImages
from images import Files, open_images
from multicrop import IMAGENET_MEAN, IMAGENET_STD, decode
from scale import layout

BATCH = 64                               # pictures at once


class Labelled(NamedTuple):
    """Pictures and, of each, whether it is of a class."""
    images: object                       # len(), [i] -> bytes, .name(i)
    is_of: Tensor                        # bool (N, K)
    classes: list[str]
    several: bool = False                # whether pictures have other than one label

    @property
    def labels(self) -> Tensor:
        """(N,), where each picture has one label."""
        return self.is_of.to(torch.uint8).argmax(1)


def open_labelled(source: str | os.PathLike, classes: Sequence[str] = ()) -> Labelled:
    """A folder of class folders, or a list of paths and labels -> Labelled.

    classes: the names, in order, where not only those that are there count. Raises ValueError where
    there are no labels, or one that is not in classes.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.rsplit(None, 1) for line in file if line.strip()]
        if any(len(line) < 2 for line in lines):
            raise ValueError(f"{source} has a line without a path and a label")
        images = Files(os.path.dirname(source), (os.fsencode(path.strip()) for path, _ in lines),
                       f"no pictures in {source}")
        names = [labels.split(",") for _, labels in lines]
    else:
        images = open_images(source)
        if images.labels is None:
            raise ValueError(f"{source} needs a folder for each class: CLASS/*.jpg")
        names = [[images.classes[label]] for label in images.labels]
    found = {name for some in names for name in some}
    if classes and found - set(classes):
        raise ValueError(f"{source} has classes that are not known: {sorted(found - set(classes))[:5]}")
    classes = list(classes) or sorted(found)
    return Labelled(images, one_hot(names, classes), classes, any(len(some) != 1 for some in names))


def one_hot(names: Sequence[Sequence[str]], classes: list[str]) -> Tensor:
    number = {name: k for k, name in enumerate(classes)}
    is_of = torch.zeros(len(names), len(classes), dtype=torch.bool)
    for i, some in enumerate(names):
        is_of[i, [number[name] for name in some]] = True
    return is_of


def open_splits(data: str) -> tuple[Labelled, Labelled]:
    """DIR/train and DIR/val, each a folder of class folders or a list with .txt behind its name; or
    "" for the demo pictures. Raises ValueError where their classes differ."""
    if not data:
        demo = DemoImages("train"), DemoImages("val")
        return tuple(Labelled(images, one_hot([[images.classes[k]] for k in images.labels],
                                              images.classes), images.classes) for images in demo)
    listed = [Path(data, f"{split}.txt") for split in ("train", "val")]
    train, val = (open_labelled(file if file.is_file() else file.with_suffix(""))
                  for file in listed)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"train and val of {data} differ in their classes: {odd[:5]}")
    several = train.several or val.several
    return train._replace(several=several), val._replace(several=several)


# ------------------------------------------------------------------------------------ features
class Centred(Dataset):
    """Picture i -> its centre, uint8 (3, size, size), and whether it could be read.

    The short side is resized to size / crop_ratio, then a square of `size` is cut from the middle:
    256 and 224 (ratio 0.875, bilinear) for most published numbers, 384 and 384 (ratio 1, bicubic)
    for the fine-tuned SEER. A ratio of 0 resizes to a square whatever the shape (VOC07's SVMs).
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
            print(f"left out {self.images.name(i)}: {error}", file=sys.stderr)
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False
        image = TF.resize(image, self.resize, self.filter)
        return TF.pil_to_tensor(TF.center_crop(image, self.size)), True


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def my_share(count: int) -> range:
    """Of `count` things, those of this rank: a run of them."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    each = -(-count // ranks)
    return range(min(rank * each, count), min((rank + 1) * each, count))


@torch.no_grad()
def in_batches(network: nn.Module, pictures: Sequence[tuple[Tensor, bool]], device="cpu",
               workers: int = 0, mean=IMAGENET_MEAN, std=IMAGENET_STD, desc: str = "features"):
    """Outputs of a network in eval mode, a list of tensors on the CPU, and which pictures could be
    read, a batch at a time. mean, std: those of the pretraining."""
    how = layout(torch.device(device))
    network = network.to(device, memory_format=how).eval()
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (mean, std))
    loader = DataLoader(pictures, BATCH, num_workers=workers)
    for images, ok in tqdm(loader, desc=desc, disable=not sys.stderr.isatty()):
        count = len(images)
        full = images.new_zeros(BATCH, *images.shape[1:])
        full[:count] = images
        full = full.to(device).to(torch.float32, memory_format=how)
        out = network(full.div_(255).sub_(mean).div_(std))
        yield [x[:count].float().cpu() for x in (out if isinstance(out, list) else [out])], ok


def extract(network: nn.Module, pictures: Sequence[tuple[Tensor, bool]],
            **options) -> tuple[list[Tensor], Tensor]:
    """All of it: each output of the network (N, C), and which pictures could be read (N,).

    pictures: a Centred dataset, or a list of what it gives.  options: as for in_batches. Raises
    ValueError where no picture could be read.
    """
    share = my_share(len(pictures))
    batches = list(in_batches(network, Subset(pictures, share), **options)) if share else []
    outputs = [torch.cat(parts) for parts in zip(*(out for out, _ in batches))]
    ok = torch.cat([ok for _, ok in batches]) if batches else torch.zeros(0, dtype=torch.bool)
    if dist.is_initialized():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (outputs, ok))
        outputs = [torch.cat(same) for same in zip(*(out for out, _ in parts if out))]
        ok = torch.cat([ok for _, ok in parts])
    if not ok.any():
        raise ValueError("no picture could be read")
    return outputs, ok


class Depths(nn.Module):
    """A trunk's features at several depths: images -> list of (B, C * cells). depths: of res2, res3,
    ..., the stages, whose maps are averaged over two cells, one above the other, and avgpool: the
    last stage's, averaged over one. (VISSL has other cells for each network: of the 256GF (2, 1) and
    (1, 2), of the 32GF (7, 1) and (3, 1).)"""
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
        maps = dict(zip(self.stages, stage_maps(self.trunk, images)))
        maps["avgpool"] = maps[self.stages[-1]]
        return [nn.functional.adaptive_avg_pool2d(
            maps[depth], 1 if depth == "avgpool" else self.CELLS).flatten(1)
            for depth in self.depths]


def stage_maps(trunk: nn.Module, images: Tensor) -> list[Tensor]:
    """One map a stage, of a RegNet or of torchvision's ResNet."""
    if hasattr(trunk, "forward_stages"):
        return trunk.forward_stages(images)
    x, maps = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images)))), []
    for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
        x = stage(x)
        maps.append(x)
    return maps
