"""FSDP: weights, gradients and momentum in shards, a part of each on every rank of a group."""


def shard_ranks(wanted: int, ranks: int, of_node: int) -> int:
    """Ranks that share one copy of the weights: as wanted, if it divides their number, else the
    next lower number that does; 0: of_node where there are several nodes, else all."""
    most = min(wanted or of_node, ranks)
    return max(n for n in range(1, most + 1) if ranks % n == 0)
