"""The baseline: standard PyTorch and torchvision, written plainly.

    step = baseline_step(config, crops)         # what `python -m bench step` measures beside ours
    step(Clock(device))                         # a whole training step, timed by its parts

torchvision's network in NCHW, eager; the loss as a double loop; the textbook Sinkhorn; LARC tensor
by tensor around torch.optim.SGD; torchvision's transforms on a PIL image, once for each crop.

Shapes: B images, V crops, K prototypes.
"""
import io
import random
from collections.abc import Callable, Sequence

import torch
import torchvision
from PIL import Image, ImageFilter
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from multicrop import IMAGENET_MEAN, IMAGENET_STD, CropSpec
from recipes.config import Config
from regnet import ARCHS
from swav import ASSIGNED


def baseline_trunk(arch: str) -> nn.Module:
    """torchvision's network, with a classifier .fc; it rounds a few RegNets to other widths."""
    if arch not in ARCHS:
        return torchvision.models.resnet50()
    p = ARCHS[arch]
    return torchvision.models.RegNet(torchvision.models.regnet.BlockParams.from_init_params(
        p.depth, p.w_0, p.w_a, p.w_m, p.group_width, se_ratio=p.se_ratio))


def baseline_step(config: Config, crops: list[Tensor]) -> Callable:
    """A training step in float32 or, on a GPU, bf16 autocast. crops: uint8, one tensor per size.
    Returns step(clock), which times its parts with clock.timed(name, function)(arguments)."""
    views, device = sum(spec.count for spec in config.crops), crops[0].device
    with torch.device(device):
        trunk = baseline_trunk(config.arch)
        widths, head = [trunk.fc.in_features, *config.head], nn.Sequential()
        trunk.fc = nn.Identity()
        for i, (w_in, w_out) in enumerate(zip(widths, widths[1:])):
            head.append(nn.Linear(w_in, w_out))
            if i < len(widths) - 2:
                head.extend([nn.BatchNorm1d(w_out)] * config.head_bn + [nn.ReLU()])
        prototypes = nn.Linear(widths[-1], config.prototypes, bias=False)
    params = [p for m in (trunk, head, prototypes) for p in m.parameters()]
    optimizer = torch.optim.SGD(params, config.lr, config.momentum)
    crops = [crop.float() / 255 for crop in crops]

    def forward():
        features = torch.cat([trunk(images) for images in crops])
        return prototypes(F.normalize(head(features), dim=1))

    def codes(scores):
        return textbook_codes(scores, config.epsilon, config.sinkhorn_iterations)

    def backward(scores, codes):
        double_loop(scores, codes, config.temperature).backward()

    @torch.no_grad()
    def update():
        plain_larc(params, optimizer, config.weight_decay)
        prototypes.weight.copy_(F.normalize(prototypes.weight, dim=1))

    def step(clock) -> None:
        optimizer.zero_grad()
        dtype = baseline_precision(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = clock.timed("forward", forward)().unflatten(0, (views, -1))      # (V, B, K)
            assigned = clock.timed("Sinkhorn", codes)(scores)
            clock.timed("backward", backward)(scores, assigned)
        clock.timed("optimizer", update)()

    return step


def baseline_precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


@torch.no_grad()
def textbook_codes(scores: Tensor, epsilon: float, iterations: int) -> list[Tensor]:
    """(V, B, K) -> codes (B, K) of the assigned crops, one after the other."""
    return [textbook_sinkhorn(scores[a].float(), epsilon, iterations) for a in range(ASSIGNED)]


def textbook_sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Exponentiate, then divide rows and columns in turn."""
    q = torch.exp(scores / epsilon)                                      # (B, K)
    q /= q.sum()
    for _ in range(iterations):
        q /= q.sum(0, keepdim=True)
        q /= q.shape[1]
        q /= q.sum(1, keepdim=True)
        q /= q.shape[0]
    return q * q.shape[0]


def double_loop(scores: Tensor, codes: list[Tensor], temperature: float) -> Tensor:
    """The loss: for each assigned crop, for each other crop."""
    loss = 0.0
    for a, code in enumerate(codes):
        subloss = 0.0
        for v in set(range(len(scores))) - {a}:
            log_p = F.log_softmax(scores[v].float() / temperature, dim=1)
            subloss -= (code * log_p).sum(1).mean()
        loss += subloss / (len(scores) - 1)
    return loss / len(codes)


@torch.no_grad()
def plain_larc(params, optimizer, weight_decay: float) -> None:
    """Tensor by tensor; `if` waits for the device at each norm."""
    for p in params:
        p_norm, g_norm = p.norm(), p.grad.norm()
        if p_norm != 0 and g_norm != 0:
            rate = 0.001 * p_norm / (g_norm + weight_decay * p_norm + 1e-8)
            p.grad += weight_decay * p
            p.grad *= rate
    optimizer.step()


def baseline_crops(specs: Sequence[CropSpec]) -> Callable[[bytes], list[Tensor]]:
    """torchvision's transforms on a PIL image, once for each crop: bytes -> (3, s, s) each."""
    def blur(image):
        if random.random() < 0.5:
            return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return image

    views = [transforms.Compose([
        transforms.RandomResizedCrop(spec.size, spec.scale), transforms.RandomHorizontalFlip(),
        transforms.RandomApply([transforms.ColorJitter(0.8, 0.8, 0.8, 0.2)], 0.8),
        transforms.RandomGrayscale(0.2), blur, transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]) for spec in specs
        for _ in range(spec.count)]

    def crops(data: bytes) -> list[Tensor]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [view(image) for view in views]

    return crops
