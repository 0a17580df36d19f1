"""Methods at equal gain: exact on known lines, no further than measured, and how often the truth is covered."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import ArrayLike

from cfsd.statistics.figures import Figure
from cfsd.statistics.matched_gain import Match, Trained, matched, seeds_of
from cfsd.statistics.units import Units

Points = dict[str, list[tuple[float | None, float, float]]]  # method -> strength, gain, cost


def units(tag: str, sums: ArrayLike, counts: ArrayLike = 1.0, rows: int = 20) -> Units:
    """Return units whose quotient is `sums` where that is one number."""
    of_sums, of_counts = (np.broadcast_to(values, rows).astype(float) for values in (sums, counts))
    return Units(tuple(f"{tag}{i}" for i in range(rows)), of_sums, of_counts)


def models_of(points: Points, seed: str = "") -> list[Trained]:
    """Return models whose rows are all alike, so that no resample changes anything."""
    return [
        Trained(method, strength, seed, [units("held out", gain)], [units("probe", cost)])
        for method, own in points.items()
        for strength, gain, cost in own
    ]


def costs(match: Match) -> dict[str, float | None]:
    return {entry.method: entry.cost.value if entry.cost else None for entry in match.methods}


def ends(figure: Figure | None) -> tuple[float, float]:
    assert figure and figure.low is not None and figure.high is not None
    return figure.low, figure.high


LINES: Points = {  # cost = 2 x gain and cost = 3 x gain - 1, along strengths of their own
    "wise": [(0.25, 1.0, 2.0), (0.5, 2.0, 4.0), (1.0, 5.0, 10.0)],
    "rate": [(1e-5, 0.5, 0.5), (1e-4, 4.0, 11.0)],
}


def test_points_on_lines_are_interpolated_exactly() -> None:
    found = matched(models_of(LINES), log=False)
    assert [match.gain.value for match in found] == pytest.approx([4.0, 3.25, 2.5, 1.75])
    for match in found:
        gain = match.gain.value
        assert costs(match) == pytest.approx({"wise": 2 * gain, "rate": 3 * gain - 1})
        (apart,) = match.differences
        assert (apart.one, apart.other, apart.ratio) == ("wise", "rate", None)
        assert apart.difference.value == pytest.approx(1 - gain) and ends(apart.difference) == pytest.approx(
            (1 - gain,) * 2
        )
    at_most, *_ = found
    assert at_most.at == "the largest gain that all sweeps reach"
    assert {entry.method: entry.strengths for entry in at_most.methods} == {"wise": (0.5, 1.0), "rate": (1e-4,)}


def test_in_logarithms_what_is_exponential_is_exact_and_has_a_quotient() -> None:
    curved: Points = {
        "steep": [(s, g, np.exp(g)) for s, g in ((1, 0.0), (2, 1.0), (3, 3.0))],
        "flat": [(s, g, 0.5 * np.exp(g / 2)) for s, g in ((1, 0.5), (2, 2.0))],
    }
    for match in matched(models_of(curved), log=True):
        gain, (apart,) = match.gain.value, match.differences
        assert costs(match) == pytest.approx({"steep": np.exp(gain), "flat": 0.5 * np.exp(gain / 2)})
        assert apart.ratio and apart.ratio.value == pytest.approx(2 * np.exp(gain / 2))
    zero: Points = {"a": [(0, 0.0, 0.0), (1, 2.0, 4.0)], "b": [(0, 0.0, 0.0), (1, 1.0, 1.0)]}
    half = matched(models_of(zero), log=True)[2]
    assert costs(half) == pytest.approx({"a": 1.0, "b": 0.5}) and half.differences[0].ratio  # 0 has no logarithm


def test_nothing_is_extrapolated() -> None:
    apart: Points = {"weak": [(1, 0.1, 0.1), (2, 0.4, 0.2)], "strong": [(1, 0.5, 0.3), (2, 0.9, 0.6)]}
    found = matched(models_of(apart), log=False)
    assert [match.at for match in found] == ["the largest gain of weak", "the largest gain of strong"]
    assert costs(found[0]) == {"weak": pytest.approx(0.2), "strong": None}
    assert costs(found[1]) == {"weak": None, "strong": pytest.approx(0.6)}
    assert [match.methods[1 - i].reached for i, match in enumerate(found)] == [0, 0]
    assert not any(match.differences for match in found)


def test_a_single_variant_is_met_at_its_own_gain() -> None:
    points = LINES | {"plain": [(None, 2.5, 9.0)], "beyond": [(None, 4.5, 9.5)]}
    *_, plain, beyond = matched(models_of(points), log=False)
    assert (plain.at, beyond.at) == ("the gain of plain", "the gain of beyond")
    assert costs(plain) == pytest.approx({"wise": 5.0, "rate": 6.5, "plain": 9.0})
    assert {(d.one, d.other): d.difference.value for d in plain.differences} == pytest.approx(
        {("wise", "rate"): -1.5, ("wise", "plain"): -4.0, ("rate", "plain"): -2.5}
    )
    assert costs(beyond) == {"wise": pytest.approx(9.0), "rate": None, "beyond": 9.5}
    (only,) = matched(models_of({"wise": LINES["wise"], "plain": [(None, 2.0, 9.0)]}), log=False)
    assert costs(only) == {"wise": 4.0, "plain": 9.0} and only.methods[0].strengths == (0.5,)


def test_one_method_or_no_sweep_gives_nothing() -> None:
    assert matched([], log=True) == [] == matched(models_of({"wise": LINES["wise"]}), log=True)
    assert matched(models_of({"a": [(None, 1.0, 1.0)], "b": [(None, 2.0, 2.0)]}), log=True) == []


def test_of_several_strengths_with_one_gain_the_cheapest_counts_and_is_said() -> None:
    points: Points = {
        "turns": [(1, 1.0, 1.0), (2, 3.0, 5.0), (3, 1.0, 7.0)],  # at 2 on the way up and on the way down
        "level": [(1, 0.0, 0.5), (2, 2.0, 4.0), (3, 2.0, 3.0)],  # ties: the same gain at two strengths
        "single": [(None, 2.0, 1.0)],
    }
    match = matched(models_of(points), log=False)[-1]
    assert costs(match) == {"turns": 3.0, "level": 3.0, "single": 1.0}
    assert {e.method: (e.crossings, e.strengths) for e in match.methods[:2]} == {
        "turns": (2, (1, 2)),
        "level": (2, (3,)),
    }


def test_a_gain_that_some_resamples_miss_has_no_bounds() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 50)
    noise += 0.02 - noise.mean()
    swept = [
        Trained("swept", s, "", [units("h", np.array(g + 0.5 * noise * s), rows=50)], [units("p", c)])
        for s, g, c in ((0.0, 1.0, 1.0), (1.0, 2.0, 2.0))
    ]
    other = Trained("single", None, "", [units("h", 2.0, rows=50)], [units("p", 1.5)])
    (match,) = matched([*swept, other], log=False)
    entry = match.methods[0]
    assert entry.method == "swept" and entry.cost and 1.9 < entry.cost.value < 2
    assert 0.4 < entry.reached < 0.7 and entry.cost.low is None


def test_fewer_than_five_rows_have_no_interval() -> None:
    few = [Trained(m, s, "", [units("h", g, rows=4)], [units("p", c)]) for m, own in LINES.items() for s, g, c in own]
    for match in matched(few, log=False):
        assert match.gain.low is None and all(e.cost and e.cost.low is None for e in match.methods)


def test_rows_that_all_share_do_not_blur_a_difference() -> None:
    """Two methods that differ by a constant factor on every row: wide intervals of each, none of their quotient."""
    row = np.random.default_rng(0).lognormal(0, 0.8, 60)
    models = [
        Trained(m, s, "", [units("h", s, rows=40)], [units("p", factor * s * row, rows=60)])
        for m, factor in (("a", 1.0), ("b", 3.0))
        for s in (1.0, 2.0)
    ]
    for match in matched(models, log=True):
        low, high = ends(match.methods[0].cost)
        assert high > 1.3 * low
        assert ends(match.differences[0].ratio) == pytest.approx((1 / 3, 1 / 3))


def test_seeds_are_resampled_from_five_on_and_only_whole_ones_count() -> None:
    def seeded(count: int) -> list[Trained]:
        by_seed = np.random.default_rng(1).normal(0, 0.1, count)
        return [
            Trained(m, s, f" seed={j}", [units("h", s)], [units("p", s * factor + by_seed[j])])
            for j in range(count)
            for m, factor in (("a", 1.0), ("b", 2.0))
            for s in (1.0, 2.0)
        ]

    few, many = seeded(4), seeded(6)
    assert seeds_of(few) == 4 and seeds_of([*many[:-1]]) == 5
    low, high = ends(matched(few, log=False)[0].methods[0].cost)
    assert low == pytest.approx(high)  # rows that are all alike
    entry = matched(many, log=False)[0]
    scatter = np.random.default_rng(1).normal(0, 0.1, 6)
    low, high = ends(entry.methods[0].cost)
    half = 2.5706 * scatter.std(ddof=1) / np.sqrt(6)
    assert entry.methods[0].cost and entry.methods[0].cost.value == pytest.approx(2 + scatter.mean())
    assert (low, high) == pytest.approx((2 + scatter.mean() - half, 2 + scatter.mean() + half), abs=0.25 * half)
    assert ends(entry.differences[0].difference) == pytest.approx((-2.0, -2.0))  # the seeds are the same for both


# --- coverage

TRUTH = {
    "a": ([0.2, 0.5, 0.8, 1.0], [1.0, 1.8, 2.4, 2.6], [0.02, 0.1, 0.3, 0.5]),
    "b": ([1.0, 2.0, 4.0], [1.2, 2.0, 2.8], [0.01, 0.05, 0.12]),
}


def world(rng: np.random.Generator, held_out: int, probe: int, seeds: int = 1, spread: float = 0.0) -> list[Trained]:
    """Return models whose rows share log-normal effects; `spread` is that of seeds, shared by methods in part."""
    length, tokens = rng.integers(5, 60, held_out) * 1.0, rng.integers(20, 128, probe) * 1.0
    ease, reach = rng.lognormal(-0.08, 0.4, held_out), rng.lognormal(-0.18, 0.6, probe)
    shared = rng.normal(0, spread, (2, seeds))
    models = []
    for method, (strengths, gains, kls) in TRUTH.items():
        for strength, gain, kl in zip(strengths, gains, kls, strict=True):
            for j in range(seeds):
                own = shared[:, j] + rng.normal(0, 0.7 * spread, 2)
                nats = gain * ease * (1 + rng.normal(0, 0.15, held_out)) + 0.3 * own[0]
                moved = kl * reach * rng.lognormal(-0.045, 0.3, probe) * np.exp(own[1] - 1.49 * spread**2 / 2)
                parts = units("h", nats * length, length, held_out), units("p", moved * tokens, tokens, probe)
                models.append(Trained(method, strength, str(j), [parts[0]], [parts[1]]))
    return models


def true_costs() -> list[dict[str, float]]:
    points: Points = {m: list(zip(*own, strict=True)) for m, own in TRUTH.items()}
    return [{m: float(cost or 0) for m, cost in costs(match).items()} for match in matched(models_of(points), log=True)]


def coverage(repeats: int, *sizes: float) -> dict[str, float]:
    """Return how often each interval holds the truth: of what a method lost, and of difference and quotient."""
    truth, hits = true_costs(), dict.fromkeys(("a", "b", "difference", "ratio"), 0)
    for repeat in range(repeats):
        found = matched(world(np.random.default_rng([9, repeat]), *sizes), log=True)  # type: ignore[arg-type]
        for match, true in zip(found, truth, strict=True):
            (apart,) = match.differences
            figures: Sequence[tuple[str, Figure | None, float]] = [
                *((entry.method, entry.cost, true[entry.method]) for entry in match.methods),
                ("difference", apart.difference, true["a"] - true["b"]),
                ("ratio", apart.ratio, true["a"] / true["b"]),
            ]
            for name, figure, value in figures:
                low, high = ends(figure)
                hits[name] += low <= value <= high
    return {name: count / repeats / len(truth) for name, count in hits.items()}


def test_intervals_hold_the_truth() -> None:
    found = coverage(120, 60, 64)
    assert min(found.values()) >= 0.9, found


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(50, 50), (100, 96), (300, 300), (100, 96, 5, 0.1), (50, 50, 8, 0.2)])
def test_coverage_in_full(sizes: tuple[float, ...]) -> None:
    found = coverage(1000, *sizes)
    print(f"{sizes} held-out rows, sequences, seeds, their spread: {found}")
    assert min(found.values()) >= 0.915, found
