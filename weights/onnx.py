"""ONNX: a trunk, and its classifier where there is one, as a graph for any runtime.

    export(read("runs/mine"), Path("mine.onnx"))        # python -m weights runs/mine --to onnx ...
    session = onnxruntime.InferenceSession("mine.onnx")             # elsewhere
    features, = session.run(["features"], {"images": images})

Input `images`: float32 (N, 3, H, W), normalised; N, H and W are free. Outputs: `features` (N, C)
and, of a file with a classifier, `logits` (N, K). More than 2 GB of weights, which is all that an
ONNX file can hold, lie in a file beside it, OUT.data.

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
from weights.trunk import open_trunk

MOST = 1_900_000_000            # bytes of weights in the file itself: it ends at 2 ** 31


class Outputs(nn.Module):
    """images (N, 3, H, W) -> features (N, C), and logits (N, K) where there is an fc."""

    def __init__(self, trunk: nn.Module, fc: nn.Linear | None):
        super().__init__()
        self.trunk, self.fc = trunk, fc

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = self.trunk(images)
        return (features, self.fc(features)) if self.fc else (features,)


def export(loaded: Loaded, out: Path) -> None:
    """Write the graph to out, whole or not at all. Raises ValueError where a package is missing,
    and for a network that is none of regnet.ARCHS or a ResNet-50; OSError where it cannot be
    written."""
    if missing := [name for name in ("onnx", "onnxscript") if not importlib.util.find_spec(name)]:
        raise ValueError(f"{out} needs {' and '.join(missing)}: pip install onnx onnxscript")
    trunk, fc = open_trunk(loaded)[0].float(), None
    if "fc.weight" in loaded.tensors:
        weight = loaded.tensors["fc.weight"]
        fc = nn.Linear(*reversed(weight.shape))
        fc.load_state_dict({"weight": weight, "bias": loaded.tensors["fc.bias"]})
    network = Outputs(trunk, fc).eval()
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as aside:
        torch.onnx.export(
            network, (torch.zeros(2, 3, 64, 64),), Path(aside, out.name), verbose=False,
            dynamo=True, input_names=["images"], output_names=["features", "logits"][:1 + bool(fc)],
            dynamic_shapes={"images": {0: Dim("batch"), 2: Dim("height"), 3: Dim("width")}},
            external_data=size > MOST)
        for file in sorted(Path(aside).iterdir(), reverse=True):        # the data first
            os.replace(file, out.with_name(file.name))
