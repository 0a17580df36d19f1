"""Power: how small a change is detectable, and how many documents or seeds are needed to detect a given one.

Detectable means with 80 % probability, by a two-sided test at 5 %.
"""

import math

import numpy as np
from scipy import stats

from cfsd.statistics.figures import Figure
from cfsd.statistics.intervals import Z

Z_POWER = float(stats.norm.ppf(0.8))
MAX_SEEDS = 1000


def detectable_share(changed_share: float, total: int) -> float:
    """Return the smallest drop of a share that is detectable; above 1 where no drop is.

    `changed_share` is the observed share of documents that changed, taken as at least 3/total: none among n
    proves no more than that (the rule of three).
    """
    share = min(1.0, max(changed_share, 3 / total))
    return float((Z + Z_POWER) * np.sqrt(share / total))


def detectable_change(figure: Figure) -> float | None:
    """Return the smallest change that is detectable, from the width of the figure's own interval.

    For mean scores, losses and probe_kl, which are no shares of documents. None without an interval, or with one of
    width 0 (all rows equal), from which the scatter cannot be estimated.
    """
    if figure.low is None or figure.high is None or figure.high <= figure.low:
        return None
    return (figure.high - figure.low) / 2 * (Z + Z_POWER) / Z


def documents_needed(changed_share: float, drop: float) -> int:
    """Return how many documents detect `drop`: the smallest n with `detectable_share(changed_share, n) <= drop`.

    Raises:
        ValueError: `changed_share` outside [0, 1] or `drop` outside (0, 1].
    """
    if not (0 <= changed_share <= 1 and 0 < drop <= 1):
        raise ValueError(f"changed share {changed_share} must be from 0 to 1, drop {drop} above 0 and at most 1")
    factor = (Z + Z_POWER) / drop
    return math.ceil(max(factor**2 * changed_share, factor * math.sqrt(3)) - 1e-9)


def seeds_needed(deviation: float, change: float) -> int:
    """Return how many seeds detect `change` by a t test, at a standard `deviation` between seeds.

    The scatter of documents does not count: more seeds on the same documents do not reduce it.

    Raises:
        ValueError: `deviation` negative, `change` not above 0, or more than 1000 seeds needed.
    """
    if deviation < 0 or change <= 0:
        raise ValueError(f"deviation {deviation} must be 0 or more and change {change} above 0")
    counts = np.arange(2, MAX_SEEDS + 1)
    reach = (stats.t.ppf(0.975, counts - 1) + stats.t.ppf(0.8, counts - 1)) * deviation / np.sqrt(counts)
    enough = counts[reach <= change]
    if not len(enough):
        raise ValueError(f"more than {MAX_SEEDS} seeds would be needed to find {change} at a deviation of {deviation}")
    return int(enough[0])
