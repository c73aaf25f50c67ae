"""The RegNet design space, printed: its published members, one explained, random ones.

    python -m figures.design_space                                           # the published ones
    python -m figures.design_space show 27,640,230.83,2.53,373               # from line to stages
    python -m figures.design_space sample --flops 400e6 --count 20 --seed 0  # random members

Paper: "Designing Network Design Spaces" (arXiv 2003.13678); how it comes to this space is in
regnet.py.
"""
import argparse
import math
import random

from regnet import ARCHS, RegNetParams, complexity
from weights.terminal import number_in, one_sentence


def sample(flops: float, rng: random.Random, se_ratio: float | None = 0.25,
           draws: int = 200_000) -> RegNetParams:
    """A random member of the space with 90 to 100 % of a budget of multiply-adds at 224 pixels.

    As the paper draws them (sections 4 and 5, with the ranges of its code): 12 to 28 blocks in four
    stages, w_m of 2 to 3, w_0 and w_a of 8 to 256, all three log-uniform, and group widths of 8 to
    128, every other one a power of two; and no more parameters and activations than good networks
    of that budget have (figure 12). Above 16 GF the ranges of w_0, w_a and the group width grow
    with the root of the budget.

    se_ratio: as in RegNetParams; None is RegNetX.  draws: tries, before it gives up.
    Raises ValueError where no draw meets the budget.
    """
    if not 0 < flops < math.inf:
        raise ValueError(f"a budget of {flops:g} multiply-adds is none")
    giga, scale = flops / 1e9, math.sqrt(max(1.0, flops / 16e9))

    def log_uniform(low, high, step):
        return step * round(math.exp(rng.uniform(math.log(low), math.log(high))) / step)

    for _ in range(draws):
        powers_of_two = rng.random() < 0.5
        group_width = log_uniform(8 * scale, 128 * scale, 8)
        if powers_of_two:
            group_width = 2 ** round(math.log2(group_width))
        params = RegNetParams(
            rng.randint(12, 28), log_uniform(8 * scale, 256 * scale, 8),
            round(log_uniform(8 * scale, 256 * scale, 0.1), 1), round(log_uniform(2, 3, 0.001), 3),
            group_width, se_ratio)
        powers = {round(s) for _, s, _ in params.blocks()}
        if powers == {0, 1, 2, 3} and len(params.stages()) == 4:
            cost = complexity(params)
            if (0.9 * flops <= cost.flops <= flops and cost.params <= (3 + 5.5 * giga) * 1e6
                    and cost.activations <= 6.5 * math.sqrt(giga) * 1e6):
                return params
    raise ValueError(f"none of {draws:,} networks had 90 to 100 % of {flops:g} multiply-adds; the "
                     "space is made for 1e8 and more")


def show(params: RegNetParams) -> str:
    """A network from its line to its stages: a row a block, a row a stage, then its costs."""
    p, stages = params, params.stages()
    lines = [f"RegNet{'Y' if p.se_ratio else 'X'} of depth {p.depth}, w_0 {p.w_0}, w_a {p.w_a:g}, "
             f"w_m {p.w_m:g}, group width {p.group_width}", "",
             f"{'block j':>7} {'u_j = w_0 + w_a j':>18} {'s_j':>6} {'rounded':>8} "
             f"{'w_0 w_m^k':>10} {'multiple of 8':>14}"]
    for j, (u, s, width) in enumerate(params.blocks()):
        k = round(s)
        lines.append(f"{j:>7} {u:>18.2f} {s:>6.2f} {k:>8} {p.w_0 * p.w_m ** k:>10.1f} {width:>14}")
    lines += ["", f"{'stage':>7} {'depth':>6} {'width':>7} {'group width':>12} {'groups':>7} "
                  f"{'divisible: width':>17}"]
    for i, (width, stage) in enumerate(zip(sorted({w for _, _, w in params.blocks()}), stages), 1):
        lines.append(f"{i:>7} {stage.depth:>6} {width:>7} {stage.group_width:>12} "
                     f"{stage.width // stage.group_width:>7} {stage.width:>17}")
    cost = complexity(params)
    return "\n".join([*lines, "", f"{cost.params / 1e6:.3f} M parameters with 1000 classes, "
                      f"{cost.flops / 1e9:.3f} GF (10^9 multiply-adds) and "
                      f"{cost.activations / 1e6:.2f} M activations at 224 pixels"])


def table(networks: dict[str, RegNetParams]) -> str:
    """One network a line; networks: name -> parameters. Costs with 1000 classes, at 224 pixels."""
    lines = [f"{'network':<28} {'widths':<22} {'depths':<11} {'group widths':<19} "
             f"{'M params':>9} {'GF':>9} {'M acts':>7}"]
    for name, params in networks.items():
        widths, depths, groups = (",".join(map(str, column)) for column in zip(*params.stages()))
        cost = complexity(params)
        lines.append(f"{name:<28} {widths:<22} {depths:<11} {groups:<19} "
                     f"{cost.params / 1e6:>9.3f} {cost.flops / 1e9:>9.3f} "
                     f"{cost.activations / 1e6:>7.2f}")
    return "\n".join(lines)


def parse(text: str) -> RegNetParams:
    """A name of ARCHS, or "depth,w_0,w_a,w_m,group_width"; a sixth number is se_ratio, 0 for X."""
    if text in ARCHS:
        return ARCHS[text]
    try:
        kinds = (int, int, float, float, int, float)
        numbers = [kind(number) for kind, number in zip(kinds, text.split(","), strict=False)]
        if len(text.split(",")) not in (5, 6):
            raise ValueError
    except ValueError:
        raise ValueError(f"{text!r} is neither a published network nor five numbers, "
                         "depth,w_0,w_a,w_m,group_width as in 27,640,230.83,2.53,373") from None
    return RegNetParams(*numbers)



def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    name = "python -m figures.design_space"
    parser = argparse.ArgumentParser(name, usage=f"{name} [show NETWORK | sample [options]]",
                                     description="The RegNet design space.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", help="none: the published networks")
    one = commands.add_parser("show", help="one network, from its line to its stages")
    one.add_argument("network", help="a published one, or depth,w_0,w_a,w_m,group_width")
    many = commands.add_parser("sample", help="random networks of the space", allow_abbrev=False,
                               usage=f"{name} sample [options]")
    many.add_argument("--flops", type=number_in(float, 1e6, 1e13), default=400e6,
                      help="most multiply-adds (400e6)")
    many.add_argument("--count", type=number_in(int, 1, 10_000), default=20, help="how many (20)")
    many.add_argument("--seed", type=number_in(int, 0, 2 ** 63 - 1), default=0)
    many.add_argument("--x", action="store_true", help="RegNetX: no squeeze-and-excitation")
    return parser.parse_args(argv)


def samples(flops: float, count: int, seed: int, x: bool) -> dict[str, RegNetParams]:
    """Random networks by what `parse` takes. x: RegNetX. Raises ValueError, as `sample` does."""
    rng, networks = random.Random(seed), {}
    for _ in range(count):
        p = sample(flops, rng, None if x else 0.25)
        networks[f"{p.depth},{p.w_0},{p.w_a:g},{p.w_m:g},{p.group_width}" + ",0" * x] = p
    return networks


def main(argv: list[str] | None = None) -> None:
    with one_sentence("python -m figures.design_space"):
        args = parse_arguments(argv)
        if args.command == "show":
            print(show(parse(args.network)))
        elif args.command == "sample":
            print(table(samples(args.flops, args.count, args.seed, args.x)))
        else:
            print(table(ARCHS))


if __name__ == "__main__":
    main()
