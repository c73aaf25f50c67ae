"""Preprocessing: what the run beside a file of weights says about it, and how it takes images.

    loaded = read("runs/mine")
    config = config_of(loaded)                              # {"arch": "regnety_16gf", ...}
    preprocessing_of(config, loaded.path)                   # {"size": 224, "mean": ..., "std": ...}

Needs multicrop.py, whose text for crops, mean and std a configuration holds.
"""
import json
from pathlib import Path

from multicrop import IMAGENET_MEAN, IMAGENET_STD, parse_channels, parse_crops
from weights.files import Loaded
from weights.official import official_names

PRODUCTS = ("trunk.pt", "best.pt", "last.pt")        # their configuration is in config.json
USUAL = {"size": 224, "crop_ratio": 0.875, "bicubic": False,        # for what is not known
         "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
SEER_FINETUNED = {"size": 384, "crop_ratio": 1.0, "bicubic": True}      # its official networks


def config_of(loaded: Loaded) -> dict:
    """The configuration of the run that a file is of: its own, or that of config.json beside it; {}
    where there is none. Raises ValueError for a config.json that is damaged."""
    beside = loaded.path.parent / "config.json"
    if loaded.config or loaded.path.name not in PRODUCTS or not beside.exists():
        return loaded.config
    try:
        return json.loads(beside.read_text())["config"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{beside} is damaged: move it away") from None


def preprocessing_of(config: dict, path: Path | None) -> dict:
    """How a network's own images were preprocessed, as far as it is known: size, crop_ratio,
    bicubic, mean, std, or some of them.

    config: a run's, with text for crops, mean and std; a fine-tuned run's has in "recipe" a
    dictionary with the rest.  path: of the file; SEER's official fine-tuned ones are known by name.
    """
    known = {name: parse_channels(config[name]) for name in ("mean", "std") if name in config}
    if "crops" in config:
        known["size"] = parse_crops(config["crops"])[0].size
    names = [path.name, *official_names(path)] if path else []
    if any(name.startswith("seer_ft") for name in names):
        known |= SEER_FINETUNED
    elif isinstance(config.get("recipe"), dict):
        known |= {name: config["recipe"][name] for name in SEER_FINETUNED
                  if name in config["recipe"]}
    return known
