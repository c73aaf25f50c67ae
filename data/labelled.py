"""Images with labels: class folders, lists of paths and labels, or the built-in demo images.

    train, val = open_splits("flowers/")                # flowers/train/CLASS/*.jpg, flowers/val/...
    val = open_labelled("flowers/val", train.classes)   # one of them, with classes in that order
    val.targets, val.labels                             # bool (N, K), and numbers of classes (N,)

A list is a text file, DIR/train.txt or DIR/val.txt, with a path and its labels a line:
"images/0001.jpg dog" or, with several labels, "images/0001.jpg dog,person".

Shapes: N images, K classes.
"""
import os
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset

from data.demo import DemoImages
from data.images import Files, open_images


class Labelled(NamedTuple):
    """Images and their targets."""
    images: object                       # len(), [i] -> bytes, .name(i)
    targets: Tensor                      # multi-hot, bool (N, K)
    classes: list[str]
    multilabel: bool = False             # whether any image has other than one label

    @property
    def labels(self) -> Tensor:
        """(N,), where each image has one label."""
        return self.targets.to(torch.uint8).argmax(1)

    def subset(self, indices: Sequence[int]) -> "Labelled":
        """Some of the images, with their targets; all classes stay."""
        return self._replace(images=_NamedSubset(self.images, indices),
                             targets=self.targets[indices])


class _NamedSubset(Subset):
    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])


def open_labelled(source: str | os.PathLike, classes: Sequence[str] = ()) -> Labelled:
    """A folder of class folders, or a list of paths and labels -> Labelled.

    classes: all names, in order; none: those that the source has, sorted. Raises ValueError where
    there are no labels, or one that is not in classes.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        with open(source, encoding="utf-8-sig", errors="surrogateescape") as file:
            lines = [line.rsplit(None, 1) for line in file if line.strip()]
        if any(len(line) < 2 for line in lines):
            raise ValueError(f"{source} has a line without a path and a label")
        images = Files(os.path.dirname(source), (os.fsencode(path.strip()) for path, _ in lines),
                       f"no images in {source}")
        names = [labels.split(",") for _, labels in lines]
    else:
        images = open_images(source)
        if images.labels is None:
            raise ValueError(f"{source} needs a folder for each class: CLASS/*.jpg")
        names = [[images.classes[label]] for label in images.labels]
    found = {name for row in names for name in row}
    if classes and found - set(classes):
        unknown = sorted(found - set(classes))[:5]
        raise ValueError(f"{source} has classes that are not known: {unknown}")
    classes = list(classes) or sorted(found)
    return Labelled(images, one_hot(names, classes), classes, any(len(row) != 1 for row in names))


def one_hot(names: Sequence[Sequence[str]], classes: list[str]) -> Tensor:
    """The names of each image's classes -> targets, bool (N, K)."""
    number = {name: k for k, name in enumerate(classes)}
    targets = torch.zeros(len(names), len(classes), dtype=torch.bool)
    for i, row in enumerate(names):
        targets[i, [number[name] for name in row]] = True
    return targets


def open_splits(data: str) -> tuple[Labelled, Labelled]:
    """DIR/train and DIR/val, each a folder of class folders or a list with .txt behind its name; or
    "" for the demo images. Raises ValueError where their classes differ."""
    if not data:
        demo = DemoImages("train"), DemoImages("val")
        return tuple(Labelled(images, one_hot([[images.classes[k]] for k in images.labels],
                                              images.classes), images.classes) for images in demo)
    lists = [Path(data, f"{split}.txt") for split in ("train", "val")]
    train, val = (open_labelled(file if file.is_file() else file.with_suffix("")) for file in lists)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"train and val of {data} differ in their classes: {odd[:5]}")
    multilabel = train.multilabel or val.multilabel
    return train._replace(multilabel=multilabel), val._replace(multilabel=multilabel)
