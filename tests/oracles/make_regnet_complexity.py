"""Write regnet_complexity.json: parameters, FLOPs and activations of 28 published RegNets.

    python -m tests.oracles.make_regnet_complexity

The generator's parameters and, for 24 models, the counts are those that pycls publishes
(configs/dds_baselines and dev/model_complexity.json of facebookresearch/pycls). All counts are
computed here in integers, by pycls' rules; for the 24 models they must equal the published ones.

    params        learnable parameters with a linear layer of 1000 classes
    trunk_params  without that layer
    flops         multiply-adds of one image of 224 x 224: k*k * w_in * w_out * h * w / groups of a
                  convolution, + w_out * h * w with a bias; the linear layer with its bias;
                  BN, ReLU, pooling and the product with squeeze-and-excitation's gate are free
    acts          elements of all convolutions' outputs, squeeze-and-excitation included, + logits
"""
import json
from pathlib import Path

from tests.oracles.make_regnet_widths import KEYS, stages

# name: depth, w_0, w_a, w_m, group width; then params, flops, acts, where pycls publishes them
MODELS = {
    "RegNetX-200MF": (13, 24, 36.44, 2.49, 8, 2684792, 199040872, 2164056),
    "RegNetX-400MF": (22, 24, 24.48, 2.54, 16, 5157512, 397678568, 3143272),
    "RegNetX-600MF": (16, 48, 36.97, 2.24, 24, 6196040, 600891112, 3975096),
    "RegNetX-800MF": (16, 56, 35.73, 2.28, 16, 7259656, 799700712, 5148744),
    "RegNetX-1.6GF": (18, 80, 34.01, 2.25, 24, 9190136, 1602850792, 7933512),
    "RegNetX-3.2GF": (25, 88, 26.31, 2.25, 48, 15296552, 3176622952, 11367432),
    "RegNetX-4.0GF": (23, 96, 38.65, 2.43, 40, 22118248, 3964499816, 12201608),
    "RegNetX-6.4GF": (17, 184, 60.83, 2.07, 56, 26209256, 6460292264, 16369744),
    "RegNetX-8.0GF": (23, 80, 49.56, 2.88, 120, 39572648, 7995133416, 14059688),
    "RegNetX-12GF": (19, 168, 73.36, 2.37, 112, 46106056, 12086679016, 21366568),
    "RegNetX-16GF": (22, 216, 55.59, 2.1, 128, 54278536, 15940756456, 25515496),
    "RegNetX-32GF": (23, 320, 69.86, 2.0, 168, 107811560, 31735930792, 36302160),
    "RegNetY-200MF": (13, 24, 36.44, 2.49, 8, 3162996, 199519076, 2168052),
    "RegNetY-400MF": (16, 48, 27.89, 2.09, 8, 4344144, 401849056, 3892496),
    "RegNetY-600MF": (15, 48, 32.54, 2.32, 16, 6055160, 601227608, 4334296),
    "RegNetY-800MF": (14, 56, 38.84, 2.4, 16, 6263168, 797183328, 5249888),
    "RegNetY-1.6GF": (27, 48, 20.71, 2.65, 24, 11202430, 1612087326, 8044814),
    "RegNetY-3.2GF": (21, 80, 42.63, 2.66, 24, 19436338, 3176496162, 11263418),
    "RegNetY-4.0GF": (22, 96, 31.41, 2.24, 64, 20646656, 3973301344, 12287200),
    "RegNetY-6.4GF": (25, 112, 33.22, 2.27, 72, 30583252, 6355221876, 16407188),
    "RegNetY-8.0GF": (17, 192, 76.82, 2.19, 56, 39180068, 7963074196, 17968916),
    "RegNetY-12GF": (19, 168, 73.36, 2.37, 112, 51822544, 12092395504, 21384496),
    "RegNetY-16GF": (18, 200, 106.23, 2.48, 112, 83590140, 15911534044, 23041228),
    "RegNetY-32GF": (20, 232, 115.89, 2.53, 232, 145046770, 32279583362, 30261570),
    "RegNetY-64GF": (20, 352, 147.48, 2.4, 328),
    "RegNetY-128GF": (27, 456, 160.83, 2.52, 264),
    "RegNetY-256GF": (27, 640, 230.83, 2.53, 373),
    "RegNetY-10B": (27, 1744, 620.83, 2.52, 1010),
}


def count(widths, depths, groups, se_ratio, classes=1000, size=224) -> tuple[int, int, int, int]:
    """params, trunk_params, flops, acts."""
    total = {"params": 0, "flops": 0, "acts": 0}

    def conv(w_in, w_out, kernel, size, groups=1, bias=False):
        weights = kernel * kernel * w_in * w_out // groups
        total["params"] += weights + bias * w_out
        total["flops"] += (weights + bias * w_out) * size * size
        total["acts"] += w_out * size * size

    def conv_bn(w_in, w_out, *rest):
        conv(w_in, w_out, *rest)
        total["params"] += 2 * w_out

    w_in, size = 32, (size + 1) // 2
    conv_bn(3, w_in, 3, size)                                   # stem, stride 2
    for width, depth, group_width in zip(widths, depths, groups):
        for block in range(depth):
            size_in, size = size, size if block else (size + 1) // 2
            if not block:
                conv_bn(w_in, width, 1, size)                   # projection
            conv_bn(w_in, width, 1, size_in)
            conv_bn(width, width, 3, size, width // group_width)
            if se_ratio:
                se_width = round(se_ratio * w_in)               # half to even
                conv(width, se_width, 1, 1, 1, True)
                conv(se_width, width, 1, 1, 1, True)
            conv_bn(width, width, 1, size)
            w_in = width
    linear = (w_in + 1) * classes
    return (total["params"] + linear, total["params"], total["flops"] + linear,
            total["acts"] + classes)


def make() -> list[dict]:
    entries = []
    for name, row in MODELS.items():
        parameters, published = row[:5], row[5:]
        shape = stages(*parameters)
        se_ratio = 0.25 if name.startswith("RegNetY") else None
        params, trunk_params, flops, acts = count(*shape, se_ratio)
        assert published in ((), (params, flops, acts)), name
        entries.append({
            "name": name, "se_ratio": se_ratio, **dict(zip(KEYS, parameters)),
            **dict(zip(("widths", "depths", "group_widths"), shape)), "params": params,
            "trunk_params": trunk_params, "flops": flops, "acts": acts,
            "source": f"pycls {'model_complexity.json' if published else 'complexity rules'}"})
    return entries


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry) for entry in make())
    Path(__file__).with_name("regnet_complexity.json").write_text(f"[\n{lines}\n]\n")
