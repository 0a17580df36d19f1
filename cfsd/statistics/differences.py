"""Differences between two variants of training, paired by unit and by seed: value, 95 % interval and p.

Two variants that were measured on the same sequences, rows or documents agree in most of what makes a unit easy or
hard, so that their difference is known far better than either figure: a model that moved 0.8 times as far is found in
every run by its paired difference, and in none by whether the two intervals overlap.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

from cfsd.statistics import seeds
from cfsd.statistics.figures import Figure, figure_p, mean_of
from cfsd.statistics.intervals import Z, mcnemar_p, padded, ratio_p
from cfsd.statistics.units import Units, figure_of_units, is_share

LEVEL = 0.05  # of what is called a difference, after adjusting for all that was compared
DEFINITION = (
    "Two variants are compared on the same units: each probe sequence, held-out row or document is paired with itself. "
    f"p is from McNemar's exact test for right or wrong answers, else from a paired t test corrected for skew; of a "
    f"mean over benchmarks, and of figures that are not paired, it is that of the interval. Of all pairs of "
    f"variants, those count as different whose p, adjusted by Holm over the pairs, is at most {LEVEL:g}: any "
    f"false one among them has at most {100 * LEVEL:g} % probability. Intervals are not adjusted."
)
OF_BENCHMARKS = (
    "For single benchmarks p is adjusted over benchmarks and pairs by Benjamini and Hochberg: of the differences "
    f"found, at most {100 * LEVEL:g} % are expected to be wrong."
)
OF_SEEDS = (
    "With one seed a difference is one of two models, not of their recipes. "
    f"Repeats are paired by seed. With 2 to {seeds.FEWEST - 1} seeds a difference has no interval over seeds, and is "
    f"claimed only where every seed shows it; from {seeds.FEWEST} seeds on the interval counts documents and seeds."
)
LEAST_LOG_LEVEL = -690.0  # of numbers that can be told from 0
Parts = Sequence[Units]


class Difference(NamedTuple):
    """One variant's figure less the other's. `each`: by seed, where there are 2 to 4 of them.

    `p_value` is None where there are too few units. `paired`: on the same units, by name, in every seed.
    """

    figure: Figure
    p_value: float | None
    paired: bool
    each: tuple["Difference", ...] = ()


def difference_over_seeds(pairs: Sequence[tuple[Parts, Parts]]) -> Difference:
    """Return the difference of two variants whose repeats with equal seeds are the `pairs`, at least one.

    A figure is the mean of its parts; the parts of all models are in the same order. With 2 to 4 seeds there is no
    interval, and p is the largest of the seeds', 1 where they differ in sign. From 5 on interval and p count units
    and seeds, as `cfsd.statistics.seeds` does.
    """
    if len(pairs) >= seeds.FEWEST and (averaged := _averaged(pairs)):
        values = [_value(one) - _value(other) for one, other in pairs]
        found = _of_many(values, [_of_units(averaged).figure], paired=True)
        return found._replace(figure=_possible(found.figure, averaged))
    each = tuple(difference(*pair) for pair in pairs)
    paired = all(found.paired for found in each)
    if len(each) == 1:
        return each[0]
    if len(each) >= seeds.FEWEST:
        return _of_many([found.figure.value for found in each], [found.figure for found in each], paired=paired)
    mean = seeds.over_seeds([found.figure for found in each])
    return Difference(mean, _every_seed(each), paired, each)


def difference(one: Parts, other: Parts) -> Difference:
    """Return the difference of two models: paired where they have the same units, else from their two intervals."""
    if joined := _joined(one, other):
        return _of_units(joined)
    figure = _independent(figure_of_units(one), figure_of_units(other))
    return Difference(figure, figure_p(figure), paired=False)


def _joined(one: Parts, other: Parts) -> list[Units]:
    """Return the units' differences, part by part; none where any unit has no partner."""
    parts = [_paired(*pair) for pair in zip(one, other, strict=False)] if len(one) == len(other) else []
    return [part for part in parts if part is not None] if None not in parts else []


def _paired(one: Units, other: Units) -> Units | None:
    ours, theirs = (np.argsort(np.array(side.names)) for side in (one, other))
    names = [tuple(np.array(side.names)[order]) for side, order in ((one, ours), (other, theirs))]
    counts = one.counts[ours]
    if names[0] != names[1] or not np.array_equal(counts, other.counts[theirs]):
        return None
    reach = None if one.reach is None or other.reach is None else one.reach + other.reach
    if one.reach == other.reach == 1:  # scores from 0 to 1, of which the base's cancel out
        reach = 1.0
    return Units(names[0], one.sums[ours] - other.sums[theirs], counts, one.unit, reach, one.scale)


def _averaged(pairs: Sequence[tuple[Parts, Parts]]) -> list[Units]:
    """Return the units' differences averaged over the seeds; none where the seeds do not share all units."""
    joined = [_joined(*pair) for pair in pairs]
    shapes = [[(part.names, part.counts.tolist()) for part in parts] for parts in joined]
    if not shapes[0] or any(shape != shapes[0] for shape in shapes):
        return []
    return [
        first._replace(sums=np.mean([parts[i].sums for parts in joined], axis=0)) for i, first in enumerate(joined[0])
    ]


def _possible(figure: Figure, parts: Sequence[Units]) -> Figure:
    """Return `figure` with its interval cut to what the scores allow: a share falls by 100 points at most."""
    reaches = [part.scale * part.reach for part in parts if part.reach is not None]
    most = float(np.mean(reaches)) if len(reaches) == len(parts) else np.inf
    return figure.within(-most, most)


def _of_units(parts: list[Units]) -> Difference:
    figure = figure_of_units(parts)
    assert figure is not None, "no parts"
    return Difference(figure, _p_of_part(parts[0]) if len(parts) == 1 else figure_p(figure), paired=True)


def _p_of_part(part: Units) -> float | None:
    if is_share(part.sums, part.reach):
        return mcnemar_p(int((part.sums > 0).sum()), int((part.sums < 0).sum()))
    if part.reach is None:
        has_tokens = part.counts > 0
        return ratio_p(part.sums[has_tokens], part.counts[has_tokens])
    sums = padded(part.sums, part.reach)
    return ratio_p(sums, np.ones(len(sums))) if part.reach else None


def _value(parts: Parts) -> float:
    return float(np.mean([part.scale * part.sums.sum() / part.counts.sum() for part in parts]))


def _independent(one: Figure | None, other: Figure | None) -> Figure:
    """Return one figure less another one of other units."""
    assert one and other, "a figure without units"
    low, high = (None if end is None else -end for end in (other.high, other.low))
    turned = Figure(value=-other.value, low=low, high=high, unit=other.unit)
    return mean_of([one, turned], one.unit).scaled(2, one.unit)


def _every_seed(each: Sequence[Difference]) -> float | None:
    p_values = [found.p_value for found in each]
    known = [p for p in p_values if p is not None]
    if len(known) < len(each):
        return None
    alike = len({found.figure.value > 0 for found in each}) == 1
    return max(known) if alike else 1.0


def over_many_seeds(figures: Sequence[Figure]) -> Difference:
    """Return what several seeds, FEWEST at least, show together, each with its own interval over the same documents."""
    return _of_many([figure.value for figure in figures], figures, paired=False)


def _of_many(values: Sequence[float], over_units: Sequence[Figure], *, paired: bool) -> Difference:
    """Return the figure over 5 seeds or more, and its p: the level at which its interval ends at 0.

    A t with Satterthwaite's degrees of freedom has tails that are far too thin where a few seeds happen to agree: of 15
    variants that are alike it found a difference in 27 % of families at Holm's 5 %.
    """
    unit = over_units[0].unit
    alone = [Figure(value=value, low=None, high=None, unit=unit) for value in values]
    averaged = over_units[0] if len(over_units) == 1 else None
    figure = seeds.over_seeds(alone if averaged else over_units, averaged)
    reaches = [_reach(part) for part in over_units]
    if figure.low is None:
        return Difference(figure, None, paired)
    of_units, of_seeds = float(np.mean(reaches)) / Z, float(np.std(values, ddof=1)) / np.sqrt(len(values))
    return Difference(figure, level_at(abs(figure.value), of_units, of_seeds, len(values) - 1), paired)


def level_at(distance: float, of_units: float, of_seeds: float, freedom: int) -> float:
    """Return the level a at which hypot(z_a x of_units, t_a x of_seeds) is `distance`: where an interval ends at 0.

    That is the interval of `cfsd.statistics.seeds`, whose two parts are standard errors here, at every level: 1 at
    distance 0, and 0 where neither part scatters.
    """
    if distance == 0:
        return 1.0

    def reach(log_level: float) -> float:
        tail = np.exp(log_level) / 2
        return float(np.hypot(special.ndtri(tail) * of_units, special.stdtrit(freedom, tail) * of_seeds) - distance)

    if reach(LEAST_LOG_LEVEL) <= 0:
        return 0.0
    return float(np.exp(optimize.brentq(reach, LEAST_LOG_LEVEL, 0.0, xtol=1e-9)))


def _reach(figure: Figure) -> float:
    """Return the distance from the value to the bound that is nearer to 0."""
    if figure.low is None or figure.high is None:
        return np.nan
    return figure.value - figure.low if figure.value > 0 else figure.high - figure.value
