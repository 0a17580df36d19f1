"""Power: how small a change would have been found."""

import pytest

from cfsd.statistics.figures import Figure
from cfsd.statistics.power import detectable_change, detectable_share


@pytest.mark.parametrize(("share", "documents"), [(0.1, 1963), (0.0, 243)])  # none seen to change: the rule of three
def test_a_drop_of_two_points_needs_thousands_of_documents(share: float, documents: int) -> None:
    assert detectable_share(share, documents) <= 0.02  # (2.8016 / 0.02)^2 * 0.1
    assert detectable_share(share, documents - 1) > 0.02


def test_detectable_changes_follow_the_width_of_the_interval() -> None:
    figure = Figure(value=0.3, low=0.3 - 1.96, high=0.3 + 1.96, unit="f1")
    assert detectable_change(figure) == pytest.approx(2.8016, rel=1e-4)
    assert detectable_change(Figure(value=0.3, low=None, high=None, unit="f1")) is None
    assert detectable_change(Figure(value=0.0, low=0.0, high=0.0, unit="f1")) is None
