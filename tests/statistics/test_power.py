"""Power: what was found beside what would have been, and how many documents or seeds are needed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cfsd.statistics.figures import Figure
from cfsd.statistics.power import detectable_change, detectable_share, documents_needed, seeds_needed


@given(st.floats(0, 1), st.floats(0.005, 1))
def test_the_documents_needed_are_the_fewest_that_find_the_drop(share: float, drop: float) -> None:
    needed = documents_needed(share, drop)
    assert detectable_share(share, needed) <= drop * (1 + 1e-6)
    assert detectable_share(share, needed - 1) > drop * (1 - 1e-6)


def test_a_drop_of_two_points_needs_thousands_of_documents() -> None:
    assert documents_needed(0.1, 0.02) == 1963  # (2.8016 / 0.02)^2 * 0.1
    assert documents_needed(0.0, 0.02) == 243  # none seen to change: the rule of three


def test_detectable_changes_follow_the_width_of_the_interval() -> None:
    figure = Figure(value=0.3, low=0.3 - 1.96, high=0.3 + 1.96, unit="f1")
    assert detectable_change(figure) == pytest.approx(2.8016, rel=1e-4)
    assert detectable_change(Figure(value=0.3, low=None, high=None, unit="f1")) is None
    assert detectable_change(Figure(value=0.0, low=0.0, high=0.0, unit="f1")) is None


@pytest.mark.parametrize(("deviation", "change"), [(1.0, 1.0), (1.0, 0.5), (0.02, 0.03)])
def test_the_seeds_needed_find_the_change_four_times_in_five(deviation: float, change: float) -> None:
    seeds = seeds_needed(deviation, change)
    samples = np.random.default_rng(0).normal(change, deviation, (4000, seeds))
    found = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert found.mean() == pytest.approx(0.8, abs=0.06)


def test_what_cannot_be_found_or_asked_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1000 seeds"):
        seeds_needed(1.0, 0.01)
    with pytest.raises(ValueError, match="change 0 above 0"):
        seeds_needed(1.0, 0)
    with pytest.raises(ValueError, match="must be from 0 to 1"):
        documents_needed(1.5, 0.1)
