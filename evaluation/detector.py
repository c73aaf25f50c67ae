"""Detector: Mask R-CNN or Faster R-CNN on the stages of a trunk, with torchvision's modules.

    detector = Detector(build_trunk("regnety_16gf"), classes=80, masks=True)
    losses = detector(images, targets, seeds)           # in train mode: a dict of scalars
    detections = detector.eval()(images)                # a dict per image: boxes, labels, scores

Papers: Mask R-CNN (arXiv 1703.06870), FPN (1612.03144), Faster R-CNN (1506.01497). The heads, the
losses, and what becomes of images are torchvision's, which documents them.

Differs from torchvision:
- What it draws at random (an image's size, the anchors and the proposals that count in the losses)
  follows from a seed of the image. So a step depends neither on the number of ranks nor on earlier
  ones. It seeds torch's own generator.
- Its losses are means over all anchors or proposals chosen in a batch, and DDP averages gradients
  over ranks. A rank's losses are weighted by its share of what is chosen on all of them, so that
  they are those of the joined batch. (Where images differ in size, each rank pads its own to the
  largest of them.)
- BatchNorm in the pyramid, by default, as in SEER's; trained like all others.

Shapes: B images, each (3, H, W) of its own size, from 0 to 1; n objects of an image.
"""
from typing import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from data.stream import mix
from evaluation.features import stage_maps
from multicrop import IMAGENET_MEAN, IMAGENET_STD, BadImage

RATIOS = (0.5, 1.0, 2.0)                 # of an anchor's height to its width
MASK = 0.5                               # of a pixel that is in a mask, at least


class Pyramid(nn.Module):
    """Images (B, 3, H, W) -> maps {"0": (B, width, H/4, W/4), "1": (B, width, H/8, W/8), ...}, one
    a stage, and "pool" of half the last one's size. norm: BatchNorm after each convolution."""

    def __init__(self, trunk: nn.Module, width: int, norm: bool):
        super().__init__()
        training = trunk.training
        with torch.no_grad():
            widths = [x.shape[1] for x in stage_maps(trunk.eval(), torch.zeros(1, 3, 64, 64))]
        self.trunk, self.out_channels = trunk.train(training), width
        self.names = [str(i) for i in range(len(widths))]
        self.fpn = FeaturePyramidNetwork(widths, width, LastLevelMaxPool(),
                                         nn.BatchNorm2d if norm else None)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip(self.names, stage_maps(self.trunk, images))))


class Resize(GeneralizedRCNNTransform):
    """torchvision's. In training the short side of image i is one of min_size, by seeds[i]. Masks
    of detections are bool, and made a few at a time: as float32 those of a photograph of 12
    megapixels would have 5 GB."""
    seeds: Sequence[int] = ()

    def forward(self, images, targets=None):
        self.left = iter(self.seeds)
        return super().forward(images, targets)

    def torch_choice(self, sides: Sequence[int]) -> int:
        return sides[mix(next(self.left)) % len(sides)]

    def postprocess(self, result, image_shapes, original_image_sizes):
        small = [found.pop("masks", None) for found in result]
        result = super().postprocess(result, image_shapes, original_image_sizes)
        for found, masks, size in zip(result, small, original_image_sizes):
            if masks is not None:
                found["masks"] = torch.cat([paste_masks_in_image(*few, size) >= MASK for few in
                                            zip(masks.split(8), found["boxes"].split(8))])
        return result


class Sampler(BalancedPositiveNegativeSampler):
    """torchvision's. Among the anchors or proposals of image i it draws by seeds[i].

    counts: int64 (2,), of the positive and of the negative ones that the last call chose.
    """
    seeds: Sequence[int] = ()

    def __call__(self, matched: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        positive, negative = [], []
        for seed, of_image in zip(self.seeds, matched, strict=True):
            torch.manual_seed(seed)
            for chosen, (mask,) in zip((positive, negative), super().__call__([of_image])):
                chosen.append(mask)
        self.counts = torch.stack([torch.cat(masks).sum() for masks in (positive, negative)])
        return positive, negative


def check_shape(image: Tensor, longest: int) -> None:
    """longest: pixels of the long side, resized. Raises BadImage where the short side would have
    none."""
    short, long = sorted(image.shape[1:])
    if short * longest < 2 * long:
        raise BadImage("too narrow", f"{long} x {short} pixels")


class Detector(nn.Module):
    """A trunk's Mask R-CNN, or Faster R-CNN. All of it is trained.

    classes: without the background; their labels are 1, 2, ...  sides, longest: pixels; an image is
    resized to one of these short sides (the last one in eval mode), its long side at most longest.
    mean, std: of each channel.  width: channels of the pyramid and the mask head; box head 4 times
    as many.  norm: BatchNorm in the pyramid.  anchor: an anchor's side, in strides of its map; 8
    gives 32 to 512 pixels.  proposals: kept of an image in training, half as many in eval mode.
    samples: of these, and half as many anchors, count in an image's losses.
    """

    def __init__(self, trunk: nn.Module, classes: int, masks: bool,
                 sides: Sequence[int] = (800,), longest: int = 1333,
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
                 width: int = 256, norm: bool = True, anchor: int = 8, proposals: int = 2000,
                 samples: int = 512):
        super().__init__()
        pyramid = Pyramid(trunk, width, norm)

        def pool(size: int) -> MultiScaleRoIAlign:
            return MultiScaleRoIAlign(pyramid.names, size, sampling_ratio=2,
                                      canonical_scale=28 * anchor)

        kinds = {}
        if masks:
            kinds = {"mask_roi_pool": pool(14),
                     "mask_head": MaskRCNNHeads(width, (width,) * 4, dilation=1),
                     "mask_predictor": MaskRCNNPredictor(width, width, classes + 1)}
        self.rcnn = (MaskRCNN if masks else FasterRCNN)(
            pyramid, image_mean=mean, image_std=std,
            rpn_anchor_generator=AnchorGenerator(
                tuple((anchor * 4 * 2 ** i,) for i in range(len(pyramid.names) + 1)),
                (RATIOS,) * (len(pyramid.names) + 1)),
            rpn_pre_nms_top_n_train=proposals, rpn_post_nms_top_n_train=proposals,
            rpn_pre_nms_top_n_test=proposals // 2, rpn_post_nms_top_n_test=proposals // 2,
            box_roi_pool=pool(7), box_head=TwoMLPHead(49 * width, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, classes + 1), **kinds)
        self.rcnn.transform = Resize(sides, longest, mean, std)
        self.rcnn.rpn.fg_bg_sampler = Sampler(samples // 2, 0.5)
        self.rcnn.roi_heads.fg_bg_sampler = Sampler(samples, 0.25)

    @property
    def longest(self) -> int:
        return self.rcnn.transform.max_size

    @property
    def trunk(self) -> nn.Module:
        return self.rcnn.backbone.trunk

    def forward(self, images: list[Tensor], targets: list[dict] | None = None,
                seeds: Sequence[int] = ()) -> dict[str, Tensor] | list[dict]:
        """targets, seeds: in train mode; a target has boxes float32 (n, 4), labels int64 (n,), and
        masks uint8 (n, H, W). The detections of an image have boxes, labels, scores (n,), and masks
        bool (n, 1, H, W)."""
        rpn, heads = self.rcnn.rpn.fg_bg_sampler, self.rcnn.roi_heads.fg_bg_sampler
        self.rcnn.transform.seeds = rpn.seeds = heads.seeds = seeds
        output = self.rcnn(images, targets)
        if self.training and dist.is_initialized():
            counts = torch.stack([rpn.counts.sum(), heads.counts.sum(), heads.counts[0]]).float()
            of_ranks = counts.clone()
            dist.all_reduce(of_ranks)
            weights = dist.get_world_size() * counts / of_ranks.clamp(min=1)
            places = {"loss_objectness": 0, "loss_rpn_box_reg": 0, "loss_classifier": 1,
                      "loss_box_reg": 1, "loss_mask": 2}
            output = {name: loss * weights[places[name]] for name, loss in output.items()}
        return output

    def tensors(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Of its state dict, what best.pt and last.pt hold: the trunk with torchvision's names, and
        detector.*."""
        return {rename(name): x for name, x in state.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """What `tensors` gave. Raises ValueError where it is of another network."""
        try:
            self.load_state_dict({name: tensors[rename(name)] for name in self.state_dict()})
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"its detector does not fit its config.json ({error})") from None


def rename(name: str) -> str:
    """Of Detector -> of a file."""
    trunk = "rcnn.backbone.trunk."
    return (name.removeprefix(trunk) if name.startswith(trunk) else
            f"detector.{name.removeprefix('rcnn.').removeprefix('backbone.')}")
