"""Hugging Face: a folder that transformers opens from disk.

    write_folder(read("runs/mine"), Path("hf"))         # python -m weights runs/mine --to hf hf
    transformers.RegNetModel.from_pretrained("hf")      # elsewhere
    transformers.AutoImageProcessor.from_pretrained("hf")

config.json says which RegNet it is, preprocessor_config.json how images become its input, and
model.safetensors holds the weights; a classifier's too, for RegNetForImageClassification. Facts:
transformers' RegNetConfig, modeling_regnet.py and BitImageProcessor (5.24).
"""
import json
import os
import tempfile
from pathlib import Path

from torch import Tensor

from weights.atomic import save_safetensors
from weights.files import Loaded
from weights.load import describe, stages_of
from weights.names import from_ours
from weights.preprocessing import USUAL, config_of, preprocessing_of


def write_folder(loaded: Loaded, out: Path) -> None:
    """Write the folder, whole or not at all. Raises ValueError for a network that transformers'
    RegNet cannot be, OSError where it cannot be written."""
    run = config_of(loaded)
    texts = {"config.json": model_config(loaded.tensors, run.get("classes")),
             "preprocessor_config.json": preprocessor_config(run, loaded.path)}
    state = from_ours(loaded.tensors, "transformers")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.") as aside:
        folder = Path(aside, out.name)
        folder.mkdir()
        for name, content in texts.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")
        save_safetensors(folder / "model.safetensors", state)
        os.rename(folder, out)


def model_config(tensors: dict[str, Tensor], classes: list[str] | None = None) -> dict:
    """What RegNetConfig holds for tensors with torchvision's names.  classes: names of the
    classifier's.

    There one group width g is of all stages, a stage of width w has max(1, w // g) groups, and
    squeeze-and-excitation has a quarter of a block's input's channels. Raises ValueError for a
    network that is not so.
    """
    stages, squeeze = stages_of(tensors)
    if not stages:
        raise ValueError(f"transformers' RegNet cannot be {describe(tensors)}")
    widths, depths, groups = map(list, zip(*stages))
    if any(g * max(1, w // max(groups)) != w for w, g in zip(widths, groups)):
        raise ValueError("transformers' RegNet has one group width for all stages, which "
                         f"{describe(tensors)} has not")
    for name, tensor in tensors.items():
        if name.endswith(".f.se.fc1.weight"):
            w_in = tensors[name.replace("f.se.fc1", "f.a.0")].shape[1]
            if len(tensor) != round(w_in / 4):
                raise ValueError("transformers' RegNetY has squeeze-and-excitation of a quarter of "
                                 f"a block's input, which {name} has not: {len(tensor)} of {w_in}")
    stem = tensors["stem.0.weight"]
    config = {"model_type": "regnet", "architectures": ["RegNetModel"],
              "num_channels": stem.shape[1], "embedding_size": len(stem), "hidden_sizes": widths,
              "depths": depths, "groups_width": max(groups), "layer_type": "y" if squeeze else "x",
              "hidden_act": "relu", "downsample_in_first_stage": True}
    if "fc.weight" in tensors:
        count = len(tensors["fc.weight"])
        config |= {"architectures": ["RegNetForImageClassification"]}
        config |= {"num_labels": count} if len(classes or ()) != count else {
            "id2label": {str(i): name for i, name in enumerate(classes)},
            "label2id": {name: i for i, name in enumerate(classes)}}
    return config


def preprocessor_config(run: dict, path: Path | None) -> dict:
    """How transformers' BitImageProcessor is to preprocess images, as evaluate.py does with --data.

    run: the configuration; {}: ImageNet's usual preprocessing.  path: of the file.
    """
    known = USUAL | preprocessing_of(run, path)
    square = {"height": known["size"], "width": known["size"]}
    ratio = known["crop_ratio"]                 # 0: the whole image as a square
    return {"image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": round(known["size"] / ratio)} if ratio else square,
            "resample": 3 if known["bicubic"] else 2, "do_center_crop": bool(ratio),
            "crop_size": square, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(known["mean"]),
            "image_std": list(known["std"])}
