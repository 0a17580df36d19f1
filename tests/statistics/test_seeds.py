"""Figures over seeds: coverage where documents and seeds both scatter, and what is said of few seeds."""

import numpy as np
import pytest

from cfsd.statistics.figures import Figure
from cfsd.statistics.intervals import paired_share_bounds
from cfsd.statistics.seeds import over_seeds

DOCUMENTS, DROP, GAINED = 400, 0.1, 0.05


def figure(value: float, half: float = 0.1, unit: str = "fraction") -> Figure:
    return Figure(value=value, low=value - half, high=value + half, unit=unit)


def drawn(rng: np.random.Generator, seeds: int, scatter: float, alike: float) -> list[Figure]:
    """Return the forgetting per seed on the same documents; of the documents `alike` falls the same for all seeds."""
    own = rng.random((seeds, DOCUMENTS))
    luck = np.where(rng.random(DOCUMENTS) < alike, own[0], own)
    lost_share = DROP + GAINED + rng.normal(0, scatter, (seeds, 1))
    lost = (luck < lost_share).sum(axis=1)
    gained = (luck > 1 - GAINED).sum(axis=1)
    lows, highs = paired_share_bounds(lost, gained, DOCUMENTS)
    return [
        Figure(value=(up - down) / DOCUMENTS, low=low, high=high, unit="fraction")
        for up, down, low, high in zip(lost, gained, lows, highs, strict=True)
    ]


def coverages(seeds: int, scatter: float, alike: float, repeats: int) -> tuple[float, float]:
    """Return the coverage of the interval over seeds, and of a single seed's over its documents."""
    rng = np.random.default_rng(0)
    whole = alone = 0
    for _ in range(repeats):
        each = drawn(rng, seeds, scatter, alike)
        joined = over_seeds(each)
        assert joined.low is not None and joined.high is not None and each[0].low is not None
        whole += joined.low <= DROP <= joined.high
        alone += each[0].low <= DROP <= (each[0].high or 0)
    return whole / repeats, alone / repeats


@pytest.mark.parametrize("seeds", [5, 10])
@pytest.mark.parametrize("alike", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scatter", [0.0, 0.01, 0.03])
def test_the_interval_over_seeds_covers_whatever_scatters(seeds: int, scatter: float, alike: float) -> None:
    whole, _ = coverages(seeds, scatter, alike, repeats=500)
    assert whole >= 0.93


def test_an_interval_over_documents_alone_does_not_speak_for_the_recipe() -> None:
    whole, alone = coverages(5, scatter=0.03, alike=0.5, repeats=500)
    assert alone < 0.75 < 0.93 <= whole


def test_few_seeds_are_points_without_a_common_interval() -> None:
    found = over_seeds([figure(0.1), figure(0.2), figure(0.3), figure(0.4)])
    assert found == Figure(value=0.25, low=None, high=None, unit="fraction")


def test_five_seeds_join_documents_and_seeds() -> None:
    values = [0.1, 0.2, 0.3, 0.4, 0.5]
    found = over_seeds([figure(value) for value in values])
    between = 2.776445 * np.std(values, ddof=1) / np.sqrt(5)
    assert found.high == pytest.approx(0.3 + np.hypot(0.1, between))
    sharper = over_seeds([figure(value) for value in values], averaged=figure(0.3, half=0.02))
    assert sharper.low == pytest.approx(0.3 - np.hypot(0.02, between))


def test_seeds_that_agree_keep_the_interval_over_documents() -> None:
    assert over_seeds([figure(0.0)] * 5) == figure(0.0)


def test_what_cannot_be_joined() -> None:
    unknown = Figure(value=0.1, low=None, high=None, unit="fraction")
    assert over_seeds([*[figure(0.1)] * 4, unknown]).low is None
    with pytest.raises(ValueError, match=r"2 seeds in \['fraction', 'nats/token'\]"):
        over_seeds([figure(0.1), figure(0.1, unit="nats/token")])
    with pytest.raises(ValueError, match="0 seeds"):
        over_seeds([])


def test_repeats_with_a_probe_of_their_own_have_an_interval_that_is_too_wide_rather_than_too_narrow() -> None:
    """Truth DROP, 500 repetitions; of the documents none is alike for two seeds, as with seeds_vary: [probe]."""
    whole, _ = coverages(5, scatter=0.01, alike=0.0, repeats=500)
    assert whole >= 0.97
