"""Roofline: the least time that forward and backward can take on a device, layer by layer.

    seconds = roofline(config, torch.bfloat16, convolution_rate(device, torch.bfloat16),
                       bandwidth(device))

Counted on the meta device: takes a second or two, and no memory, also for 10 billion parameters.
"""
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from methods.build import build_method
from recipes.config import Config


def roofline(config: Config, dtype: torch.dtype, flops_a_second: float,
             bytes_a_second: float) -> float:
    """Seconds, at the least, of forward and backward of a micro-batch: the sum over layers of the
    larger of what its arithmetic and what its memory takes, were each as fast as measured alone.

    A convolution or linear layer computes three products (output, gradients of input and of
    weights; the first layer no gradient of the images), each with its two operands read and its
    result written. BatchNorm, with a ReLU behind it or not, goes over its map eight times: it reads
    for the statistics, reads and writes; and backward reads map and gradient twice, and writes. All
    else (squeeze-and-excitation's mean and product, residuals, the loss) is left out.
    """
    layers, crops = [], 2                # BatchNorm wants more than one value of a channel
    method = build_method(config, "meta")

    def count(module, inputs, output):
        n_in, n_out, w = inputs[0].numel() / crops, output.numel() / crops, 0
        if isinstance(module, _BatchNorm):
            layers.append((0, 8 * n_out, 0))
        else:
            w = module.weight.numel()
            per_output = w // len(module.weight)             # multiply-adds
            products = 2 if inputs[0].shape[1] == 3 else 3           # of images, or of maps
            layers.append((products * 2 * n_out * per_output, products * (n_in + n_out),
                           products * w))

    for module in method.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, _BatchNorm)):
            module.register_forward_hook(count)
    passes = [(method.trunk, (3, spec.size, spec.size), spec.count) for spec in config.crops]
    passes.append((nn.Sequential(method.head, method.prototypes), (method.trunk.num_features,),
                   sum(spec.count for spec in config.crops)))
    seconds = 0.0
    for network, shape, views in passes:
        layers.clear()
        network(torch.empty(crops, *shape, device="meta"))
        rows = views * config.micro_batch
        seconds += sum(max(rows * flops / flops_a_second,
                           (rows * maps + weights) * dtype.itemsize / bytes_a_second)
                       for flops, maps, weights in layers)
    return seconds
