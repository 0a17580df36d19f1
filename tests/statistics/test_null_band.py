"""The null band of a stability gap: closed forms, gaps of nothing that stay inside, real gaps that do not."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from cfsd.statistics.null_band import error_of_ratio, error_of_scores, null_band

Floats = NDArray[np.float64]
Looks = Callable[[np.random.Generator], Floats]  # -> values of L looks at N documents, more is worse


def test_equal_errors_have_a_closed_form() -> None:
    assert null_band([0.3]) == pytest.approx(0.3 * stats.norm.ppf(0.95))
    assert null_band([0.02] * 18) == pytest.approx(0.02 * stats.norm.ppf(0.95 ** (1 / 18)))
    assert null_band([]) == null_band([0.0, 0.0]) == 0
    mixed = null_band([0.01, 0.05, 0.0])
    assert stats.norm.cdf(mixed / 0.01) * stats.norm.cdf(mixed / 0.05) == pytest.approx(0.95)


def test_errors_are_those_of_paired_changes() -> None:
    rng = np.random.default_rng(0)
    changes = rng.normal(0.1, 1, 40)
    assert error_of_ratio(changes, np.ones(40)) == pytest.approx(stats.sem(changes))
    counts = rng.integers(5, 60, 40).astype(float)
    jackknife = np.array([np.delete(changes, i).sum() / np.delete(counts, i).sum() for i in range(40)])
    assert error_of_ratio(changes, counts) == pytest.approx(np.sqrt(39 * jackknife.var()), rel=0.1)
    flips = np.repeat([1.0, -1.0, 0.0], [4, 2, 44])
    assert error_of_scores(flips, 1.0) == pytest.approx(stats.sem(np.append(flips, [1, -1])), rel=0.01)
    assert error_of_scores(np.zeros(50), 1.0) == pytest.approx(stats.sem(np.append(np.zeros(50), [1, -1])))


def exceeds(looks: Looks, scores: bool, repeats: int) -> tuple[float, float, float]:
    """Return how often the gap exceeds its band, the mean gap, and the mean of the worst look against the first."""
    above, gaps, worst = 0, 0.0, 0.0
    for repeat in range(repeats):
        seen_LN = looks(np.random.default_rng([3, repeat]))
        changes_LN, means_L = seen_LN - seen_LN[0], seen_LN.mean(1)
        ones = np.ones(seen_LN.shape[1])
        between = changes_LN[1:-1]
        band = null_band([error_of_scores(c, 1.0) if scores else error_of_ratio(c, ones) for c in between])
        gap = max(0.0, means_L.max() - max(means_L[0], means_L[-1]))
        above, gaps, worst = above + (gap > band), gaps + gap, worst + means_L.max() - means_L[0]
    return above / repeats, gaps / repeats, worst / repeats


def flips(documents: int, looks: int, share: float, lost: Floats | None = None) -> Looks:
    """Return looks of which each has changed `share` of the answers at random since the first; `lost`: truly so."""

    def sampled(rng: np.random.Generator) -> Floats:
        wrong = rng.random(documents) < 0.4
        chance = np.where(wrong, share / 0.8, share / 1.2)
        seen = [wrong, *(wrong ^ (rng.random(documents) < chance) for _ in range(looks))]
        if lost is not None:
            seen = [w | (rng.random(documents) < more) for w, more in zip(seen, lost, strict=True)]
        return np.array(seen, dtype=float)

    return sampled


def walk(documents: int, looks: int, share: float) -> Looks:
    """Return looks of which each has changed `share` of the answers of the look before."""

    def sampled(rng: np.random.Generator) -> Floats:
        seen = [rng.random(documents) < 0.4]
        for _ in range(looks):
            seen.append(seen[-1] ^ (rng.random(documents) < np.where(seen[-1], share / 0.8, share / 1.2)))
        return np.array(seen, dtype=float)

    return sampled


def plateau(rows: int, looks: int, spread: float) -> Looks:
    """Return a divergence: 0 at the first look, then everywhere at one level, with noise of each row and look."""

    def sampled(rng: np.random.Generator) -> Floats:
        return np.vstack([np.zeros(rows), rng.lognormal(0, 0.3, rows) * rng.lognormal(0, spread, (looks, rows))])

    return sampled


NOTHING: dict[str, tuple[Looks, bool]] = {
    "20 looks at 50 documents": (flips(50, 20, 0.05), True),
    "5 looks at 50 documents": (flips(50, 5, 0.1), True),
    "a walk": (walk(50, 20, 0.1), True),
    "a divergence that stays": (plateau(32, 20, 0.3), False),
}


@pytest.mark.parametrize("name", NOTHING)
def test_a_gap_of_nothing_stays_inside(name: str) -> None:
    looks, scores = NOTHING[name]
    above, _, _ = exceeds(looks, scores, repeats=600)
    assert above <= 0.05


def test_a_real_gap_is_found_though_the_end_does_not_show_it() -> None:
    lost = np.array([0, *np.interp(range(1, 21), [1, 10, 20], [0, 0.35, 0])])  # 35 % of the right answers, half-way
    above, gap, _ = exceeds(flips(50, 20, 0.05, lost), scores=True, repeats=100)
    assert above >= 0.9 and gap > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTHING)
def test_gaps_of_nothing_in_full(name: str) -> None:
    above, gap, worst = exceeds(*NOTHING[name], repeats=4000)
    print(f"{name}: {above:.4f} above the band; mean gap {gap:.3f}, mean of the worst look {worst:.3f}")
    assert above <= 0.035
