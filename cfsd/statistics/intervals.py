"""Intervals and tests for paired figures: pure functions of arrays, at 95 % throughout.

`tests/statistics/test_simulation.py` measures the coverage of each.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special  # scipy.stats takes 0.7 s to import, and commands import this module

Floats = NDArray[np.float64]

Z = float(special.ndtri(0.975))
RESAMPLES = 2000
SIGN_FLIPS = 4999
RESOLUTION = 1 / (SIGN_FLIPS + 1)
MIN_ROWS = 5
FEWEST_EFFECTIVE = 3.5
CELLS = 1 << 17  # of one block of resamples; larger blocks leave the cache: 2 to 3 times slower


class Interval(NamedTuple):
    """The two bounds of a 95 % interval."""

    low: float
    high: float


def paired_share_bounds(up: ArrayLike, down: ArrayLike, total: int) -> tuple[Floats, Floats]:
    """Return both bounds for a difference of paired shares, elementwise, within [-1, 1].

    `up` and `down` count the documents that changed either way, `total` all documents. Never of width 0:
    with no change at all it is +-2.77/(total + 2).

    Source: Bonett and Price 2012, Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data, Journal of Educational and Behavioral Statistics 37(4).
    It covers 0.931 to 0.962; docs/LOG.md compares it with Tango's and others.
    """
    share_up, share_down = (np.add(up, 1.0) / (total + 2), np.add(down, 1.0) / (total + 2))
    middle = share_up - share_down
    half = Z * np.sqrt((share_up + share_down - middle**2) / (total + 2))
    return np.maximum(middle - half, -1.0), np.minimum(middle + half, 1.0)


def bootstrap_ratio(sums: Floats, counts: Floats, *, seed: int) -> Interval | None:
    """Return the interval of sum(sums)/sum(counts), resampling rows; None below 5 rows or 3.5 `effective_rows`.

    Where one row holds most of the counts, resamples have it or not, and say nothing of what another such row would
    be: with 9,000 of 9,950 tokens in one of 20 rows it covered 0.08. From 3.5 effective rows on it covered 0.86 or more
    of normal and of exponential rows.

    Studentised, because rows are skewed: it covers 0.93-0.94 at 50 to 96 rows, the percentile bootstrap 0.90-0.92.
    Of width 0 where all rows have the same quotient.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5.
    Differs: a resample's standard error counts as at least a quarter of the whole sample's; otherwise a
    resample of one row over and over gives an infinite bound.
    """
    if len(sums) < MIN_ROWS or effective_rows(counts) < FEWEST_EFFECTIVE:
        return None
    ratio = sums.sum() / counts.sum()
    rest = sums - ratio * counts
    error = np.sqrt(rest @ rest) / counts.sum()
    if error == 0:
        return Interval(float(ratio), float(ratio))
    columns = np.stack([rest, counts, rest**2, rest * counts, counts**2], axis=1)
    of_rest, of_counts, rest_rest, rest_counts, counts_counts = resampled_sums(columns, seed).T
    shift = of_rest / of_counts
    squares = rest_rest - 2 * shift * rest_counts + shift**2 * counts_counts
    errors = np.sqrt(np.maximum(squares, 0.0)) / of_counts
    low, high = np.quantile(shift / np.maximum(errors, error / 4), [0.025, 0.975])
    widen = error * np.sqrt(len(sums) / (len(sums) - 1))
    return Interval(float(ratio - high * widen), float(ratio - low * widen))


def effective_rows(counts: Floats) -> float:
    """Return as how many rows of equal counts these are worth: sum(counts)^2 / sum(counts^2)."""
    return float(counts.sum() ** 2 / (counts @ counts)) if len(counts) else 0.0


def resampled_sums(columns: Floats, seed: int) -> Floats:
    """Return the column sums of RESAMPLES samples of rows with replacement, the same rows for the same `seed`."""
    rng, rows = np.random.default_rng(seed), len(columns)
    block = max(1, CELLS // rows)
    parts = []
    for start in range(0, RESAMPLES, block):
        size = min(block, RESAMPLES - start)
        sampled = rng.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        times = np.bincount(sampled.ravel(), minlength=size * rows).reshape(size, rows)
        parts.append(times @ columns)
    return np.concatenate(parts)


def bootstrap_change(changes: Floats, *, reach: float, seed: int) -> Interval | None:
    """Return the interval of the mean of paired `changes`, of which most may be 0; None below 5 documents.

    `reach` is the largest change that the metric allows. Two documents are added that are by s above and below the
    mean: by `reach` if hardly any document changed, by as much as the others if many did. As in `paired_share_bounds`,
    the interval so has a width where no document changed. With 1 document in 20 changed, out of 50, the percentile
    bootstrap covered 0.75 and this one 0.99. Over 14 distributions of change it covered 0.93 or more from 50
    documents on; at 20 documents, all changed and skewed, only 0.88. Around 0 in place of the mean the two documents
    pull a large loss towards 0: of 50 that all changed by 0.4, give or take 0.05, such an interval covered 0.87.
    """
    if reach == 0 or len(changes) < MIN_ROWS:
        return None
    sums = padded(changes, reach)
    interval = bootstrap_ratio(sums, np.ones(len(sums)), seed=seed)
    return interval and Interval(max(interval.low, -reach), min(interval.high, reach))


def padded(changes: Floats, reach: float) -> Floats:
    """Return paired `changes` with the two documents that `bootstrap_change` adds."""
    mean = changes.mean()
    size = imagined_change(np.where(changes != 0, changes - mean, 0.0), reach)
    return np.append(changes, [mean + size, mean - size])


def imagined_change(changes: Floats, reach: float) -> float:
    """Return how large an imagined change is: `reach` if hardly any document changed, that of the others if many."""
    changed = int(np.count_nonzero(changes))
    trust = min(1.0, 3 / max(1, changed))
    return float(np.sqrt((changes @ changes + trust * reach**2) / (changed + trust)))


def mcnemar_p(up: int, down: int) -> float:
    """Return the two-sided p of the exact McNemar test; 1 where nothing changed."""
    fewer, more = sorted((up, down))
    return min(1.0, 2 * float(special.betainc(more, fewer + 1, 0.5))) if fewer < more else 1.0


def sign_flip_p(changes: Floats, *, seed: int) -> float:
    """Return the two-sided p of the paired permutation test: before and after swapped at random per document.

    On 0/1 scores it is McNemar's test, but for the sampling of swaps (resolution 1/5000).
    """
    sizes = np.abs(changes[changes != 0])
    if not len(sizes):
        return 1.0
    rng, seen = np.random.default_rng(seed), abs(float(changes.sum())) * (1 - 1e-9)
    block = max(1, CELLS // len(sizes))
    extreme = 0
    for start in range(0, SIGN_FLIPS, block):
        signs = rng.integers(0, 2, (min(block, SIGN_FLIPS - start), len(sizes)), dtype=np.int8) * 2.0 - 1.0
        extreme += int(np.count_nonzero(np.abs(signs @ sizes) >= seen))
    return (extreme + 1) * RESOLUTION


def mean_change_p(changes: Floats, counts: Floats, reach: float | None, *, seed: int) -> float:
    """Return the two-sided p that paired `changes` have a mean of 0: the larger of a permutation test's and `ratio_p`.

    Swapping signs takes the changes for symmetric. Where most documents gain a little and a few lose much, it calls a
    mean of 0 better in 12 % of cases (100 documents, 5 % of which lose 0.95); `ratio_p` corrects for skew.
    At the permutation test's resolution p is `ratio_p`: a change could otherwise not be found among hundreds of tests
    that are adjusted for each other, however large it is. That is of scores with the documents that
    `bootstrap_change` adds (`reach`), or of sums over `counts` tokens (None), and never below 2^(1-n), the smallest p
    of a permutation test when n documents changed.
    """
    p = sign_flip_p(changes, seed=seed)
    sums, of = (changes[counts > 0], counts[counts > 0]) if reach is None else (padded(changes, reach), None)
    below = ratio_p(sums, np.ones(len(sums)) if of is None else of)
    if below is None:
        return p
    return max(below, p if p > RESOLUTION else 2.0 ** (1 - np.count_nonzero(changes)))


def ratio_p(sums: Floats, counts: Floats) -> float | None:
    """Return the two-sided p that sum(sums)/sum(counts) is 0, rows being independent; None below 5 rows.

    Every count is above 0. It is the larger of two: Student's t with the jackknife's error, and the same after Hall's
    correction for skew. The first finds too much where rows are skewed, the second where they have long tails. Unlike a
    permutation's, its p has no smallest value, so that hundreds of tests can be adjusted for each other. Of 20 to 128
    rows it rejects 0.02-0.055 at 5 % where differences have a normal, t3 or exponential law, are those of two models of
    one skewed law, or of two unequally skewed ones; 0.067, 0.054, 0.044 (20, 50, 128) of a log-normal with sigma 1.

    Source: Hall 1992, On the removal of skewness by transformation, JRSS B 54(1), equation 2.4.
    Differs: rows count as `effective_rows`, which is their number where all counts are equal.
    """
    if len(sums) < MIN_ROWS:
        return None
    total, rows = counts.sum(), effective_rows(counts)
    ratio = sums.sum() / total
    rest = (sums - ratio * counts) / (1 - counts / total)
    error = np.sqrt(rest @ rest) / total
    if error == 0:
        return float(ratio == 0)
    share = ratio / error / np.sqrt(rows)
    skew = float((rest**3).mean() / (rest**2).mean() ** 1.5)
    corrected = share + skew * share**2 / 3 + skew**2 * share**3 / 27 + skew / (6 * rows)
    return 2 * float(special.stdtr(rows - 1, -np.sqrt(rows) * min(abs(share), abs(corrected))))


def interval_p(value: float, low: float, high: float) -> float:
    """Return the two-sided p of 0 whose 95 % interval this is: its bounds move away as those of a normal law do."""
    reach = value - low if value > 0 else high - value
    return float(value == 0) if reach == 0 else 2 * float(special.ndtr(-Z * abs(value) / reach))


def is_above(scores: Floats, level: float, *, binary: bool) -> bool:
    """Return whether the mean of `scores` is above `level`, one-sided at 2.5 %.

    By a t test, and for 0/1 scores by the exact binomial test as well: the t test fails where all scores
    are equal, the binomial test takes a single success for proof when `level` is 0.
    """
    if len(scores) < MIN_ROWS:
        return False
    error = scores.std(ddof=1) / np.sqrt(len(scores))
    clear = scores.mean() - special.stdtrit(len(scores) - 1, 0.975) * error > level
    if not binary:
        return bool(clear)
    at_least_as_many = special.bdtrc(scores.sum() - 1, len(scores), level)
    return bool(clear and at_least_as_many < 0.025)
