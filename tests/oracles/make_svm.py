"""Write svm.json: linear SVMs as liblinear solves them, and average precisions, by scikit-learn.

    pip install scikit-learn && python -m tests.oracles.make_svm
"""
import json
from pathlib import Path

import numpy
import sklearn
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

N, QUERIES, CLASSES, FEATURES, COSTS = 40, 25, 3, 12, (0.01, 1.0, 100.0)

rng = numpy.random.default_rng(0)
points = rng.normal(0, 1, (N + QUERIES, FEATURES))
targets = points[:, :CLASSES] + rng.normal(0, 1, (N + QUERIES, CLASSES)) > 0.6     # multi-hot
points = points.round(6)
unit = points / numpy.linalg.norm(points, axis=1, keepdims=True)

fits, precisions = {}, {}
for cost in COSTS:
    models = [LinearSVC(C=cost, loss="squared_hinge", dual=False, tol=1e-12, max_iter=10 ** 5).fit(
        unit[:N], targets[:N, k]) for k in range(CLASSES)]
    fits[cost] = [numpy.append(model.coef_[0], model.intercept_[0]).tolist() for model in models]
    scores = [model.decision_function(unit[N:]) for model in models]
    precisions[cost] = [average_precision_score(targets[N:, k], scores[k]) for k in range(CLASSES)]
tied = rng.integers(0, 5, 30).tolist()
relevant = (rng.random(30) > 0.6).tolist()
Path(__file__).with_name("svm.json").write_text(json.dumps({
    "sklearn": sklearn.__version__, "features": points[:N].tolist(), "queries": points[N:].tolist(),
    "is_of": targets.tolist(), "fits": fits, "precisions": precisions, "tied": tied,
    "relevant": relevant, "tied_precision": average_precision_score(relevant, tied)}) + "\n")
