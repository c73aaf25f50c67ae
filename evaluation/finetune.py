"""Fine-tuning: the whole network trained with all labels or some, and what it classifies.

    model = Finetuned(trunk, classes=1000)              # images -> [scores (B, K)]
    train = some_labels(train, "0.01")                  # 1 % of each class
    python evaluate.py finetune runs/mine --data flowers/ --labels 0.1 --out runs/finetuned

A trunk that has learned, and few images, get recipe `small`: fc begins as the linear probe (Kumar
et al., arXiv 2202.10054), and BatchNorm keeps the trunk's statistics. `classify` measures a
fine-tuned run or an official fine-tuned file, top-1 and top-5. Training is in supervised.py.

Shapes: B images of a batch, M images of a set, K classes.
"""
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from data.images import read_list
from data.labelled import Labelled, open_labelled, open_splits, read_share
from data.stream import mix
from evaluation.features import Depths
from evaluation.linear import fit_probe
from evaluation.supervised import train_with_labels
from evaluation.task import EvalTask, counts
from weights.load import load_weights

FEW_IMAGES = 5_000          # with labels; with fewer, recipe small


class Finetuned(nn.Module):
    """Trunk and fc: images -> [scores (B, K)]. All of it is trained; keep_statistics: but for
    BatchNorm's running means and variances, which it normalises with in training too."""

    def __init__(self, trunk: nn.Module, classes: int, keep_statistics: bool = False):
        super().__init__()
        self.trunk, self.fc = trunk, nn.Linear(trunk.num_features, classes)
        self.keep_statistics = keep_statistics
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.fc(self.trunk(images))]

    def train(self, mode: bool = True) -> "Finetuned":
        super().train(mode)
        if self.keep_statistics:
            self.trunk.eval()
        return self

    @torch.no_grad()
    def start_as_probe(self, features: Tensor, labels: Tensor) -> None:
        """fc predicts what `fit_probe` does. features: of the trunk (N, C); labels: (N,)."""
        mean, std, weights, _ = fit_probe(features, labels, self.fc.out_features)
        weight = weights[:-1] / std[:, None]                # of features that are not standardised
        self.fc.weight.copy_(weight.t())
        self.fc.bias.copy_(weights[-1] - mean @ weight)

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of its state dict with torchvision's names: what best.pt and last.pt hold."""
        return {name.removeprefix("trunk."): x for name, x in state.items()}


def some_labels(train: Labelled, labels: str) -> Labelled:
    """A share of each class, at least one image, the same at each call; or those whose file names a
    list has, one a line (SimCLR's lists for ImageNet).

    labels: the share, as in "0.01", or the list's path. Raises ValueError where it is neither, or
    where a name of the list is that of no image, or of several.
    """
    if Path(labels).is_file():
        return train.subset(_listed(train.images, labels))
    share = read_share(labels, "neither a share, as 0.01, nor a list")
    return train.subset(share_of_classes(train.targets, share))


def share_of_classes(targets: Tensor, share: float, draw: int = 0) -> list[int]:
    """Numbers of the images of a share of each class, at least one, of bool (N, K)."""
    chosen = set()
    for column in targets.t():
        members = column.nonzero()[:, 0].tolist()
        members.sort(key=lambda i: mix(i, draw))
        chosen.update(members[:max(1, round(share * len(members)))])
    return sorted(chosen)


def _listed(images, path: str) -> list[int]:
    wanted = {os.fsdecode(line.strip()) for line in read_list(path)}
    if not wanted:
        raise ValueError(f"{path} names no image")
    names = [images.name(i) for i in range(len(images))]
    if not wanted & set(names):                         # SimCLR's have no folders
        names = [os.path.basename(name) for name in names]
    missing = wanted - set(names)
    if missing or len(set(names)) < len(names):
        raise ValueError(f"{path} names images that are not there, or not the only ones of that "
                         f"name: {sorted(missing)[:3]}")
    return [i for i, name in enumerate(names) if name in wanted]


def run(task: EvalTask) -> dict:
    """Fine-tune: top-1 (or mean average precision) on val after the last epoch, and the best."""
    options, (train, val) = task.options, task.splits(multilabel=True)
    everything = len(train.images)
    train = some_labels(train, options.labels) if options.labels else train
    few = len(train.images) < everything
    torch.manual_seed(options.seed)
    recipe = options.recipe or recipe_for(task, train, few)
    learned = recipe == "small"
    if learned and (not task.loaded or train.multilabel or options.shard):
        raise ValueError("recipe small needs a trunk that has learned, one label an image, and no "
                         "--shard")
    model = Finetuned(task.trunk, len(train.classes), keep_statistics=learned)
    if learned:
        probed = task.extract(Depths(task.trunk, ["avgpool"]), train, dtype=torch.float32)
        model.start_as_probe(*probed.outputs, probed.labelled.labels)
    about = {"labels": [train.images.name(i) for i in range(len(train.images))] if few else "all"}
    (last,), (best,), summary = train_with_labels(
        task, model, train, val, recipe, about | ({"begins": "linear probe"} if learned else {}))
    what = "map" if train.multilabel else "top1"
    return {what: last, "best": best, "labels": options.labels or "1"} | summary


def recipe_for(task: EvalTask, train: Labelled, few: bool) -> str:
    """few: some of the labels. An untrained trunk has no statistics to keep, and learns with the
    published rates."""
    if (task.loaded and not task.options.shard and not train.multilabel
            and 5 <= len(train.images) < FEW_IMAGES):
        return "small"
    return "few" if few else "finetune"


def run_classify(task: EvalTask) -> dict:
    """Top-1 and top-5 of a network with a classifier, among the classes that the dataset has."""
    tensors, options = task.loaded.tensors if task.loaded else {}, task.options
    if "fc.weight" not in tensors:
        raise ValueError(f"{task.source} holds no classifier: name what finetune wrote, or a "
                         "fine-tuned official file")
    count = len(tensors["fc.weight"])
    model = Finetuned(task.trunk, count)
    load_weights(model, task.loaded)
    classes = ([os.fsdecode(line.strip()) for line in read_list(options.classes)]
               if options.classes else task.config.get("classes") or [])
    if classes and len(classes) != count:
        raise ValueError(f"the network has {count} classes, the list of them {len(classes)}")
    val = _to_classify(options.data, classes)
    if len(val.classes) != count:
        raise ValueError(f"the network has {count} classes and {options.data} {len(val.classes)}: "
                         "name them all, in order, one a line (--classes)")
    extracted = task.extract(model, val)
    (scores,), targets = extracted.outputs, extracted.labelled.targets
    present = val.targets.any(0)        # ImageNet-A and -R have 200 of 1,000
    scores[:, ~present] = -torch.inf
    best = scores.topk(min(5, count), dim=1).indices                     # (M, 5)
    correct = targets.gather(1, best)
    return {"top1": round(100 * correct[:, :1].any(1).double().mean().item(), 2),
            "top5": round(100 * correct.any(1).double().mean().item(), 2),
            "classes": count, "present": int(present.sum())} | counts(None, extracted)


def _to_classify(data: str, classes: list[str]) -> Labelled:
    """A folder of classes; "": the demo's val. Its classes are in the order of the network's."""
    if data:
        return open_labelled(data, classes)
    _, val = open_splits("")
    classes = classes or val.classes
    order = [val.classes.index(name) for name in classes]
    return val._replace(targets=val.targets[:, order], classes=classes)
