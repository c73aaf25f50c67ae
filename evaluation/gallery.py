"""evaluate.py clusters --html: the clusters of a set of images, as a page to look at.

    python evaluate.py clusters runs/mine --data photos/ --html gallery/        # open index.html

Neighbours are those of the trunk's features, by cosine similarity. The page: figures/gallery.py.

Shapes: N images, C features, k neighbours.
"""
import os
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from data.labelled import find_splits
from evaluation.features import BATCH, CenterCrops
from evaluation.knn import neighbours
from evaluation.task import EvalTask
from figures.gallery import SPRITES, Images, arrange, write

MOST = 100_000                          # images; the time for neighbours grows with its square
NEAREST = 12                            # neighbours of each image


def nearest_others(features: Tensor, k: int = NEAREST) -> tuple[Tensor, Tensor]:
    """(N, C) -> of each image its k nearest others: similarities, indices, each (N, k), or of fewer
    images (N, N - 1)."""
    similarity, nearest = neighbours(features, features, k + 1)
    others = nearest != torch.arange(len(features))[:, None]
    others[others.all(1), -1] = False   # where so many are equal that it is not among its own
    return similarity[others].view(len(features), -1), nearest[others].view(len(features), -1)


def labels_of(images, data: str) -> Tensor | None:
    """Numbers of the top folders (N,); none where there is one alone, or where they are train and
    val."""
    if images.labels is None or len(images.classes) < 2 or data and find_splits(data):
        return None
    return torch.as_tensor(images.labels)


def address_of(images, folder: Path) -> str:
    """Of the folder that the images' names are relative to, as a link from another folder; none
    where they are not files below one folder."""
    root = getattr(images, "root", None)
    if root is None or any(os.path.isabs(images.name(i)) for i in range(len(images))):
        return ""
    try:
        path = os.path.relpath(root or ".", folder)
    except ValueError:                  # on another drive of Windows
        return ""
    return quote(os.fsencode(path.replace(os.sep, "/"))) + "/"


def counted(result: dict) -> str:
    """A sentence of the result of clusters."""
    return (f"{result['pictures']:,} images by their nearest of {result['prototypes']:,} "
            f"prototypes; {result['used']:,} prototypes have images.")


def open_gallery(task: EvalTask, images) -> Callable[[list[Tensor], Tensor, dict], None]:
    """What writes --html: a function of NearestPrototype's outputs with the features, of which
    images could be read (N,), and of the result. Raises ValueError for more than MOST images."""
    folder, labels = Path(task.options.html), labels_of(images, task.options.data)
    if len(images) > MOST:
        raise ValueError(f"--html shows at most {MOST:,} images, and there are {len(images):,}: "
                         "name some of them in a list")

    def gallery(outputs: list[Tensor], ok: Tensor, result: dict) -> None:
        prototype, cosine, confidence, features = (x[ok] for x in outputs)
        order = arrange(prototype.long(), cosine)
        indices = ok.nonzero()[:, 0][order]
        similarity, near = nearest_others(features[order])
        shown = Images([images.name(i) for i in indices.tolist()], prototype.long()[order],
                       cosine[order], confidence[order], features[order], near, similarity,
                       *() if labels is None else (labels[indices], images.classes))
        thumbs = CenterCrops(images, SPRITES["thumbs"][0], task.preprocessing.crop_ratio)
        loader = tqdm(DataLoader(Subset(thumbs, indices.tolist()), BATCH,
                                 num_workers=task.options.workers),
                      desc="thumbnails", disable=not sys.stderr.isatty())
        write(folder, shown, (tile for batch, _ in loader for tile in batch),
              f"Clusters of {task.name()}", counted(result), address_of(images, folder))

    return gallery
