"""Figures: values with 95 % intervals; means per token and differences of paired shares."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, FiniteFloat

from cfsd.statistics.intervals import Floats, Interval, Z, bootstrap_ratio, interval_p, paired_share_bounds

NATS = "nats/token"
FRACTION = "fraction"
MEAN = "mean_forgetting"  # of all benchmarks that have a chance level
# divergences: above 0, and seeds scatter by factors
SKEWED = frozenset({"probe_kl", "chat_kl", "chat_user_kl", "target_divergence"})
OVERFLOW = 700.0  # nats; exp of more is infinite in float64


class Figure(BaseModel):
    """A value with its 95 % interval; both bounds are None where no interval is known."""

    model_config = ConfigDict(frozen=True)

    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    unit: str

    def scaled(self, factor: float, unit: str) -> "Figure":
        """Return the figure times a positive `factor`, in `unit`."""
        low, high = (None if bound is None else bound * factor for bound in (self.low, self.high))
        return Figure(value=self.value * factor, low=low, high=high, unit=unit)

    def within(self, least: float, most: float) -> "Figure":
        """Return the figure with its interval, if there is one, cut to what is possible."""
        if self.low is None or self.high is None:
            return self
        return self.model_copy(update={"low": max(self.low, least), "high": min(self.high, most)})


def figure_p(figure: Figure) -> float | None:
    """Return the two-sided p of 0 that the figure's interval comes to; None where there is none."""
    if figure.low is None or figure.high is None:
        return None
    return interval_p(figure.value, figure.low, figure.high)


def mean_per_token(sums: ArrayLike, counts: ArrayLike, *, seed: int) -> Figure:
    """Return sum(sums)/sum(counts) in nats per token, with a bootstrap over rows (one row per sequence).

    For `probe_kl` and losses. Rows without tokens add nothing. No interval below 5 rows, or
    where few rows hold most tokens (`cfsd.statistics.intervals.effective_rows`).

    Raises: ValueError for different shapes, no tokens at all, a number that is not finite, or a sum without tokens.
    """
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    if sums.shape != counts.shape or sums.ndim != 1:
        raise ValueError(f"sums {sums.shape} and counts {counts.shape} must be of one dimension and equal")
    bad = ~np.isfinite(sums) | ~np.isfinite(counts) | (counts < 0) | ((counts == 0) & (sums != 0))
    if bad.any():
        rows = ", ".join(map(str, np.flatnonzero(bad)[:5]))
        raise ValueError(f"{bad.sum()} rows (first: {rows}) are not finite or have a sum but no tokens")
    if counts.sum() == 0:
        raise ValueError("no row has any tokens; nothing can be measured per token")
    sums, counts = sums[counts > 0], counts[counts > 0]
    return figure_of(sums.sum() / counts.sum(), bootstrap_ratio(sums, counts, seed=seed), NATS)


def paired_share_difference(base: ArrayLike, tuned: ArrayLike) -> Figure:
    """Return the share of True in `tuned` less that in `base`, on the same documents: positive = more.

    It is `target_accuracy_gain`. Interval: `cfsd.statistics.intervals.paired_share_bounds`.

    Raises: ValueError for different shapes, no documents, or values other than 0 and 1.
    """
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"base {before.shape} and tuned {after.shape} must be the same documents, 1 or more")
    if not (all_zero_or_one(before) and all_zero_or_one(after)):
        raise ValueError("values other than 0 and 1 in base or tuned; shares are of documents right or wrong")
    return share_difference(after > before, after < before, FRACTION)


def share_of(right: NDArray[np.bool_]) -> Figure:
    """Return the share of documents that are right, with Wilson's interval, which stays within 0 and 1."""
    total, share = len(right), float(right.mean())
    middle, spread = share + Z**2 / (2 * total), Z * math.sqrt(share * (1 - share) / total + (Z / total / 2) ** 2)
    low, high = ((middle + side * spread) / (1 + Z**2 / total) for side in (-1, 1))
    return figure_of(share, Interval(low, high), FRACTION)


def share_difference(up: NDArray[np.bool_], down: NDArray[np.bool_], unit: str) -> Figure:
    """Return the share of `up` less that of `down`, two masks over the same documents."""
    ups, downs, total = int(up.sum()), int(down.sum()), len(up)
    low, high = paired_share_bounds(ups, downs, total)
    return figure_of((ups - downs) / total, Interval(float(low), float(high)), unit)


def figure_of(value: float, interval: Interval | None, unit: str) -> Figure:
    """Return the figure; an interval that misses its own estimate is stretched to hold it."""
    value = float(value) + 0.0  # -0.0 would be printed with its sign
    if interval is None:
        return Figure(value=value, low=None, high=None, unit=unit)
    return Figure(value=value, low=min(interval.low, value), high=max(interval.high, value), unit=unit)


def mean_of(parts: Sequence[Figure], unit: str) -> Figure:
    """Return the mean of independent figures; it has no interval where one of them has none.

    Each side adds up its own squared distances, so skew survives and a part without changes still counts.

    Source: Zou, Huang and Zhang 2009, A note on confidence interval estimation for a linear function of
    binomial proportions, Computational Statistics and Data Analysis 53 ("MOVER").
    """
    values, lows, highs = np.array(
        [(part.value, part.low, part.high) for part in parts], dtype=np.float64
    ).T.copy()  # rows: sums of strided numbers round otherwise
    mean = values.mean()
    if np.isnan([lows, highs]).any():
        return figure_of(mean, None, unit)
    below, above = np.linalg.norm(values - lows), np.linalg.norm(highs - values)
    return figure_of(mean, Interval(float(mean - below / len(parts)), float(mean + above / len(parts))), unit)


def exponential(difference: Figure) -> Figure | None:
    """Return exp of a difference in nats per token, a quotient of perplexities; None if it overflows."""
    numbers = (difference.value, difference.low, difference.high)
    if max(abs(number) for number in numbers if number is not None) > OVERFLOW:
        return None
    low, high = (None if bound is None else math.exp(bound) for bound in (difference.low, difference.high))
    return Figure(value=math.exp(difference.value), low=low, high=high, unit="factor")


def all_zero_or_one(values: Floats) -> bool:
    """Return whether every value is exactly 0 or 1."""
    return bool(((values == 0) | (values == 1)).all())
