"""ONNX: a trunk, and its classifier where there is one, as a graph for any runtime.

    export(read("runs/mine"), Path("mine.onnx"))        # python -m weights runs/mine --to onnx ...
    session = onnxruntime.InferenceSession("mine.onnx")             # elsewhere
    features, = session.run(["features"], {"images": images})
    session.get_modelmeta().custom_metadata_map         # {"mean": "0.485,0.456,0.406", ...}

Input `images`: float32 (N, 3, H, W), RGB from 0 to 1, normalised by the mean and std of the graph's
metadata; N, H and W are free. Outputs: `features` (N, C) and, of a file with a classifier, `logits`
(N, K). Where the weights are too large for an ONNX file, which ends at 2 GB, they lie beside it in
OUT.data.

Needs onnx and onnxscript, with which torch.onnx writes.
"""
import importlib.util
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim

from weights.files import Loaded
from weights.preprocessing import USUAL, config_of, preprocessing_of
from weights.trunk import open_trunk


class Outputs(nn.Module):
    """images (N, 3, H, W) -> features (N, C), and logits (N, K) where there is an fc."""

    def __init__(self, trunk: nn.Module, fc: nn.Linear | None):
        super().__init__()
        self.trunk, self.fc = trunk, fc

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.trunk(images)
        return (features, self.fc(features)) if self.fc else (features,)


def classifier_of(tensors: dict[str, Tensor]) -> nn.Linear | None:
    """fc, with or without a bias; None where there is none."""
    if "fc.weight" not in tensors:
        return None
    fc = nn.Linear(*reversed(tensors["fc.weight"].shape), bias="fc.bias" in tensors)
    fc.load_state_dict({name: tensors[f"fc.{name}"] for name, _ in fc.named_parameters()})
    return fc


def export(loaded: Loaded, out: Path) -> None:
    """Write the graph to out, whole or not at all. Raises ValueError where a package is missing,
    and for a network that is none of regnet.ARCHS or a ResNet-50; OSError where it cannot be
    written."""
    if not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise ValueError(f"{out} needs onnx and onnxscript: pip install onnx onnxscript")
    (trunk, _), fc = open_trunk(loaded), classifier_of(loaded.tensors)
    # first of all, for it fails where the folder is not there
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as aside:
        program = torch.onnx.export(
            Outputs(trunk, fc).eval(), (torch.zeros(2, 3, 64, 64),), dynamo=True, verbose=False,
            input_names=["images"], output_names=["features", "logits"] if fc else ["features"],
            dynamic_shapes={"images": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}})
        known = USUAL | preprocessing_of(config_of(loaded), loaded.path)
        for name in ("mean", "std"):
            program.model.metadata_props[name] = ",".join(map(str, known[name]))
        program.save(Path(aside, out.name))
        for file in sorted(Path(aside).iterdir(), reverse=True):        # the data first
            os.replace(file, out.with_name(file.name))
