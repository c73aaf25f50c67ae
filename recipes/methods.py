"""Recipes of the other methods (methods/): published ones for a ResNet-50, and for small sets.

    PUBLISHED["byol"]                           # option -> (value, source); --recipe byol
    small_of("byol", count=2000, batch=128)     # option -> (value, reason); of recipe small

The numbers behind the reasons of small_of are in docs/methods.md.
"""

PUBLISHED: dict[str, dict[str, tuple[object, str]]] = {}
PAIR = ("2x64@0.25-1", "two views of one size, which the method compares")


def small_of(method: str, count: int, batch: int) -> dict[str, tuple[object, str]]:
    """What recipe small, or demo, changes for a method other than SwAV: option -> value, reason.

    count: images of the set.  batch: images of a step.
    """
    rules = {
        "simclr": {"crops": PAIR, "head_bn": (True, ""), "temperature": (0.1, "")},
        "mocov2": {"crops": PAIR, "temperature": (0.2, ""), "target_momentum": (0.99, ""),
                   "queue": (min(2048, count // batch * batch), "")},
        "byol": {"crops": PAIR, "predictor": ("256-64", ""), "target_momentum": (0.99, "")},
        "barlow_twins": {"crops": PAIR, "head": ("256-256-256", "")},
        "dino": {"head": ("256-256-64", ""), "prototypes": (256, ""), "target_momentum": (0.99, ""),
                 "freeze_prototypes": (0, "")},
        "deepcluster_v2": {"prototypes": (max(2, min(128, count // 4)), ""), "head_bn": (True, "")},
        "supervised": {"crops": ("1x64@0.25-1", "one crop, as with labels everywhere")},
    }
    return rules[method]
