"""The tour's sections on the network and its input: RegNet's line, its design space, the crops.

    album = Album(Path("out"), light(), dark())
    sections = [line(album), space(album), crops(album)]

Papers: RegNet (arXiv 2003.13678), SwAV (arXiv 2006.09882, section 3.3).
"""
import random
import time

import numpy
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.demo import DemoImages
from figures import tour_pictures as draw
from figures.design_space import sample
from figures.page import Album, Code, Section
from multicrop import NEUTRAL, PARAMS, MultiCrop, augment, decode, parse_crops, random_box
from regnet import ARCHS, RegNet, RegNetParams, complexity


def line(album: Album) -> Section:
    networks = {"RegNetY-400MF": ARCHS["regnety_400mf"],
                "RegNetY-256GF, SEER's": ARCHS["regnety_256gf"]}
    picture = album.picture(
        "line", "Two networks: the width of each block as a bar, beside a straight line.", 3.5,
        draw.line, networks)
    text = """<p>A RegNet is a residual network: <i>d</i> blocks in stages. All blocks of a stage
have the same width, which is their number of channels. Five numbers make a network: the depth
<i>d</i>, the initial width <i>w</i><sub>0</sub>, the slope <i>w<sub>a</sub></i>, the width
multiplier <i>w<sub>m</sub></i>, and the group width of the 3 × 3 convolutions.</p>
<p>The width of block <i>j</i> is first a line:</p>
<p class="equation">u<sub>j</sub> = w<sub>0</sub> + w<sub>a</sub> · j <small>(2)</small></p>
<p>Written as a power of <i>w<sub>m</sub></i>, it has an exponent <i>s<sub>j</sub></i>:</p>
<p class="equation">u<sub>j</sub> = w<sub>0</sub> · w<sub>m</sub><sup>s<sub>j</sub></sup>
<small>(3)</small></p>
<p>The exponent is rounded to the nearest whole number, written ⌊ ⌉. Blocks of equal width are a
stage:</p>
<p class="equation">w<sub>j</sub> = w<sub>0</sub> · w<sub>m</sub><sup>⌊s<sub>j</sub>⌉</sup>
<small>(4)</small></p>"""
    below = """<p>Gray: the line. Dotted: the whole powers. Bars: the blocks, and over each stage
its blocks × width. Widths become multiples of 8, then divisible by the group width.</p>"""
    return Section("A network from a line", text, picture,
                   [Code(RegNetParams.blocks), Code(RegNetParams.stages)], below)


def space(album: Album, count: int = 60, clocked: int = 16, resolution: int = 112) -> Section:
    rng = random.Random(0)
    drawn = [sample(2e8 * 16 ** rng.random(), rng) for _ in range(count)]
    published = [ARCHS[f"regnety_{size}"] for size in ("200mf", "400mf", "600mf", "800mf", "1.6gf",
                                                       "3.2gf")]
    some = sorted(drawn, key=lambda params: complexity(params).flops)[:3 * clocked:3]
    costs = [complexity(params, resolution, num_classes=0) for params in some]
    counted, seconds = zip(*(clock(params, resolution) for params in some))
    off = max(abs(cost.flops / flops - 1) for cost, flops in zip(costs, counted))
    by = {name: rank_correlation([getattr(cost, name) for cost in costs], seconds)
          for name in ("flops", "activations")}
    picture = album.picture(
        "space", "Left: random networks by multiply-adds and depth. Right: time over count.", 3.7,
        draw.space, drawn, published, [cost.flops for cost in costs], seconds)
    text = f"""<p>The paper does not search for one network. It narrows a space of networks until
its random members are good. Here are {count} random members, drawn with the paper's ranges: 12
to 28 blocks, <i>w<sub>m</sub></i> from 2 to 3. A draw counts if it has four stages, 90 to
100&nbsp;% of its budget, and no more parameters and activations than good networks have (figure
12). <em>Activations</em> are the numbers in the outputs of all convolutions.</p>
<p>The cost is counted from the five numbers; no network is built. Is the count right? PyTorch's own
counter, which watches the operations of a pass, differs from it by at most {off:.2%} on
{len(some)} of them. The time does not follow from the count alone. On this machine's CPU, at
{resolution} pixels, the rank correlation with time is {by["flops"]:.2f} for multiply-adds and
{by["activations"]:.2f} for activations. On a GPU the paper found a larger one for activations
(figure 12).</p>"""
    below = """<p>Right: one image, the fastest of three passes, in processor time. Dashed: time in
proportion.</p>"""
    return Section("Random members of the design space", text, picture,
                   [Code(sample, "powers_of_two", "return params")], below)


def clock(params: RegNetParams, resolution: int) -> tuple[int, float]:
    """Multiply-adds as PyTorch counts them, and this thread's processor seconds in the fastest of
    three passes: other work on the machine hardly counts."""
    network, image = RegNet(params).eval(), torch.zeros(1, 3, resolution, resolution)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            network(image)
        seconds = []
        for _ in range(3):
            start = time.thread_time()
            network(image)
            seconds.append(time.thread_time() - start)
    return counter.get_total_flops() // 2, min(seconds)


def rank_correlation(x, y) -> float:
    """Spearman's."""
    ranks = [torch.tensor(values).argsort().argsort().double() for values in (x, y)]
    return torch.corrcoef(torch.stack(ranks))[0, 1].item()


def crops(album: Album, seed: int = 4) -> Section:
    data, specs = DemoImages("train", size=224)[7], parse_crops("2x112@0.25-1+4x48@0.08-0.25")
    cut, _ = MultiCrop(specs)(data, seed)
    image = torch.from_numpy(numpy.array(decode(data))).permute(2, 0, 1)
    picture = album.picture(
        "crops", "An image with six boxes, the six crops, and one crop after each augmentation.",
        5.6, draw.crops, image, specs, cut, seed, augmentations(cut[0][0]))
    text = """<p>From each image two large crops and several small ones are cut:
<em>multi-crop</em> (SwAV, section 3.3). A box is random in area, shape and place. Each crop is
then augmented at random: it is flipped, its colours are changed, it is made gray, or
blurred.</p>
<p>The crops of an image differ in place, size and colour. What they share is what they show. So
that is what the network has to find, in order to predict one from another. Small crops cost
little: four of 96 pixels have fewer pixels than one of 224.</p>"""
    below = """<p>Above: the boxes and their crops. Below: crop 1 after each augmentation alone,
and after two random draws of all.</p>"""
    return Section("An image, its crops, their augmentations", text, picture,
                   [Code(random_box, "for _", "return"), Code(augment)], below)


def augmentations(crop: Tensor) -> dict[str, Tensor]:
    """A crop, uint8 (3, s, s), after each augmentation alone, and after a random draw of all."""
    alone = {"crop 1": {}, "flip": {"flip": 1.0}, "brightness": {"brightness": 1.6},
             "contrast": {"contrast": 0.4}, "saturation": {"saturation": 0.2},
             "hue": {"hue": 0.2}, "gray": {"gray": 1.0}, "blur": {"sigma": 2.0}}
    rows = [[changes.get(name, value) for name, value in zip(PARAMS, NEUTRAL)]
            for changes in alone.values()]
    rng = random.Random(5)
    rows += [MultiCrop([], jitter=1.0, gray=0.0).draw(rng) for _ in range(2)]
    images = augment(crop.expand(len(rows), -1, -1, -1), torch.tensor(rows))
    return dict(zip([*alone, "a draw of all", "another"], images))
