"""Power: how small a change would have been found."""

import pytest
from scipy import stats

from cfsd.statistics.figures import Figure
from cfsd.statistics.intervals import mcnemar_p
from cfsd.statistics.power import detectable_change, detectable_share


@pytest.mark.parametrize(("share", "documents"), [(0.1, 1963), (0.0, 396)])  # none seen to change: 7.906 / 0.02
def test_a_drop_of_two_points_needs_thousands_of_documents(share: float, documents: int) -> None:
    assert detectable_share(share, documents) <= 0.02  # (2.8016 / 0.02)^2 * 0.1
    assert detectable_share(share, documents - 1) > 0.02


@pytest.mark.parametrize("changed", [0, 3, 5, 8])
@pytest.mark.parametrize("total", [200, 1000])
def test_a_detectable_drop_is_found_in_four_fifths_of_cases_where_few_documents_change(
    total: int, changed: int
) -> None:
    """By the exact test on every outcome: so many documents change, and of these so many are lost."""
    drop = detectable_share(changed / total, total)
    share = max(changed / total, drop)  # the drop itself changes documents
    power = sum(
        stats.binom.pmf(number, total, share) * stats.binom.pmf(lost, number, (share + drop) / (2 * share))
        for number in range(40)
        for lost in range(number // 2 + 1, number + 1)
        if mcnemar_p(lost, number - lost) <= 0.05
    )
    assert 0.75 < power < 0.85


def test_detectable_changes_follow_the_width_of_the_interval() -> None:
    figure = Figure(value=0.3, low=0.3 - 1.96, high=0.3 + 1.96, unit="f1")
    assert detectable_change(figure) == pytest.approx(2.8016, rel=1e-4)
    assert detectable_change(Figure(value=0.3, low=None, high=None, unit="f1")) is None
    assert detectable_change(Figure(value=0.0, low=0.0, high=0.0, unit="f1")) is None
