"""Retention: values by hand, bounds that invert the paired test, and how often they hold the true quotient."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cfsd.statistics.intervals import is_above
from cfsd.statistics.retention import retention_of
from tests.statistics.test_forgetting import ends, right_and_wrong

Floats = NDArray[np.float64]


def test_each_bound_is_a_quotient_that_the_paired_t_test_just_rules_out() -> None:
    base, tuned = right_and_wrong(29, 12, 4, 5)
    found = retention_of(base, tuned, 0.25)
    assert found.value == pytest.approx((33 - 12.5) / (41 - 12.5))
    middle = (base.mean() + tuned.mean()) / 2  # of the two imagined documents, which change by 1 either way
    x, y = np.append(tuned, [middle - 0.5, middle + 0.5]) - 0.25, np.append(base, [middle + 0.5, middle - 0.5]) - 0.25
    for bound in ends(found):
        assert abs(stats.ttest_1samp(x - bound * y, 0).statistic) == pytest.approx(stats.t.ppf(0.975, 49))


def test_what_has_no_bound_is_given_none() -> None:
    few = retention_of(*right_and_wrong(3, 1, 0, 0), 0.25)
    assert few.value == pytest.approx(2 / 3) and few.low is None
    at_chance = retention_of(*right_and_wrong(6, 0, 0, 14), 0.25)  # 0.30 of 20 against 0.25
    assert at_chance.value == 1 and (at_chance.low, at_chance.high) == (None, None)


def coverage(size: int, law: tuple[float, float, float], chance: float, repeats: int) -> tuple[float, float]:
    """Return how often the interval holds the true quotient where the base is above chance, and how often it is."""
    (both, lost, gained), rng = law, np.random.default_rng(0)
    true, hits, above = (both + gained - chance) / (both + lost - chance), 0, 0
    for counts in rng.multinomial(size, (*law, 1 - sum(law)), repeats):
        base, tuned = right_and_wrong(*map(int, counts))
        if is_above(base, chance, binary=True):
            found, above = retention_of(base, tuned, chance), above + 1
            hits += found.low is None or found.high is None or found.low <= true <= found.high
    return hits / above, above / repeats


FEW_CHANGES = [(0.58, 0.02, 0.02), (0.9, 0.02, 0.0), (0.89, 0.01, 0.01)]
LAWS = [(0.5, 0.1, 0.02), (0.3, 0.3, 0.05), (0.25, 0.35, 0.0), (0.35, 0.1, 0.05), (0.25, 0.2, 0.02)]


@pytest.mark.parametrize("law", [*FEW_CHANGES[:1], *LAWS])
def test_it_covers_at_fifty_documents(law: tuple[float, float, float]) -> None:
    found, _ = coverage(50, law, 0.25, repeats=1500)
    assert found >= 0.93  # 0.95 less 3.5 standard errors


@pytest.mark.slow
@pytest.mark.parametrize("size", [50, 100, 500])
@pytest.mark.parametrize("law", [*FEW_CHANGES, *LAWS])
def test_coverage_in_full(size: int, law: tuple[float, float, float]) -> None:
    found, above = coverage(size, law, 0.25, repeats=10_000)
    print(f"{size} documents, both/lost/gained {law}: {found:.3f}, above chance in {above:.3f}")
    assert found >= 0.938
