"""N-grams of token ids as 64-bit numbers: how varied a corpus is, how much rows repeat themselves and each other.

T tokens, G n-grams, R rows. Two n-grams of a million share a number with probability 1e-7; nothing else is approximate.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
PAIR_ORDER = 4  # tokens in the n-grams by which rows are compared with each other and with themselves
BLOCK = 256  # rows compared with all others at once


class Rows(NamedTuple):
    """Rows of tokens laid end to end."""

    ids_T: Ints
    row_T: Ints  # the row that each token is in, from 0, never falling
    sampled_T: NDArray[np.bool_]  # false for prompt tokens

    def of(self, selected_R: NDArray[np.bool_]) -> "Rows":
        """Return the rows where `selected_R` is true; they keep their numbers."""
        selected_T = selected_R[self.row_T]
        return Rows(self.ids_T[selected_T], self.row_T[selected_T], self.sampled_T[selected_T])


class Grams(NamedTuple):
    """The n-grams of some rows and the row that each is in."""

    hash_G: Hashes
    row_G: Ints


def spread(first: int, count: int, fraction: float) -> NDArray[np.bool_]:
    """Return which of the rows `first`, `first` + 1, … are selected, so that `fraction` of all are, evenly spread."""
    edge = np.floor(np.arange(first, first + count + 1) * min(1.0, fraction))
    selected: NDArray[np.bool_] = edge[1:] > edge[:-1]
    return selected


def ngrams(rows: Rows, order: int) -> Grams:
    """Return every run of `order` sampled tokens inside one row."""
    length = max(0, len(rows.ids_T) - order + 1)
    hash_G = np.zeros(length, np.uint64)
    whole_G = rows.row_T[:length] == rows.row_T[len(rows.row_T) - length :]
    for place in range(order):
        hash_G = _mixed(hash_G ^ _mixed(rows.ids_T[place : place + length].astype(np.uint64) + np.uint64(1)))
        whole_G &= rows.sampled_T[place : place + length]
    return Grams(hash_G[whole_G], rows.row_T[:length][whole_G])


def _mixed(values: Hashes) -> Hashes:
    """Return 64 bits that depend on every bit of `values`; one to one.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def repetition(grams: Grams) -> list[float]:
    """Return, for each row that has n-grams, the share of them that stood earlier in the same row.

    Source: Welleck et al. 2020, arXiv:1908.04319, the metric seq-rep-n: 1 - |unique n-grams| / |n-grams|.
    """
    own = _mixed(grams.hash_G ^ _mixed(grams.row_G.astype(np.uint64)))
    _, first = np.unique(own, return_index=True)
    total_R = np.bincount(grams.row_G)
    distinct_R = np.bincount(grams.row_G[first], minlength=len(total_R))
    there_R = total_R > 0
    shares: list[float] = (1 - distinct_R[there_R] / total_R[there_R]).tolist()
    return shares


class NearPair(NamedTuple):
    """Two rows, by their places in what was compared, and the Jaccard index of their n-grams."""

    one: int
    other: int
    overlap: float


def nearest_pairs(sets: Sequence[Hashes], count: int) -> list[NearPair]:
    """Return the `count` pairs with the largest Jaccard index |A & B| / |A | B|, over all pairs; none of index 0.

    `sets` holds the n-grams of each row, each once. Exact: a block of rows at a time against all later ones.
    """
    sizes_R = np.array([len(grams) for grams in sets])
    _, column = np.unique(np.concatenate([*sets, np.zeros(0, np.uint64)]), return_inverse=True)
    starts = np.concatenate([[0], np.cumsum(sizes_R)])
    shape = (len(sets), int(column.max(initial=-1)) + 1)
    has: Any = sparse.csr_matrix((np.ones(len(column), np.int32), column, starts), shape)
    nearest: list[NearPair] = []
    for first in range(0, len(sets), BLOCK):
        shared = (has[first : first + BLOCK] @ has[first:].T).tocoo()
        later = shared.col > shared.row
        one, other, both = shared.row[later] + first, shared.col[later] + first, shared.data[later]
        overlap = both / (sizes_R[one] + sizes_R[other] - both)
        best = np.lexsort((other, one, -overlap))[:count]
        nearest += [NearPair(int(one[i]), int(other[i]), float(overlap[i])) for i in best]
    return sorted(nearest, key=lambda pair: (-pair.overlap, pair.one, pair.other))[:count]
