"""Write resnet50_swav_keys.json: names, shapes and types in SwAV's ResNet-50 checkpoint.

    python -m tests.oracles.make_resnet50_swav_keys

The trunk is torchvision's resnet50 without its classifier; the head is the definition of
facebookresearch/swav (hidden_mlp=2048, output_dim=128, nmb_prototypes=3000): Linear, BatchNorm1d,
ReLU, Linear, and prototypes without a bias. All names begin with DistributedDataParallel's
"module.".
"""
import json
from pathlib import Path

import torch
import torchvision
from torch import nn

HIDDEN, DIM, PROTOTYPES = 2048, 128, 3000


def make() -> dict:
    with torch.device("meta"):
        network = torchvision.models.resnet50()
        network.fc = nn.Identity()
        trunk_parameters = sum(p.numel() for p in network.parameters())
        network.projection_head = nn.Sequential(
            nn.Linear(2048, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM))
        network.prototypes = nn.Linear(DIM, PROTOTYPES, bias=False)
    keys = [{"key": f"module.{name}", "shape": list(value.shape),
             "dtype": str(value.dtype).removeprefix("torch.")}
            for name, value in network.state_dict().items()]
    return {"architecture": "resnet50", "hidden_mlp": HIDDEN, "output_dim": DIM,
            "nmb_prototypes": PROTOTYPES, "num_keys": len(keys),
            "num_parameters": sum(p.numel() for p in network.parameters()),
            "num_trunk_parameters": trunk_parameters, "keys": keys}


def main() -> None:
    content = make()
    keys = ",\n".join(f"  {json.dumps(entry)}" for entry in content.pop("keys"))
    rest = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items())
    Path(__file__).with_name("resnet50_swav_keys.json").write_text(
        f'{{\n{rest} "keys": [\n{keys}\n ]\n}}\n')


if __name__ == "__main__":
    main()
