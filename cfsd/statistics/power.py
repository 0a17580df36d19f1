"""How small a change is detectable: with 80 % probability, by a two-sided test at 5 %."""

import math

from scipy import special

from cfsd.statistics.figures import Figure
from cfsd.statistics.intervals import Z

Z_POWER = float(special.ndtri(0.8))


def detectable_share(changed_share: float, total: int) -> float:
    """Return the smallest drop of a share that is detectable; above 1 where no drop is.

    `changed_share` is the observed share of documents that changed, taken as at least 3/total: none among n
    proves no more than that (the rule of three).
    """
    share = min(1.0, max(changed_share, 3 / total))
    return (Z + Z_POWER) * math.sqrt(share / total)


def detectable_change(figure: Figure) -> float | None:
    """Return the smallest change that is detectable, from the width of the figure's own interval.

    For mean scores, losses and probe_kl, which are no shares of documents. None without an interval, or with one of
    width 0 (all rows equal), from which the scatter cannot be estimated.
    """
    if figure.low is None or figure.high is None or figure.high <= figure.low:
        return None
    return (figure.high - figure.low) / 2 * (Z + Z_POWER) / Z
