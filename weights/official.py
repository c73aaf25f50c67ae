"""Official files: published RegNets, and SwAV's ResNet-50s, by name: arch, licence, download.

    OFFICIAL["seer_regnety_32gf"].licence               # "seer", a key of LICENCES
    path = fetch("torchvision_regnety_400mf_v2")        # in torch.hub's cache, downloaded once
    official_names(path)                                # ["torchvision_regnety_400mf_v2"]

Needs torch; the size of a file is known where regnet.py is there. Raises ValueError where a
download fails. Licences: SEER's weights are for non-commercial research only, those of SwAV's
ResNet-50s and SWAG's are CC BY-NC 4.0.
"""
import http.client
import re
import sys
from pathlib import Path
from typing import Iterator, NamedTuple

import torch

from weights.terminal import reason

LICENCES = {
    "seer": "SEER License Agreement: non-commercial research only "
            "(github.com/facebookresearch/vissl, projects/SEER/MODEL_LICENSE.md)",
    "swav": "CC BY-NC 4.0: non-commercial (github.com/facebookresearch/swav)",
    "swag": "CC BY-NC 4.0: non-commercial (github.com/facebookresearch/SWAG)",
    "vissl": "none of their own; VISSL's repository is MIT (github.com/facebookresearch/vissl)",
    "torchvision": "BSD-3-Clause (github.com/pytorch/vision)",
}


class Official(NamedTuple):
    url: str
    arch: str                      # a name of regnet.ARCHS, or resnet50
    licence: str                   # a key of LICENCES
    about: str


_VISSL = "https://dl.fbaipublicfiles.com/vissl/model_zoo/"
_SEER = {
    "32gf": "seer_regnet32d/seer_regnet32gf_model_iteration244000.torch",
    "64gf": "seer_regnet64/seer_regnet64gf_model_final_checkpoint_phase0.torch",
    "128gf": "swav_ig1b_regnet128Gf_cnstant_bs32_node16_sinkhorn10_proto16k_syncBN64_"
             "warmup8k/model_final_checkpoint_phase0.torch",
    "256gf": "swav_ig1b_cosine_rg256gf_noBNhead_wd1e5_fairstore_bs16_node64_sinkhorn10_"
             "proto16k_apex_syncBN64_warmup8k/model_final_checkpoint_phase0.torch",
    "10b": "seer_regnet10B/model_iteration124500_conso.torch",
}
_SEER_FINETUNED = {
    "32gf": "seer_regnet32_finetuned_in1k_model_final_checkpoint_phase78.torch",
    "64gf": "seer_regnet64_finetuned_in1k_model_final_checkpoint_phase78.torch",
    "128gf": "seer_regnet128_finetuned_in1k_model_final_checkpoint_phase78.torch",
    "256gf": "seer_regnet256_finetuned_in1k_model_final_checkpoint_phase38.torch",
    "10b": "seer_10b_finetuned_in1k_model_phase28_conso.torch",
}
_SWAV_REGNET = {
    "16gf": "swav_regnet16_in1k/swav_in1k_regnet16gf_model_final_checkpoint_phase799.torch",
    "128gf": "swav_regnet128_in1k/model_phase230.torch",
}
_SWAV_RESNET = "100ep 200ep 400ep 800ep 200ep_bs256 400ep_bs256 400ep_2x224"
# torchvision and SWAG: the end of a file's name is the beginning of its SHA-256
_TORCHVISION = """
size      v1       v2
y_400mf   c65dace8 e6988f5f
y_800mf   1b27b58c 58fc7688
y_1_6gf   b11a554e 0d7bc02a
y_3_2gf   b5a9779c 9180c971
y_8gf     d0d0e4a8 dc2b1b54
y_16gf    9e6ed7dd 3e4a00f9
y_32gf    4dee3f7a 8db6d4b5
x_400mf   adf1edd5 62229a5f
x_800mf   ad17e45c 94a99ebd
x_1_6gf   e3633e7f a12f2b72
x_3_2gf   f342aeae 7071aa85
x_8gf     03ceed89 2b70d774
x_16gf    2007eb11 ba3796d7
x_32gf    9d47f8d0 6eb8fdc6
"""
_SWAG = """
size      whole    linear
16gf      43afe44d f3ec0043
32gf      04fdfa75 e1583746
128gf     c8ce3e52 cbe8ce12
"""


def _rows(table: str) -> list[list[str]]:
    return [row.split() for row in table.strip().splitlines()[1:]]


def _of_vissl() -> Iterator[tuple[str, Official]]:
    for size, path in _SEER.items():
        yield f"seer_regnety_{size}", Official(
            _VISSL + path, f"regnety_{size}", "seer", "SEER, a billion images, no labels")
    for size, path in _SEER_FINETUNED.items():
        yield f"seer_ft_regnety_{size}", Official(
            f"{_VISSL}seer_finetuned/{path}", f"regnety_{size}", "seer",
            "SEER, fine-tuned on ImageNet at 384 pixels")
    for size, path in _SWAV_REGNET.items():
        yield f"swav_regnety_{size}", Official(
            _VISSL + path, f"regnety_{size}", "vissl", "SwAV on ImageNet, no labels")


def _of_swav() -> Iterator[tuple[str, Official]]:
    for run in _SWAV_RESNET.split():
        yield f"swav_resnet50_{run}", Official(
            f"https://dl.fbaipublicfiles.com/deepcluster/swav_{run}_pretrain.pth.tar", "resnet50",
            "swav", "SwAV on ImageNet, no labels")


def _of_torchvision() -> Iterator[tuple[str, Official]]:
    root = "https://download.pytorch.org/models/regnet_"
    for size, v1, v2 in _rows(_TORCHVISION):
        arch = "regnet" + size[0] + "_" + size[2:].replace("_", ".")        # regnety_1.6gf
        for version, digest in ((1, v1), (2, v2)):
            yield f"torchvision_{arch}_v{version}", Official(
                f"{root}{size}-{digest}.pth", arch, "torchvision",
                f"torchvision, ImageNet with labels, recipe {version}")
    for size, whole, linear in _rows(_SWAG):
        yield f"swag_regnety_{size}", Official(
            f"{root}y_{size}_swag-{whole}.pth", f"regnety_{size}", "swag",
            "SWAG, hashtags, then ImageNet")
        yield f"swag_linear_regnety_{size}", Official(
            f"{root}y_{size}_lc_swag-{linear}.pth", f"regnety_{size}", "swag",
            "SWAG, hashtags, then ImageNet with the trunk frozen")


OFFICIAL = {name: entry for entries in (_of_vissl(), _of_swav(), _of_torchvision())
            for name, entry in entries}
_licences_printed = set()          # by this process


def official_names(path: Path) -> list[str]:
    """The official files that a file may be, going by its own name: the last part of a URL, or
    NAME.torch. Several where URLs end alike, none for any other file."""
    return [name for name, entry in OFFICIAL.items()
            if path.name in (entry.url.rpartition("/")[2], f"{name}.torch")]


def fetch(name: str, quiet: bool = False) -> Path:
    """An official file in torch.hub's cache; downloaded if it is not there. Prints its licence
    once, unless quiet. Raises ValueError where the download fails.

    The file is named as torchvision names its own, by the last part of the URL, so that both share
    it. Where other URLs end alike (two of SEER's do) it is NAME.torch.
    """
    entry = OFFICIAL[name]
    last = entry.url.rpartition("/")[2]
    unique = sum(other.url.endswith("/" + last) for other in OFFICIAL.values()) == 1
    path = Path(torch.hub.get_dir(), "checkpoints", last if unique else f"{name}.torch")
    if entry.licence not in _licences_printed and not quiet:
        _licences_printed.add(entry.licence)
        print(f"licence of {name}: {LICENCES[entry.licence]}", file=sys.stderr)
    digest = re.search(r"-([0-9a-f]{8})\.", last)
    return download(entry.url, path, digest and digest[1], gigabytes(entry))


def gigabytes(entry: Official) -> float | None:
    """The least size of a file: the trunk's parameters in float32. (A file of VISSL's may also hold
    the optimizer's state.) None where regnet.py, which counts them, is not there."""
    if entry.arch == "resnet50":
        return 0.1
    try:
        from regnet import ARCHS, complexity
    except ImportError:
        return None
    return 4e-9 * complexity(ARCHS[entry.arch]).params


def download(url: str, path: Path, digest: str | None = None, size: float | None = None) -> Path:
    """Download url to path if there is no file yet; returns path. digest: how the file's SHA-256
    begins. size: in gigabytes, printed. Raises ValueError where the download fails."""
    if not path.exists():
        about = "" if size is None else f", {size:.2g} GB or more"
        print(f"downloading {url}{about}, to {path}", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), digest)
        except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
            raise ValueError(f"{url} could not be downloaded: {reason(error)}; put the file at "
                             f"{path}") from None
    return path
