"""methods/deepcluster_v2.py against loops in float64, closed forms, and one process against two."""
import copy
import math
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from data.stream import Positions, Stream
from methods import deepcluster_v2
from methods.deepcluster_v2 import DeepCluster, spherical_kmeans
from tests.helpers import equal, run_ranks
from tests.methods.loop import step_of

N, COUNTS = 10, (2, 1)                      # images, crops


# -------------------------------------------------------------------------------------- k-means
def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_kmeans(embeddings, k, iterations, seed):
    """In lists of Python's numbers."""
    def unit(x):
        length = math.sqrt(sum(a * a for a in x))
        return [a / length for a in x]

    def nearest(x):
        cosines = [sum(a * b for a, b in zip(x, c)) for c in centroids]
        return cosines.index(max(cosines))

    points = [unit(x) for x in embeddings.tolist()]
    first = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]
    centroids = [points[i] for i in first]
    for _ in range(iterations):
        clusters = [nearest(x) for x in points]
        for c in range(k):
            members = [x for x, cluster in zip(points, clusters) if cluster == c]
            total = [sum(column) for column in zip(*members)]
            if any(total):
                centroids[c] = unit(total)
    return torch.tensor(centroids, dtype=torch.float64), torch.tensor([nearest(x) for x in points])


@pytest.mark.parametrize("n, d, k, iterations", [(40, 5, 6, 10), (40, 5, 6, 0), (30, 3, 20, 4),
                                                 (9, 4, 1, 3)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kmeans_is_the_loop_in_float64(n, d, k, iterations, dtype, tolerance):
    for seed in range(3):
        embeddings = rows(n, d, seed)
        centroids, clusters = spherical_kmeans(embeddings.to(dtype), k, iterations, seed)
        expected, expected_clusters = naive_kmeans(embeddings, k, iterations, seed)
        assert centroids.dtype == dtype and clusters.dtype == torch.int64
        torch.testing.assert_close(centroids.double(), expected, rtol=0, atol=tolerance)
        assert torch.equal(clusters, expected_clusters)


def test_kmeans_of_one_cluster_and_of_as_many_as_rows():
    unit = F.normalize(rows(12, 4), dim=1)
    centroids, clusters = spherical_kmeans(unit, 1, 2, seed=0)
    torch.testing.assert_close(centroids, F.normalize(unit.sum(0, keepdim=True), dim=1))
    assert clusters.tolist() == [0] * 12
    centroids, clusters = spherical_kmeans(unit, 12, 5, seed=0)
    torch.testing.assert_close(centroids[clusters], unit)
    assert sorted(clusters.tolist()) == [*range(12)]


def test_kmeans_ends_nearer_than_it_began_and_never_turns_back():
    unit = F.normalize(rows(300, 8), dim=1)
    means = []
    for iterations in range(8):
        centroids, clusters = spherical_kmeans(unit, 10, iterations, seed=1)
        torch.testing.assert_close(centroids.norm(dim=1), torch.ones(10, dtype=torch.float64))
        means.append((unit * centroids[clusters]).sum(1).mean().item())
    assert all(a <= b + 1e-12 for a, b in zip(means, means[1:])) and means[-1] > means[0] + 0.02


def test_a_cluster_that_is_empty_or_cancels_keeps_its_centroid():
    a, b = [1.0, 0.0], [0.0, 1.0]
    centroids, clusters = spherical_kmeans(torch.tensor([a, a, b]), 3, 5, seed=0)
    assert sorted(centroids.tolist()) == [b, a, a] and len(set(clusters.tolist())) == 2
    centroids, _ = spherical_kmeans(torch.tensor([a, [-1.0, 0.0]]), 1, 5, seed=0)
    assert centroids.abs().tolist() == [a]


@pytest.mark.parametrize("k", [-1, 0, 6])
def test_kmeans_refuses_no_clusters_and_more_than_rows(k):
    with pytest.raises(ValueError, match=f"not {k}$"):
        spherical_kmeans(torch.randn(5, 3), k, 1, 0)


def test_kmeans_depends_on_directions_and_its_seed_alone():
    embeddings = rows(50, 4, dtype=torch.float32)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = spherical_kmeans(embeddings, 7, 3, seed=2)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(3)
    longer = embeddings * torch.rand(50, 1).add(0.5)
    other = spherical_kmeans(longer, 7, 3, seed=2)
    torch.testing.assert_close(other, one)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert equal(spherical_kmeans(embeddings, 7, 3, seed=2), one)
    assert not torch.equal(spherical_kmeans(embeddings, 7, 3, seed=4)[1], one[1])


def test_kmeans_in_blocks_is_the_same_and_never_holds_all_similarities(monkeypatch):
    embeddings = rows(200, 3)
    whole = spherical_kmeans(embeddings, 50, 3, seed=0)
    argmax, shapes = torch.Tensor.argmax, []
    monkeypatch.setattr(deepcluster_v2, "BLOCK", 50 * 7)
    monkeypatch.setattr(torch.Tensor, "argmax",
                        lambda x, dim: shapes.append(x.shape) or argmax(x, dim))
    blocks = spherical_kmeans(embeddings, 50, 3, seed=0)
    torch.testing.assert_close(blocks, whole)
    assert shapes == ([(7, 50)] * 28 + [(4, 50)]) * 4


# ------------------------------------------------------------------------------------ the method
class Trunk(nn.Module):
    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)

    def forward(self, images):
        return self.conv(images).tanh().mean((2, 3))


def build(batch=5, **changes):
    """Of float64, without BatchNorm, so that micro-batches can equal the joined batch."""
    torch.manual_seed(0)
    settings = dict(head=(8, 4), prototypes=(3, 4, 2), counts=COUNTS, iterations=4, head_bn=False,
                    steps_per_epoch=N / batch)
    model = DeepCluster(Trunk(), N, **settings | changes).double()
    model.images_of = lambda step: torch.arange(step * batch, (step + 1) * batch) % N
    return model


@cache
def crop(image, size, step):
    rng = torch.Generator().manual_seed(1000 * step + image)
    shade = torch.sin(torch.arange(3) * (1.0 + image))[:, None, None]
    return (shade + 0.3 * torch.randn(3, size, size, generator=rng)).double()


def crops_of(images, step, flat=False):
    """Crops of these images, other ones at every step: (count, B, 3, s, s) a size, or flat."""
    sizes = [torch.stack([torch.stack([crop(int(i), 8 >> s, step) + c for i in images])
                          for c in range(count)]) for s, count in enumerate(COUNTS)]
    return [size.flatten(0, 1) for size in sizes] if flat else sizes


def play(model, step, micro_batches=1, skip=False, lr=0.0, wrapped=None):
    """A step of the loop -> loss."""
    crops = crops_of(model.images_of(step), step)
    model.zero_grad()
    total, _ = step_of(model, [[part.flatten(0, 1) for part in parts] for parts in zip(
        *[size.chunk(micro_batches, 1) for size in crops])], step, wrapped)
    model.before_step(step)
    if not skip:
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad if p.requires_grad else 0
        model.after_step(step)
    return total


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def state(model):
    return copy.deepcopy(model.state_dict())


def naive_loss(scores, targets, temperature):
    """Crop by crop: cross-entropy, nothing for -100; mean over all crops and clusterings."""
    total, crops = 0.0, sum(COUNTS)
    for table, clusters in zip(scores, targets.tolist()):
        for i, row in enumerate(table):
            cluster = clusters[i % len(clusters)]
            if cluster >= 0:
                e = (row / temperature).exp()
                total = total - (e[cluster] / e.sum()).log()
    return total / (len(scores) * crops * targets.shape[1])


def test_loss_and_gradient_are_the_loop_in_float64():
    model = build(temperature=0.3)
    scores = [rows(3 * 5, k, k).requires_grad_() for k in (3, 4, 2)]
    targets = torch.tensor([[0, 2, -100, 1, 1], [3, -100, 0, 1, 2], [1, 1, 0, -100, -100]])
    loss = model.loss((None, *scores), targets)
    ours = torch.autograd.grad(loss, scores)
    expected = naive_loss(scores, targets, 0.3)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, scores), rtol=1e-10, atol=1e-14)


def test_the_loss_of_equal_scores_is_the_mean_of_ln_k():
    loss = build().loss((None, *(torch.ones(15, k) for k in (3, 4, 2))), torch.ones(3, 5).long())
    assert loss.item() == pytest.approx((math.log(3) + math.log(4) + math.log(2)) / 3)


def test_outputs_are_unit_embeddings_and_cosines_with_the_centroids():
    model = build()
    for step in range(2):
        play(model, step)
    embeddings, *scores = model(crops_of(range(4), 0, flat=True))
    assert embeddings.shape == (12, 4) and [s.shape[1] for s in scores] == [3, 4, 2]
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(12, dtype=torch.float64))
    for table, layer in zip(scores, model.prototypes):
        expected = F.cosine_similarity(embeddings[:, None], layer.weight[None], dim=2)
        torch.testing.assert_close(table, expected)
        assert not layer.weight.requires_grad


def test_the_first_epoch_learns_nothing_and_the_second_its_clusters():
    model, seen = build(), torch.zeros(2, N, 4, dtype=torch.float64)
    for step in range(2):
        with torch.no_grad():
            embeddings = model(crops_of(model.images_of(step), step, flat=True))[0]
        assert play(model, step) == 0
        assert all(grad.count_nonzero() == 0 for grad in gradients(model).values())
        seen[:, model.images_of(step)] = embeddings.unflatten(0, (3, 5))[:2]
        torch.testing.assert_close(model.memory, seen)
    assert model.epoch == 1
    for p, (k, layer) in enumerate(zip((3, 4, 2), model.prototypes)):
        cosines = seen[p % 2] @ layer.weight.t()                        # (N, K)
        assert torch.equal(cosines.argmax(1), model.assignments[p])
        expected = spherical_kmeans(seen[p % 2], k, 4, seed=1_000_003 * (3 + p))
        torch.testing.assert_close((layer.weight.detach(), model.assignments[p]), expected)
    outputs = model(crops_of(model.images_of(2), 2, flat=True))
    assert torch.equal(model.targets(outputs, 2), model.assignments[:, :5])
    assert play(model, 2) > 0.1 and gradients(model)["trunk.conv.weight"].norm() > 0
    assert all(layer.weight.grad is None for layer in model.prototypes)


@pytest.mark.long
def test_it_learns():
    model = build(prototypes=(3,))
    losses = [play(model, step, lr=3.0).item() for step in range(2)]
    while len(losses) < 42:                     # on the clusters of the first epoch
        model.steps_per_epoch = len(losses)
        losses.append(play(model, len(losses), lr=3.0).item())
    assert losses[:2] == [0, 0] and sum(losses[-2:]) < 0.6 * sum(losses[2:4])


@pytest.mark.parametrize("micro_batches", [2, 5])
def test_micro_batches_are_the_joined_batch(micro_batches):
    model, other = build(10), build(10)
    for step in range(3):
        model.steps_per_epoch = other.steps_per_epoch = 1.5
        losses = play(model, step), play(other, step, micro_batches)
        torch.testing.assert_close(*losses, rtol=0, atol=1e-10)
        torch.testing.assert_close(gradients(other), gradients(model), rtol=0, atol=1e-10)
        torch.testing.assert_close(state(other), state(model), rtol=0, atol=1e-10)
    assert losses[0] > 0.1


# ------------------------------------------------------------------------- what is remembered
@pytest.mark.parametrize("skipped", [0, 1, 2, 3])
def test_a_skipped_step_leaves_no_trace(skipped):
    """Also where it is the one in which an epoch ends: the next one clusters then."""
    model = build()
    for step in range(skipped):
        play(model, step)
    before = state(model)
    fresh = build()
    fresh.load_state_dict(before)
    play(model, skipped, micro_batches=5, skip=True)
    assert equal(state(model), before)
    for step in range(skipped + 1, skipped + 4):
        play(model, step), play(fresh, step)
        assert equal(state(model), state(fresh))
    assert model.epoch == (skipped + 4) // 2
    if skipped < 2:
        assert (model.assignments >= 0).all()


def test_a_step_that_was_dropped_halfway_leaves_no_trace():
    model, other = build(), build()
    model.targets(model(crops_of(range(2), 0, flat=True)), 0)
    play(model, 1), play(other, 1)
    assert equal(state(model), state(other)) and model.memory[:, :5].count_nonzero() == 0


def test_too_few_images_for_the_clusters_wait():
    model = build(prototypes=(8,))
    play(model, 0), play(model, 1, skip=True), play(model, 2)       # five images seen
    assert model.epoch == 0 and (model.assignments == -100).all()
    play(model, 3)
    assert model.epoch == 2 and (model.assignments >= 0).all()


def test_an_image_that_was_never_seen_has_no_target_and_no_part_in_the_clusters():
    model = build()
    model.images_of = lambda step: torch.arange(5)
    play(model, 0), play(model, 1)
    assert (model.assignments[:, :5] >= 0).all() and (model.assignments[:, 5:] == -100).all()
    for p, layer in enumerate(model.prototypes):
        expected = spherical_kmeans(model.memory[p % 2, :5], len(layer.weight), 4,
                                    1_000_003 * (3 + p))
        torch.testing.assert_close((layer.weight.detach(), model.assignments[p, :5]), expected)


def test_of_an_image_shown_twice_the_later_row_stays():
    model = build()
    shown = torch.tensor([3, 7, 3, 3, 7])
    model.images_of = lambda step: shown
    crops = [torch.randn(count * 5, 3, 8, 8).double() for count in COUNTS]
    outputs = model(crops)
    model.targets(outputs, 0)
    model.after_step(0)
    expected = outputs[0].unflatten(0, (3, 5))[:2].detach()
    torch.testing.assert_close(model.memory[:, 3], expected[:, 3])
    torch.testing.assert_close(model.memory[:, 7], expected[:, 4])
    assert model.memory.any(2).any(0).nonzero()[:, 0].tolist() == [3, 7]


def test_the_streams_own_epochs_fill_the_memory():
    """Ten images in steps of four: the third step belongs to two epochs."""
    stream, model = Stream(range(N), None, seed=5), build(4)
    model.images_of = lambda step: torch.tensor(
        [stream.index(position) for batch in Positions(step, step + 1, 4, micro_batch=2)
         for position in batch])
    for step in range(3):
        assert play(model, step, micro_batches=2) == 0 and model.epoch == (step == 2)
    assert model.memory.any(2).all() and (model.assignments >= 0).all()
    assert play(model, 3, micro_batches=2) > 0


@pytest.mark.parametrize("images, batch", [(10, 3), (7, 7), (49, 7), (10, 1), (3, 10), (11, 4)])
def test_an_epoch_ends_where_all_its_images_were_shown(images, batch):
    model = DeepCluster(Trunk(), images, (4,), (1,), counts=(2,), steps_per_epoch=images / batch)
    model.memory.fill_(0.5)
    for step in range(40):
        model.seen = [(torch.tensor([0]), torch.full((1, 2, 4), 0.5))]
        model.after_step(step)
        assert model.epoch == (step + 1) * batch // images


def test_a_state_dict_goes_on_in_the_middle_of_an_epoch():
    model, other = build(), build()
    for step in range(5):
        play(model, step)
    other.load_state_dict(state(model))
    for step in range(5, 9):
        assert play(model, step) == play(other, step)
        assert equal(state(model), state(other))
    assert {"memory", "assignments", "epoch", "prototypes.2.weight"} <= model.state_dict().keys()


# --------------------------------------------------------------------------------------- the rest
def test_statistics_count_the_clusters_used_and_the_images_that_moved():
    model = build()
    first = model.statistics((), torch.tensor(0.0))
    assert first == {"loss_over_ln_k": 0, "clusters_used": 0, "images_moved": 1}
    for step in range(4):
        before = model.assignments.clone()
        play(model, step)
        if step == 1:
            assert model.moved.tolist() == [1, 1, 1]
    moved, used = [], []
    for old, new, k in zip(before.tolist(), model.assignments.tolist(), (3, 4, 2)):
        inside = [[a for a, b in zip(old, new) if b == c] for c in range(k)]
        moved.append(1 - sum(max(map(part.count, part)) for part in inside if part) / N)
        used.append(len(set(new)) / k)
    ln_k = (math.log(3) + math.log(4) + math.log(2)) / 3
    expected = {"loss_over_ln_k": 2 / ln_k, "clusters_used": sum(used) / 3,
                "images_moved": sum(moved) / 3}
    assert model.statistics((), torch.tensor(2.0)) == pytest.approx(expected)
    assert 0 < sum(moved) / 3 < 1


def test_clusters_with_other_numbers_have_not_moved():
    """The same memory, clustered from other rows: groups far apart are found again."""
    model = build(prototypes=(2,), iterations=10)
    group = torch.arange(N) % 2
    model.memory = F.one_hot(group, 4).double().add(0.01 * rows(N, 4))[None].repeat(2, 1, 1)
    for step in range(1, 20, 2):
        model.seen = [(torch.tensor([0]), model.memory[:, :1].transpose(0, 1).clone())]
        model.after_step(step)
        clusters = model.assignments[0]
        assert clusters[0] != clusters[1] and (clusters == clusters[group]).all()
        assert model.moved == (1 if step == 1 else 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_scores_loss_and_memory_are_float32_under_autocast(dtype):
    model = build(head_bn=True).float()
    with torch.autocast("cpu", dtype=dtype):
        outputs = model([size.float() for size in crops_of(range(5), 0, flat=True)])
        model.assignments.zero_()
        loss = model.loss(outputs, model.targets(outputs, 0))
        model.after_step(0)
    assert {x.dtype for x in (*outputs, loss, model.memory)} == {torch.float32}
    torch.testing.assert_close(outputs[1], outputs[0] @ model.prototypes[0].weight.t())
    assert torch.equal(model.memory[:, :5], outputs[0].unflatten(0, (3, 5))[:2])


@pytest.mark.parametrize("bn, expected", [(True, ["0", "1", "3", "4", "6"]),
                                          (False, ["0", "2", "4"])])
def test_head_layers_have_the_published_indices(bn, expected):
    names = build(head=(8, 8, 4), head_bn=bn).state_dict()
    assert sorted({name.split(".")[1] for name in names if name.startswith("head.")}) == expected


@pytest.mark.parametrize("changes", [{"counts": (1,)}, {"prototypes": (3, N + 1)},
                                     {"prototypes": (0, 3)}])
def test_what_cannot_be_is_refused(changes):
    with pytest.raises(ValueError, match="needs two crops or more"):
        build(**changes)


def test_a_step_that_is_played_again_begins_with_its_first_image():
    model = build()
    for _ in range(2):
        play(model, 0, micro_batches=5)
        assert model.memory.any(2).all(0).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


# -------------------------------------------------------------------------------------- two ranks
def on_a_rank(rank, steps, micro_batches):
    """State and loss after each step on this rank's half of ten images' batches of six."""
    model = build(6)
    whole = model.images_of
    model.images_of = lambda step: whole(step)[3 * rank:3 * rank + 3]
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    results = []
    for step in range(steps):
        loss = play(model, step, micro_batches, lr=0.1, wrapped=wrapped)
        dist.all_reduce(loss)
        results.append((loss / 2, gradients(model), state(model)))
    return results


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.measured),
                                           pytest.param(3, marks=pytest.mark.long)])
def test_two_ranks_are_the_joined_batch(micro_batches, tmp_path):
    first, second = run_ranks(on_a_rank, tmp_path, 6, micro_batches)
    model = build(6)
    for step, (one, two) in enumerate(zip(first, second)):
        assert equal(one, two)
        loss = play(model, step, lr=0.1)
        torch.testing.assert_close(one, (loss, gradients(model), state(model)), rtol=0, atol=1e-10)
    assert loss > 0.1 and model.epoch == 3
