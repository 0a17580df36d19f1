"""Variants against each other: what pairing finds, how often it is wrong, and what it does without pairs."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats

from cfsd.statistics.differences import LEVEL, difference, difference_over_seeds, level_at
from cfsd.statistics.figures import FRACTION, NATS
from cfsd.statistics.intervals import mcnemar_p, ratio_p
from cfsd.statistics.multiplicity import holm
from cfsd.statistics.seeds import FEWEST
from cfsd.statistics.units import Units, figure_of_units

Floats = NDArray[np.float64]
ROWS = 128


def moved(base: Floats, factor: float, rng: np.random.Generator, scatter: float = 0.2) -> list[Units]:
    """The divergence of a model along sequences, `factor` times what they have in common; 64 tokens each."""
    nats = 64 * factor * base * rng.lognormal(0, scatter, len(base))
    return [Units(tuple(map(str, range(len(base)))), nats, np.full(len(base), 64.0))]


def sequences(rng: np.random.Generator, rows: int = ROWS) -> Floats:
    return rng.lognormal(-3, 0.8, rows)  # nats per token; the hardest is some 50 times the easiest


def lost(right: NDArray[np.bool_], now: NDArray[np.bool_], name: str = "b") -> Units:
    names = tuple(f"{name}{i}" for i in range(len(right)))
    return Units(names, right.astype(float) - now, np.ones(len(right)), FRACTION, reach=1.0)


def overlap(one: list[Units], other: list[Units]) -> bool:
    a, b = figure_of_units(one), figure_of_units(other)
    assert a and b and None not in (a.low, a.high, b.low, b.high)
    return bool(a.low <= b.high and b.low <= a.high)  # type: ignore[operator]


def found(one: list[Units], other: list[Units]) -> bool:
    p = difference(one, other).p_value
    return p is not None and p <= LEVEL


# --- power: what overlapping intervals miss


def test_a_model_that_moved_four_fifths_as_far_is_told_apart_in_every_run_and_by_overlap_in_none() -> None:
    rng, runs = np.random.default_rng(0), 40
    pairs = [(moved(base, 0.8, rng), moved(base, 1.0, rng)) for base in (sequences(rng) for _ in range(runs))]
    assert sum(found(*pair) for pair in pairs) == runs
    assert sum(not overlap(*pair) for pair in pairs) <= 0.05 * runs


def test_3_6_points_on_500_documents_are_found_where_answers_agree() -> None:
    rng, runs = np.random.default_rng(1), 200
    base = rng.random((runs, 500)) < 0.6
    one = base & (rng.random(base.shape) > 0.15)  # both lost the same 15 % of the right answers
    other = one & ~(rng.random(base.shape) < 0.036 / 0.51)
    pairs = [([lost(*row[:2])], [lost(row[0], row[2])]) for row in zip(base, one, other, strict=True)]
    assert np.mean([difference(*pair).figure.value for pair in pairs]) == pytest.approx(-0.036, abs=0.003)
    assert np.mean([found(*pair) for pair in pairs]) >= 0.99
    assert np.mean([not overlap(*pair) for pair in pairs]) <= 0.25


# --- level

LAWS: dict[str, Callable[[np.random.Generator, Any], Floats]] = {
    "normal": lambda rng, size: rng.standard_normal(size),
    "t3": lambda rng, size: rng.standard_t(3, size),
    "two of one skewed law": lambda rng, size: rng.lognormal(0, 1.5, size) - rng.lognormal(0, 1.5, size),
    "two skewed laws of one mean": lambda rng, size: rng.lognormal(-0.32, 0.8, size) - rng.lognormal(-0.08, 0.4, size),
    "exponential": lambda rng, size: rng.exponential(1, size) - 1,
}


@pytest.mark.parametrize("rows, limit", [(20, 0.07), (50, 0.065), (ROWS, 0.065)])  # 3 standard errors of 2000 runs
@pytest.mark.parametrize("law", LAWS)
def test_no_more_than_5_percent_of_equal_variants_are_called_different(law: str, rows: int, limit: float) -> None:
    rng, runs = np.random.default_rng(rows), 2000
    counts = np.where(rng.random((runs, rows)) < 0.7, 128.0, rng.integers(5, 128, (runs, rows)))
    sums = LAWS[law](rng, (runs, rows)) * counts
    alarms = sum((p := ratio_p(*row)) is not None and p <= 0.05 for row in zip(sums, counts, strict=True))
    assert alarms / runs <= limit


@pytest.mark.parametrize("share", [0.04, 0.1, 0.3])
def test_the_mean_over_benchmarks_keeps_its_level(share: float) -> None:
    rng, runs = np.random.default_rng(2), 500
    changes = np.where((u := rng.random((runs, 4, 50))) < share / 2, 1.0, np.where(u < share, -1.0, 0.0))
    nothing = [lost(np.ones(50, bool), np.ones(50, bool), name)._replace(scale=scale)
               for name, scale in zip("abcd", (1, 4 / 3, 2, 1), strict=True)]  # fmt: skip
    runs_of = ([part._replace(sums=row) for part, row in zip(nothing, rows, strict=True)] for rows in changes)
    assert np.mean([found(parts, nothing) for parts in runs_of]) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_over_all_pairs_of_six_equal_variants_there_is_one_false_finding_in_20_comparisons_at_most() -> None:
    rng, runs = np.random.default_rng(3), 600
    alarms = 0
    for base in (sequences(rng) for _ in range(runs)):
        nats = base * rng.lognormal(0, 0.2, (6, ROWS))
        p_values = [ratio_p(one - other, np.ones(ROWS)) or 0.0 for one, other in combinations(nats, 2)]
        alarms += min(holm(p_values)) <= LEVEL
    assert alarms / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


@pytest.mark.slow
@pytest.mark.parametrize("seeds, alike", [(1, 0), (3, 0), (FEWEST, 0), (FEWEST, 0.1), (FEWEST, 0.3), (8, 0.1)])
def test_equal_variants_over_seeds_at_full_size(seeds: int, alike: float) -> None:
    """`alike`: how far the seeds scatter together over all sequences, in logarithms."""
    rng, runs = np.random.default_rng(4), 600
    alarms = 0
    for base in (sequences(rng) for _ in range(runs)):
        one, other = ([moved(base, rng.lognormal(0, alike), rng) for _ in range(seeds)] for _ in "ab")
        p = difference_over_seeds(list(zip(one, other, strict=True))).p_value
        alarms += p is not None and p <= LEVEL
    print(f"{seeds} seeds, scatter {alike}: {alarms / runs:.3f} called different")
    assert alarms / runs <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


# --- the tests themselves


def test_holm_is_the_closed_test_of_bonferroni() -> None:
    p_values = np.random.default_rng(5).random(6) ** 3
    subsets = [s for size in range(1, 7) for s in combinations(range(6), size)]
    closed = [max(min(1.0, len(s) * min(p_values[list(s)])) for s in subsets if i in s) for i in range(6)]
    assert holm(list(p_values)) == pytest.approx(closed)
    assert holm([]) == []


def test_without_skew_it_is_students_test_with_the_jackknifes_error_and_its_p_has_no_smallest_value() -> None:
    half = np.random.default_rng(6).normal(size=30)
    for shift in (0.0, 0.2, 3.0):
        rows = np.concatenate([half, -half]) + shift
        t = stats.ttest_1samp(rows, 0).statistic * np.sqrt(59 / 60)
        assert ratio_p(rows, np.ones(60)) == pytest.approx(2 * stats.t.sf(abs(t), 59), rel=1e-6)
    assert 0 < (ratio_p(rows, np.ones(60)) or 0) < 1e-20
    assert ratio_p(np.ones(9), np.ones(9)) == 0 and ratio_p(np.zeros(9), np.ones(9)) == 1
    assert ratio_p(np.ones(4), np.ones(4)) is None


def test_right_or_wrong_answers_have_mcnemars_p_and_hardly_changed_scores_nearly() -> None:
    right = np.ones(50, bool)
    one, other = (np.arange(50) >= wrong for wrong in (9, 2))
    shares = difference([lost(right, one)], [lost(right, other)])
    assert shares.p_value == mcnemar_p(7, 0) and shares.figure.value == pytest.approx(0.14)
    halves = [lost(right, now)._replace(sums=(right - now.astype(float)) / 2) for now in (one, other)]
    p = difference([halves[0]], [halves[1]]).p_value
    assert p == pytest.approx(mcnemar_p(7, 0), rel=0.5)


# --- pairing


def test_units_are_paired_by_name_in_whatever_order() -> None:
    rng = np.random.default_rng(7)
    base = sequences(rng)
    (one,), (other,) = moved(base, 0.8, rng), moved(base, 1.0, rng)
    order = rng.permutation(ROWS)
    mixed = Units(tuple(other.names[i] for i in order), other.sums[order], other.counts[order])
    assert difference([one], [mixed]).paired
    assert difference([one], [mixed]) == difference([one], [other])
    back = difference([other], [one])
    assert back.figure.value == -difference([one], [other]).figure.value


def test_two_models_that_moved_in_opposite_directions_are_further_apart_than_either_moved() -> None:
    rng = np.random.default_rng(0)
    worse, better = 40 + rng.normal(0, 5, 60), -40 + rng.normal(0, 5, 60)
    sides = [
        [Units(tuple(map(str, range(60))), change, np.ones(60), "bleu", reach=float(abs(change).max()))]
        for change in (worse, better)
    ]
    figure = difference(*sides).figure
    assert figure.low is not None and figure.high is not None
    half = 1.96 * (worse - better).std(ddof=1) / np.sqrt(60)
    assert (figure.value - figure.low, figure.high - figure.value) == pytest.approx((half, half), rel=0.1)


def test_without_common_units_the_two_intervals_decide_and_it_is_said() -> None:
    rng = np.random.default_rng(8)
    base = sequences(rng)
    (one,), (other,) = moved(base, 0.8, rng), moved(base, 1.0, rng)
    elsewhere = other._replace(names=tuple(f"other {name}" for name in other.names))
    longer = other._replace(counts=other.counts + 1)
    for unpaired in (difference([one], [elsewhere]), difference([one], [longer])):
        assert not unpaired.paired and unpaired.p_value is not None and unpaired.p_value > LEVEL
    figures = [figure_of_units([part]) for part in (one, elsewhere)]
    a, b = figures
    assert a and b and a.low is not None and b.high is not None
    low = a.value - b.value - np.hypot(a.value - a.low, b.high - b.value)
    assert difference([one], [elsewhere]).figure.low == pytest.approx(low)


# --- seeds


def pairs_of(factors: list[float], scatter: float = 0.02) -> list[tuple[list[Units], list[Units]]]:
    """Repeats whose first model moved by each factor of the second's."""
    rng = np.random.default_rng(9)
    base = sequences(rng)
    return [(moved(base, factor, rng, scatter), moved(base, 1.0, rng, scatter)) for factor in factors]


def test_few_seeds_claim_a_difference_only_where_each_shows_it() -> None:
    sure = difference_over_seeds(pairs_of([0.8, 0.9, 0.7]))
    assert sure.figure.low is None and sure.figure.unit == NATS and len(sure.each) == 3
    assert sure.p_value == max(part.p_value or 0 for part in sure.each) < 1e-6
    assert sure.figure.value == pytest.approx(np.mean([part.figure.value for part in sure.each]))
    one_is_not = difference_over_seeds(pairs_of([0.8, 1.0, 0.7]))
    assert one_is_not.p_value is not None and one_is_not.p_value > LEVEL
    assert difference_over_seeds(pairs_of([0.8, 1.2])).p_value == 1.0


def test_from_five_seeds_on_the_interval_counts_them() -> None:
    factors = [0.6, 0.7, 0.8, 0.9, 1.0]
    alike, apart = (difference_over_seeds(pairs_of(each)) for each in ([0.8] * 5, factors))
    widths = [f.figure.high - f.figure.low for f in (alike, apart)]  # type: ignore[operator]
    assert widths[1] > 2 * widths[0] and alike.p_value is not None and alike.p_value < 1e-6
    values = [one[0].sums.sum() / one[0].counts.sum() - two[0].sums.sum() / two[0].counts.sum()
              for one, two in pairs_of(factors)]  # fmt: skip
    t_test = stats.ttest_1samp(values, 0).pvalue
    assert apart.p_value is not None and t_test / 2 < apart.p_value < 5 * t_test  # the sequences add a little
    turned = difference_over_seeds(pairs_of([0.5, 1.5, 0.5, 1.5, 1.0]))
    assert turned.p_value is not None and turned.p_value > 0.3


def test_seeds_with_probes_of_their_own_are_paired_within_each() -> None:
    rng = np.random.default_rng(10)
    pairs = []
    for seed in range(FEWEST):
        base = sequences(rng)
        one, other = moved(base, 0.8, rng), moved(base, 1.0, rng)
        names = tuple(f"probe {seed}: {name}" for name in one[0].names)
        pairs.append(([one[0]._replace(names=names)], [other[0]._replace(names=names)]))
    over = difference_over_seeds(pairs)
    assert over.paired and over.p_value is not None and over.p_value < 0.01 and over.figure.low is not None


def test_an_interval_over_seeds_ends_where_scores_do() -> None:
    """One model loses everything, the other little but for one seed: [73, 106] points was printed."""
    right, rng = np.ones(300, dtype=bool), np.random.default_rng(3)
    kept = [0.98, 0.97, 0.6, 0.96, 0.99]
    pairs = [([lost(right, ~right)], [lost(right, rng.random(300) < share)]) for share in kept]
    figure = difference_over_seeds(pairs).figure
    assert figure.low and 0.6 < figure.low < figure.value < 1 and figure.high == 1.0


def test_the_p_over_seeds_is_the_level_at_which_the_interval_ends_at_0() -> None:
    for of_units, of_seeds, seeds_less_one in ((1.0, 0.0, 4), (0.0, 1.0, 4), (0.3, 1.0, 4), (1.0, 0.4, 9)):
        for level in (0.5, 0.05, 1e-4, 1e-9):
            z, t = special.ndtri(1 - level / 2), special.stdtrit(seeds_less_one, 1 - level / 2)
            distance = float(np.hypot(z * of_units, t * of_seeds))
            assert level_at(distance, of_units, of_seeds, seeds_less_one) == pytest.approx(level, rel=1e-4)
    assert (level_at(0, 1, 1, 4), level_at(0, 0, 0, 4), level_at(1, 0, 0, 4)) == (1, 1, 0)


def test_among_many_variants_that_are_alike_hardly_any_is_called_different() -> None:
    """With Satterthwaite's degrees of freedom 1.5 false differences were found among 990 pairs, where 0.05 are due."""
    random, trials = np.random.default_rng(0), 400_000
    for of_units in (0.15, 0.3, 1.0):
        of_seeds = np.sqrt(random.chisquare(4, trials) / 4)
        distance = np.abs(random.standard_normal(trials)) * np.hypot(of_units, 1)
        for pairs in (10, 105, 990):
            level = 0.05 / pairs
            z, t = special.ndtri(1 - level / 2), special.stdtrit(4, 1 - level / 2)
            near = np.flatnonzero(distance >= 0.9 * np.hypot(z * of_units, t * of_seeds))
            found = [level_at(distance[i], of_units, of_seeds[i], 4) <= level for i in near]
            assert pairs * sum(found) / trials <= 0.06
