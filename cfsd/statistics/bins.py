"""Bins of a per-token figure: by position in the row, or by the quantiles of another number of the token."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cfsd.statistics.figures import Figure, mean_per_token

Floats = NDArray[np.float64]


class Bin(NamedTuple):
    """The tokens whose number is from `low` on and below `high`; the last bin's `high` belongs to it."""

    low: float
    high: float
    tokens: int
    share: float  # of the sum over all bins
    figure: Figure  # mean per token


def doubling_edges(longest: int) -> Floats:
    """Return edges of bins for positions 1 to `longest`: 1, 2, 3 to 4, 5 to 8, and so on."""
    edges = [1, 2]
    while edges[-1] <= longest:
        edges.append(2 * (edges[-1] - 1) + 1)
    return np.array(edges, dtype=np.float64)


def quantile_edges(values: ArrayLike, count: int) -> Floats:
    """Return the `count` + 1 edges of bins that hold equally many of `values`, as far as they differ."""
    return np.quantile(np.asarray(values, dtype=np.float64), np.linspace(0, 1, count + 1))


def row_sums(
    values: Sequence[ArrayLike], numbers: Sequence[ArrayLike], edges: ArrayLike
) -> tuple[Floats, Floats]:  # fmt: skip
    """Return sums and counts, rows x bins, of each row's per-token `values`, by the bin of their `numbers`.

    Numbers outside the edges belong to the first or last bin, so that bins add up to the whole.
    """
    inner, bins = np.asarray(edges, np.float64)[1:-1], len(np.asarray(edges)) - 1
    sums, counts = np.zeros((2, len(values), bins))
    for row, (own, by) in enumerate(zip(values, numbers, strict=True)):
        place = np.searchsorted(inner, np.asarray(by, np.float64), side="right")
        sums[row] = np.bincount(place, np.asarray(own, np.float64), minlength=bins)
        counts[row] = np.bincount(place, minlength=bins)
    return sums, counts


def bins_of(values: Sequence[ArrayLike], numbers: Sequence[ArrayLike], edges: ArrayLike) -> list[Bin]:
    """Return the mean per token in each bin, with its interval over rows; bins without tokens are left out."""
    sums, counts = row_sums(values, numbers, edges)
    whole, pairs = sums.sum(), pairwise(np.asarray(edges, np.float64).tolist())
    return [
        Bin(low, high, int(count.sum()), float(own.sum() / whole) if whole else 0.0, mean_per_token(own, count, seed=0))
        for (low, high), own, count in zip(pairs, sums.T, counts.T, strict=True)
        if count.any()
    ]
