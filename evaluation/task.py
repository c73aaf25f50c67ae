"""What a protocol works on: a trunk, a labelled dataset, and the preprocessing of its images.

    task = open_task(options)                           # from evaluate.py's command line
    train, val = task.extract_splits(["avgpool"])       # features, targets, how many were left out
    task.preprocessing                                  # size, crop ratio, filter, mean, std

The preprocessing is chosen here and nowhere else, by `choose_preprocessing`.

Shapes: N images, C features.
"""
import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Sequence

import torch
from torch import Tensor, nn

from data.images import open_images
from data.labelled import Labelled, find_splits, open_splits
from distributed.hardware import PRECISIONS, pick_device
from distributed.ranks import is_main
from evaluation.features import SEER_FINETUNED, CenterCrops, Depths, Preprocessing, extract
from methods.build import TRUNKS, build_trunk
from weights.atomic import file_digest
from weights.files import Loaded
from weights.preprocessing import PRODUCTS, config_of, preprocessing_of
from weights.sharded import SUMS, is_sharded
from weights.trunk import open_trunk

TILE = 96                                # pixels of an image in a sheet
# of a run's folder; else trunk.pt
FILES = {"clusters": ["checkpoint.pt", "checkpoint"], "classify": ["best.pt"],
         "detect": ["trunk.pt", "best.pt"]}


def load_trunk(source: str, arch: str = "",
               seed: int = 0) -> tuple[nn.Module, dict, Loaded | None]:
    """-> trunk in eval mode, the run's configuration ({} where there is none), and what the file
    holds.

    source: anything that weights.files reads (a run's folder, a file in any layout, an official
    name), or "random".  arch: of random; of a file, what it has to be. Raises ValueError where
    there is no trunk, or none that is known.
    """
    if source == "random":
        if arch not in TRUNKS:
            raise ValueError(f"random needs --arch, one of {', '.join(sorted(TRUNKS))}")
        torch.manual_seed(seed)
        return build_trunk(arch).eval(), {}, None
    trunk, loaded = open_trunk(source, arch)
    return trunk, config_of(loaded), loaded


def choose_preprocessing(config: dict, path: Path | None,
                         options: argparse.Namespace) -> Preprocessing:
    """As the network's own images were preprocessed, changed by the options size, crop_ratio and
    bicubic.

    config: a run's, with text for crops, mean and std; a fine-tuned run's has in "recipe" a
    dictionary with its preprocessing. {}: ImageNet's usual one.  path: of the file; SEER's official
    fine-tuned ones, and those of --recipe finetune384, have SEER's.
    """
    chosen = Preprocessing(crop_ratio=0.875 if options.data else 1.0)
    changes = preprocessing_of(config, path)
    if options.recipe == "finetune384":
        changes |= SEER_FINETUNED.geometry
    asked = {"size": options.size or None, "crop_ratio": options.crop_ratio,
             "bicubic": options.bicubic}
    return chosen._replace(**changes | {name: value for name, value in asked.items()
                                        if value is not None})


class Extracted(NamedTuple):
    """Features of those images of a dataset that could be read."""
    outputs: list[Tensor]                # of each output of the network (N, C)
    labelled: Labelled                   # these N images
    left_out: int                        # the others


def counts(train: Extracted | None, val: Extracted) -> dict[str, int]:
    """How many images a result rests on."""
    splits = [split for split in (train, val) if split]
    return {"train": len(train.labelled.targets) if train else 0,
            "val": len(val.labelled.targets), "left_out": sum(split.left_out for split in splits)}


@dataclass
class EvalTask:
    """A trunk, its preprocessing, and the options that say which dataset, and how to measure."""
    options: argparse.Namespace          # of evaluate.py
    device: torch.device
    source: str                          # the checkpoint: a file or a name
    trunk: nn.Module
    config: dict                         # of the run that the checkpoint is of; {} where unknown
    loaded: Loaded | None                # what the checkpoint holds; None: a random network
    preprocessing: Preprocessing

    def splits(self, multilabel: bool = False) -> tuple[Labelled, Labelled]:
        """The labelled dataset, train and val. multilabel: whether images may have several labels;
        else they raise ValueError."""
        data = self.options.data
        train, val = open_splits(data)
        if data and not find_splits(data) and is_main():
            print(f"{data} has no train and val: a fifth of each class, chosen by a hash of the "
                  f"names, is val: {len(val.targets):,} of "
                  f"{len(train.targets) + len(val.targets):,} images", file=sys.stderr)
        if not multilabel and (train.multilabel or val.multilabel):
            raise ValueError(f"{self.options.what} needs images with one label each")
        return train, val

    def images(self):
        """Images without labels, --data as train.py takes it; none: the held-out demo images."""
        return open_images(self.options.data) if self.options.data else open_splits("")[1].images

    def extract(self, network: nn.Module, labelled: Labelled, **more) -> Extracted:
        """more: in place of extract_options."""
        outputs, ok = extract(network, self.preprocessing.center_crops(labelled.images),
                              **self.extract_options() | more)
        kept = labelled.subset(ok.nonzero()[:, 0].tolist())
        return Extracted([x[ok] for x in outputs], kept, len(ok) - len(kept.targets))

    def extract_splits(self, depths: Sequence[str],
                       multilabel: bool = False) -> tuple[Extracted, Extracted]:
        """Features of the training and of the val images, an output for each depth."""
        (train, val), network = self.splits(multilabel), Depths(self.trunk, depths)
        return self.extract(network, train), self.extract(network, val)

    def extract_options(self) -> dict:
        """Of features.extract and in_batches."""
        return {"device": self.device, "workers": self.options.workers,
                "dtype": PRECISIONS["bf16" if self.options.precision == "bf16" else "fp32"],
                **self.preprocessing.normalisation}

    def tile(self, images, i: int) -> Tensor:
        """An image as a sheet shows it, uint8 (3, TILE, TILE)."""
        return CenterCrops(images, TILE, self.preprocessing.crop_ratio)[i][0]

    def name(self) -> str:
        """Of the network, as part of a folder's name."""
        path = self.loaded.path if self.loaded else Path("random")
        in_run = path.name in (*PRODUCTS, *FILES["clusters"])
        return path.parent.resolve().name if in_run else path.stem

    def digest(self) -> str | None:
        """SHA-256 of the checkpoint's file, its first 16 digits."""
        path = self.loaded.path if self.loaded else None
        return path and file_digest(path / SUMS if path.is_dir() else path)


def open_task(options: argparse.Namespace) -> EvalTask:
    """Load what evaluate.py's command line names. Raises ValueError for what cannot be used."""
    device = pick_device(options.device, int(os.environ.get("LOCAL_RANK", 0)))
    source = Path(options.checkpoint)
    if source.is_dir() and not is_sharded(source):      # of a run of train.py, or of finetune
        names = [source / name for name in FILES.get(options.what, ["trunk.pt"])]
        source = next(filter(Path.exists, names), names[0])
    trunk, config, loaded = load_trunk(str(source), options.arch, options.seed)
    preprocessing = choose_preprocessing(config, loaded.path if loaded else None, options)
    return EvalTask(options, device, str(source), trunk, config, loaded, preprocessing)
