"""Collapse: signs of it in the statistics of a run, and a warning that names what to change.

    watchdog = Watchdog(config)
    watchdog.look(entry)            # an entry of log.jsonl; warns once, if the run collapses

The statistics are swav.collapse_statistics', and what other methods have of their own; a sign is
looked for where its number is there. Shapes: N rows, D embedding.
"""
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from methods.build import METHODS
from recipes.config import Config
from recipes.small import remedies
from swav import geometry

ROWS = 1024                 # whose effective rank is computed: more take seconds
CHANCE = "the loss is not below 99 % of that of predictions that know nothing"
# a number of the log: whether it tells of a collapse, and what is seen; {} is the number
SIGNS = {
    "loss_over_ln_k": (lambda x: x > 0.99, "the loss is not below 99 % of ln K: all K are "
                                           "predicted alike, whatever the image"),
    "loss_over_ln_candidates": (lambda x: x > 0.99, CHANCE),                    # SimCLR
    "loss_over_ln_keys": (lambda x: x > 0.99, CHANCE),                          # MoCo
    "prototypes_used": (lambda x: x < 0.05, "only {:.0%} of the prototypes are the nearest one to "
                                            "any crop"),
    "outputs_used": (lambda x: x < 0.05, "only {:.0%} of the outputs are any crop's largest"),
    # 0: none has images before the end of the first epoch
    "clusters_used": (lambda x: 0 < x < 0.05, "only {:.0%} of the clusters have images"),
    "correlation_diagonal": (lambda x: x < 0.1, "the two views' embeddings correlate by {:.2f}"),
}


def symptoms(statistics: dict[str, float], dim: int) -> dict[str, str]:
    """Signs of a collapse in a run's statistics -> what is seen and what it means.

    Meant for steps after the warm-up, when the prototypes are free. A sign counts when it has
    lasted: a healthy run may look like this for its first few dozen steps.
    dim: D; 0: not known.  The limits stand well clear of healthy runs
    (tests/oracles/demo_curves.json).
    """
    seen = {name: meaning.format(statistics[name]) for name, (tells, meaning) in SIGNS.items()
            if name in statistics and tells(statistics[name])}
    rank = statistics.get("effective_rank", dim)
    if rank < max(1.5, 0.02 * min(dim, 256)):       # of a few hundred rows it is no higher
        seen["effective_rank"] = (f"the embeddings' effective rank is {rank:.1f}"
                                  + f" of {dim}" * (dim > 0) + ": they lie nearly on a line")
    return seen


def statistics_of(method: nn.Module, outputs: tuple[Tensor, ...], loss: Tensor) -> dict[str, float]:
    """A method's own, and how its embeddings lie (swav.geometry), of ROWS of them at most. outputs:
    of forward, or of assigned. Waits for the device."""
    own = method.statistics(outputs, loss)
    if "effective_rank" in own:
        return own
    rows = outputs[0].detach().flatten(0, -2)[:ROWS].float()
    return own | geometry(F.normalize(rows, dim=1))


class Watchdog:
    """Warns once, when a sign of collapse has lasted for `patience` steps after the warm-up, with
    the prototypes free. It looks at each line of the log."""

    def __init__(self, config: Config, patience: int = 100):
        self.config, self.since, self.warned = config, {}, False
        own = METHODS[config.method].options.split()
        frozen = config.freeze_prototypes if "freeze_prototypes" in own else 0
        self.first = max(config.warmup_steps(), frozen)
        self.dim = config.head[-1] if "head" in own else 0
        self.patience = max(patience, config.steps // 50)

    def look(self, entry: dict) -> None:
        step = entry["step"]
        found = symptoms(entry, self.dim) if step > self.first else {}
        self.since = {sign: self.since.get(sign, step) for sign in found}
        lasting = {sign: step - since for sign, since in self.since.items()
                   if step - since >= self.patience}
        if lasting and not self.warned:
            self.warned = True
            tqdm.write(f"warning: for {min(lasting.values())} steps, "
                       f"{'; and '.join(found[sign] for sign in lasting)}. Little or nothing is "
                       f"learned like this. What has helped, best first: {remedies(self.config)}")
