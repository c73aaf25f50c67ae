"""evaluation/search.py against slow definitions written here, and by hand."""
import sys
import types

import numpy
import pytest
import torch
from torch.nn import functional as F

from evaluation.search import average_precision, nearest, ranks, similarities


def test_the_nearest_are_those_of_a_full_sort():
    torch.manual_seed(0)
    features, queries = (F.normalize(torch.randn(n, 6), dim=1) for n in (50, 13))
    exact = queries.double() @ features.double().t()
    order = exact.argsort(descending=True)
    nothing = nearest(features, queries[:0], 3)         # of a rank without a share
    assert [x.shape for x in nothing] == [(0, 3)] * 2
    for chunk in (0, 1, 5):
        for k in (1, 7, 80):
            similarity, found = nearest(features, queries, k, chunk)
            assert torch.equal(found, order[:, :k])
            torch.testing.assert_close(similarity.double(), exact.gather(1, order[:, :k]))
        starts = [start for start, block in similarities(features, queries, chunk)]
        assert starts == {0: [0], 1: [*range(13)], 5: [0, 5, 10]}[chunk]


def test_faiss_is_used_where_it_is_asked_for_alone(monkeypatch):
    features, queries = (F.normalize(torch.randn(n, 6), dim=1) for n in (50, 13))
    asked = []

    def knn(queries, features, k, metric):
        asked.append(metric)
        similarity = queries @ features.T
        found = numpy.argsort(-similarity, axis=1)[:, :k]
        return numpy.take_along_axis(similarity, found, 1), found

    library = types.SimpleNamespace(knn=knn, METRIC_INNER_PRODUCT="dot")
    monkeypatch.setitem(sys.modules, "faiss", library)
    expected = nearest(features, queries, 4)
    assert not asked
    found = nearest(features, queries, 4, use_faiss=True)
    assert asked == ["dot"] and torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="--faiss needs that library"):
        nearest(features, queries, 4, use_faiss=True)


def test_the_library_itself_finds_the_same():
    pytest.importorskip("faiss")
    features, queries = (F.normalize(torch.randn(n, 6), dim=1) for n in (50, 13))
    expected, found = (nearest(features, queries, 4, use_faiss=used) for used in (False, True))
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0])


def test_ranks_are_places_in_the_sorted_list_without_junk():
    torch.manual_seed(0)
    for trial in range(20):
        similarity = torch.randint(0, 8, (30,)) / 8             # many are equal
        chosen = torch.randperm(30)
        positives, junk = chosen[:5], chosen[5:5 + trial % 4]
        order = sorted(range(30), key=lambda i: (-similarity[i], i))
        order = [i for i in order if i not in junk.tolist()]
        expected = sorted(order.index(p) for p in positives.tolist())
        assert ranks(similarity, positives, junk).tolist() == expected
        assert len(similarity.unique()) < 9                     # nothing of it was changed


def oxford(ranked, positives, junk):
    """As the Oxford buildings' program goes through a ranked list."""
    old_recall, old_precision, found, seen, area = 0.0, 1.0, 0, 0, 0.0
    for image in ranked:
        if image in junk:
            continue
        found += image in positives
        seen += 1
        recall, precision = found / len(positives), found / seen
        area += (recall - old_recall) * (old_precision + precision) / 2
        old_recall, old_precision = recall, precision
    return area


def test_average_precision_is_the_area_of_trapezoids():
    torch.manual_seed(0)
    for trial in range(20):
        similarity = torch.rand(25)
        chosen = torch.randperm(25)
        positives, junk = chosen[:1 + trial % 6], chosen[6:6 + trial % 5]
        ranked = similarity.argsort(descending=True).tolist()
        expected = oxford(ranked, positives.tolist(), junk.tolist())
        found = average_precision(ranks(similarity, positives, junk))
        assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("where, expected", [
    ([0], 1), ([1], 1 / 4), ([9], 1 / 20), ([0, 1], 1),
    ([0, 2], (1 + (1 / 2 + 2 / 3) / 2) / 2),            # sum of j / r and (j + 1) / (r + 1)
    ([1, 2], ((0 + 1 / 2) / 2 + (1 / 2 + 2 / 3) / 2) / 2)])
def test_average_precision_by_hand(where, expected):
    assert average_precision(torch.tensor(where)) == pytest.approx(expected)
