"""Recipes of the other methods (methods/): published ones for a ResNet-50, and for small sets.

    PUBLISHED["byol"]                           # option -> (value, source); --recipe byol
    small_of("byol", count=2000, batch=128)     # option -> (value, reason); of recipe small

The numbers behind the reasons of small_of are in docs/methods.md. What no public source says of a
published recipe is called assumed.
"""
from methods.build import options_of_others
from recipes.published import IMAGENET_MEAN, IMAGENET_STD, SWAV

# (value, source). Script, README, its code: of the method's own repository; args.txt: of DINO's
# released ResNet-50, as others quote it. What no option expresses: LARS takes one norm of gradient
# and decay (LARC adds two); SimCLR, BYOL, Barlow Twins and DINO resize crops bicubically; the code
# of BYOL and Barlow Twins begins with 0 in each block's last BatchNorm; BYOL adds to the
# brightness, and does not multiply it; pycls adds PCA lighting; main_dino.py clips gradients; and
# rates that fall by steps, as VISSL's supervised and MoCo v2's do: theirs here fall by a cosine.
_RESNET = {
    "arch": ("resnet50", "paper"), "mean": (IMAGENET_MEAN, "its code: ImageNet's"),
    "std": (IMAGENET_STD, "its code: ImageNet's"), "momentum": (0.9, "its code"),
    "first_lr": (0.0, "its code"),
}
_LARS = {"trust_coefficient": (0.001, "its code's LARS"), "exclude_bias_bn": (True, "its code")}
_SGD = {"trust_coefficient": (0.0, "its code: SGD"), "exclude_bias_bn": (False, "its code")}
_COLOUR = {                             # of BYOL, Barlow Twins and DINO
    "strength": (0.5, "its code: 0.4, 0.4, 0.2, 0.1; here saturation too is 0.4"),
    "gray": (0.2, "its code"),
}
PUBLISHED: dict[str, dict[str, tuple[object, str]]] = {
    "simclr": {"method": ("simclr", "arXiv 2002.05709")} | _RESNET | _LARS | {
        "epochs": (1000.0, "paper: 69.3 %; README: 100"), "batch_size": (4096, "README"),
        "crops": ("2x224@0.08-1", "its code"), "strength": (1.0, "its code"),
        "gray": (0.2, "its code"), "blur": (0.5, "its code"), "solarize": (0.0, "its code: none"),
        "mean": ("0,0,0", "its code: images from 0 to 1"), "std": ("1,1,1", "its code: so too"),
        "head": ("2048-128", "its code"),
        "head_bn": (True, "its code, which has it after the last layer too"),
        "temperature": (0.1, "README"), "lr": (0.3, "README, per 256 images"),
        "final_lr": (0.0, "its code"), "warmup": (0.01, "its code: 10 epochs"),
        "weight_decay": (1e-6, "README"), "sync_bn_group": (128, "paper: all of 128 cores"),
    },
    "mocov2": {"method": ("mocov2", "arXiv 2003.04297")} | _RESNET | _SGD | {
        "epochs": (800.0, "README: 71.1 %"), "batch_size": (256, "README"),
        "crops": ("2x224@0.2-1", "its code"), "strength": (0.5, "its code: 0.4, 0.4, 0.4, 0.1"),
        "gray": (0.2, "its code"), "blur": (0.5, "its code"), "solarize": (0.0, "its code: none"),
        "head": ("2048-128", "its code"), "queue": (65536, "its code"),
        "target_momentum": (0.999, "its code"), "temperature": (0.2, "README"),
        "lr": (0.03, "README"), "final_lr": (0.0, "README: --cos, there by epochs"),
        "warmup": (0.0, "its code: none"), "weight_decay": (1e-4, "its code"),
        "sync_bn_group": (8, "its 8 GPUs, over which it shuffles keys instead"),
    },
    "byol": {"method": ("byol", "arXiv 2006.07733")} | _RESNET | _LARS | _COLOUR | {
        "epochs": (1000.0, "paper"), "batch_size": (4096, "README"),
        "crops": ("2x224@0.08-1", "its code"), "blur": ("1,0.1", "its code"),
        "solarize": ("0,0.2", "its code"), "head": ("4096-256", "its code"),
        "predictor": ("4096-256", "its code"), "target_momentum": (0.996, "its code"),
        "lr": (0.2, "paper, per 256 images"), "final_lr": (0.0, "its code"),
        "warmup": (0.01, "paper: 10 epochs"), "weight_decay": (1.5e-6, "paper"),
        "sync_bn_group": (512, "its code: all; README: 512 TPU cores"),
    },
    "barlow_twins": {"method": ("barlow_twins", "arXiv 2103.03230")} | _RESNET | _LARS | _COLOUR | {
        "epochs": (1000.0, "README"), "batch_size": (2048, "README"),
        "crops": ("2x224@0.08-1", "its code: RandomResizedCrop's own"),
        "blur": ("1,0.1", "its code"), "solarize": ("0,0.2", "its code"),
        "head": ("8192-8192-8192", "README"), "off_diagonal": (0.0051, "README"),
        "loss_scale": (0.024, "README; now it has 0.024 of the rate for biases and BatchNorm"),
        "lr": (0.2, "README, per 256 images"), "final_lr": (0.001, "its code"),
        "warmup": (0.01, "its code: 10 epochs"), "weight_decay": (1.5e-6, "VISSL; its code: 1e-6"),
        "sync_bn_group": (32, "its code: all; paper: 32 GPUs"),
    },
    "dino": {"method": ("dino", "arXiv 2104.14294")} | _RESNET | _LARS | _COLOUR | {
        "epochs": (800.0, "args.txt"), "batch_size": (4080, "its issue 133: 80 x 51"),
        "crops": ("2x224+6x96", "args.txt; 0.14 to 1 and 0.05 to 0.14 of the area"),
        "blur": ("1,0.1,0.5,0.5,0.5,0.5,0.5,0.5", "its code"),
        "solarize": ("0,0.2,0,0,0,0,0,0", "its code"),
        "head": ("4096-256", "its issue 189: the released one; its code: 2048-2048-256"),
        "head_bn": (True, "args.txt"), "prototypes": (60000, "args.txt"),
        "freeze_prototypes": (314, "its code: an epoch of ImageNet"),
        "temperature": (0.1, "its code"), "teacher_temperature": ("0.04,0.07", "args.txt"),
        "teacher_warmup": (0.0625, "args.txt: 50 epochs"),
        "target_momentum": (0.996, "its code"), "lr": (0.3, "args.txt, per 256 images"),
        "final_lr": (0.001, "args.txt: 0.0048"), "warmup": (0.0125, "args.txt: 10 epochs"),
        "weight_decay": (1e-6, "args.txt, from first to last"),
        "sync_bn_group": (80, "its code: all; issue 133: 80 GPUs"),
    },
    # its script has SwAV's numbers
    "deepcluster_v2": {"method": ("deepcluster_v2", "arXiv 2006.09882")} | {
        name: SWAV["swav"][name] for name in SWAV["swav"]
        if name not in options_of_others("deepcluster_v2")} | {
        "solarize": (0.0, "its code: none"), "clusterings": (3, "script"),
        "exclude_bias_bn": (False, "its code"),
    },
    # pycls (RegNet's own repository): its model zoo, and its configuration of a ResNet-50
    "supervised": {"method": ("supervised", "pycls")} | _RESNET | _SGD | {
        "arch": ("resnet50", "pycls"), "epochs": (100.0, "pycls"), "batch_size": (256, "pycls"),
        "crops": ("1x224@0.08-1", "pycls"), "strength": (0.0, "pycls: none"),
        "gray": (0.0, "pycls: none"), "blur": (0.0, "pycls: none"),
        "solarize": (0.0, "pycls: none"), "momentum": (0.9, "pycls, there Nesterov's"),
        "lr": (0.2, "pycls: 0.1 per 128 images"), "final_lr": (0.0, "pycls: half a cosine"),
        "warmup": (0.05, "pycls: 5 epochs"), "first_lr": (0.1, "pycls"),
        "weight_decay": (5e-5, "pycls, on BatchNorm and biases too"),
        "sync_bn_group": (0, "pycls: none"),
    },
}
PAIR = ("2x64@0.25-1", "two views of one size, which the method compares")
MOMENTUM_PEAK = 2.4         # peak learning rate, with a momentum encoder


def small_of(method: str, count: int, batch: int) -> dict[str, tuple[object, str]]:
    """What recipe small, or demo, changes for a method other than SwAV: option -> value, reason.

    count: images of the set.  batch: images of a step. Numbers are of sets/backgrounds, linear.
    """
    slower = (MOMENTUM_PEAK * 256 / batch, f"a peak of {MOMENTUM_PEAK:g} for any batch, with LARC; "
                                           "twice as much cost 1 to 3 points")
    rules = {
        "simclr": {"temperature": (0.1, "as published; 0.2 cost a point. All crops are views: "
                                        "4 points better than two")},
        "mocov2": {"crops": PAIR, "lr": slower, "temperature": (0.2, "as published"),
                   "target_momentum": (0.99, "a short run needs a faster copy than 0.999; at "
                                             "0.96 3 points less"),
                   "queue": (max(batch, min(2048, count) // batch * batch),
                             "of the set's images, but at most 2,048 (not measured)")},
        "byol": {"crops": PAIR, "lr": slower, "predictor": ("256-64", "as the head"),
                 "target_momentum": (0.99, "a short run needs a faster copy than 0.996; at 0.96 "
                                           "4 points less")},
        "barlow_twins": {"crops": PAIR, "head": (
            "256-256-256", "a small trunk needs no larger one (not measured)")},
        "dino": {"lr": slower,
                 "head": ("256-256-64", "a small trunk needs no larger one (not measured)"),
                 "prototypes": (256, "outputs; few, as the images are (not measured)"),
                 "target_momentum": (0.99, "a short run needs a faster copy than 0.996; at 0.96 "
                                           "2 points less"),
                 "freeze_prototypes": (0, "a short run has no steps to give away")},
        "deepcluster_v2": {"prototypes": (max(2, min(128, count // 4)), "of each clustering: at "
                                          "least 4 images to a cluster; 64 is no better")},
        "supervised": {"crops": ("1x64@0.25-1", "one crop, as is usual with labels")},
    }
    return rules[method]
