"""Bins partition the tokens: their sums are the rows' sums, whatever the edges."""

import numpy as np
import pytest

from cfsd.statistics.bins import bins_of, doubling_edges, quantile_edges, row_sums

RNG = np.random.default_rng(0)
LENGTHS = [1, 3, 8, 17, 5, 30]
VALUES = [RNG.exponential(size=n).astype(np.float32) for n in LENGTHS]
NUMBERS = [RNG.normal(size=n).astype(np.float32) for n in LENGTHS]
PLACES = [np.arange(1, n + 1) for n in LENGTHS]


@pytest.mark.parametrize("longest", [1, 2, 3, 4, 5, 8, 9, 100])
def test_positions_double_from_bin_to_bin_and_reach_the_longest(longest: int) -> None:
    edges = doubling_edges(longest)
    assert edges[0] == 1 and edges[-2] <= longest < edges[-1]
    assert (np.diff(edges)[1:] == 2.0 ** np.arange(len(edges) - 2)).all()


@pytest.mark.parametrize("numbers", [NUMBERS, PLACES])
@pytest.mark.parametrize("edges", ["quantiles", "doubling", "too narrow"])
def test_the_sums_of_bins_are_the_sums_of_rows(numbers: list[np.ndarray], edges: str) -> None:
    found = {"quantiles": quantile_edges(np.concatenate(numbers), 10), "doubling": doubling_edges(30),
             "too narrow": np.array([0.1, 0.2, 0.3])}[edges]  # fmt: skip
    sums, counts = row_sums(VALUES, numbers, found)
    assert sums.sum(1) == pytest.approx([float(v.sum(dtype=np.float64)) for v in VALUES], rel=1e-14)
    assert counts.sum(1).tolist() == LENGTHS


def test_a_token_on_an_edge_is_in_the_bin_above_and_the_last_edge_is_in_the_last_bin() -> None:
    _, counts = row_sums([[1.0] * 5], [[1, 2, 3, 4, 5]], [1, 2, 4, 5])
    assert counts.tolist() == [[1, 2, 2]]


def test_deciles_hold_a_tenth_of_the_tokens_each() -> None:
    numbers = [np.arange(50.0) * 2, np.arange(50.0) * 2 + 1]
    bins = bins_of([np.ones(50), np.full(50, 3.0)], numbers, quantile_edges(np.concatenate(numbers), 10))
    assert [part.tokens for part in bins] == [10] * 10
    assert [part.figure.value for part in bins] == pytest.approx([2.0] * 10)
    assert [part.share for part in bins] == pytest.approx([0.1] * 10)


def test_bins_without_tokens_are_left_out_and_the_others_stay_whole() -> None:
    bins = bins_of([[1.0, 2.0, 4.0]], [[0.0, 0.0, 9.0]], quantile_edges([0.0, 0.0, 9.0], 10))
    assert sum(part.tokens for part in bins) == 3
    assert sum(part.figure.value * part.tokens for part in bins) == 7.0
    assert sum(part.share for part in bins) == pytest.approx(1)


def test_equal_models_have_no_share_anywhere() -> None:
    assert {part.share for part in bins_of([[0.0] * 4], [[1, 2, 3, 4]], doubling_edges(4))} == {0.0}
