"""Write regnet_widths.json: RegNet's generator, five named and 100 random sets of parameters.

    python -m tests.oracles.make_regnet_widths

Float64, by the rule of pycls (Radosavovic et al., arXiv 2003.13678, section 3.3, equations 2 to 4;
bottleneck ratio 1), every rounding half to even:

    u_j = w_0 + w_a * j,  j = 0..d-1
    k_j = round(log(u_j / w_0) / log(w_m))
    w_j = 8 * round(w_0 * w_m**k_j / 8)
    stages: runs of equal w_j (depth = length of the run)
    per stage: g_s = min(g, w_s);  width = g_s * round(w_s / g_s)

The random sets aim at the rule's edges, so many of each kind as KINDS says. A set whose answer
depends on the last bits of log or pow is left out, which `settled` sees by exact fractions.
"""
import json
import math
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy

KEYS = ("depth", "w_0", "w_a", "w_m", "group_width")
SEER = {"seer_regnet_y_32gf": (20, 232, 115.89, 2.53, 232),
        "seer_regnet_y_64gf": (20, 352, 147.48, 2.4, 328),
        "seer_regnet_y_128gf": (27, 456, 160.83, 2.52, 264),
        "seer_regnet_y_256gf": (27, 640, 230.83, 2.53, 373),
        "seer_regnet_y_10b": (27, 1744, 620.83, 2.52, 1010)}
KINDS = {"float32 differs": 5, "tie at a multiple of 8": 13, "tie at groups": 9,
         "two stages of equal width": 5, "one stage": 4, "other": 64}
GROUPS = (8, 16, 24, 32, 40, 48, 56, 72, 96, 104, 112, 128, 152, 232, 264, 336, 373, 848, 1010,
          1120)
HALF = Fraction(1, 2)


def blocks(d, w_0, w_a, w_m, single=False) -> tuple[list[int], list[int]]:
    """k_j and w_j of each block; with `single`, the result of every step is rounded to float32."""
    def cut(x):
        return float(numpy.float32(x)) if single else x

    w_a, w_m = cut(w_a), cut(w_m)
    u = [cut(w_0 + cut(w_a * j)) for j in range(d)]
    ks = [round(cut(cut(math.log(cut(x / w_0))) / cut(math.log(w_m)))) for x in u]
    return ks, [8 * round(cut(w_0 * cut(w_m ** k)) / 8) for k in ks]


def stages(d, w_0, w_a, w_m, g) -> tuple[list[int], list[int], list[int]]:
    """Widths, depths and group widths."""
    runs = [(width, len(list(run))) for width, run in groupby(blocks(d, w_0, w_a, w_m)[1])]
    groups = [min(g, width) for width, _ in runs]
    widths = [size * round(width / size) for size, (width, _) in zip(groups, runs)]
    return widths, [depth for _, depth in runs], groups


def settled(d, w_0, w_a, w_m) -> bool:
    """Whether each rounding is far from a tie, or an exact tie that float64 meets exactly."""
    logs = [math.log((w_0 + w_a * j) / w_0) / math.log(w_m) for j in range(d)]
    eighths = {k: w_0 * Fraction(w_m) ** k / 8 for k in blocks(d, w_0, w_a, w_m)[0]}
    return all(abs(x % 1 - 0.5) > 1e-9 for x in logs) and all(
        w_0 * w_m ** k / 8 == x if x % 1 == HALF else abs(x % 1 - HALF) > 1e-9
        for k, x in eighths.items())


def kind_of(d, w_0, w_a, w_m, g) -> str:
    ks, exact = blocks(d, w_0, w_a, w_m)
    if blocks(d, w_0, w_a, w_m, single=True)[1] != exact:
        return "float32 differs"
    if any(w_0 * Fraction(w_m) ** k / 8 % 1 == HALF for k in ks):
        return "tie at a multiple of 8"
    ratios = [Fraction(width, min(g, width)) for width in exact]
    if any(x % 1 == HALF and x // 1 % 2 == 0 for x in ratios):      # half up would go up
        return "tie at groups"
    widths = stages(d, w_0, w_a, w_m, g)[0]
    if len(set(widths)) < len(widths):
        return "two stages of equal width"
    return "one stage" if len(widths) == 1 else "other"


def draw(rng) -> tuple:
    """A set with one u_j near the edge of two stages."""
    d, g = int(rng.integers(8, 33)), int(rng.choice(GROUPS))
    w_0 = 8 * int(2 ** rng.uniform(0, 8))
    w_m = round(rng.uniform(1.2, 3.2), 2) if rng.random() < 0.5 else rng.integers(10, 26) / 8
    edge = w_0 * w_m ** (rng.integers(0, 5) + 0.5)
    w_a = 0.0 if rng.random() < 0.02 else round((edge - w_0) / rng.integers(1, d), 3)
    return d, w_0, float(w_a), float(w_m), g


def make() -> list[dict]:
    rng, left = numpy.random.default_rng(1), dict(KINDS)
    found = [({"name": name}, p) for name, p in SEER.items()]
    while sum(left.values()):
        parameters = draw(rng)
        kind = kind_of(*parameters)
        widths = stages(*parameters)[0]
        if left[kind] and settled(*parameters[:4]) and len(widths) <= 6 and max(widths) < 30000:
            left[kind] -= 1
            found.append(({}, parameters))
    return [name | dict(zip(KEYS, p)) | dict(zip(("widths", "depths", "group_widths"), stages(*p)))
            for name, p in found]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry) for entry in make())
    Path(__file__).with_name("regnet_widths.json").write_text(f"[\n{lines}\n]\n")
