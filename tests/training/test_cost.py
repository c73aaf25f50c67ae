"""training/cost.py against published figures, and against what a step keeps."""
import functools
from dataclasses import replace

import pytest
import torch

from distributed.fsdp import shard_ranks
from distributed.wrap import wrap
from methods.build import build_method
from recipes.command_line import configure
from swav import swav_codes, swav_loss
from training import cost

MIB = 2 ** 20
BENCHMARK, SEER = "2x160+4x96", "2x224+4x96"
SIZES = ["regnety_32gf", "regnety_64gf", "regnety_128gf", "regnety_256gf", "regnety_10b"]
COST = functools.cache(cost.cost)            # a network is counted once for all tests


def of_sizes(*columns):
    """A case a size, with its values of the columns; the quick suite has SEER's."""
    rows = zip(SIZES, *columns)
    return [pytest.param(*row, marks=() if row[0] == "regnety_256gf" else pytest.mark.long)
            for row in rows]


def cost_of(arch, crops=SEER, dtype=torch.bfloat16):
    return COST(configure({"arch": arch, "crops": crops}), dtype)


@pytest.mark.parametrize("arch, small, again, large", of_sizes(
    [.342, .679, 1.350, 2.689, 19.664], [.455, .905, 1.798, 3.583, 26.215],
    [.531, 1.056, 2.099, 4.183, 30.61]))
def test_flops_of_training(arch, small, again, large):
    """TFLOP an image: 2x160+4x96, the same with activation checkpointing, 2x224+4x96."""
    of = cost_of(arch, BENCHMARK)
    assert round(cost.work(of), 3) == small
    assert round(cost.work(of, checkpointing=True), 3) == again
    assert cost.work(cost_of(arch)) == pytest.approx(large, abs=0.0051 if large > 10 else 0.00051)


@pytest.mark.parametrize("arch, whole, stored, computed", of_sizes(
    [227, 319, 543, 766, 2068], [30, 41, 69, 95, 250], [21, 29, 46, 65, 174]))
def test_activations(arch, whole, stored, computed):
    """MiB an image in bf16. Small parts that are kept once for a batch weigh half in two crops, so
    the whole lies up to a per cent lower. With checkpointing the largest block is counted with its
    output's gradient, and the stored part without the output of the last block: the same sum."""
    of = cost_of(arch, BENCHMARK)
    assert 0.985 * whole < of.activations / MIB < whole + 0.5
    assert (of.inputs + of.block) / MIB == pytest.approx(stored + computed, rel=0.04)
    assert of.inputs / MIB == pytest.approx(stored, rel=0.08)


@pytest.mark.parametrize("arch, million", of_sizes(
    [141.334, 276.458, 637.420, 1272.156, 9323.935]))
def test_parameters(arch, million):
    assert cost_of(arch).trunk_params / 1e6 == pytest.approx(million, abs=5e-4)


@pytest.mark.parametrize("arch", ["regnety_200mf", "regnetx_200mf",
                                  pytest.param("resnet50", marks=pytest.mark.long)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_counted_without_memory_is_what_a_step_keeps(arch, checkpointing):
    """On meta tensors against real ones, the storages that autograd holds after a forward pass."""
    crops, kept = "2x64+2x32", {}
    config = configure({"recipe": "demo", "arch": arch, "crops": crops, "head": "16-8",
                        "prototypes": 4})
    model = build_method(config)
    wrap(model, torch.device("cpu"), checkpoint_activations=checkpointing)
    model.to(memory_format=torch.contiguous_format)
    owned = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor      # held: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [model.trunk(torch.randn(2, 3, spec.size, spec.size))
                   for spec in config.crops]
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    of = cost_of(arch, crops, torch.float32)
    assert len(outputs) == 2
    assert (of.inputs if checkpointing else of.activations) == measured


def test_head_scores_and_loss_are_what_a_step_keeps():
    """Counted beside what autograd holds between forward and backward, in float32; the two
    gradients of the scores come later."""
    config = configure({"recipe": "demo", "head": "64-32", "prototypes": 300, "crops": "2x64+2x32"})
    model, kept, pictures = build_method(config), {}, 8
    model.trunk = torch.nn.AdaptiveAvgPool2d(1)             # so that only the head's part is held
    model.head[0] = torch.nn.Linear(3, 64)
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in owned:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    forward = model.forward
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        features = [torch.randn(2 * pictures, 3), torch.randn(2 * pictures, 3)]
        model.trunk = torch.nn.Identity()
        _, scores = forward(features)
        loss = swav_loss(scores, swav_codes(scores, 4), 4)
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) + scores.nbytes
    of = cost.cost(config, torch.float32)
    planned = cost.memory(of, replace(config, batch_size=pictures), pictures, False, 1,
                           torch.float32)["head, scores and loss"]
    gradients, joined = 2 * 4 * 4 * pictures * 300, 4 * 2 * pictures * 300
    assert loss.requires_grad and held == pytest.approx(planned - gradients - joined, rel=0.02)


def test_traffic_of_a_small_case():
    """Two GPUs, so that a ring sends each byte once: by hand."""
    config = configure({"recipe": "demo", "arch": "regnety_100mf", "head": "16-8", "prototypes": 10,
                        "crops": "2x64+4x32", "batch_size": 8, "sync_bn_group": 2})
    of = cost.cost(config)
    assert (len(of.norms), of.head_norms) == (1 + 3 * 8 + 3, [16])
    assert sum(of.norms) == 32 + 3 * (24 + 2 * 64 + 5 * 152) + 24 + 64 + 152
    sent = cost.traffic(of, config, 4, False, 2)
    assert sent["gradients"] == 4 * of.params and sent["Sinkhorn"] == 4 * 2 * 10 * 3
    one_pass, one_back = 4 * (2 * sum(of.norms) + 28), 4 * 2 * sum(of.norms)
    head_pass, head_back = 4 * (2 * 16 + 1), 4 * 2 * 16
    assert sent["SyncBatchNorm"] == 2 * one_pass + 2 * one_back + head_pass + head_back
    for all_crops, first in ((None, 2), (False, 1)):        # sizes; and checkpointing: twice two
        config = replace(config, codes_from_all_crops=all_crops)
        accumulating = cost.traffic(of, config, 2, True, 2)["SyncBatchNorm"]
        assert accumulating == 2 * ((4 + first) * one_pass + 2 * one_back + 2 * head_pass
                                    + head_back)
        once = cost.cost(config)
        added = cost.work(once, accumulating=True) - cost.work(once)
        assert added == pytest.approx(2e-12 * once.first_flops)
        assert (once.first_flops == of.flops) == (first == 2)
    assert cost.traffic(of, replace(config, sync_bn_group=0), 4, False, 2)["SyncBatchNorm"] == 0


def small_sharded(**given):
    """RegNetY-100MF: stem and BatchNorm counted by hand below. On a CPU, so without NCCL."""
    config = configure({"recipe": "demo", "arch": "regnety_100mf", "head": "16-8", "prototypes": 10,
                        "crops": "2x64+4x32", "batch_size": 64, "shard": True, "device": "cpu"}
                       | given)
    return config, COST(config, torch.bfloat16)


def test_units_are_the_stem_the_blocks_and_the_head():
    _, of = small_sharded()
    assert len(of.units) == 1 + 8 + 1 and of.units[0] == 32 * 3 * 9
    assert of.units[-1] == 152 * 16 + 16 + 16 * 8 + 8
    width, squeezed = 24, 8             # the first block: a shortcut, 1x1, 3x3 in groups of 8, gate
    assert of.units[1] == 2 * 32 * width + 9 * width * 8 + width * width + (
        2 * width * squeezed + width + squeezed)
    assert of.params - sum(of.units) == 2 * (sum(of.norms) + sum(of.head_norms)) + 10 * 8
    assert len(COST(configure({"arch": "resnet50"}), torch.bfloat16).units) == 18


@pytest.mark.parametrize("wanted, ranks, of_node, group", [
    (0, 1, 8, 1), (0, 4, 8, 4), (0, 8, 8, 8), (0, 64, 8, 8), (0, 8, 4, 4), (0, 12, 8, 6),
    (1, 8, 8, 1), (2, 8, 8, 2), (3, 8, 8, 2), (64, 8, 8, 8), (16, 64, 8, 16), (40, 64, 8, 32)])
def test_ranks_of_a_group_of_shards(wanted, ranks, of_node, group):
    assert shard_ranks(wanted, ranks, of_node) == group


def test_memory_of_shards():
    """A rank of four holds a quarter of what is sharded, three times, and two units at once."""
    config, of = small_sharded(shard_group=4)
    units, whole = of.units, replace(config, shard=False)
    neighbours = max(first + second for first, second in zip(units, units[1:]))
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        parts = cost.memory(of, config, 2, True, 8, dtype)
        assert [parts[f"{name}, float32 shards"] for name in ("weights", "gradients", "momentum")
                ] == [sum(units), 2 * sum(units), sum(units)]           # gradients of two replicas
        assert parts["BatchNorm and prototypes, whole"] == 12 * (of.params - sum(units))
        assert parts["gathered weights of two units"] == size * neighbours
        assert parts["gradients of two units"] == (size + 4) * neighbours
        other = cost.memory(of, whole, 2, True, 8, dtype)
        assert {*parts.items()} & {*other.items()} == {
            (name, parts[name]) for name in parts.keys() & other.keys()}
        assert "weights, float32" not in parts and parts["padded weights"] == 0


def test_odd_widths_are_padded_a_block_at_a_time():
    config, of = configure({"arch": "regnety_256gf", "shard": True}), cost_of("regnety_256gf")
    for pad_widths, checkpointing in ((None, True), (None, False), (False, True)):
        parts = cost.memory(of, replace(config, pad_widths=pad_widths), 2, checkpointing, 8)
        assert parts["padded weights"] == 2 * max(of.units) * (
            pad_widths is None and checkpointing)
    asked = cost.memory(of, replace(config, pad_widths=True), 2, False, 8)
    assert asked["padded weights"] == 2 * sum(of.units[:-1]) * len(config.crops)    # kept by each


def test_traffic_of_shards():
    """Eight GPUs, groups of two, so that a ring sends half; two micro-batches of four images. The
    first pass has one crop size, or both."""
    config, of = small_sharded(shard_group=2, codes_from_all_crops=False)
    trunk, head = sum(of.units[:-1]), of.units[-1]
    for all_crops, first in ((False, 1), (True, 2)):
        config = replace(config, codes_from_all_crops=all_crops)
        sent = cost.traffic(of, config, 4, False, 8)
        assert sent["all-gather, weights"] == 2 / 2 * 2 * ((4 + first) * trunk + 3 * head)
        assert sent["reduce-scatter, gradients"] == 4 / 2 * 2 * (2 * trunk + head)
        assert sent["all-reduce, replicas"] == 2 * 3 / 4 * 4 / 2 * (trunk + head)      # once
        assert sent["all-reduce, not sharded"] == 2 * 7 / 8 * 4 * (of.params - sum(of.units))
    at_once = cost.traffic(of, replace(config, precision="fp32"), 8, False, 8)
    assert at_once["all-gather, weights"] == 4 / 2 * (4 * trunk + 2 * head)
    within = cost.traffic(of, replace(config, shard_group=8), 8, False, 8)
    assert within["all-reduce, replicas"] == 0


def test_the_queue_takes_part_in_the_codes():
    """Scores and codes (A, L, K) of L earlier images, float32, on each of two ranks."""
    config = configure({"queue": 1000})
    counted = cost.cost(config)
    with_queue, without = (cost.memory(counted, replace(config, queue=queue), 8, False, 2)
                           for queue in (1000, 0))
    name = "head, scores and loss"
    assert with_queue[name] - without[name] == 2 * 2 * 500 * config.prototypes * 4
    assert with_queue | {name: 0} == without | {name: 0}


def test_buffers_of_communication_are_those_of_the_groups():
    """None on one GPU; then the whole group's, and that of SyncBatchNorm with its statistics: mean
    and deviation of each channel of the widest layer, and a count, in float32."""
    config = configure({"arch": "regnety_256gf"})
    of, rows = cost_of("regnety_256gf"), {}
    for ranks, group in ((1, 64), (8, 0), (512, 64)):
        parts = cost.memory(of, replace(config, sync_bn_group=group), 16, False, ranks)
        rows[ranks] = parts["SyncBatchNorm's buffers"], parts["NCCL's buffers (estimate)"]
    assert rows[1] == (0, 0) and rows[8] == (0, cost.NCCL_BUFFERS)
    assert rows[512] == (64 * 4 * (2 * 10_444 + 1), 2 * cost.NCCL_BUFFERS)
    on_cpu = cost.memory(of, replace(config, sync_bn_group=64, device="cpu"), 16, False, 512)
    assert on_cpu["NCCL's buffers (estimate)"] == 0
    assert 0.5e9 < cost.NCCL_BUFFERS < 0.7e9


def test_the_plan_has_the_matrices_of_the_loss():
    """SimCLR's cosines of 2 x 64 rows with 2 x 128, Barlow Twins' correlations: four at a time."""
    for method, numbers in (("simclr", 128 * 256), ("barlow_twins", 32 ** 2), ("byol", 0)):
        config = configure({"method": method, "crops": "2x64", "head": "16-32", "batch_size": 128}
                           | ({"predictor": "16-32"} if method == "byol" else {}))
        parts = cost.memory(COST(config, torch.bfloat16), config, 8, False, ranks=2)
        assert parts["matrices of the loss"] == 4 * 4 * numbers
