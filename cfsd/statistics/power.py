"""How small a change is detectable: with 80 % probability, by a two-sided test at a level."""

import math

from scipy import special

from cfsd.statistics.figures import Figure
from cfsd.statistics.intervals import Z

POWER = 0.8
Z_POWER = float(special.ndtri(POWER))
LEVEL = 0.05


def detectable_share(changed_share: float, total: int, level: float = LEVEL) -> float:
    """Return the smallest drop of a share that a test at `level` detects; above 1 where none is.

    `changed_share` is the observed share of documents that changed. Where it is small, the normal approximation
    promises too much: after three changes it calls a drop of 4.9 documents detectable at 5 %, which the exact McNemar
    test finds in 36 %. It takes a drop of 7.9 documents for six or more, the fewest that it finds, to be lost in 80 %.
    """
    fewest = math.ceil(1 - math.log2(level))  # lost and none won: p = 2 / 2^fewest
    on_average = float(special.gammaincinv(fewest, POWER))  # of a Poisson law that reaches them so often
    return max(_deviates(level) * math.sqrt(min(1.0, changed_share) / total), on_average / total)


def _deviates(level: float) -> float:
    """Return how many standard errors away a change is found by a test at `level`."""
    return Z_POWER - float(special.ndtri(level / 2))


def detectable_change(figure: Figure, level: float = LEVEL) -> float | None:
    """Return the smallest change that a test at `level` detects, from the width of the figure's own interval.

    For mean scores, losses and probe_kl, which are no shares of documents. None without an interval, or with one of
    width 0 (all rows equal), from which the scatter cannot be estimated.
    """
    if figure.low is None or figure.high is None or figure.high <= figure.low:
        return None
    return (figure.high - figure.low) / 2 * _deviates(level) / Z
