"""Write method_keys.json: names and shapes in the published ResNet-50 checkpoints of other methods.

    python -m tests.oracles.make_method_keys

By layout: where the state dict lies in the file, what stands before the trunk's names (those of
resnet50_swav_keys.json), and names and shapes of the rest, as these build it: facebookresearch's
moco (moco/builder.py), dino (README and issue 189: the published head has two layers, 4096-256, and
no weight normalisation), barlowtwins (main.py), swav (src/resnet50.py, and its scripts for the
widths of the heads), vissl (models/heads/mlp.py; its Barlow Twins head was published without
biases), and lightly (benchmarks/imagenet/resnet50/byol.py).
"""
import json
from pathlib import Path

import torch
from torch import nn


def mlp(*widths: int, bn: bool = True, bias=(True, True), between=nn.ReLU) -> nn.Sequential:
    """bias: of the inner linear layers, of the last one."""
    layers = []
    for i, (w_in, w_out) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        layers.append(nn.Linear(w_in, w_out, bias=bias[last]))
        if not last:
            layers += ([nn.BatchNorm1d(w_out)] if bn else []) + [between()]
    return nn.Sequential(*layers)


def shapes(**modules: nn.Module) -> dict[str, list[int]]:
    """Names, with "__" for a dot -> shapes of all tensors."""
    return {f"{prefix.replace('__', '.')}.{name}": list(tensor.shape)
            for prefix, module in modules.items() for name, tensor in module.state_dict().items()}


def swav(width: int, hidden: int, prototypes: nn.Module) -> dict:
    return {"inside": [], "trunks": ["module."], "width": width,
            "rest": shapes(module__projection_head=mlp(2048 * width, hidden, 128),
                           module__prototypes=prototypes)}


def linears(*sizes: int, name: str = "prototypes") -> nn.ModuleDict:
    return nn.ModuleDict({f"{name}{i}": nn.Linear(128, size, bias=False)
                          for i, size in enumerate(sizes)})


def clf(*modules: nn.Sequential) -> dict[str, list[int]]:
    return {name: shape for i, module in enumerate(modules)
            for name, shape in shapes(**{f"{i}__clf": module}).items()}


def make() -> dict:
    with torch.device("meta"):
        head = dict(mlp=mlp(2048, 4096, 256, between=nn.GELU),
                    last_layer=nn.Linear(256, 60000, bias=False))
        norm, byol = nn.BatchNorm1d, dict(bias=(False, True))
        projector = mlp(2048, 8192, 8192, 8192, bias=(False, False))
        plain = nn.Linear(8192, 8192, bias=False)
        return {
            "moco": {
                "inside": ["state_dict"], "trunks": ["module.encoder_q.", "module.encoder_k."],
                "rest": shapes(**{f"module__encoder_{x}__fc": mlp(2048, 2048, 128, bn=False)
                                  for x in "qk"})
                | {"module.queue": [128, 65536], "module.queue_ptr": [1]}},
            "dino student": {"inside": ["student"], "trunks": ["module.backbone."], "rest": shapes(
                **{f"module__head__{part}": module for part, module in head.items()})},
            "dino teacher": {"inside": ["teacher"], "trunks": ["backbone."], "rest": shapes(
                **{f"head__{part}": module for part, module in head.items()})},
            "dino center": {"inside": ["dino_loss"], "trunks": [], "rest": {"center": [1, 60000]}},
            "barlow_twins": {
                "inside": ["model"], "trunks": ["module.backbone."],
                "rest": shapes(module__projector=projector, module__bn=norm(8192, affine=False))},
            "trunk alone": {"inside": [], "trunks": [""], "rest": {}},
            "deepcluster_v2": swav(1, 2048, linears(3000, 3000, 3000)),
            "swav w2": swav(2, 8192, nn.Linear(128, 3000, bias=False)),
            "swav w4": swav(4, 8192, nn.Linear(128, 3000, bias=False)),
            "swav w5": swav(5, 10240, nn.Linear(128, 3000, bias=False)),
            "vissl simclr": {
                "inside": ["classy_state_dict", "base_model", "model"],
                "trunks": ["_feature_blocks."],
                "heads": clf(mlp(2048, 2048), mlp(2048, 128)), "rest": {}},
            "vissl barlow_twins": {
                "inside": ["classy_state_dict", "base_model", "model"],
                "trunks": ["_feature_blocks."], "rest": {},
                "heads": clf(nn.Sequential(nn.Linear(2048, 8192, bias=False), norm(8192)),
                             nn.Sequential(plain, norm(8192)), nn.Sequential(plain))},
            "lightly byol": {
                "inside": ["state_dict"], "trunks": ["backbone.", "teacher_backbone."],
                "rest": shapes(projection_head__layers=mlp(2048, 4096, 256, **byol),
                               prediction_head__layers=mlp(256, 4096, 256, **byol),
                               teacher_projection_head__layers=mlp(2048, 4096, 256, **byol),
                               online_classifier__linear=nn.Linear(2048, 1000))}}


def main() -> None:
    lines = [f" {json.dumps(layout)}: {json.dumps(entry)}" for layout, entry in make().items()]
    Path(__file__).with_name("method_keys.json").write_text(
        "{\n" + ",\n".join(lines).replace(", \"", ",\n  \"") + "\n}\n")


if __name__ == "__main__":
    main()
