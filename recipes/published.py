"""Published recipes: SwAV's and SEER's settings, each with its source, and the demo's.

    RECIPES["demo"]                             # option -> value
    SWAV["swav-bs256"]                          # option -> (value, source)
    seer("regnety_16gf")                        # the same, by the network's size

Sources: SwAV (arXiv 2006.09882) and its scripts, SEER (2103.01988, 2202.08360), VISSL's
configuration files. What no public source says is called assumed. A new recipe is a line here.
"""
from recipes.config import Config

IMAGENET_MEAN, IMAGENET_STD = Config.mean, Config.std          # as text

RECIPES = {
    # 64-pixel images on two CPU cores in a few minutes
    "demo": dict(arch="regnety_100mf", steps=500, batch_size=128,
                 crops="2x64@0.25-1+4x32@0.08-0.25", strength=0.2, gray=0.0, blur=0.0,
                 head="256-64", head_bn=True, prototypes=64, epsilon=0.03, sinkhorn_iterations=3,
                 freeze_prototypes=0, lr=9.6, warmup=0.08, weight_decay=1e-6),
}
# SwAV's own: (value, source). Script: facebookresearch/swav's for 800 epochs, and for a batch of
# 256.
_SWAV = {
    "arch": ("resnet50", "script"), "epochs": (800.0, "script"),
    "batch_size": (4096, "script: 64 x 64"),
    "crops": ("2x224+6x96", "script; 0.14 to 1 and 0.05 to 0.14 of the area"),
    "strength": (1.0, "paper, A.3"), "gray": (0.2, "paper, A.3"), "blur": (0.5, "paper, A.3"),
    "mean": (IMAGENET_MEAN, "its code: ImageNet's"),
    "std": ("0.228,0.224,0.225", "its code; elsewhere the first is 0.229"),
    "head": ("2048-128", "script"), "head_bn": (True, "its code"), "prototypes": (3000, "script"),
    "epsilon": (0.05, "script"), "sinkhorn_iterations": (3, "script"),
    "temperature": (0.1, "script"), "freeze_prototypes": (313, "script"),
    "lr": (0.3, "script: 4.8 at 4096"), "final_lr": (0.001, "script: 0.0048"),
    "warmup": (0.0125, "script: 10 epochs"), "first_lr": (0.0625, "script: from 0.3"),
    "momentum": (0.9, "its code"), "trust_coefficient": (0.001, "its code"),
    "weight_decay": (1e-6, "script"), "sync_bn_group": (8, "script"),
}
SWAV = {
    "swav": _SWAV,
    "swav-bs256": _SWAV | {
        "epochs": (200.0, "script"), "batch_size": (256, "script: 4 x 64"),
        "lr": (0.6, "script"), "warmup": (0.0, "script"), "first_lr": (0.0, "script"),
        "final_lr": (0.001, "script: 0.0006"), "sync_bn_group": (8, "assumed: as the other script"),
        "freeze_prototypes": (5005, "script: an epoch"), "queue": (3840, "script"),
        "queue_start": (75_075, "script: 15 epochs of ImageNet")},
}
# SEER by size: (value, source). VISSL: its configuration files and model documentation. Name: that
# of the released weights. What no public source says is assumed, and printed so.
_ASSUMED = "assumed"
_SEER_COMMON = {
    "images": (1_000_000_000, "one pass over a billion images (paper)"),
    "crops": ("2x224+4x96", "VISSL"), "strength": (1.0, "VISSL's base for SwAV"),
    "gray": (0.2, "VISSL's base for SwAV"), "blur": (0.5, "VISSL's base for SwAV"),
    "mean": (IMAGENET_MEAN, "VISSL: ImageNet's"), "std": (IMAGENET_STD, "VISSL: ImageNet's"),
    "prototypes": (16000, "VISSL"),
    "sinkhorn_iterations": (10, "VISSL, names"), "temperature": (0.1, "VISSL"),
    "queue": (0, "VISSL"), "lr": (0.3, "VISSL, per 256 images"), "momentum": (0.9, "VISSL"),
    "trust_coefficient": (0.001, "VISSL"), "freeze_prototypes": (313, "VISSL's base; " + _ASSUMED),
    "first_lr": (0.0625, "VISSL's base starts at 0.3; " + _ASSUMED),
}
_SEER_LARGE = {"head": ("8192-8192-256", "VISSL"), "head_bn": (False, "VISSL")}
SEER = {
    "regnety_32gf": {
        "batch_size": (4096, _ASSUMED + ": name of the 16GF"), "head": ("4096-4096-256", "VISSL"),
        "head_bn": (True, "VISSL"), "epsilon": (0.05, _ASSUMED), "weight_decay": (1e-5, _ASSUMED),
        "sync_bn_group": (32, _ASSUMED + ": name of the 16GF"),
        "final_lr": (0.001, "cosine: name; its end " + _ASSUMED),
        "warmup": (0.0655, "'warmup2x' in the name, " + _ASSUMED + " 2 x 8,000 of 244,141 steps")},
    "regnety_64gf": _SEER_LARGE | {
        "prototypes": (16000, _ASSUMED), "sinkhorn_iterations": (10, _ASSUMED),
        "batch_size": (4096, _ASSUMED), "epsilon": (0.05, _ASSUMED),
        "sync_bn_group": (64, _ASSUMED),
        "weight_decay": (1e-5, _ASSUMED), "final_lr": (0.001, _ASSUMED),
        "warmup": (0.0328, _ASSUMED + ": 8,000 steps, as the 128GF")},
    "regnety_128gf": _SEER_LARGE | {
        "batch_size": (4096, "name: 16 nodes x 8 x 32"), "epsilon": (0.05, _ASSUMED),
        "weight_decay": (1e-5, _ASSUMED), "final_lr": (1.0, "name: constant after the warm-up"),
        "sync_bn_group": (64, "name"),
        "warmup": (0.0328, "8,000 steps (name)")},
    "regnety_256gf": _SEER_LARGE | {
        "batch_size": (8192, "VISSL, name: 64 nodes x 8 x 16"), "weight_decay": (1e-5, "VISSL"),
        "epsilon": (0.05, _ASSUMED + ": the files do not say"), "sync_bn_group": (64, "name"),
        "first_lr": (0.03125, "VISSL's base starts at 0.3; " + _ASSUMED),
        "final_lr": (0.001, "VISSL: 9.6 to 0.0096"), "warmup": (0.0655, "8,000 steps (name)")},
    "regnety_10b": _SEER_LARGE | {
        "crops": ("2x160+4x96", "VISSL"), "batch_size": (7936, "VISSL: 62 nodes x 8 x 16"),
        "epsilon": (0.03, "VISSL"), "weight_decay": (1e-5, "VISSL"),
        "first_lr": (0.3 / 9.3, "VISSL's base: from 0.3"), "sync_bn_group": (8, "VISSL: a node"),
        "final_lr": (0.001, "VISSL: 9.3 to 0.0093"), "freeze_prototypes": (313, "VISSL"),
        "warmup": (0.043648, "VISSL")},
}


def seer(arch: str) -> dict[str, tuple[object, str]]:
    """SEER's recipe for a size: option -> value and source. 8GF and 16GF were trained as the 32GF;
    other sizes borrow the 32GF's, all assumed."""
    rule = _SEER_COMMON | SEER.get(arch, SEER["regnety_32gf"])
    if arch not in (*SEER, "regnety_8gf", "regnety_16gf"):
        rule = {name: (value, _ASSUMED) for name, (value, _) in rule.items()}
    return {"arch": (arch, "")} | rule
