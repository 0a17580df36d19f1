"""The null band of a stability gap: how large a gap comes from chance alone, with so many looks at so few documents."""

from collections.abc import Sequence

import numpy as np
from scipy import special

from cfsd.statistics.intervals import Floats, padded

LEVEL = 0.95
HALVINGS = 60
DEFINITION = (
    "The band is what 95 % of gaps stay below if no look was truly worse than the worse of the start and the end. It "
    "takes the looks between as independent, each with the error of its change since the first look; looks at the same "
    "documents go together, so that the claim is a cautious one: a gap of nothing exceeded it in 0.2 to 3 % of "
    "simulated trainings"
)


def null_band(errors: Sequence[float]) -> float:
    """Return the level that the worst of independent normal changes stays below in 95 % of cases.

    `errors`: the standard error of each look's change since the first look, without first and last look, since a
    gap is counted from the worse of these two. 0 without a look between them.

    Differs: what a gap is counted from has an error too. It is in `errors` where looks are alike, since each change
    has the first look's error in it, and that of a change since the last look is then as large.
    """
    scales = np.array([error for error in errors if error > 0])
    if not len(scales):
        return 0.0
    low, high = 0.0, float(scales.max()) * 40
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        inside = special.log_ndtr(middle / scales).sum() >= np.log(LEVEL)
        low, high = (low, middle) if inside else (middle, high)
    return high


def error_of_ratio(changes: Floats, counts: Floats) -> float:
    """Return the standard error over rows of sum(changes)/sum(counts), paired changes of sums over tokens."""
    rest = changes - changes.sum() / counts.sum() * counts
    return float(np.sqrt(rest @ rest * len(rest) / max(1, len(rest) - 1)) / counts.sum())


def error_of_scores(changes: Floats, reach: float) -> float:
    """Return the standard error of the mean of paired changes, at most `reach` each, of which most may be 0.

    Two imagined documents changed either way, as in `bootstrap_change`: no change seen does not mean no error.
    """
    return error_of_ratio(padded(changes, reach), np.ones(len(changes) + 2))
