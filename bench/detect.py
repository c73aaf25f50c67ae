"""A detector's training step and its detections, beside torchvision's with the same trunk.

    result = bench_detect("regnety_400mf", 2, 480, torch.device("cpu"), torch.float32, repeats=5)

Both have the same weights, images, anchors and sizes, and no BatchNorm in the pyramid; samples
of torchvision's are drawn from torch's generator.
"""
from functools import partial

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from bench.baseline import baseline_trunk
from bench.timing import in_turn
from data.scenes import DemoScenes
from distributed.hardware import autocast
from evaluation.detector import Detector
from methods.build import build_trunk


class BaselinePyramid(nn.Module):
    """torchvision's trunk and pyramid. widths: channels of the four stages; width: of the maps."""

    def __init__(self, arch: str, widths: list[int], width: int):
        super().__init__()
        body = baseline_trunk(arch)
        names = ([f"layer{i}" for i in range(1, 5)] if arch == "resnet50" else
                 [f"trunk_output.block{i}" for i in range(1, 5)])
        self.trunk = create_feature_extractor(body, dict(zip(names, "0123")))
        self.fpn = FeaturePyramidNetwork(widths, width, LastLevelMaxPool())
        self.out_channels = width

    def forward(self, images):
        return self.fpn(self.trunk(images))


def bench_detect(arch: str, count: int, size: int, device: torch.device, dtype: torch.dtype,
                 repeats: int) -> dict:
    """Mask R-CNN's training step on `count` scenes of `size` pixels, and its detections in them."""
    scenes = DemoScenes(count=count, size=size)
    torch.manual_seed(0)
    ours = Detector(build_trunk(arch, "torchvision"), len(scenes.classes), True, (size,), size,
                    norm=False)
    widths = [conv[0].in_channels for conv in ours.rcnn.backbone.fpn.inner_blocks]
    theirs = MaskRCNN(BaselinePyramid(arch, widths, ours.rcnn.backbone.out_channels),
                      len(scenes.classes) + 1, min_size=size, max_size=size)
    theirs.load_state_dict(ours.rcnn.state_dict())
    nets = {"torchvision": theirs.to(device), "ours": ours.to(device)}
    images, targets = zip(*(scenes[i] for i in range(count)))
    images = [image.to(device).float() / 255 for image in images]
    targets = [{name: target[name].to(device) for name in ("boxes", "labels", "masks")}
               for target in targets]

    def step(name, *seeds):
        net = nets[name].train()
        net.zero_grad(set_to_none=True)
        with autocast(device, dtype):
            losses = net(images, targets, *seeds)
        sum(loss.float() for loss in losses.values()).backward()

    def found(name):
        nets[name].eval()
        with torch.no_grad(), autocast(device, dtype):
            nets[name](images)

    rows = {"step, ms": {"torchvision": partial(step, "torchvision"),
                         "ours": partial(step, "ours", range(count))},
            "detections, ms": {name: partial(found, name) for name in nets}}
    rows = {row: in_turn(functions, repeats, device) for row, functions in rows.items()}
    precision = str(dtype).removeprefix("torch.")
    print(f"Mask R-CNN on {arch}, {count} scenes of {size} pixels, {precision}; {device}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of {repeats}\n"
          f"{'':<16}" + "".join(f"{name:>15}" for name in nets) + f"{'ratio':>8}")
    for row, ms in rows.items():
        ms["ratio"] = ms["torchvision"] / ms["ours"]
        print(f"{row:<16}{ms['torchvision']:>15.1f}{ms['ours']:>15.1f}{ms['ratio']:>8.2f}")
    return {"arch": arch, "pictures": count, "size": size, "repeats": repeats,
            "precision": precision, **rows}
