"""Images with labels: class folders, lists of paths and labels, or the built-in demo images.

    train, val = open_splits("flowers/")                # flowers/train/CLASS/*.jpg, flowers/val/...
    train, val = open_splits("photos/")                 # photos/CLASS/*.jpg: a fifth of them is val
    val = open_labelled("flowers/val", train.classes)   # one of them, with classes in that order
    val.targets, val.labels                             # bool (N, K), and numbers of classes (N,)

A list is a text file, DIR/train.txt or DIR/val.txt, with a path and its labels a line:
"images/0001.jpg dog" or, with several labels, "images/0001.jpg dog,person".

Shapes: N images, K classes.
"""
import hashlib
import os
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset

from data.demo import DemoImages
from data.images import Files, open_images, read_list


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
        return self._replace(images=NamedSubset(self.images, indices),
                             targets=self.targets[indices])


class NoClasses(ValueError):
    """Images that are not in class folders."""


class NamedSubset(Subset):
    """Some of the images of a dataset, with their names."""

    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])


def open_labelled(source: str | os.PathLike, classes: Sequence[str] = ()) -> Labelled:
    """A folder of class folders, or a list of paths and labels -> Labelled.

    classes: all names, in order; none: those that the source has, sorted. Raises ValueError where
    there are no labels, or one that is not in classes.
    """
    source = os.fspath(source)
    if os.path.isfile(source):
        lines = [os.fsdecode(line).rsplit(None, 1) for line in read_list(source)]
        if any(len(line) < 2 for line in lines):
            raise ValueError(f"{source} has a line without a path and a label")
        images = Files(os.path.dirname(source), (os.fsencode(path.strip()) for path, _ in lines),
                       f"no images in {source}")
        names = [labels.split(",") for _, labels in lines]
    else:
        images = open_images(source)
        if images.labels is None:
            raise NoClasses(f"{source} needs a folder for each class: "
                            f"{os.path.join(source, 'CLASS', '*.jpg')}")
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


def split(whole: Labelled) -> tuple[Labelled, Labelled]:
    """Train and val of a set that has no parts: of the images of each class (of all that have the
    same labels) the fifth whose names have the smallest SHA-256, at least one of two, is val.
    Raises ValueError where no class has two."""
    groups, val = {}, []
    for i, row in enumerate(whole.targets):
        groups.setdefault(row.numpy().tobytes(), []).append(i)
    for members in groups.values():
        members.sort(key=lambda i: hashlib.sha256(
            os.fsencode(whole.images.name(i).replace(os.sep, "/"))).digest())
        val += members[:max(len(members) // 5, len(members) > 1)]
    if not val:
        raise ValueError("too few images for train and val: no class has two")
    kept = sorted({*range(len(whole.targets))} - {*val})
    return whole.subset(kept), whole.subset(sorted(val))


def find_splits(data: str) -> list[Path]:
    """DIR/train and DIR/val, each a list with .txt behind its name or a folder; those there are."""
    places = ((Path(data, f"{part}.txt"), Path(data, part)) for part in ("train", "val"))
    return [place for pair in places for place in [*filter(Path.exists, pair)][:1]]


def open_splits(data: str) -> tuple[Labelled, Labelled]:
    """DIR/train and DIR/val, each a folder of class folders or a list with .txt behind its name; of
    a folder of class folders alone, or a list, `split` makes both; "" for the demo images. Raises
    ValueError where one of both is missing, and where their classes differ."""
    if not data:
        demo = DemoImages("train"), DemoImages("val")
        return tuple(Labelled(images, one_hot([[images.classes[k]] for k in images.labels],
                                              images.classes), images.classes) for images in demo)
    parts = find_splits(data)
    if not parts:
        try:
            return split(open_labelled(data))
        except NoClasses as error:
            raise ValueError(f"{error}; or train and val, each with such folders or as a list, "
                             "train.txt and val.txt, of a path and its label a line") from None
    if len(parts) == 1:
        missing = "val" if parts[0].stem == "train" else "train"
        raise ValueError(f"{data} holds {parts[0].name} and neither {missing} nor {missing}.txt")
    train, val = map(open_labelled, parts)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise ValueError(f"train and val of {data} differ in their classes: {odd[:5]}")
    multilabel = train.multilabel or val.multilabel
    return train._replace(multilabel=multilabel), val._replace(multilabel=multilabel)


def read_share(labels: str, else_it_is: str) -> float:
    """--labels: a share of what there is, above 0 and at most 1. Raises ValueError, with these
    words, for anything else."""
    try:
        share = float(labels)
        if not 0 < share <= 1:
            raise ValueError
    except ValueError:
        raise ValueError(f"--labels {labels} is {else_it_is}") from None
    return share


def digest_of(parts: Sequence[Labelled]) -> str:
    """Of a labelled set: changes where its names, its labels, or the sizes of (up to 1,000 of) its
    files do."""
    digest = hashlib.sha256()
    for part in parts:
        images = getattr(part.images, "dataset", part.images)           # of a subset: the whole
        digest.update(f"{images.fingerprint} {images.sizes} {part.classes}".encode(
            errors="surrogateescape") + part.targets.numpy().tobytes())
    return digest.hexdigest()[:16]
