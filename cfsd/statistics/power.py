"""How small a change is detectable: with 80 % probability, by a two-sided test at 5 %."""

import math

from scipy import special

from cfsd.statistics.figures import Figure
from cfsd.statistics.intervals import Z

POWER = 0.8
Z_POWER = float(special.ndtri(POWER))
FEWEST_LOST = 6  # documents that are lost and none won, before the exact McNemar test is below 5 %
LOST_ON_AVERAGE = float(special.gammaincinv(FEWEST_LOST, POWER))  # of a Poisson law that reaches them so often: 7.9


def detectable_share(changed_share: float, total: int) -> float:
    """Return the smallest drop of a share that is detectable; above 1 where no drop is.

    `changed_share` is the observed share of documents that changed. Where it is small, the normal approximation
    promises too much: after three changes it calls a drop of 4.9 documents detectable, which the exact McNemar test
    finds in 36 %. It takes a drop of 7.9 documents for six or more to be lost in 80 %.
    """
    return max((Z + Z_POWER) * math.sqrt(min(1.0, changed_share) / total), LOST_ON_AVERAGE / total)


def detectable_change(figure: Figure) -> float | None:
    """Return the smallest change that is detectable, from the width of the figure's own interval.

    For mean scores, losses and probe_kl, which are no shares of documents. None without an interval, or with one of
    width 0 (all rows equal), from which the scatter cannot be estimated.
    """
    if figure.low is None or figure.high is None or figure.high <= figure.low:
        return None
    return (figure.high - figure.low) / 2 * (Z + Z_POWER) / Z
