"""Two tests of a corpus against a distribution: its first tokens, and the log-probabilities of two samples.

R rows, V vocabulary.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

SMALLEST_EXPECTED = 5.0  # counts per bin; rarer tokens are counted together
Array = NDArray[Any]


def first_token_p(first_R: Array, probs_V: Array) -> float:
    """Return the p-value of these first tokens under `probs_V`, which need not be normalised; see `counts_p`."""
    seen_V = np.bincount(first_R, minlength=len(probs_V)).astype(float)
    return counts_p(seen_V, np.pad(probs_V, (0, len(seen_V) - len(probs_V))) / probs_V.sum() * len(first_R))


def counts_p(seen_V: Array, expected_V: Array) -> float:
    """Return the chi-square p-value of counts; rare tokens are pooled, or tested alone if they are too rare."""
    common_V = expected_V >= SMALLEST_EXPECTED
    seen, expected = seen_V[common_V], expected_V[common_V]
    rare_seen, rare_expected = seen_V[~common_V].sum(), expected_V[~common_V].sum()
    if rare_expected >= SMALLEST_EXPECTED:
        return _chi_square(np.append(seen, rare_seen), np.append(expected, rare_expected))
    rare = float(stats.poisson.sf(rare_seen - 1, rare_expected)) if rare_seen else 1.0
    return min(1.0, 2 * min(_chi_square(seen, expected), rare))


def _chi_square(seen: Array, expected: Array) -> float:
    """Return the p-value of counts, conditional on their sum."""
    if len(seen) < 2:
        return 1.0
    return float(stats.chisquare(seen, expected / expected.sum() * seen.sum()).pvalue)


def _ratio(nats_R: Array, count_R: Array) -> tuple[float, float, int]:
    """Return sum/sum, its squared standard error over rows, and the degrees of freedom."""
    mean, rows = float(nats_R.sum() / count_R.sum()), len(count_R)
    rest_R = nats_R - mean * count_R
    return mean, float(rest_R @ rest_R) / float(count_R.sum()) ** 2 * rows / (rows - 1), rows - 1


def difference_z(one: tuple[Array, Array], other: tuple[Array, Array]) -> float | None:
    """Return how many standard errors the mean per token of sample `one` is above the `other`'s.

    A sample: per row the summed values and how many tokens they are of. Rows are independent, the tokens of one are
    not: the error of sum/sum is counted over rows. It is Welch's t, as the normal deviate of the same
    probability. None with fewer than two rows.
    """
    if any(len(count_R) < 2 or not count_R.sum() for _, count_R in (one, other)):
        return None
    (mean, variance, free), (other_mean, other_variance, other_free) = _ratio(*one), _ratio(*other)
    if (total := variance + other_variance) == 0:
        return 0.0
    t = (mean - other_mean) / np.sqrt(total)
    freedom = total**2 / (variance**2 / free + other_variance**2 / other_free)
    return float(np.copysign(stats.norm.isf(max(stats.t.sf(abs(t), freedom), 1e-300)), t))


def per_row(value_T: Array, length_R: Array) -> Array:
    """Return the sums over rows that lie end to end in `value_T`."""
    summed = np.concatenate([np.zeros(1, value_T.dtype), np.cumsum(value_T)])
    ends = np.cumsum(length_R)
    sums: Array = summed[ends] - summed[ends - length_R]
    return sums
