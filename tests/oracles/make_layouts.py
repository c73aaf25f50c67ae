"""Write layouts.json: names, shapes and features of timm's and transformers' RegNets.

    pip install timm transformers && python -m tests.oracles.make_layouts

The weights are not stored: `fill` makes them again from the names and shapes.
"""
import json
from pathlib import Path

import torch


def fill(shapes: list) -> dict[str, torch.Tensor]:
    """Random weights with which activations stay of order one; the same for the same list."""
    state = {}
    for seed, (name, shape) in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            value = 1 + 0.1 * value.abs()
        elif name.endswith("num_batches_tracked"):
            value = torch.tensor(seed)
        elif len(shape) == 4:
            value = value * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name.endswith("weight") and len(shape) == 1:
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        state[name] = value if value.dtype == torch.long else value.float()
    return state


def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def main() -> None:
    import timm
    import transformers
    networks = {f"timm {timm.__version__}: {name}, {arch}": timm.create_model(name, num_classes=0)
                for name, arch in (("regnety_004", "regnety_400mf"),
                                   ("regnetx_016", "regnetx_1.6gf"),
                                   ("regnety_008_tv", "regnety_800mf"))}
    for kind, name, widths, depths, groups in (
            ("y", "regnety_400mf", [48, 104, 208, 440], [1, 3, 6, 6], 8),
            ("x", "regnetx_200mf", [24, 56, 152, 368], [1, 1, 4, 7], 8)):
        config = transformers.RegNetConfig(embedding_size=32, hidden_sizes=widths, depths=depths,
                                           groups_width=groups, layer_type=kind)
        made_by = f"transformers {transformers.__version__}: {kind}, {name}"
        networks[made_by] = transformers.RegNetModel(config)
    entries = []
    for name, network in networks.items():
        shapes = [(key, list(value.shape)) for key, value in network.state_dict().items()]
        network.load_state_dict(fill(shapes))
        with torch.no_grad():
            features = network.double().eval()(images().double())
        features = getattr(features, "pooler_output", features).flatten(1)
        entries.append({"made_by": name, "shapes": shapes,
                        "features": [[round(x, 7) for x in row] for row in features.tolist()]})
    Path(__file__).with_name("layouts.json").write_text(json.dumps(entries))


if __name__ == "__main__":
    main()
