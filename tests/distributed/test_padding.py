"""distributed/padding.py: odd widths padded against the same network as it is, in float64."""
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from distributed.padding import PaddedBlock, Width, odd_widths, pad
from distributed.wrap import compile_trunk, wrap
from larc import LARC
from methods.build import build_trunk
from regnet import ARCHS, RegNet, RegNetParams, complexity
from tests.helpers import run_ranks

CPU = torch.device("cpu")
# stages of 3, 6 and 13 groups of 5; of a group of 8, which is not padded, then of 1 and 4 groups of
# 13, and a stem of an odd width
SHAPES = {"y": RegNetParams(4, 16, 10.0, 2.0, 5), "x": RegNetParams(4, 16, 10.0, 2.0, 5, None),
          "mixed": RegNetParams(5, 8, 12.0, 2.5, 13, stem_width=7)}


class Model(nn.Module):
    """A trunk in float64, which SwAV is not."""

    def __init__(self, params: RegNetParams):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = RegNet(params).double()
        for tensor in self.trunk.state_dict().values():
            if tensor.dim() == 1:       # BatchNorms and biases of no special value
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, crops):
        return torch.cat([self.trunk(images) for images in crops])


def trained(model, wrapped) -> tuple:
    """Features, gradients, and the state after two steps of LARC."""
    optimizer = LARC(model.parameters(), lr=1.0, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        optimizer.zero_grad()
        crops = [torch.randn(count * 3, 3, size, size, generator=generator, dtype=torch.float64)
                 for count, size in ((2, 64), (1, 48))]
        features = wrapped(crops)
        (features.square().mean() + features[:, 0].sum()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    return features.detach(), grads, dict(model.state_dict())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training, checkpointing", [(True, False), (True, True), (False, False)])
def test_nothing_changes_but_rounding(shape, training, checkpointing):
    plain = Model(SHAPES[shape]).train(training)
    padded = deepcopy(plain)
    wrapped = wrap(padded, CPU, checkpoint_activations=checkpointing, pad_widths=True)
    assert any(isinstance(module, PaddedBlock) for module in padded.modules())
    expected, mine = trained(plain, plain), trained(padded, wrapped)
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-11)
    counted = expected[2]["trunk.stem.1.num_batches_tracked"]
    assert counted == 4 * training and mine[2].keys() == expected[2].keys()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for a, b in zip(padded.trunk.forward_stages(images), plain.trunk.forward_stages(images)):
        torch.testing.assert_close(a, b)                    # of the real channels


def test_state_has_the_same_names_and_shapes_and_loads():
    plain, padded = Model(SHAPES["mixed"]), Model(SHAPES["mixed"])
    wrap(padded, CPU, checkpoint_activations=True, pad_widths=True)
    before, after = plain.state_dict(), padded.state_dict()
    assert [(name, tensor.shape) for name, tensor in before.items()] == [
        (name, tensor.shape) for name, tensor in after.items()]
    assert [*dict(plain.named_parameters())] == [*dict(padded.named_parameters())]
    for tensor in padded.state_dict().values():
        tensor.zero_()
    padded.load_state_dict(before)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(padded.eval().trunk(images), plain.eval().trunk(images))


def test_padding_is_zero_after_each_block():
    trunk = Model(SHAPES["y"]).trunk
    pad(trunk)
    block, width = trunk.trunk_output[0][0], Width(3, 5)
    block.last = False                                      # so that it returns what it computes
    maps = block(torch.randn(2, 32, 16, 16, dtype=torch.float64)).unflatten(1, (3, 8))
    assert block.after == width and not maps[:, :, 5:].any() and maps[:, :, :5].any()


def test_a_norm_of_another_kind_is_padded_too():
    """As a SyncBatchNorm that replaces BatchNorm: a module of its own, with the same tensors."""
    class Norm(nn.BatchNorm2d):
        def forward(self, x):
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
            self.running_mean.lerp_(mean.detach(), 0.5)
            self.running_var.lerp_(var.detach(), 0.5)
            scale = self.weight * (var + self.eps).rsqrt()
            return x * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]

    plain = Model(SHAPES["y"])
    for module in list(plain.trunk.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                norm = Norm(child.num_features).double()
                norm.load_state_dict(child.state_dict())
                setattr(module, name, norm)
    padded = deepcopy(plain)
    wrapped = wrap(padded, CPU, checkpoint_activations=True, pad_widths=True)
    torch.testing.assert_close(trained(padded, wrapped), trained(plain, plain), rtol=1e-9,
                               atol=1e-11)


def test_autocast_casts_the_weights_before_they_are_padded():
    outputs = []
    for padded in (False, True):
        trunk = Model(SHAPES["y"]).float().trunk
        if padded:
            pad(trunk)
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(trunk(torch.randn(4, 3, 64, 64, generator=torch.manual_seed(2))))
        outputs[-1].float().square().mean().backward()
        assert outputs[-1].dtype == torch.bfloat16
        assert {p.grad.dtype for p in trunk.parameters()} == {torch.float32}
    assert (outputs[0] - outputs[1]).norm() < 0.02 * outputs[0].norm()


@pytest.mark.long
def test_one_graph_per_crop_size(checkpointing=True):
    counters = torch._dynamo.utils.counters
    plain = Model(SHAPES["y"])
    padded = deepcopy(plain)
    torch._dynamo.reset()
    counters.clear()
    wrap(padded, CPU, checkpoint_activations=checkpointing, pad_widths=True)
    compile_trunk(padded.trunk, backend="aot_eager_decomp_partition")
    torch.testing.assert_close(trained(padded, padded), trained(plain, plain), rtol=1e-9,
                               atol=1e-11)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


def trained_on_a_rank(rank, sync_bn_group):
    """Padded, and as it is."""
    results = []
    for pad_widths in (True, False):
        model = Model(SHAPES["y"])
        results.append(trained(model, wrap(model, CPU, sync_bn_group, checkpoint_activations=True,
                                           pad_widths=pad_widths)))
    return results


@pytest.mark.long
@pytest.mark.parametrize("sync_bn_group", [0, 2])
def test_two_ranks_reduce_the_real_gradients(tmp_path, sync_bn_group):
    """The same crops on both ranks; with SyncBatchNorm too."""
    model = Model(SHAPES["y"])
    features, grads, _ = trained(model, model)
    for padded, plain in run_ranks(trained_on_a_rank, tmp_path, sync_bn_group):
        torch.testing.assert_close(padded, plain, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(padded[:2], (features, grads), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("arch, widths, more", [
    ("regnety_256gf", {(2, 373): 752, (4, 373): 1504, (11, 373): 4136, (28, 373): 10528}, 1.016),
    pytest.param("regnety_10b", {(2, 1010): 2032, (4, 1010): 4064, (11, 1010): 11176,
                                 (28, 1010): 28448}, 1.012, marks=pytest.mark.long)])
def test_the_widths_of_the_large_networks(arch, widths, more):
    """Without memory: which groups are padded, what comes out, and the multiply-adds of it."""
    with torch.device("meta"):
        trunk = build_trunk(arch)
    assert {width: width.groups * width.padded for width in odd_widths(trunk.params)} == widths
    pad(trunk)
    assert all(isinstance(block, PaddedBlock) for block in trunk.blocks())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = trunk.forward_stages(torch.empty(2, 3, 224, 224, device="meta"))
    assert [x.shape[1] for x in maps] == [groups * channels for groups, channels in widths]
    flops = counter.get_total_flops() / 4                   # of two images; 2 a multiply-add
    plain = complexity(trunk.params, num_classes=0).flops
    assert flops / plain == pytest.approx(more, abs=5e-4)


@pytest.mark.parametrize("arch", ["regnety_128gf", "regnety_16gf", "resnet50"])
def test_a_trunk_without_odd_widths_stays_as_it_is(arch):
    with torch.device("meta"):
        trunk = build_trunk(arch)
    before = list(trunk.modules())
    pad(trunk)
    assert list(trunk.modules()) == before


def test_two_networks_have_odd_widths():
    assert [arch for arch, params in ARCHS.items() if odd_widths(params)] == [
        "regnety_256gf", "regnety_10b"]


@pytest.mark.cuda
@pytest.mark.parametrize("channels_last, compiled", [(False, False), (True, False), (True, True)])
def test_on_a_gpu(channels_last, compiled):
    device, trunks = torch.device("cuda"), []
    images = torch.randn(4, 3, 64, 64, device=device)
    for padded in (False, True):
        model = Model(SHAPES["y"]).float().to(device)
        wrap(model, device, checkpoint_activations=padded, compiled=compiled and padded,
             channels_last=channels_last, pad_widths=padded)
        features = model.trunk(images.to(memory_format=torch.channels_last))
        features.square().mean().backward()
        trunks.append((features.detach(), {name: p.grad for name, p in
                                           model.trunk.named_parameters()}))
    torch.testing.assert_close(*trunks, rtol=1e-2, atol=1e-3)       # TF32 may compute them
