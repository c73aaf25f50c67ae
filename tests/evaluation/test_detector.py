"""evaluation/detector.py against torchvision's maskrcnn_resnet50_fpn, and two ranks against one."""
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from data.scenes import DemoScenes
from distributed.wrap import wrap
from evaluation.detector import Detector, Sampler
from methods.build import build_trunk
from tests.helpers import run_ranks

TINY = {"width": 16, "anchor": 4, "proposals": 64, "samples": 32}


def scenes(count, size=64, first=0):
    """Images from 0 to 1, and their targets."""
    some = DemoScenes(size=size)
    pairs = [some[i] for i in range(first, first + count)]
    return [image / 255 for image, _ in pairs], [target for _, target in pairs]


def frozen(detector):
    """In train mode, BatchNorm in eval mode."""
    detector.train()
    for module in detector.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return detector


@pytest.mark.parametrize("arch, stages", [("regnety_100mf", 3), ("regnety_200mf", 4),
                                          ("resnet50", 4)])
def test_strides_at_odd_sizes(arch, stages):
    """Images are padded to a multiple of 32; so every map has its stride."""
    torch.manual_seed(0)
    detector = Detector(build_trunk(arch), 2, masks=False, **TINY, sides=(97,), longest=163).eval()
    images = [torch.rand(3, 97, 131), torch.rand(3, 101, 90), torch.rand(3, 97, 163)]
    batch, _ = detector.rcnn.transform(images)
    assert batch.tensors.shape == (3, 3, 128, 192)      # 97 to 109 high, 163 wide
    with torch.no_grad():
        maps = detector.rcnn.backbone(batch.tensors)
    strides = [4 * 2 ** i for i in range(stages)]
    assert [tuple(x.shape) for x in maps.values()] == [
        *((3, 16, 128 // stride, 192 // stride) for stride in strides),
        (3, 16, 128 // strides[-1] // 2, 192 // strides[-1] // 2)]
    anchors = detector.rcnn.rpn.anchor_generator(batch, list(maps.values()))[0]
    cells = sum(x.shape[2] * x.shape[3] for x in maps.values())
    assert len(anchors) == 3 * cells
    sides = (anchors[:, 2:] - anchors[:, :2]).prod(1).sqrt()
    assert sides.min() == pytest.approx(16, abs=1)
    assert sides.max() == pytest.approx(16 * 2 ** stages, abs=1)


def test_the_sampler_draws_as_torchvisions():
    matched = [torch.tensor([1., 1, 0, 0, -1, 1, 0, 0]), torch.tensor([0., 2, 2, 2, 0, -1, 0, 0])]
    sampler = Sampler(4, 0.5)
    sampler.seeds = [5, 2 ** 63 + 1]
    both = sampler(matched)
    for i, seed in enumerate(sampler.seeds):
        torch.manual_seed(seed)
        expected = BalancedPositiveNegativeSampler(4, 0.5)([matched[i]])
        assert all(torch.equal(masks[i], one) for masks, (one,) in zip(both, expected))
    assert sampler.counts.tolist() == [4, 4]


@pytest.mark.long
def test_as_torchvisions_mask_rcnn_with_the_same_weights():
    """Losses, gradients and detections, where images are resized, and one has no object."""
    torch.manual_seed(0)
    theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=13,
                                   min_size=80, max_size=100, box_score_thresh=0.0)
    ours = Detector(build_trunk("resnet50"), 12, masks=True, sides=(80,), longest=100, norm=False)
    ours.rcnn.roi_heads.score_thresh = 0.0
    ours.rcnn.load_state_dict({name.replace("backbone.body.", "backbone.trunk."): x
                               for name, x in theirs.state_dict().items()})
    images, targets = scenes(2)
    images[1] = images[1][:, :40]                       # another shape
    for name in ("boxes", "labels", "masks"):
        targets[1][name] = targets[1][name][:0]
    targets[1]["masks"] = targets[1]["masks"][:, :40]
    seeds = [3, 4]
    for name in ("rpn", "roi_heads"):
        module, own = getattr(theirs, name), getattr(ours.rcnn, name)
        assert vars(module.fg_bg_sampler) == {
            key: value for key, value in vars(own.fg_bg_sampler).items() if key != "seeds"}
        module.fg_bg_sampler = Sampler(**vars(module.fg_bg_sampler))
        module.fg_bg_sampler.seeds = seeds
    expected, got = frozen(theirs)(images, targets), frozen(ours)(images, targets, seeds)
    assert expected.keys() == got.keys() and len(got) == 5
    for name, loss in expected.items():
        assert loss > 0
        torch.testing.assert_close(got[name], loss, msg=name)
    sum(expected.values()).backward()
    sum(got.values()).backward()
    gradients = {name.replace("backbone.body.", "backbone.trunk."): p.grad
                 for name, p in theirs.named_parameters()}
    trained = 0
    for name, p in ours.rcnn.named_parameters():        # torchvision's does not train all
        if gradients[name] is not None:
            torch.testing.assert_close(p.grad, gradients[name], msg=name)
            trained += 1
        assert p.grad is not None, name
    assert trained > 50
    with torch.no_grad():
        expected, got = theirs.eval()(images), ours.eval()(images)
    for one, other in zip(expected, got):
        assert len(one["boxes"]) == 100
        assert one.keys() == other.keys()
        assert torch.equal(other.pop("masks"), one.pop("masks") >= 0.5)
        for name, x in one.items():
            torch.testing.assert_close(other[name], x, msg=name)


def test_what_is_saved_is_loaded():
    torch.manual_seed(0)
    one, other = (Detector(build_trunk("regnety_100mf"), 3, True, **TINY) for _ in range(2))
    tensors = one.tensors(one.state_dict())
    assert {name.partition(".")[0] for name in tensors} == {"stem", "trunk_output", "detector"}
    other.load(tensors)
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    with pytest.raises(ValueError, match="does not fit"):
        Detector(build_trunk("regnety_100mf"), 4, True, **TINY).load(tensors)


def stepped(rank, world):
    """A step's losses and gradients, of this rank's half of four images, or of all."""
    torch.manual_seed(0)
    detector = Detector(build_trunk("regnety_100mf"), 12, True, **TINY, sides=(64,))
    images, targets = scenes(4)
    for name in ("boxes", "labels", "masks"):           # one has no object
        targets[3][name] = targets[3][name][:0]
    seeds = [0, 1, 4, 5]
    wrapped = wrap(detector, torch.device("cpu"), sync_bn_group=world)
    part = slice(rank * 4 // world, (rank + 1) * 4 // world)
    frozen(detector)
    losses = wrapped(images[part], targets[part], seeds[part])
    sum(losses.values()).backward()
    return ({name: loss.detach() for name, loss in losses.items()},
            {name: p.grad for name, p in detector.named_parameters()},
            detector.rcnn.roi_heads.fg_bg_sampler.counts)


@pytest.mark.long
def test_two_ranks_step_as_one(tmp_path):
    """Though they choose different numbers of proposals, and BatchNorm is as of inference."""
    losses, gradients, counts = stepped(0, 1)
    ranks = run_ranks(stepped_on_rank, tmp_path)
    assert sum(rank[2] for rank in ranks).tolist() == counts.tolist()
    assert ranks[0][2][0] != ranks[1][2][0]             # so that plain means would differ
    for name, loss in losses.items():
        torch.testing.assert_close(sum(rank[0][name] for rank in ranks) / 2, loss, msg=name)
    for name, gradient in gradients.items():
        for rank in ranks:
            torch.testing.assert_close(rank[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def stepped_on_rank(rank):
    return stepped(rank, 2)
