"""Images with objects, for detection: COCO's layout, Pascal VOC's, or the built-in scenes.

    train, val = open_detection("coco/")                # coco/annotations/instances_train2017.json
    train, val = open_detection("VOC2012/")             # VOC2012/ImageSets/Main/train.txt
    val = open_val("coco/")                             # alone: nothing of train is read
    image, target = val[0]                              # uint8 (3, H, W), target["boxes"], ...
    truth = val.as_coco()                               # for the tool that measures
    tenth = train.share("0.1")                          # of the images
    val.digest()                                        # of names and objects: "5f0c..."

    coco/train2017/*.jpg      coco/val2017/*.jpg      coco/annotations/instances_val2017.json
    VOC2012/JPEGImages/*.jpg  VOC2012/Annotations/*.xml  VOC2012/ImageSets/Main/val.txt

COCO's format: cocodataset.org/#format-data. Its masks need pycocotools or faster-coco-eval. An
image that is not there, and a broken object, are left out and named in `left_out`; an image that
cannot be read raises its error at `[i]`, for data.stream.fault_of. There are masks where each
object has one; an object with a broken one is there without masks alone.

Shapes: N images, n objects of an image, H and W its pixels. A box is x1, y1, x2, y2 from 0.
"""
import copy
import hashlib
import json
import os
from array import array
from pathlib import Path
from typing import Sequence

import numpy
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from data.annotations import Annotations, read_coco, read_voc
from data.images import Files
from data.labelled import read_share
from data.scenes import DemoScenes
from data.stream import mix
from multicrop import BadImage, decode

ANNOTATIONS = "annotations/instances_{split}.json"


def mask_tool():
    """The module with COCO's encode, decode, merge and frPyObjects. Raises ValueError where none
    is installed."""
    try:
        import pycocotools.mask as tool
    except ImportError:
        try:
            import faster_coco_eval.core.mask as tool
        except ImportError:
            raise ValueError("COCO's masks need one of two packages: pip install pycocotools, or "
                             "faster-coco-eval") from None
    return tool


class Scenes(Dataset):
    """len(), [i] -> image, uint8 (3, H, W), and target: boxes float32 (n, 4), labels int64 (n,)
    from 1, masks uint8 (n, H, W) where has_masks, iscrowd int64 (n,), area float32 (n,), image_id.

    source: data.scenes.DemoScenes or Annotated.  indices: of its images; none: all.
    classes: names of labels 1, 2, ...  category_ids: the file's ids of them.  left_out: what was,
    of the whole source.  area_limits: square pixels from which on objects are medium, and large.
    """

    def __init__(self, source, indices: Sequence[int] | None = None):
        self.source, self.has_masks = source, source.has_masks
        self.indices = range(len(source)) if indices is None else indices
        self.classes, self.category_ids = source.classes, source.category_ids
        self.left_out, self.area_limits = source.left_out, source.area_limits

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        return self.source.name(self.indices[i])

    def size(self, i: int) -> tuple[int, int]:
        """H, W, without decoding the image."""
        return self.source.size(self.indices[i])

    def target(self, i: int) -> dict:
        """Without the image."""
        return self.source.target(self.indices[i], self.has_masks)

    def __getitem__(self, i: int) -> tuple[Tensor, dict]:
        return self.source.scene(self.indices[i], self.has_masks)

    def subset(self, indices: Sequence[int]) -> "Scenes":
        """Some of the images; all classes stay."""
        part = copy.copy(self)
        part.indices = [self.indices[i] for i in indices]
        return part

    def share(self, labels: str) -> "Scenes":
        """A share of the images, at least one, the same at each call.

        labels: the share, as "0.01". Raises ValueError where it is none.
        """
        share = read_share(labels, "no share of the images, as 0.01")
        order = sorted(range(len(self)), key=lambda i: mix(i, 0))
        return self.subset(sorted(order[:max(1, round(share * len(self)))]))

    def without_masks(self) -> "Scenes":
        """Boxes alone, for which no mask is decoded."""
        part = copy.copy(self)
        part.has_masks = False
        return part

    def digest(self) -> str:
        """16 hex digits that change with the names, sizes and objects; no image is read."""
        source, tensors = self.source, [torch.tensor(self.indices, dtype=torch.int64)]
        if isinstance(source, DemoScenes):
            about = source.split, source.seed, source.count, source.side
        else:
            about = source.files.fingerprint, source.classes, source.category_ids
            tensors += source.objects(self.has_masks)
        digest = hashlib.sha256(repr((about, self.has_masks)).encode())
        for tensor in tensors:
            digest.update(repr(tensor.shape).encode())
            digest.update(tensor.numpy())
        return digest.hexdigest()[:16]

    def as_coco(self) -> dict:
        """The ground truth in COCO's format: images, categories, and annotations, whose masks are
        compressed RLE. No image is decoded."""
        images, annotations = [], []
        for i in range(len(self)):
            (height, width), target = self.size(i), self.target(i)
            images.append({"id": target["image_id"], "file_name": self.name(i),
                           "height": height, "width": width})
            masks = encode_masks(target["masks"]) if self.has_masks else []
            for k, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
                annotations.append({
                    "id": len(annotations) + 1,         # 0 would count as no match
                    "image_id": target["image_id"],
                    "category_id": self.category_ids[int(target["labels"][k]) - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float(target["area"][k]),
                    "iscrowd": int(target["iscrowd"][k]),
                    **({"segmentation": masks[k]} if self.has_masks else {})})
        categories = [{"id": k, "name": name} for k, name in zip(self.category_ids, self.classes)]
        return {"images": images, "categories": categories, "annotations": annotations}


def encode_masks(masks: Tensor) -> list[dict]:
    """uint8 (n, H, W) of 0 and 1 -> compressed RLE of each, as JSON takes it."""
    if not len(masks):
        return []
    rles = mask_tool().encode(numpy.asfortranarray(masks.permute(1, 2, 0).numpy()))
    return [{"size": [int(x) for x in rle["size"]], "counts": _text(rle["counts"])} for rle in rles]


def _text(counts: bytes | str) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def decode_masks(segmentations: Sequence, height: int, width: int) -> Tensor:
    """Lists of polygons, [[x, y, x, y, ...], ...], or RLE, compressed or not -> uint8 (n, H, W)."""
    if not segmentations:
        return torch.zeros(0, height, width, dtype=torch.uint8)
    tool, rles = mask_tool(), []
    for segmentation in segmentations:
        if isinstance(segmentation, list):              # one object, of several parts
            segmentation = tool.merge(tool.frPyObjects(segmentation, height, width))
        elif isinstance(segmentation["counts"], list):
            segmentation = tool.frPyObjects(segmentation, height, width)
        rles.append(segmentation)
    return torch.from_numpy(tool.decode(rles)).permute(2, 0, 1).contiguous()


class Annotated:
    """A source of Scenes: images that are files, and their objects.

    All is kept in tensors, which worker processes share; masks as the file's JSON.
    root: the images' folder.  category_ids: of the classes.  Raises ValueError where no image is
    left.
    """
    area_limits = 32 ** 2, 96 ** 2                      # COCO's

    def __init__(self, root: str | os.PathLike, annotations: Annotations, category_ids: list[int]):
        entries, classes, self.left_out, path, no_masks = annotations
        self.files = Files(os.fspath(root), (os.fsencode(entry.name) for entry in entries),
                           "no image is left: " + [f"{path}: none is listed", *self.left_out][-1])
        self.classes, self.category_ids = list(classes.values()), category_ids
        label = {category: k + 1 for k, category in enumerate(classes)}
        things = [thing for entry in entries for thing in entry.things]
        self.has_masks = not no_masks
        self._images = torch.tensor([(entry.number, *entry.size) for entry in entries])   # (N, 3)
        self._ends = torch.tensor([0] + [len(entry.things) for entry in entries]).cumsum(0)
        self._boxes = torch.tensor([(*thing.box, thing.area) for thing in things]).view(-1, 5)
        self._kinds = torch.tensor([(label[thing.category], thing.crowd) for thing in things],
                                   dtype=torch.int64).view(-1, 2)
        text, ends = bytearray(b" "), array("q", [0])
        for thing in things if self.has_masks else ():
            text += json.dumps(thing.segmentation).encode() if thing.segmentation else b""
            ends.append(len(text) - 1)
        self._text = torch.frombuffer(text, dtype=torch.uint8)[1:]
        self._text_ends = torch.frombuffer(ends, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.files)

    def name(self, i: int) -> str:
        return self.files.name(i)

    def size(self, i: int) -> tuple[int, int]:
        return tuple(self._images[i, 1:].tolist())

    def target(self, i: int, masks: bool) -> dict:
        first, last = self._ends[i:i + 2].tolist()
        boxes, kinds, ends = self._boxes[first:last], self._kinds[first:last], []
        if masks:
            ends = self._text_ends[first:last + 1]
            whole = ends[1:] > ends[:-1]                # the others' masks are broken
            boxes, kinds, ends = boxes[whole], kinds[whole], ends.unique().tolist()
        boxes, area = boxes.split([4, 1], 1)
        labels, crowd = kinds.t()
        target = {"boxes": boxes.clone(), "labels": labels.clone(), "iscrowd": crowd.clone(),
                  "image_id": int(self._images[i, 0])}
        sizes = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if masks:
            target["masks"] = decode_masks([
                json.loads(self._text[a:b].numpy().tobytes()) for a, b in zip(ends, ends[1:])],
                *self.size(i))
            sizes = target["masks"].sum((1, 2)).float()
        return target | {"area": torch.where(area[:, 0].isnan(), sizes, area[:, 0])}

    def objects(self, masks: bool) -> list[Tensor]:
        """All that is known of the objects, and the images' numbers and sizes."""
        return [self._images, self._ends, self._boxes, self._kinds,
                *([self._text, self._text_ends] if masks else [])]

    def scene(self, i: int, masks: bool) -> tuple[Tensor, dict]:
        image = pil_to_tensor(decode(self.files[i]))
        if tuple(image.shape[1:]) != self.size(i):
            (height, width), (h, w) = self.size(i), image.shape[1:]
            raise BadImage("other size", f"{w} x {h} pixels, its annotation says {width} x "
                                         f"{height}")
        return image, self.target(i, masks)


def open_detection(data: str, train: str = "", val: str = "",
                   annotations: str = ANNOTATIONS) -> tuple[Scenes, Scenes]:
    """A folder in COCO's layout, or Pascal VOC's -> train and val; "" for the built-in scenes.

    train, val: COCO's folders of images, or VOC's lists; "": train2017 and val2017, or train and
    val.  annotations: COCO's file of each, with {split} for the folder's name, or both with a comma
    between. Raises ValueError where there is no such folder, where a file is not in its format, and
    where train and val differ in COCO's categories.
    """
    return _open(data, {"train": train, "val": val}, annotations)


def open_val(data: str, val: str = "", annotations: str = ANNOTATIONS,
             classes: Sequence[str] = ()) -> Scenes:
    """val alone, as of open_detection; nothing of train is read.

    classes: of VOC's labels 1, 2, ...; none: those that occur. Raises ValueError for another one.
    """
    return _open(data, {"val": val}, annotations, classes)[0]


def _open(data: str, splits: dict[str, str], annotations: str,
          classes: Sequence[str] = ()) -> tuple[Scenes, ...]:
    if not data:
        return tuple(Scenes(DemoScenes(split)) for split in splits)
    if (Path(data) / "ImageSets").is_dir():
        return _open_voc(Path(data), [name or split for split, name in splits.items()], classes)
    folders = [Path(data) / (name or f"{split}2017") for split, name in splits.items()]
    return _open_coco(folders, [Path(data) / name for name in _files(annotations, folders)])


def _open_voc(root: Path, splits: list[str], classes: Sequence[str]) -> tuple[Scenes, ...]:
    parts = [read_voc(root, split) for split in splits]
    found = sorted({name for part in parts for name in part.classes})
    if classes and (odd := {*found} - {*classes}):
        raise ValueError(f"{parts[-1].path} has objects of an unknown class: {min(odd)}")
    names = {name: name for name in classes or found}
    ids = list(range(1, len(names) + 1))
    return tuple(Scenes(Annotated(root / "JPEGImages", part._replace(classes=names), ids))
                 for part in parts)


def _files(annotations: str, folders: list[Path]) -> list[str]:
    """The annotations' file of each folder: of val or of train and val."""
    names = [name.strip() for name in annotations.split(",")]
    if len(names) == 1 and ("{split}" in annotations or len(folders) == 1):
        names *= 2
    if len(names) != 2:
        raise ValueError(f"{annotations} is not one file of train and one of val: name them with "
                         "{split}, as in annotations/instances_{split}.json, or with a comma, as "
                         "in annotations/train.json,annotations/val.json")
    return [name.replace("{split}", folder.name)
            for name, folder in zip(names[-len(folders):], folders)]


def _open_coco(folders: list[Path], files: list[Path]) -> tuple[Scenes, ...]:
    for path in (*files, *folders):
        if not path.exists():
            raise ValueError(f"there is no {path}: --data needs COCO's layout (train2017/, "
                             "val2017/, annotations/instances_{train2017,val2017}.json) or Pascal "
                             "VOC's (JPEGImages/, Annotations/, ImageSets/Main/{train,val}.txt)")
    parts = [read_coco(path, folder) for path, folder in zip(files, folders)]
    if parts[0].classes != parts[-1].classes:
        odd = sorted({*parts[0].classes.items()} ^ {*parts[-1].classes.items()})
        raise ValueError(f"{files[0]} and {files[1]} differ in their categories: {odd[:3]}")
    if any(thing.segmentation for part in parts for entry in part.entries
           for thing in entry.things):
        for part in parts:                              # else no mask is lost
            part.left_out.extend([part.no_masks] if part.no_masks else [])
    return tuple(Scenes(Annotated(folder, part, list(part.classes)))
                 for folder, part in zip(folders, parts))
