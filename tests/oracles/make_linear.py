"""Write linear.json: logistic regressions as scikit-learn solves them, and the whole linear probe.

    pip install scikit-learn torch && python -m tests.oracles.make_linear
"""
import json
from pathlib import Path

import numpy
import sklearn
import torch
from sklearn.linear_model import LogisticRegression

N, QUERIES, CLASSES, DECAYS = 150, 60, 4, (1.0, 0.1, 0.01, 0.001, 0.0001)

rng = numpy.random.default_rng(0)
centres = rng.normal(0, 1, (CLASSES, 5))
labels = rng.integers(0, CLASSES, N + QUERIES)
points = centres[labels] + rng.normal(0, 1, (N + QUERIES, 5))
points = points * [1, 10, 0.1, 3, 1] + [0, 5, 0, 0, 9]
points = numpy.concatenate([points, numpy.full((len(points), 1), 2.5)], 1).round(6)   # one constant
x, queries = points[:N], points[N:]
y, truth = labels[:N], labels[N:]


def solve(x, y, decay):
    # scikit-learn minimises C * sum of losses + |W|^2 / 2,
    # evaluation/linear.py the mean of the losses + decay / 2 * |W|^2
    return LogisticRegression(C=1 / (len(x) * decay), solver="newton-cg", tol=1e-12,
                              max_iter=10000).fit(x, y)


spread = x.std(0, ddof=1)
spread[-1] = 1
z, z_queries = (x - x.mean(0)) / spread, (queries - x.mean(0)) / spread
order = torch.randperm(N, generator=torch.Generator().manual_seed(0)).numpy()
held_out, rest = order[:N // 5], order[N // 5:]
scores = {decay: solve(z[rest], y[rest], decay).score(z[held_out], y[held_out]) for decay in DECAYS}
chosen = max(DECAYS, key=lambda decay: (scores[decay], decay))

fits = {}
for decay in DECAYS:
    model = solve(z, y, decay)
    bias = model.intercept_ - model.intercept_.mean()      # a constant may be added to all of them
    fits[decay] = numpy.concatenate([model.coef_.T, bias[None]]).tolist()
result = {"sklearn": sklearn.__version__, "features": x.tolist(), "labels": y.tolist(),
          "queries": queries.tolist(), "truth": truth.tolist(), "fits": fits, "held_out": scores,
          "chosen": chosen, "predicted": solve(z, y, chosen).predict(z_queries).tolist()}
Path(__file__).with_name("linear.json").write_text(json.dumps(result) + "\n")
print(scores, chosen, (numpy.array(result["predicted"]) == truth).mean())
