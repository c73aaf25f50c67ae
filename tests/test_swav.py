"""swav.py against stored codes, losses and gradients, and against definitions."""
import math

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from regnet import RegNet, RegNetParams
from swav import Queue, SwAV, assigned_sizes, collapse_statistics, swav_codes, swav_loss
from tests.helpers import ORACLES

CASES = torch.load(ORACLES / "swav_loss.pt", weights_only=True)["cases"]


class Trunk(nn.Module):
    num_features = 12

    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 4)


# ------------------------------------------------------------------------------- codes and loss
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_codes_loss_and_gradients(case):
    embedding = case["embedding"].clone().requires_grad_()
    prototypes = case["prototypes"].clone().requires_grad_()
    crops, assign = case["num_crops"], case["crops_for_assign"]
    queue_scores = None
    if "queue" in case:
        queue = Queue(case["queue"].shape[1], embedding.shape[1], len(assign))
        queue.embeddings, queue.filled = case["queue"], case["queue"].shape[1]
        queue_scores = queue.scores(prototypes)
    scores = embedding @ prototypes.t()
    codes = swav_codes(scores, crops, assign, case["epsilon"], case["iterations"], queue_scores)
    loss = swav_loss(scores, codes, crops, assign, case["temperature"])
    loss.backward()
    for ours, expected in zip(codes, case["codes"]):
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(case["loss"], abs=1e-5)
    for ours, expected in ((embedding.grad, case["grad_embedding"]),
                           (prototypes.grad, case["grad_prototypes"])):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
    if "queue" in case:
        queue.push(embedding.unflatten(0, (crops, -1))[list(assign)])
        torch.testing.assert_close(queue.embeddings, case["queue_after"], rtol=0, atol=0)
        assert not queue.embeddings.requires_grad


def test_the_loss_of_uniform_predictions_is_ln_k():
    scores = torch.zeros(6 * 5, 7)
    codes = torch.softmax(torch.randn(2, 5, 7), dim=2)
    assert swav_loss(scores, codes, 6).item() == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize("rows, crops, assigned", [(10, 4, 2), (12, 1, 2), (12, 4, 3)])
def test_the_loss_refuses_what_does_not_fit(rows, crops, assigned):
    with pytest.raises(ValueError, match="do not fit"):
        swav_loss(torch.zeros(rows, 5), torch.zeros(assigned, 3, 5), crops)


# ------------------------------------------------------------------------------------ the model
@pytest.mark.parametrize("bn, expected", [(True, ["0", "1", "3", "4", "6"]),
                                          (False, ["0", "2", "4"])])
def test_head_layers_have_the_published_indices(bn, expected):
    model = SwAV(Trunk(), head=(16, 16, 8), prototypes=10, head_bn=bn)
    names = set(model.state_dict())
    assert sorted({name.split(".")[1] for name in names if name.startswith("head.")}) == expected
    assert "prototypes.weight" in names and "prototypes.bias" not in names


@pytest.mark.parametrize("head, prototypes", [((), 10), ((16, 0), 10), ((16, 8), 0)])
def test_a_head_or_prototypes_of_no_size_are_refused(head, prototypes):
    with pytest.raises(ValueError, match="at least one"):
        SwAV(Trunk(), head, prototypes)


def test_a_trunk_without_num_features_is_told_what_it_needs():
    trunk = torchvision.models.resnet18()
    with pytest.raises(ValueError, match=r"returns features \(B, num_features\)"):
        SwAV(trunk, (8,), 10)
    trunk.num_features, trunk.fc = 512, torch.nn.Identity()         # as the sentence says
    assert SwAV(trunk, (8,), 10)([torch.ones(4, 3, 32, 32)])[1].shape == (4, 10)


def test_forward_is_crop_major_unit_norm_and_cosine():
    torch.manual_seed(0)
    model = SwAV(RegNet(RegNetParams(3, 8, 8, 2.5, 8)), head=(16, 8), prototypes=10).eval()
    large, small = torch.randn(2 * 3, 3, 32, 32), torch.randn(4 * 3, 3, 16, 16)
    embeddings, scores = model([large, small])
    assert embeddings.shape == (18, 8) and scores.shape == (18, 10)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(18))
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(10))
    torch.testing.assert_close(model([small[3:6]])[1], scores[6 + 3:6 + 6])
    expected = F.cosine_similarity(embeddings[:, None], model.prototypes.weight[None], dim=2)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_codes_and_loss_stay_float32_under_autocast(dtype):
    model = SwAV(Trunk(), head=(16, 8), prototypes=10)
    with torch.autocast("cpu", dtype=dtype):
        embeddings, scores = model([torch.randn(4 * 3, 3, 8, 8)])
        codes = swav_codes(scores, 4)
        loss = swav_loss(scores, codes, 4)
    assert {t.dtype for t in (embeddings, scores, codes, loss)} == {torch.float32}
    torch.testing.assert_close(embeddings @ model.prototypes.weight.t(), scores)
    assert loss.item() == swav_loss(scores, codes, 4).item()


# ------------------------------------------------------------------------- the shape of a method
def images(counts, batch, seed=0):
    """Crops of `batch` images, one tensor a size, the second size half as large as the first."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count * batch, 3, 16 >> i, 16 >> i, generator=generator)
            for i, count in enumerate(counts)]


@pytest.mark.parametrize("counts, sizes", [([2, 4], 1), ([6], 1), ([1, 1, 4], 2), ([1, 5], 2)])
def test_the_sizes_that_hold_the_assigned_crops(counts, sizes):
    assert assigned_sizes(counts) == sizes


@pytest.mark.parametrize("counts, seen", [((2, 4), [(6, 16)]), ((1, 5), [(3, 16), (15, 8)]),
                                          ((3,), [(9, 16)]), ((1, 1, 2), [(3, 16), (3, 8)])])
def test_assigned_has_the_rows_of_forward_and_computes_no_more_sizes(counts, seen):
    model, crops, sizes = SwAV(Trunk(), (16, 8), 10, counts=counts), images(counts, 3), []
    embeddings, scores = model(crops)
    model.trunk.register_forward_pre_hook(lambda _, x: sizes.append((len(x[0]), x[0].shape[-1])))
    assigned = model.assigned(crops)
    assert sizes == seen                        # (crops, pixels)
    assert [x.shape for x in assigned] == [(2, 3, 8), (2, 3, 10)]
    for ours, whole in zip(assigned, (embeddings, scores)):
        torch.testing.assert_close(ours.flatten(0, 1), whole[:2 * 3])


@pytest.mark.parametrize("queue", [0, 4])
def test_targets_are_the_same_of_all_crops_of_the_assigned_and_of_micro_batches(queue):
    torch.manual_seed(0)
    model, crops = SwAV(Trunk(), (16, 8), 10, counts=(2, 3), queue=queue), images((2, 3), 6)
    if queue:
        model.queue.push(F.normalize(torch.randn(2, 4, 8), dim=2))
    of_all, latest = model.targets(model(crops), 0), model.latest
    assert of_all.shape == (2, 6, 10) and not of_all.requires_grad
    torch.testing.assert_close(model.targets(model.assigned(crops), 0), of_all)
    parts = [[size.unflatten(0, (count, 6))[:, start:start + 2].flatten(0, 1)
              for size, count in zip(crops, (2, 3))] for start in (0, 2, 4)]
    joined = [torch.cat(same, 1) for same in zip(*map(model.assigned, parts))]
    torch.testing.assert_close(model.targets(joined, 0), of_all)
    if queue:
        torch.testing.assert_close(model.latest, latest)
    with pytest.raises(AssertionError):         # codes of a part alone would be others
        torch.testing.assert_close(model.targets(model.assigned(parts[0]), 0), of_all[:, :2])


@pytest.mark.parametrize("length, start, skipped, used", [
    (0, 0, [], []), (8, 0, [], [3, 4, 5]), (8, 4, [], [4, 5]), (6, 0, [], [2, 3, 4, 5]),
    (8, 0, [1, 4], [4, 5]), (3, 0, [0], [2, 3, 4, 5])])
@pytest.mark.parametrize("options", [{}, dict(epsilon=0.2, iterations=1, hard=True,
                                              temperature=0.3)], ids=["plain", "options"])
def test_targets_and_loss_are_swavs_by_hand(length, start, skipped, used, options):
    """Of six steps of 3 images, some of which are skipped: codes, loss, and the queue, which takes
    part from queue_start on and once it is full, and is filled after steps that count."""
    torch.manual_seed(0)
    model = SwAV(Trunk(), (16, 8), 10, counts=(2, 4), queue=length, queue_start=start, **options)
    optimizer, kept, found = torch.optim.SGD(model.parameters(), lr=0.5), [], []
    sinkhorn = dict(epsilon=0.05, iterations=3, hard=False) | {
        name: value for name, value in options.items() if name != "temperature"}
    for step in range(6):
        outputs = model(images((2, 4), 3, seed=step))
        queue_scores = None
        if length and step >= start and 3 * len(kept) >= length:
            newest = torch.cat(kept[::-1], 1)[:, :length]                # (A, L, D)
            queue_scores = newest @ model.prototypes.weight.detach().t()
            found.append(step)
        expected = swav_codes(outputs[1], 6, queue_scores=queue_scores, **sinkhorn)
        codes = model.targets(outputs, step)
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-6)
        if queue_scores is not None:            # the test can fail: history makes a difference
            assert not torch.allclose(codes, swav_codes(outputs[1], 6, **sinkhorn), atol=1e-4)
        loss = model.loss(outputs, codes)
        expected = swav_loss(outputs[1], expected, 6, temperature=options.get("temperature", 0.1))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        model.before_step(step)
        if step in skipped:
            continue
        optimizer.step()
        model.after_step(step)
        kept.append(outputs[0].detach().unflatten(0, (6, 3))[:2])
    assert found == used
    if length:
        newest = torch.cat(kept[::-1], 1)[:, :length]
        assert torch.equal(model.queue.embeddings[:, :newest.shape[1]], newest)
        assert model.queue.filled == newest.shape[1]
    else:
        assert model.queue is None


def test_a_step_that_is_skipped_leaves_queue_and_prototypes_alone():
    model = SwAV(Trunk(), (16, 8), 10, counts=(2,), queue=6)
    for step in range(3):                       # full after two
        model.targets(model(images((2,), 3, step)), step)
        model.after_step(step)
    queue, prototypes = model.queue.embeddings.clone(), model.prototypes.weight.clone()
    codes = []
    for _ in range(2):
        outputs = model(images((2,), 3, seed=9))
        codes.append(model.targets(outputs, 3))
        model.loss(outputs, codes[-1]).backward()
        model.before_step(3)
        assert torch.equal(model.queue.embeddings, queue)
    assert torch.equal(*codes) and torch.equal(model.prototypes.weight, prototypes)
    model.after_step(3)
    assert not torch.equal(model.queue.embeddings, queue)


def test_frozen_prototypes_stay_while_the_head_moves():
    model = SwAV(Trunk(), head=(16, 8), prototypes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for frozen in (True, False):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer.zero_grad()
        scores = model([torch.randn(4 * 3, 3, 8, 8)])[1]
        swav_loss(scores, swav_codes(scores, 4), 4).backward()
        if frozen:
            model.freeze_prototypes()
        optimizer.step()
        model.normalize_prototypes()
        assert not torch.equal(before["head.0.weight"], model.state_dict()["head.0.weight"])
        moved = not torch.allclose(before["prototypes.weight"], model.prototypes.weight, atol=1e-6)
        assert moved is not frozen


@pytest.mark.parametrize("frozen", [0, 1, 3])
def test_before_step_freezes_the_first_steps_and_after_step_has_unit_norm(frozen):
    torch.manual_seed(0)
    model = SwAV(Trunk(), (16, 8), 10, counts=(4,), frozen_steps=frozen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=0.1)
    moved = []
    for step in range(4):
        head, before = model.head[0].weight.clone(), model.prototypes.weight.clone()
        optimizer.zero_grad()
        outputs = model(images((4,), 3, step))
        model.loss(outputs, model.targets(outputs, step)).backward()
        model.before_step(step)
        optimizer.step()
        model.after_step(step)
        torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(10))
        assert not torch.equal(head, model.head[0].weight)
        moved.append(not torch.allclose(before, model.prototypes.weight, atol=1e-6))
    assert moved == [step >= frozen for step in range(4)]


def test_the_state_dict_holds_weights_alone():
    """A queue is no part of it, nor are options: a file of weights fits every run."""
    plain = SwAV(Trunk(), (16, 8), 10)
    model = SwAV(Trunk(), (16, 8), 10, counts=(2, 2), queue=6, frozen_steps=3, temperature=0.2)
    model.targets(model(images((2, 2), 3)), 0)
    model.after_step(0)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert {name.split(".")[0] for name in plain.state_dict()} == {"head", "prototypes"}


# -------------------------------------------------------------------------------------- the queue
def test_a_queue_is_used_only_when_full_and_keeps_the_newest():
    queue = Queue(length=5, dim=2)
    prototypes = torch.eye(2)
    first, second = torch.randn(2, 3, 2), torch.randn(2, 3, 2)
    queue.push(first)
    assert not queue.full and queue.scores(prototypes) is None
    queue.push(second)
    assert queue.full and queue.filled == 5
    torch.testing.assert_close(queue.scores(prototypes), queue.embeddings)
    torch.testing.assert_close(queue.embeddings[1], torch.cat([second[1], first[1, :2]]))
    queue.push(torch.randn(2, 9, 2, dtype=torch.bfloat16))      # more than it holds
    assert queue.embeddings.shape == (2, 5, 2) and queue.embeddings.dtype == torch.float32


# --------------------------------------------------------------------------------- the statistics
def statistics(embeddings, prototypes):
    scores = embeddings @ prototypes.t()
    codes = swav_codes(scores, 4)
    return collapse_statistics(embeddings, scores, swav_loss(scores, codes, 4))


def test_statistics_of_a_collapsed_and_of_a_healthy_embedding():
    torch.manual_seed(0)
    prototypes = F.normalize(torch.randn(16, 8), dim=1)
    point = F.normalize(torch.ones(1, 8), dim=1).expand(256, 8)
    collapsed = statistics(point, prototypes)
    assert collapsed["spread"] == pytest.approx(0, abs=1e-3)
    assert collapsed["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert collapsed["prototypes_used"] == pytest.approx(1 / 16)
    assert collapsed["loss_over_ln_k"] > 0.99
    own = F.normalize(prototypes[torch.arange(64) % 16].repeat(4, 1), dim=1)
    healthy = statistics(own, prototypes)
    assert healthy["prototypes_used"] == 1 and healthy["spread"] > 0.9
    assert healthy["effective_rank"] > 5 and healthy["loss_over_ln_k"] < 0.6
    assert healthy["assignment_entropy"] < 0.6 < collapsed["assignment_entropy"]


def test_effective_rank_of_known_spectra():
    scores, loss = torch.zeros(8, 4), torch.tensor(1.0)
    for dims in (1, 3, 8):
        z = torch.zeros(24, 8)
        z[torch.arange(24), torch.arange(24) % dims] = 1
        got = collapse_statistics(z, scores, loss)["effective_rank"]
        assert got == pytest.approx(dims, rel=1e-3)


def test_a_methods_statistics_are_of_all_its_crops_or_of_the_assigned():
    torch.manual_seed(0)
    model, crops = SwAV(Trunk(), (16, 8), 10, counts=(2, 3), temperature=0.3), images((2, 3), 4)
    outputs, loss = model(crops), torch.tensor(1.5)
    assert model.statistics(outputs, loss) == collapse_statistics(*outputs, loss, 0.3)
    assigned = model.statistics(model.assigned(crops), loss)
    expected = collapse_statistics(*(x[:2 * 4] for x in outputs), loss, 0.3)
    assert assigned == pytest.approx(expected, rel=1e-5)
    assert assigned != pytest.approx(model.statistics(outputs, loss), rel=1e-5)
