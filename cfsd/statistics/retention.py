"""Retention: what share of its score above chance a model kept, with an interval for the quotient of paired means."""

import numpy as np
from scipy import special

from cfsd.statistics.figures import FRACTION, Figure, figure_of
from cfsd.statistics.intervals import MIN_ROWS, Floats, Interval, imagined_change


def retention_of(base: Floats, tuned: Floats, chance: float) -> Figure:
    """Return (mean of `tuned` - chance)/(mean of `base` - chance) of paired scores from 0 to 1, `base` being above.

    No bounds below 5 documents, or where the quotient is unbounded because `base` is hardly above chance.

    Source: Fieller 1954, Some problems in interval estimation, JRSS B 16(2): the quotients that the paired difference
    tuned - quotient x base does not rule out, by t.
    Differs: two imagined documents are added that changed either way, as in `cfsd.statistics.intervals`, since with few
    changes there is hardly any variance to be seen. At 50 documents it covers 0.95 to 1.00 (`tests/statistics/
    test_retention.py`), most where hardly any document changed.
    """
    value = (tuned.mean() - chance) / (base.mean() - chance)
    return figure_of(value, _fieller(base - chance, tuned - chance), FRACTION)


def _fieller(base: Floats, tuned: Floats) -> Interval | None:
    """Return the bounds of mean(tuned)/mean(base): the quotients q with |mean(tuned - q base)| <= t x its error."""
    if len(base) < MIN_ROWS:
        return None
    middle, half = (base.mean() + tuned.mean()) / 2, imagined_change(base - tuned, 1.0) / 2
    pairs = np.array([[*base, middle + half, middle - half], [*tuned, middle - half, middle + half]])
    reach = special.stdtrit(len(base) - 1, 0.975) ** 2 * np.cov(pairs) / pairs.shape[1]
    (y, x), ((yy, xy), (_, xx)) = pairs.mean(1), reach
    a, b, c = y * y - yy, x * y - xy, x * x - xx
    if a <= 0:
        return None
    half_width = np.sqrt(max(b * b - a * c, 0.0))
    return Interval(float((b - half_width) / a), float((b + half_width) / a))
