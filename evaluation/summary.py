"""Measure what a trunk has learned, as SEER did.

    python evaluate.py knn runs/demo-regnety_100mf                       # on the demo pictures
    python evaluate.py linear runs/mine/checkpoint.pt --data flowers/    # flowers/train/CLASS/*.jpg
    python evaluate.py lowshot seer_regnety_32gf --data flowers/         # flowers/val/CLASS/*.jpg
    torchrun --nproc_per_node 8 evaluate.py finetune runs/mine --data flowers/ --labels 0.1
    python evaluate.py classify runs/finetuned --data flowers/val
    python evaluate.py features runs/mine --data photos/ --out features.npy
    python evaluate.py clusters runs/mine --data photos/ --out clusters.csv --sheet sheet.png

CHECKPOINT is a run's folder, its checkpoint.pt or trunk.pt, any other file or official name that
weights.py knows, or `random` for an untrained network. The last line on stdout is one JSON object,
which is also appended to results.jsonl beside the checkpoint; progress goes to stderr.

knn: votes of the nearest training pictures, for each of several k and temperatures.
linear: logistic regression on frozen features at each of several depths, or with --sgd VISSL's
recipe.  lowshot: linear SVMs on k pictures a class, drawn several times.
finetune: the whole network, on all labels or some.  classify: what that gave, or an official one.
features: of every picture, to a memory-mapped file.  clusters: each picture's nearest prototype.

Shapes: N pictures, C features, K classes or prototypes.
"""
import argparse
import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Subset

import checkpoint
import export
import finetune
import guard
import report
import weights
from classifiers import linear_probe, mean_precision, neighbours, per_cent, svm_scores, vote
from images import mix, open_images, permute
from labelled import Centred, Depths, Labelled, extract, is_main, open_labelled, open_splits
from multicrop import parse_crops
from recipes import hyphens, parse_channels
from scale import PRECISIONS, TRUNKS, build_trunk, pick_device, pick_precision
from swav import SwAV

TILE = 96                                # pixels of a picture in a sheet
PRODUCTS = ("trunk.pt", "best.pt", "last.pt")
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)     # pictures a class (VISSL's low-shot SVMs)


def load_trunk(source: str, arch: str = "",
               seed: int = 0) -> tuple[nn.Module, dict, weights.Loaded | None]:
    """Anything weights.py reads (a run's folder, a file in any layout, an official name), or
    "random" -> trunk in eval mode, the run's configuration ({} where there is none), and what the
    file holds. arch: of random. Raises ValueError where there is no trunk, or none that is known."""
    if source == "random":
        if arch not in TRUNKS:
            raise ValueError(f"random needs --arch, one of {', '.join(sorted(TRUNKS))}")
        torch.manual_seed(seed)
        return build_trunk(arch).eval(), {}, None
    if source in weights.OFFICIAL and arch not in ("", weights.OFFICIAL[source].arch):
        raise ValueError(f"{source} is of {weights.OFFICIAL[source].arch}, not {arch}")
    loaded = weights.read(source)
    known = weights.arch_of(loaded.tensors)
    if not known or arch not in ("", known[0]):
        raise ValueError(f"{loaded.path} holds {weights.describe(loaded.tensors)}, not "
                         + (arch or "one of regnet.ARCHS"))
    with torch.device("meta"):
        trunk = build_trunk(*known)
    weights.load_weights(trunk, loaded)
    config, beside = loaded.config, loaded.path.parent / "config.json"
    if not config and loaded.path.name in PRODUCTS and beside.exists():
        try:
            config = json.loads(beside.read_text())["config"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{beside} is damaged: move it away") from None
    return trunk.eval(), config, loaded


def normalisation(config: dict) -> dict:
    """A run's configuration -> the mean and std its pictures were normalised with."""
    return {name: parse_channels(config[name]) for name in ("mean", "std") if name in config}


# ------------------------------------------------------------------------------ from the commands
class Given:
    """What a command line gives to a protocol: the checkpoint, the pictures, and how to show them."""

    def __init__(self, args: argparse.Namespace):
        self.left_out = 0
        self.args, self.device = args, pick_device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
        source = Path(args.checkpoint)
        if source.is_dir():             # of a run of train.py, or of finetune
            source = source / {"clusters": "checkpoint.pt", "classify": "best.pt"}.get(
                args.what, "trunk.pt")
        self.source = str(source)
        self.trunk, self.config, self.loaded = load_trunk(self.source, args.arch, args.seed)
        recipe = self.config.get("recipe")              # of finetune: a dictionary
        shown = recipe if isinstance(recipe, dict) else {}
        if args.recipe == "finetune384" or "seer_ft" in args.checkpoint:        # SEER's own
            shown = finetune.RECIPES["finetune384"]._asdict()
        first = parse_crops(self.config["crops"])[0].size if "crops" in self.config else 224
        self.size = args.size or shown.get("size", first)
        self.ratio = shown.get("crop_ratio", 0.875 if args.data else 1.0)
        self.ratio = self.ratio if args.crop_ratio is None else args.crop_ratio
        self.bicubic = shown.get("bicubic", False) if args.bicubic is None else args.bicubic
        self.channels = normalisation(self.config)

    def splits(self, several: bool = False) -> tuple[Labelled, Labelled]:
        train, val = open_splits(self.args.data)
        if not several and (train.several or val.several):
            raise ValueError(f"{self.args.what} needs pictures with one label each")
        return train, val

    def centred(self, images) -> Centred:
        return Centred(images, self.size, self.ratio, self.bicubic)

    def features(self, network: nn.Module, labelled: Labelled) -> tuple[list[Tensor], Labelled]:
        """Outputs for the pictures that could be read, and these pictures."""
        outputs, ok = extract(network, self.centred(labelled.images), device=self.device,
                              workers=self.args.workers, **self.channels)
        kept = Subset(labelled.images, ok.nonzero()[:, 0].tolist())
        return [x[ok] for x in outputs], labelled._replace(images=kept, is_of=labelled.is_of[ok])

    def both(self, depths: Sequence[str], several: bool = False):
        """Features of the training and of the val pictures, at each depth."""
        splits, network = self.splits(several), Depths(self.trunk, depths)
        both = [self.features(network, labelled) for labelled in splits]
        self.left_out = sum(len(s.images) for s in splits) - sum(len(s.is_of) for _, s in both)
        return both

    def name(self) -> str:
        """Of the network, as part of a folder's name."""
        path = self.loaded.path if self.loaded else Path("random")
        return path.parent.name if path.name in PRODUCTS + ("checkpoint.pt",) else path.stem

    def digest(self) -> str | None:
        """SHA-256 of the checkpoint's file, its first 16 digits."""
        if self.loaded is None:
            return None
        with open(self.loaded.path, "rb") as file:
            return checkpoint.digest(file, os.path.getsize(self.loaded.path))[:16]

    def told(self, train: Labelled | None, val: Labelled) -> dict:
        return {"train": len(train.is_of) if train else 0, "val": len(val.is_of),
                "left_out": self.left_out}


def run_knn(given: Given) -> dict:
    args = given.args
    if min(args.k) < 1 or not min(args.temperature) > 0:
        raise ValueError("knn needs --k of at least 1 and --temperature above 0")
    ((features,), train), ((queries,), val) = given.both(["avgpool"])
    similarity, nearest = neighbours(features, queries, max(args.k))
    rows, predictions = [], []
    for k in args.k:
        for temperature in args.temperature:
            predictions.append(vote(similarity[:, :k], train.labels[nearest[:, :k]], temperature,
                                    len(train.classes)))
            rows.append({"k": k, "temperature": temperature,
                         "top1": per_cent(predictions[-1], val.labels)})
    if args.sheet and is_main():
        chosen = [permute(i, len(val.is_of), 0) for i in range(min(args.rows, len(val.is_of)))]
        right = predictions[0] == val.labels
        blank = torch.full((3, TILE, TILE), 255, dtype=torch.uint8), None
        report.sheet(Path(args.sheet), [
            [tile(given, val.images, i, bool(right[i])), blank,
             *(tile(given, train.images, j, bool(train.labels[j] == val.labels[i]))
               for j in nearest[i, :args.columns].tolist())] for i in chosen])
    return rows[0] | given.told(train, val) | ({"all": rows} if len(rows) > 1 else {})


def tile(given: Given, images, i: int, right: bool | None = None) -> tuple[Tensor, bool | None]:
    """A picture as it is shown in a sheet, and its mark."""
    return Centred(images, TILE, given.ratio)[i][0], right


def run_linear(given: Given) -> dict:
    if given.args.sgd:
        return run_linear_sgd(given)
    (outputs, train), (queries, val) = given.both(given.args.depths)
    rows = []
    for depth, x, q in zip(given.args.depths, outputs, queries):
        predicted, decay = linear_probe(x, train.labels, q)
        rows.append({"depth": depth, "top1": per_cent(predicted, val.labels), "weight_decay": decay})
    best = max(rows, key=lambda row: row["top1"])
    return best | given.told(train, val) | ({"all": rows} if len(rows) > 1 else {})


def run_linear_sgd(given: Given) -> dict:
    """VISSL's: random crops, SGD, a BatchNorm before each linear layer."""
    args, (train, val) = given.args, given.splits()
    depths = Depths(given.trunk, args.depths)
    with torch.no_grad():
        widths = [x.shape[1] for x in depths(torch.zeros(2, 3, given.size, given.size))]
    torch.manual_seed(args.seed)
    model = finetune.Probes(depths, widths, len(train.classes))
    last, best, told = trained(given, model, train, val, "linear", {"depths": args.depths})
    rows = [{"depth": depth, "top1": top1, "best": most}
            for depth, top1, most in zip(args.depths, last, best)]
    return max(rows, key=lambda row: row["top1"]) | told | {"all": rows}


def trained(given: Given, model: nn.Module, train: Labelled, val: Labelled, recipe: str,
            about: dict) -> tuple[list[float], list[float], dict]:
    """finetune.fit with the command line's changes to a recipe; and what to tell of it."""
    args = given.args
    published = finetune.RECIPES[recipe].batch_size     # few pictures: at least eight steps an epoch
    changes = {"size": given.size, "crop_ratio": given.ratio, "bicubic": given.bicubic,
               "area": args.area or (0.25 if given.size < 224 else None), "epochs": args.epochs,
               "batch_size": args.batch_size or min(published, max(8, len(train.images) // 8)),
               "lr": args.lr}
    recipe = finetune.RECIPES[recipe]._replace(
        **{name: value for name, value in changes.items() if value is not None})
    out = Path(args.out or f"runs/{args.what}-{given.name()}")
    about = about | {"checkpoint": given.digest() or args.arch, "data": args.data}
    last, best, counted = finetune.fit(
        model, train, val, recipe, out, given.device, pick_precision(args.precision, given.device),
        args.workers, args.seed, about=about, **given.channels)
    given.size, given.ratio, given.bicubic = recipe.size, recipe.crop_ratio, recipe.bicubic
    return last, best, {"train": len(train.images), "val": counted, "out": str(out),
                        "left_out": len(val.images) - counted, "recipe": recipe._asdict()}


def run_finetune(given: Given) -> dict:
    args, (train, val) = given.args, given.splits(several=True)
    everything = len(train.images)
    train = some_labels(train, args.labels) if args.labels else train
    few = len(train.images) < everything
    torch.manual_seed(args.seed)
    model = finetune.Finetuned(given.trunk, len(train.classes))
    (last,), (best,), told = trained(
        given, model, train, val, args.recipe or ("few" if few else "finetune"),
        {"labels": [train.images.name(i) for i in range(len(train.images))] if few else "all"})
    what = "map" if train.several else "top1"
    return {what: last, "best": best, "labels": args.labels or "1"} | told


def some_labels(train: Labelled, labels: str) -> Labelled:
    """A share of each class, at least one picture, the same at each call; or those whose file names
    a list has, one a line (SimCLR's lists for ImageNet)."""
    if Path(labels).is_file():
        wanted = set(filter(None, map(str.strip, Path(labels).read_text("utf-8").splitlines())))
        names = [train.images.name(i) for i in range(len(train.images))]
        if not wanted & set(names):                     # SimCLR's have no folders
            names = [os.path.basename(name) for name in names]
        missing = wanted - set(names)
        if missing or len(set(names)) < len(names):
            raise ValueError(f"{labels} names pictures that are not there, or not the only ones of "
                             f"that name: {sorted(missing)[:3]}")
        chosen = [i for i, name in enumerate(names) if name in wanted]
    else:
        try:
            share = float(labels)
            if not 0 < share <= 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"--labels {labels} is neither a share, as 0.01, nor a list") from None
        chosen = []
        for k in range(len(train.classes)):
            members = train.is_of[:, k].nonzero()[:, 0].tolist()
            members.sort(key=lambda i: mix(i, 0))
            chosen += members[:max(1, round(share * len(members)))]
        chosen = sorted(set(chosen))
    return train._replace(images=Named(train.images, chosen), is_of=train.is_of[chosen])


class Named(Subset):
    """Some of the pictures, with their names."""

    def name(self, i: int) -> str:
        return self.dataset.name(self.indices[i])


def run_lowshot(given: Given) -> dict:
    args = given.args
    if min(args.shots) < 1 or args.draws < 1:
        raise ValueError("lowshot needs --shots and --draws of at least 1")
    (outputs, train), (queries, val) = given.both(args.depths, several=True)
    several = train.several or val.several
    what, rows = "map" if several else "top1", []
    counts = train.is_of.sum(0)
    skipped = [shots for shots in args.shots if shots > counts.min()]
    if skipped:
        print(f"without {skipped} pictures a class: the smallest has {int(counts.min())}",
              file=sys.stderr)
    for depth, x, q in zip(args.depths, outputs, queries):
        for shots in args.shots:
            if shots in skipped:
                continue
            values = []
            for draw in range(args.draws):
                some = drawn(train.is_of, shots, mix(args.seed, shots, draw))
                scores, _ = svm_scores(x[some], train.is_of[some], q)
                values.append(mean_precision(scores, val.is_of) if several else
                              per_cent(scores.argmax(1), val.labels))
            values = torch.tensor(values, dtype=torch.float64)
            rows.append({"depth": depth, "shots": shots, what: round(values.mean().item(), 2),
                         "deviation": round(values.std(unbiased=False).item(), 2)})
            print(f"{depth}, {shots} a class: {rows[-1][what]:.2f} +- {rows[-1]['deviation']:.2f}",
                  file=sys.stderr)
    if not rows:
        raise ValueError(f"the smallest class has {int(counts.min())} pictures, fewer than --shots")
    best = max(rows, key=lambda row: (row["shots"], row[what]))
    return best | given.told(train, val) | {"draws": args.draws, "skipped": skipped, "all": rows}


def drawn(is_of: Tensor, shots: int, seed: int) -> Tensor:
    """Numbers of `shots` pictures of each class, drawn at random."""
    generator = torch.Generator().manual_seed(seed % 2 ** 63)
    order, chosen = torch.randperm(len(is_of), generator=generator), set()
    for k in range(is_of.shape[1]):
        chosen |= set(order[is_of[order, k]][:shots].tolist())
    return torch.tensor(sorted(chosen))


def run_classify(given: Given) -> dict:
    tensors, args = given.loaded.tensors if given.loaded else {}, given.args
    if "fc.weight" not in tensors:
        raise ValueError(f"{given.source} holds no classifier: name what finetune wrote, or a "
                         "fine-tuned official file")
    model = finetune.Finetuned(given.trunk, len(tensors["fc.weight"]))
    weights.load_weights(model, given.loaded)
    count = len(tensors["fc.weight"])
    classes = (Path(args.classes).read_text().split("\n") if args.classes
               else given.config.get("classes") or [])
    classes = [name.strip() for name in classes if name.strip()]
    if classes and len(classes) != count:
        raise ValueError(f"the network has {count} classes, the list of them {len(classes)}")
    if args.data:
        val = open_labelled(args.data, classes)
    else:
        _, val = open_splits("")
        order = [val.classes.index(name) for name in classes or val.classes]
        val = val._replace(is_of=val.is_of[:, order], classes=classes or val.classes)
    if len(val.classes) != count:
        raise ValueError(f"the network has {count} classes and {args.data} {len(val.classes)}: name "
                         "them all, in order, one a line (--classes)")
    (scores,), kept = given.features(model, val)
    given.left_out = len(val.images) - len(kept.is_of)
    present = val.is_of.any(0)          # ImageNet-A and -R have 200 of 1,000
    scores[:, ~present] = -torch.inf
    best = scores.topk(min(5, count), dim=1).indices
    right = kept.is_of.gather(1, best)
    return {"top1": round(100 * right[:, :1].any(1).double().mean().item(), 2),
            "top5": round(100 * right.any(1).double().mean().item(), 2),
            "classes": count, "present": int(present.sum())} | given.told(None, kept)


def run_features(given: Given) -> dict:
    args, images = given.args, pictures_of(given.args)
    about = {"checkpoint": given.digest() or f"{args.arch}, seed {args.seed}", "size": given.size,
             "crop_ratio": given.ratio, "bicubic": given.bicubic,
             **{name: list(values) for name, values in given.channels.items()}}
    return export.features(given.trunk, given.centred(images), Path(args.out or "features.npy"), about,
                           device=given.device, workers=args.workers, **given.channels)


def run_clusters(given: Given) -> dict:
    args, images = given.args, pictures_of(given.args)
    result, rows = export.clusters(
        swav_of(given), given.centred(images), Path(args.out or "clusters.csv"),
        given.config.get("temperature", 0.1), args.rows, args.columns, device=given.device,
        workers=args.workers, **given.channels)
    if args.sheet and is_main():
        report.sheet(Path(args.sheet), [[tile(given, images, i) for i in row] for row in rows])
    return result


def pictures_of(args: argparse.Namespace):
    """--data as train.py takes it, without labels; none: the held-out demo pictures."""
    return open_images(args.data) if args.data else open_splits("")[1].images


def swav_of(given: Given) -> SwAV:
    """The whole model: trunk, head and prototypes, as the file's shapes say."""
    tensors = given.loaded.tensors if given.loaded else {}
    numbers = sorted({int(name.split(".")[1]) for name in tensors if name.startswith("head.")})
    layers = [tensors[f"head.{n}.weight"] for n in numbers]
    widths = [len(layer) for layer in layers if layer.dim() == 2]
    if not widths or "prototypes.weight" not in tensors:
        raise ValueError(f"{given.source} holds no prototypes: name a run's folder or checkpoint.pt")
    head_bn = any(layer.dim() == 1 for layer in layers)
    model = SwAV(given.trunk, widths, len(tensors["prototypes.weight"]), head_bn)
    weights.load_weights(model, given.loaded)
    return model


# -------------------------------------------------------------------------------- small print
PROTOCOLS = {"knn": run_knn, "linear": run_linear, "lowshot": run_lowshot, "finetune": run_finetune,
             "classify": run_classify, "features": run_features, "clusters": run_clusters}


def numbers(kind):
    """"1,2,4" -> a list, for argparse."""
    return lambda text: [kind(word) for word in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what a trunk has learned.")
    parser.add_argument("what", choices=list(PROTOCOLS))
    parser.add_argument("checkpoint", help="run folder, checkpoint.pt, trunk.pt, a file of another "
                        "library, an official name (python weights.py), or random")
    parser.add_argument("--data", default="", help="folder with train/ and val/, class folders or "
                        "lists train.txt, val.txt; of classify one folder of classes; of features and "
                        "clusters any pictures, as train.py takes them; none: the demo's")
    parser.add_argument("--arch", default="", help="of the network called random")
    parser.add_argument("--seed", type=int, default=0, help="of the network called random, of draws "
                        "and of training")
    parser.add_argument("--out", default="", help="file of features (.npy) and clusters (.csv), folder "
                        "of finetune and linear --sgd")
    shown = parser.add_argument_group("how pictures are shown")
    shown.add_argument("--size", type=int, default=0,
                       help="pixels; none: the size of the run's first crops, else 224")
    shown.add_argument("--crop-ratio", type=float, help="central square over short side; 0: the whole "
                       "picture as a square; none: 0.875, demo 1, as a fine-tuned network was")
    shown.add_argument("--bicubic", action=argparse.BooleanOptionalAction)
    knn = parser.add_argument_group("knn")
    knn.add_argument("--k", type=numbers(int), default=[20], help="neighbours, one or several: "
                     "10,20,200 (SEER: 200; 20)")
    knn.add_argument("--temperature", type=numbers(float), default=[0.1],
                     help="of the votes, one or several (SEER: 0.1, 10B 0.07)")
    probes = parser.add_argument_group("linear and lowshot")
    probes.add_argument("--depths", type=numbers(str), default=["avgpool"],
                        help="one or several of res2 to res5 and avgpool: res4,res5,avgpool")
    probes.add_argument("--shots", type=numbers(int), default=list(SHOTS),
                        help="of lowshot: pictures a class")
    probes.add_argument("--draws", type=int, default=5, help="of lowshot, for each number of shots")
    probes.add_argument("--sgd", action="store_true", help="linear: VISSL's recipe")
    tuned = parser.add_argument_group("finetune, and linear --sgd")
    tuned.add_argument("--labels", default="", help="a share of each class' labels, as 0.01, or a list "
                       "of file names; none: all")
    tuned.add_argument("--recipe", choices=list(finetune.RECIPES), help="none: finetune, or few where "
                       "--labels is given")
    tuned.add_argument("--epochs", type=float)
    tuned.add_argument("--batch-size", type=int)
    tuned.add_argument("--lr", type=float, help="per 256 pictures of batch")
    tuned.add_argument("--area", type=float, help="least share of a picture's area in a crop")
    tuned.add_argument("--precision", default="auto", choices=("auto", *PRECISIONS))
    parser.add_argument("--classes", default="", help="classify: file of all class names, in order")
    sheets = parser.add_argument_group("pictures to look at")
    sheets.add_argument("--sheet", default="", help="knn: queries with their neighbours, right and "
                        "wrong ones framed; clusters: pictures nearest to the largest ones; a PNG")
    sheets.add_argument("--rows", type=int, default=16)
    sheets.add_argument("--columns", type=int, default=10)
    parser.add_argument("--device", default="", help="cuda, mps or cpu; none: the best one here")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    return parser.parse_args(hyphens(sys.argv[1:] if argv is None else argv))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    try:
        if args.size < 0 or args.crop_ratio is not None and not 0 <= args.crop_ratio <= 1:
            raise ValueError("needs --size of at least 0, and --crop-ratio from 0 to 1")
        if min(args.rows, args.columns) < 1:
            raise ValueError("--rows and --columns must be at least 1")
        if "RANK" in os.environ:
            cuda = pick_device(args.device).type == "cuda"
            guard.join("cpu:gloo,cuda:nccl" if cuda else "gloo", timedelta(minutes=60))
        given = Given(args)
        result = PROTOCOLS[args.what](given)
        if is_main():
            settings = {"size": given.size, "crop_ratio": given.ratio, "bicubic": given.bicubic,
                        "seed": args.seed, "arch": args.arch or given.config.get("arch", "")}
            line = json.dumps({
                "protocol": args.what, "checkpoint": args.checkpoint, "sha256": given.digest(),
                "data": args.data or "demo", **settings, **result})
            print(line)
            if given.loaded:
                results = given.loaded.path.parent / "results.jsonl"
                try:
                    with open(results, "a") as file:
                        file.write(line + "\n")
                except OSError as error:
                    print(f"{results} could not be written: {error}", file=sys.stderr)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"evaluate.py: error: {reason}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
