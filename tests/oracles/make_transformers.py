"""Write transformers.json: two small RegNets as transformers saves and runs them.

    pip install transformers && python -m tests.oracles.make_transformers

Both have a classifier. Of each the fields of config.json that say which network it is, names and
shapes of the weights, and features and logits; the weights and images are those of make_layouts.py.
And the fields of BitImageProcessor's preprocessor_config.json.
"""
import json
from pathlib import Path

import torch

from tests.oracles.make_layouts import fill, images

NETWORKS = {"y": dict(embedding_size=32, hidden_sizes=[8, 24, 40], depths=[1, 2, 1], groups_width=8,
                      layer_type="y", num_labels=5),
            "x": dict(embedding_size=16, hidden_sizes=[8, 16, 32, 48], depths=[2, 1, 1, 1],
                      groups_width=16, layer_type="x", num_labels=3)}
FIELDS = ("model_type", "num_channels", "embedding_size", "hidden_sizes", "depths", "groups_width",
          "layer_type", "hidden_act", "downsample_in_first_stage")


def main() -> None:
    import transformers
    networks = []
    for options in NETWORKS.values():
        network = transformers.RegNetForImageClassification(transformers.RegNetConfig(**options))
        shapes = [(key, list(value.shape)) for key, value in network.state_dict().items()]
        network.load_state_dict(fill(shapes))
        network.double().eval()
        with torch.no_grad():
            features = network.regnet(images().double()).pooler_output.flatten(1)
            logits = network(images().double()).logits
        config = network.config.to_dict()
        networks.append({"config": {field: config[field] for field in FIELDS}, "shapes": shapes,
                         **{name: [[round(x, 7) for x in row] for row in output.tolist()]
                            for name, output in (("features", features), ("logits", logits))}})
    content = {"made_by": f"transformers {transformers.__version__}", "networks": networks,
               "preprocessor": sorted(transformers.BitImageProcessor().to_dict())}
    Path(__file__).with_name("transformers.json").write_text(json.dumps(content) + "\n")


if __name__ == "__main__":
    main()
