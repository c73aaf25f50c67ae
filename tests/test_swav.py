"""swav.py against stored codes, losses and gradients, and against definitions."""
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from regnet import RegNet, RegNetParams
from swav import Queue, SwAV, collapse_statistics, swav_codes, swav_loss

CASES = torch.load(Path(__file__).parent / "data" / "swav_loss.pt", weights_only=True)["cases"]


class Trunk(nn.Module):
    num_features = 12

    def forward(self, images):
        return images.mean((2, 3)).repeat(1, 4)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c["name"])
def test_codes_loss_and_gradients(case):
    embedding = case["embedding"].clone().requires_grad_()
    prototypes = case["prototypes"].clone().requires_grad_()
    crops, assign = case["num_crops"], case["crops_for_assign"]
    queue_scores = None
    if "queue" in case:
        queue = Queue(case["queue"].shape[1], embedding.shape[1], assign)
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
        queue.push(embedding, crops)
        torch.testing.assert_close(queue.embeddings, case["queue_after"], rtol=0, atol=0)


def test_the_loss_of_uniform_predictions_is_ln_k():
    scores = torch.zeros(6 * 5, 7)
    codes = torch.softmax(torch.randn(2, 5, 7), dim=2)
    assert swav_loss(scores, codes, 6).item() == pytest.approx(math.log(7), abs=1e-6)


@pytest.mark.parametrize("rows, crops, assigned", [(10, 4, 2), (12, 1, 2), (12, 4, 3)])
def test_the_loss_refuses_what_does_not_fit(rows, crops, assigned):
    with pytest.raises(ValueError, match="do not fit"):
        swav_loss(torch.zeros(rows, 5), torch.zeros(assigned, 3, 5), crops)


@pytest.mark.parametrize("bn, expected", [(True, ["0", "1", "3", "4", "6"]), (False, ["0", "2", "4"])])
def test_head_layers_have_the_published_indices(bn, expected):
    model = SwAV(Trunk(), head=(16, 16, 8), prototypes=10, head_bn=bn)
    assert sorted({k.split(".")[1] for k in model.state_dict() if k.startswith("head.")}) == expected
    assert "prototypes.weight" in model.state_dict() and "prototypes.bias" not in model.state_dict()


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


def test_a_queue_is_used_only_when_full_and_keeps_the_newest():
    queue = Queue(length=5, dim=2)
    prototypes = torch.eye(2)
    first, second = torch.randn(4 * 3, 2), torch.randn(4 * 3, 2)
    queue.push(first, num_crops=4)
    assert not queue.full and queue.scores(prototypes) is None
    queue.push(second, num_crops=4)
    assert queue.full
    torch.testing.assert_close(queue.scores(prototypes), queue.embeddings)
    torch.testing.assert_close(queue.embeddings[1], torch.cat([second[3:6], first[3:5]]))


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
    healthy = statistics(F.normalize(prototypes[torch.arange(64) % 16].repeat(4, 1), dim=1), prototypes)
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
