"""COCO: detections in COCO's results format, and their AP by the field's own tool.

    results = as_results(detections, image_id=42, category_ids=[1, 2, 5])    # {"bbox": [...], ...}
    average_precision(val.as_coco(), results["bbox"], "bbox", val.area_limits)      # {"AP": 37.9}

The tool is faster-coco-eval or pycocotools, whichever is installed; both give the same numbers.
AP is the mean over IoU 0.50, 0.55, ..., 0.95 and over classes (cocodataset.org/#detection-eval).
"""
import io
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy
import torch
from torch import Tensor

from data.detection import encode_masks

MASK = 0.5                               # of a pixel that is in a mask, at least
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
        masks = encode_masks((detections["masks"][:, 0] >= MASK).to(torch.uint8).cpu())
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
