"""Official files: published RegNets, and ResNet-50s of many methods: arch, licence, download.

    OFFICIAL["seer_regnety_32gf"].licence               # "seer", a key of LICENCES
    path = fetch("torchvision_regnety_400mf_v2")        # in torch.hub's cache, downloaded once
    official_names(path)                                # ["torchvision_regnety_400mf_v2"]

Needs torch; the size of a file is known where regnet.py is there. Raises ValueError where a
download fails. Licences: SEER's weights are for non-commercial research only, those of
facebookresearch/swav's ResNet-50s and SWAG's are CC BY-NC 4.0. URLs are those of each repository's
README, and of VISSL's MODEL_ZOO.md.
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
    "moco": "MIT by its source files, CC BY-NC 4.0 (non-commercial) by its README "
            "(github.com/facebookresearch/moco)",
    "dino": "Apache-2.0 (github.com/facebookresearch/dino)",
    "barlowtwins": "MIT (github.com/facebookresearch/barlowtwins)",
    "lightly": "MIT (github.com/lightly-ai/lightly)",
    "miniature": "MIT, as this project; those of its pictures are in docs/sets.md",
}


class Official(NamedTuple):
    url: str                       # or a file of this repository
    arch: str                      # a name of regnet.ARCHS or of RESNETS
    licence: str                   # a key of LICENCES
    about: str


RESNETS = {"resnet50": 23.5e6, "resnet50w2": 93.9e6, "resnet50w4": 375e6,
           "resnet50w5": 586e6}                 # parameters
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
# name -> file, of facebookresearch/swav's repository
_SWAV_RESNET = {
    **{f"swav_resnet50_{run}": f"swav_{run}" for run in (
        "100ep", "200ep", "400ep", "800ep", "200ep_bs256", "400ep_bs256", "400ep_2x224")},
    **{f"swav_resnet50{width}_400ep": f"swav_RN50{width}_400ep" for width in ("w2", "w4", "w5")},
    **{f"deepcluster_v2_resnet50_{run}": f"deepclusterv2_{run}"
       for run in ("800ep", "400ep", "400ep_2x224")},
    **{f"sela_v2_resnet50_{run}": f"selav2_{run}" for run in ("400ep", "400ep_2x224")}}
_METHODS = {"swav": "SwAV", "deepcluster_v2": "DeepCluster-v2", "sela_v2": "SeLa-v2"}
_CROPS = {"deepcluster_v2_resnet50_400ep": "2x160 + 4x96", "sela_v2_resnet50_400ep": "2x160 + 4x96"}
# SimCLR of VISSL: epochs, and what stands in the URL
_SIMCLR = """
network    epochs run                  date  digest
resnet50   100    rn50_100ep           16_07 8edb093e
resnet50   200    rn50_200ep           16_07 a816c0ef
resnet50   400    rn50_400ep           16_07 36b338ef
resnet50   800    rn50_800ep           16_07 7e8feed1
resnet50   1000   rn50_1000ep          16_07 afe428c7
resnet50w2 100    rn50w2_100ep         16_07 05b37ec3
resnet50w2 1000   rn50w2_1000ep        16_07 e1e3bbf0
resnet50w4 1000   rn50w4_1000ep_bs32_16node 28_07 9e20b0ae
"""
# SwAV of VISSL: what stands in the URL
_VISSL_SWAV = """
network    run         folder
resnet50   100ep       swav_in1k_rn50_100ep_swav_8node_resnet_27_07_20.7e6fc6bf
resnet50   200ep       swav_in1k_rn50_200ep_swav_8node_resnet_27_07_20.bd595bb0
resnet50   400ep       swav_in1k_rn50_400ep_swav_8node_resnet_27_07_20.a5990fc9
resnet50   800ep       swav_in1k_rn50_800ep_swav_8node_resnet_27_07_20.a0a6b676
resnet50   200ep_bs256 swav_4gpu_bs64_200ep_2x224_6x96_queue_swav_8node_resnet_28_07_20.a8f2c735
resnet50   400ep_bs256 swav_4gpu_bs64_400ep_2x224_6x96_queue_swav_8node_resnet_28_07_20.5e967ca0
resnet50   400ep_2x224 swav_8node_2x224_rn50_in1k_swav_8node_resnet_30_07_20.c8fd7169
resnet50w2 400ep       swav_rn50w2_in1k_bs32_16node_400ep_swav_8node_resnet_30_07_20.93563e51
resnet50w4 400ep       swav_rn50w4_in1k_bs40_8node_400ep_swav_8node_resnet_30_07_20.1736135b
"""
_BARLOW = "https://dl.fbaipublicfiles.com/barlowtwins/ep1000_bs2048_lrw0.2_lrb0.0048_lambd0.0051/"
_LIGHTLY = "https://lightly-ssl-checkpoints.s3.amazonaws.com/imagenet_resnet50_"
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
    for name, file in _SWAV_RESNET.items():
        method, arch = re.match(r"(\w+)_(resnet50(?:w\d)?)_", name).groups()
        yield name, Official(
            f"https://dl.fbaipublicfiles.com/deepcluster/{file}_pretrain.pth.tar", arch, "swav",
            f"{_METHODS[method]} on ImageNet, no labels" + f", crops {_CROPS.get(name)}" * (
                name in _CROPS))


def _of_methods() -> Iterator[tuple[str, Official]]:
    """Of the other methods' repositories, of VISSL and lightly: all on ImageNet, without labels."""
    def entry(url: str, licence: str, about: str) -> Official:
        return Official(url, "resnet50", licence, f"{about} on ImageNet, no labels")

    moco = "https://dl.fbaipublicfiles.com/moco/moco_checkpoints/"
    dino = "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain"
    for epochs in (200, 800):
        yield f"mocov2_resnet50_{epochs}ep", entry(
            f"{moco}moco_v2_{epochs}ep/moco_v2_{epochs}ep_pretrain.pth.tar", "moco", "MoCo v2")
    yield "dino_resnet50", entry(f"{dino}.pth", "dino", "DINO's teacher, trunk alone,")
    yield "dino_resnet50_full", entry(f"{dino}_full_checkpoint.pth", "dino", "DINO, all of it,")
    yield "barlow_twins_resnet50_1000ep", entry(
        f"{_BARLOW}resnet50.pth", "barlowtwins", "Barlow Twins, trunk alone,")
    yield "barlow_twins_resnet50_1000ep_full", entry(
        f"{_BARLOW}checkpoint.pth", "barlowtwins", "Barlow Twins, all of it,")
    for arch, epochs, run, date, digest in _rows(_SIMCLR):
        yield f"simclr_{arch}_{epochs}ep", entry(
            f"{_VISSL}simclr_{run}_simclr_8node_resnet_{date}_20.{digest}/"
            f"model_final_checkpoint_phase{int(epochs) - 1}.torch", "vissl", "SimCLR of VISSL"
        )._replace(arch=arch)
    for arch, run, folder in _rows(_VISSL_SWAV):
        yield f"vissl_swav_{arch}_{run}", entry(
            f"{_VISSL}{folder}/model_final_checkpoint_phase{int(run[:3]) - 1}.torch", "vissl",
            "SwAV of VISSL")._replace(arch=arch)
    yield "vissl_mocov2_resnet50_200ep", entry(
        f"{_VISSL}moco_v2_1node_lr.03_step_b32_zero_init/model_final_checkpoint_phase199.torch",
        "vissl", "MoCo v2 of VISSL")
    for epochs in (300, 1000):
        yield f"vissl_barlow_twins_resnet50_{epochs}ep", entry(
            f"{_VISSL}barlow_twins/barlow_twins_32gpus_4node_imagenet1k_{epochs}ep_resnet50.torch",
            "vissl", "Barlow Twins of VISSL")
    yield "byol_resnet50_100ep", entry(
        f"{_LIGHTLY}byol_2024-02-14_16-10-09/pretrain/version_0/checkpoints/"
        "epoch%3D99-step%3D500400.ckpt", "lightly", "BYOL of lightly")


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


def _of_this_project() -> Iterator[tuple[str, Official]]:
    yield "miniature_regnety_100mf", Official(
        "weights/miniature_regnety_100mf.pt", "regnety_100mf", "miniature",
        "SwAV on 36,136 pictures of Debian's packages, no labels, at 64 pixels")


OFFICIAL = {name: entry for entries in (
    _of_this_project(), _of_vissl(), _of_swav(), _of_methods(), _of_torchvision())
    for name, entry in entries}
_licences_printed = set()          # by this process
# names that files of other runs and methods have too
_COMMON = re.compile(r"(resnet50|checkpoint|epoch.*|model_final_checkpoint_phase\d+)\.\w+")


def official_names(path: Path) -> list[str]:
    """The official files that a file may be, going by its own name: the last part of a URL, where
    it tells anything, or NAME.torch. Several where URLs end alike, none for any other file."""
    return [name for name, entry in OFFICIAL.items() if path.name == f"{name}.torch" or (
        path.name == entry.url.rpartition("/")[2]
        and (entry.licence in ("seer", "vissl") or not _COMMON.fullmatch(path.name)))]


def fetch_path(name: str) -> Path:
    """Where an official file is kept: in this repository, or in torch.hub's cache, named as
    torchvision names its own, by the last part of the URL, so that both share it. Where other URLs
    may end alike (two of SEER's do) it is NAME.torch."""
    if "://" not in OFFICIAL[name].url:
        return Path(__file__).parents[1] / OFFICIAL[name].url
    last = OFFICIAL[name].url.rpartition("/")[2]
    return Path(torch.hub.get_dir(), "checkpoints",
                f"{name}.torch" if _COMMON.fullmatch(last) else last)


def fetch(name: str, quiet: bool = False) -> Path:
    """An official file's path; downloaded if it is not there. Prints its licence once, unless
    quiet. Raises ValueError where the download fails, or a file of this repository is gone."""
    entry, path = OFFICIAL[name], fetch_path(name)
    if "://" not in entry.url and not path.exists():
        raise ValueError(f"{path} is not there: it comes with this project's repository")
    if entry.licence not in _licences_printed and not quiet:
        _licences_printed.add(entry.licence)
        print(f"licence of {name}: {LICENCES[entry.licence]}", file=sys.stderr)
    digest = re.search(r"-([0-9a-f]{8})\.", entry.url.rpartition("/")[2])
    return download(entry.url, path, digest and digest[1], gigabytes(entry))


def gigabytes(entry: Official) -> float | None:
    """The least size of a file: the trunk's parameters in float32. (A file of VISSL's may also hold
    the optimizer's state.) None where regnet.py, which counts them, is not there."""
    if entry.arch in RESNETS:
        return 4e-9 * RESNETS[entry.arch]
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
