"""Collapse: signs of it in the statistics of a run, and a warning that names what to change.

    watchdog = Watchdog(config)
    watchdog.look(entry)            # an entry of log.jsonl; warns once, if the run collapses

The statistics are swav.collapse_statistics'. Shapes: D embedding.
"""
from tqdm import tqdm

from recipes.config import Config
from recipes.small import remedies


def symptoms(statistics: dict[str, float], dim: int) -> dict[str, str]:
    """Signs of a collapse in what collapse_statistics gives -> what is seen and what it means.

    Meant for steps after the warm-up, when the prototypes are free. A sign counts when it has
    lasted: a healthy run may look like this for its first few dozen steps.
    dim: D.  The limits stand well clear of healthy runs (tests/oracles/demo_curves.json).
    """
    healthy = {"loss_over_ln_k": 0.0, "effective_rank": dim, "prototypes_used": 1.0}
    loss, rank, used = ((healthy | statistics)[name] for name in healthy)
    signs = {
        "loss": (loss > 0.99, "the loss is not below 99 % of ln K: every prototype is predicted "
                              "alike, whatever the image"),
        "rank": (rank < max(1.5, 0.02 * dim), f"the embeddings' effective rank is {rank:.1f} of "
                                              f"{dim}: they lie nearly on a line"),
        "use": (used < 0.05, f"only {used:.0%} of the prototypes are the nearest one to any crop"),
    }
    return {sign: meaning for sign, (seen, meaning) in signs.items() if seen}


class Watchdog:
    """Warns once, when a sign of collapse has lasted for `patience` steps after the warm-up, with
    the prototypes free. It looks at each line of the log."""

    def __init__(self, config: Config, patience: int = 100):
        self.config, self.since, self.warned = config, {}, False
        self.first = max(config.warmup_steps(), config.freeze_prototypes)
        self.patience = max(patience, config.steps // 50)

    def look(self, entry: dict) -> None:
        step = entry["step"]
        found = symptoms(entry, self.config.head[-1]) if step > self.first else {}
        self.since = {sign: self.since.get(sign, step) for sign in found}
        lasting = {sign: step - since for sign, since in self.since.items()
                   if step - since >= self.patience}
        if lasting and not self.warned:
            self.warned = True
            tqdm.write(f"warning: for {min(lasting.values())} steps, "
                       f"{'; and '.join(found[sign] for sign in lasting)}. Little or nothing is "
                       f"learned like this. What has helped, best first: {remedies(self.config)}")
