"""dino.py against lightly's loss, closed forms and the equations by hand."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from methods.dino import DINO, dino_loss
from tests.helpers import ORACLES
from tests.methods import momentum
from tests.methods.momentum import Trunk, double, images, run_steps, sgd, split, take_step

LIGHTLY = torch.load(ORACLES / "lightly_momentum.pt", weights_only=True)["dino"]
OPTIONS = dict(head=(10, 9, 6), prototypes=11, counts=(2, 3), steps=5, momentum=0.9, warmup=2,
               frozen_steps=1)


# --------------------------------------------------------------------------------------- the loss
@pytest.mark.parametrize("case", LIGHTLY)
def test_loss_and_gradient_are_lightlys(case):
    student = case["student"].clone().requires_grad_()
    loss = dino_loss(student, *(case[name] for name in (
        "teacher", "center", "num_crops", "student_temperature", "teacher_temperature")))
    loss.backward()
    assert loss.item() == pytest.approx(case["loss"], abs=1e-12)
    torch.testing.assert_close(student.grad, case["gradient"], rtol=0, atol=1e-12)


def by_hand(student, teacher, center, crops, student_temperature, teacher_temperature):
    """Loops over pairs of crops, images and outputs."""
    pairs, images, total = 0, len(teacher) // 2, 0.0
    for t in range(2):
        for s in range(crops):
            if s == t:
                continue
            pairs += 1
            for i in range(images):
                target = (teacher[t * images + i] - center) / teacher_temperature
                x = student[s * images + i] / student_temperature
                p = [math.exp(v - target.max()) for v in target]
                norm = math.log(sum(math.exp(v) for v in x))
                total -= sum(a / sum(p) * (float(v) - norm) for a, v in zip(p, x)) / images
    return total / pairs


@pytest.mark.parametrize("crops", [2, 4])
def test_the_loss_by_hand(crops):
    torch.manual_seed(0)
    student, teacher = torch.randn(crops * 3, 5).double(), torch.randn(2 * 3, 5).double()
    center = torch.randn(5).double()
    loss = dino_loss(student, teacher, center, crops, 0.5, 0.3)
    assert loss.item() == pytest.approx(by_hand(student, teacher, center, crops, 0.5, 0.3),
                                        abs=1e-12)
    assert dino_loss(student, teacher, center, crops).item() == dino_loss(
        student, teacher, center, crops, 0.1, 0.04).item()
    assert torch.autograd.gradcheck(
        lambda x: dino_loss(x, teacher.requires_grad_(), center, crops, 0.5, 0.3),
        student.requires_grad_())
    dino_loss(student, teacher, center, crops).backward()
    assert teacher.grad is None                 # the teacher is not learned


def test_the_loss_of_uniform_and_of_agreeing_outputs():
    teacher, zero = torch.randn(6, 7), torch.zeros(7)
    assert dino_loss(torch.zeros(12, 7), teacher, zero, 4).item() == pytest.approx(math.log(7))
    own = torch.eye(7)[[0, 3, 5]].repeat(4, 1)              # of each image an output of its own
    loss = dino_loss(own, own[:6], zero, 4)
    assert loss.item() == pytest.approx(math.log(1 + 6 * math.exp(-10)), abs=1e-4)
    # a teacher that is the centre says nothing, whatever it says
    row, student = torch.randn(7), torch.randn(12, 7)
    loss = dino_loss(student, row.expand(6, 7), row, 4)
    log_p = torch.log_softmax(student / 0.1, dim=1).view(4, 3, 7).mean((1, 2))
    expected = -(log_p.sum() - log_p[:2].mean()) / 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("student, teacher, crops", [(10, 6, 4), (12, 8, 4), (4, 8, 1), (10, 5, 4),
                                                     (12, 6, 3)])
def test_rows_that_do_not_fit_are_refused(student, teacher, crops):
    with pytest.raises(ValueError, match="do not fit"):
        dino_loss(torch.zeros(student, 5), torch.zeros(teacher, 5), torch.zeros(5), crops)


@pytest.mark.parametrize("teacher, center", [(1, 5), (5, 1)])
def test_outputs_of_another_number_are_refused(teacher, center):
    with pytest.raises(ValueError, match="do not fit"):
        dino_loss(torch.zeros(12, 5), torch.zeros(6, teacher), torch.zeros(center), 4)


# -------------------------------------------------------------------------------------- the model
@pytest.mark.parametrize("bn, layers", [(False, [nn.GELU]), (True, [nn.BatchNorm1d, nn.GELU])])
def test_the_head_is_as_published(bn, layers):
    head = DINO(Trunk(), head=(10, 9, 6), prototypes=11, head_bn=bn, steps=1).head
    assert [type(x) for x in head.mlp] == [nn.Linear, *layers, nn.Linear, *layers, nn.Linear]
    assert [x.out_features for x in head.mlp if isinstance(x, nn.Linear)] == [10, 9, 6]
    assert head.last.weight.shape == (11, 6) and head.last.bias is None
    features = torch.randn(8, 12)
    embeddings, outputs = head(features)
    torch.testing.assert_close(embeddings, F.normalize(head.mlp(features), dim=1))
    expected = F.cosine_similarity(embeddings[:, None], head.last.weight[None], dim=2)
    torch.testing.assert_close(outputs, expected)
    with torch.no_grad():                       # the norms of the last layer's rows are fixed
        head.last.weight.mul_(torch.rand(11, 1) + 0.5)
    torch.testing.assert_close(head(features)[1], expected)


@pytest.mark.parametrize("counts, teacher", [((2, 3), (8, 16)), ((2,), (8, 16)), ((5, 1), (8, 16))])
def test_the_teacher_sees_the_two_large_crops_alone(counts, teacher):
    model, seen = double(DINO, **OPTIONS | {"counts": counts}), []
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(torch.randn_like(p))
    model.teacher[0].register_forward_pre_hook(
        lambda _, x: seen.append((len(x[0]), x[0].shape[-1])))
    crops = images(counts, 4)
    embeddings, student, outputs = model(crops)
    assert seen == [teacher]                    # (crops, pixels)
    rows = 4 * sum(counts)
    assert [x.shape for x in (embeddings, student, outputs)] == [(rows, 6), (rows, 11), (8, 11)]
    expected = model.head(torch.cat([model.trunk(x) for x in crops]))
    torch.testing.assert_close((embeddings, student), expected)
    torch.testing.assert_close(outputs, model.teacher[1](model.teacher[0](crops[0][:8]))[1])
    assert not torch.allclose(outputs, student[:8], atol=0.1)
    assert student.requires_grad and not outputs.requires_grad and model.teacher.training


def test_no_gradient_reaches_the_teacher_and_all_of_the_student_has_one():
    model = double(DINO, **OPTIONS)
    outputs = model(images((2, 3), 4))
    model.loss(outputs, model.targets(outputs, 0)).backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("teacher."), name


def test_loss_centre_and_teacher_by_hand():
    """Of steps of 4 images in two micro-batches, some of which are skipped: the loss is that of the
    centre as it was, of the temperature of the step; the teacher is still after the last step."""
    model = double(DINO, **OPTIONS | {"warmup": 4})
    center = torch.zeros(11).double()
    kept = [p.detach().clone() for p in model.teacher.parameters()]
    optimizer, buffer = sgd(model), model.center.data_ptr()
    for step in range(7):
        parts = split(images((2, 3), 4, step), (2, 3), 2)
        with torch.no_grad():
            outputs = [model(part) for part in parts]
        loss, _ = take_step(model, optimizer, parts, step, skipped=step in (1, 3))
        temperature = 0.04 + 0.03 * min(step / 4, 1)
        expected = sum(by_hand(student, teacher, center, 5, 0.1, temperature)
                       for _, student, teacher in outputs) / 2
        assert loss.item() == pytest.approx(expected, abs=1e-10)
        before = kept
        if step not in (1, 3):
            center = 0.9 * center + 0.1 * torch.cat([x[2] for x in outputs]).mean(0)
            rate = 1 - 0.1 * (math.cos(math.pi * min(step, 5) / 5) + 1) / 2
            online = [*model.trunk.parameters(), *model.head.parameters()]
            kept = [rate * x + (1 - rate) * y.detach() for x, y in zip(kept, online)]
        torch.testing.assert_close(model.center, center, rtol=0, atol=1e-12)
        for p, expected in zip(model.teacher.parameters(), kept):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)
        moved = any(not torch.equal(x, y) for x, y in zip(before, kept))
        assert moved == (step in (0, 2, 4))
    assert model.center.data_ptr() == buffer and center.abs().max() > 1e-3


@pytest.mark.parametrize("warmup, step, expected", [(0, 0, 0.07), (4, 0, 0.04), (4, 1, 0.0475),
                                                    (4, 4, 0.07), (4, 9, 0.07)])
def test_the_teachers_temperature_rises_linearly(warmup, step, expected):
    model = double(DINO, **OPTIONS | {"warmup": warmup})
    outputs = model(images((2, 3), 4))
    targets = model.targets(outputs, step)
    torch.testing.assert_close(targets, outputs[2].view(2, 4, 11) / expected)


@pytest.mark.parametrize("frozen", [0, 2])
def test_the_last_layer_is_frozen_at_first_while_the_head_moves(frozen):
    model, moved = double(DINO, **OPTIONS | {"frozen_steps": frozen}), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.1)
    for step in range(4):
        head, last = model.head.mlp[0].weight.clone(), model.head.last.weight.clone()
        take_step(model, optimizer, [images((2, 3), 4, step)], step)
        assert not torch.equal(head, model.head.mlp[0].weight)
        moved.append(not torch.equal(last, model.head.last.weight))
    assert moved == [step >= frozen for step in range(4)]


@pytest.mark.parametrize("trunk, counts", [(nn.Flatten(), (2, 8)), (Trunk(), (1, 8))])
def test_what_cannot_be_used_is_refused(trunk, counts):
    with pytest.raises(ValueError, match="num_features, and two crops"):
        DINO(trunk, steps=1, prototypes=8, counts=counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_and_loss_stay_float32_under_autocast(dtype):
    model = double(DINO, **OPTIONS).float()
    crops = [x.float() for x in images((2, 3), 4)]
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(crops)
        targets = model.targets(outputs, 0)
        loss = model.loss(outputs, targets)
    assert {x.dtype for x in (*outputs, targets, loss)} == {torch.float32}
    assert loss.item() == model.loss(outputs, targets).item()
    torch.testing.assert_close(outputs[1], outputs[0] @ F.normalize(model.head.last.weight).t())
    assert dino_loss(outputs[1].to(dtype), outputs[2], model.center, 5).dtype == torch.float32


def test_statistics_of_known_teachers():
    model, loss = double(DINO, **OPTIONS | {"prototypes": 8}), torch.tensor(0.5)
    for teacher, entropy, used in ((torch.eye(8)[[3]].expand(8, 8), 0, 1 / 8),
                                   (torch.eye(8), 1, 1),
                                   (torch.eye(8)[[0, 1] * 4], 1 / 3, 2 / 8),
                                   (torch.eye(8)[[0, 1]], 1 / 3, 1)):        # of two rows both
        statistics = model.statistics((None, None, teacher), loss)
        expected = {"loss_over_ln_k": 0.5 / math.log(8), "mean_entropy": entropy,
                    "outputs_used": used}
        assert statistics == pytest.approx(expected, abs=2e-4)
    model.center.copy_(torch.eye(8)[3])         # what all say is taken off
    statistics = model.statistics((None, None, torch.eye(8)[[3]].expand(8, 8)), loss)
    assert statistics["mean_entropy"] == pytest.approx(1)


# --------------------------------------------------------------------------------------- the loop
def test_micro_batches_equal_the_joined_batch():
    joined, parts = (double(DINO, **OPTIONS) for _ in range(2))
    torch.testing.assert_close(run_steps(parts, (2, 3), 6, micro_batches=3),
                               run_steps(joined, (2, 3), 6), rtol=0, atol=1e-10)
    momentum.assert_same_state(parts, joined.state_dict())


@pytest.mark.long
def test_it_learns():
    model = double(DINO, **OPTIONS | {"steps": 100, "frozen_steps": 0})
    losses = [take_step(model, torch.optim.SGD(model.parameters(), lr=0.3),
                        [images((2, 3), 8, step % 3)], step)[0]
              for step in range(40)]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("bn", [False, True])
def test_a_skipped_step_leaves_no_trace(bn):
    momentum.assert_a_skipped_step_leaves_no_trace(DINO, OPTIONS | {"head_bn": bn}, (2, 3),
                                                   but=["running", "tracked"])


def test_its_state_goes_on():
    momentum.assert_state_goes_on(DINO, OPTIONS, (2, 3))
    names = {name.split(".")[0] for name in double(DINO, **OPTIONS).state_dict()}
    assert names == {"trunk", "head", "teacher", "center"}


@pytest.mark.parametrize("bn, micro_batches", [
    pytest.param(True, 1, marks=pytest.mark.measured),
    pytest.param(False, 3, marks=pytest.mark.long)])
def test_two_ranks_equal_the_joined_batch(tmp_path, bn, micro_batches):
    momentum.assert_ranks_equal_the_joined_batch(DINO, OPTIONS | {"head_bn": bn}, (2, 3), 6,
                                                 tmp_path, micro_batches)
