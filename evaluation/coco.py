"""COCO's measure: detections in its results format, and their AP by the field's own tool.

    metrics, counted = measure(detector, val, device)                        # {"box": {"AP": 37.9}}
    results = as_results(detections, image_id=42, category_ids=[1, 2, 5])    # {"bbox": [...], ...}
    average_precision(val.as_coco(), results["bbox"], "bbox", val.area_limits)      # {"AP": 37.9}

The tool is faster-coco-eval or pycocotools, whichever is installed; both give the same numbers.
AP is the mean over IoU 0.50, 0.55, ..., 0.95 and over classes (cocodataset.org/#detection-eval).
"""
import functools
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from data.detection import Scenes, encode_masks
from data.stream import Fault, fault_of
from distributed.ranks import fail_together, gather_lists, is_main, my_share
from evaluation.detector import Detector, check_shape
from weights.atomic import write_whole

METRICS = ("AP", "AP50", "AP75", "small", "medium", "large")
ALL = 1e10                               # square pixels: more than any object has


def coco_tool() -> tuple[Callable, Callable]:
    """COCO and COCOeval. Raises ValueError where no package with them is installed."""
    try:
        from faster_coco_eval import COCO, COCOeval_faster
        return COCO, COCOeval_faster
    except ImportError:
        try:
            from pycocotools.coco import COCO
            from pycocotools.cocoeval import COCOeval
        except ImportError:
            raise ValueError("AP is measured by one of two packages: pip install faster-coco-eval, "
                             "or pycocotools") from None
        return COCO, COCOeval


def as_results(detections: dict[str, Tensor], image_id: int,
               category_ids: list[int]) -> dict[str, list[dict]]:
    """An image's detections, as Detector gives them -> "bbox" and, where they have masks, "segm":
    lists of what COCO's results files hold. A box is x, y, width, height."""
    boxes = detections["boxes"].cpu()
    boxes = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
    scores = detections["scores"].tolist()
    about = [{"image_id": image_id, "category_id": category_ids[label - 1]}
             for label in detections["labels"].tolist()]
    results = {"bbox": [one | {"bbox": [round(x, 2) for x in box], "score": round(score, 5)}
                        for one, box, score in zip(about, boxes, scores)]}
    if "masks" in detections:
        masks = encode_masks(detections["masks"][:, 0].to(torch.uint8).cpu())
        results["segm"] = [one | {"segmentation": mask, "score": round(score, 5)}
                           for one, mask, score in zip(about, masks, scores)]
    return results


def average_precision(truth: dict, results: list[dict], kind: str,
                      area_limits: tuple[float, float] = (32 ** 2, 96 ** 2)) -> dict:
    """Per cent: AP; AP50 and AP75, at one IoU; small, medium and large, of objects of that size;
    None where the truth has no such object.

    truth: in COCO's format.  kind: bbox or segm.  area_limits: square pixels from which on objects
    are medium, and large.
    """
    COCO, COCOeval = coco_tool()
    small, large = area_limits
    with redirect_stdout(io.StringIO()):                # it tells its progress
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        # it writes into what it is given
        detected = coco.loadRes([dict(one) for one in results]) if results else COCO()
        if not results:
            detected.dataset = truth | {"annotations": []}
            detected.createIndex()
        tool = COCOeval(coco, detected, kind)
        tool.params.areaRng = [[0, ALL], [0, small], [small, large], [large, ALL]]
        tool.evaluate()
        tool.accumulate()
        tool.summarize()
    values = numpy.asarray(tool.stats[:len(METRICS)], numpy.float64)
    return {name: None if x < 0 else round(100 * x, 2)
            for name, x in zip(METRICS, values.tolist())}


class Readable(Dataset):
    """Image i and its image_id, or the Fault with which it could not be read."""

    def __init__(self, scenes, longest: int):
        self.scenes, self.longest = scenes, longest

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, i: int) -> tuple[Tensor, int] | Fault:
        try:
            image, target = self.scenes[i]
            check_shape(image, self.longest)
            return image, target["image_id"]
        except Exception as error:          # decoders raise nearly anything on damaged files
            return fault_of(error, self.scenes.name(i))


def detect(detector: Detector, scenes, indices, device,
           workers: int = 0) -> Iterator[tuple[int, Tensor, int, dict]]:
    """Of each of these images that can be read: i, the image, its image_id, and its detections. One
    at a time, so that they do not depend on the others."""
    readable = Readable(scenes, detector.eval().longest)
    loader = DataLoader(Subset(readable, indices), batch_size=None, num_workers=workers)
    for i, item in zip(indices, loader):
        if isinstance(item, Fault):
            say_left_out(f"{item.name}: {item.cause}, {item.detail}")
            continue
        image, image_id = item
        with torch.no_grad():
            found, = detector([image.to(device).float() / 255])
        yield i, image, image_id, found


@functools.cache
def say_left_out(what: str) -> None:
    """Once each."""
    print(f"left out: {what}", file=sys.stderr)


def measure(detector: Detector, val: Scenes, device, workers: int = 0,
            out: Path | None = None) -> tuple[dict[str, dict], int]:
    """{"box": AP..., "mask": AP... where there are masks}, of the images that can be read, and how
    many these are. out: folder for the predictions. A collective."""
    results, seen = {"bbox": []} | ({"segm": []} if val.has_masks else {}), []
    for _, _, image_id, found in detect(detector, val, my_share(len(val)), device, workers):
        seen.append(image_id)
        for kind, rows in as_results(found, image_id, val.category_ids).items():
            if kind in results:
                results[kind] += rows
    results, seen = {kind: gather_lists(rows) for kind, rows in results.items()}, gather_lists(seen)
    if not seen:
        raise ValueError("no image of val could be read")
    metrics = []
    with fail_together():
        if is_main():
            whole, known = val.as_coco(), {*seen}
            truth = whole | {
                "images": [one for one in whole["images"] if one["id"] in known],
                "annotations": [one for one in whole["annotations"] if one["image_id"] in known]}
            names = {"bbox": "box", "segm": "mask"}
            metrics = [{names[kind]: average_precision(truth, rows, kind, val.area_limits)
                        for kind, rows in results.items()}]
            for kind, rows in results.items() if out else ():
                write_whole(out / f"predictions-{kind}.json", json.dumps(rows))
    metrics, = gather_lists(metrics)
    return metrics, len(seen)
