"""What methods lost at equal gain: each swept method is interpolated along its own strengths, never beyond them.

B resamples, before which come the figures as measured; N trained models; P points, each a method at one strength, the
mean of its S seeds; K points of one method.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat
from scipy import special

from cfsd.statistics.figures import Figure, figure_of
from cfsd.statistics.intervals import MIN_ROWS, RESAMPLES, Floats, Interval, Z, padded, resampled_sums
from cfsd.statistics.seeds import FEWEST
from cfsd.statistics.units import Units

PARTS = (1.0, 0.75, 0.5, 0.25)  # of the way from the least to the largest gain that all swept methods reach
EQUAL = 1e-9  # of a gain
DEFINITION = (
    "Each swept method is interpolated along its own strengths, in a straight line between neighbours (probe_kl in its "
    "logarithm), never beyond the first and last; where it has a gain at several strengths, the one with the least "
    "loss counts. Intervals at 95 % and differences come from resampling documents, the same ones for all variants"
)


class Trained(NamedTuple):
    """One trained model: `method` with `seed` at `strength` (None: a method that was not swept).

    `gain` and `cost` are the parts of both figures, unit by unit; of several parts the mean counts.
    """

    method: str
    strength: float | None
    seed: str
    gain: Sequence[Units]
    cost: Sequence[Units]


class AtGain(BaseModel):
    """One method at one gain. `cost` is None where the method does not reach the gain.

    `strengths`: the two neighbours that it lies between, or the one that it has exactly; none for a method that was
    not swept. `crossings`: at how many places along its strengths the method has this gain; above 1 the least cost
    counts. `reached`: the share of resamples in which it has the gain; below 0.975 an interval has no bounds.
    """

    model_config = ConfigDict(frozen=True)

    method: str
    cost: Figure | None
    strengths: tuple[FiniteFloat, ...]
    crossings: int
    reached: FiniteFloat


class Apart(BaseModel):
    """How two methods differ at one gain: `one` - `other`, paired in each resample, and the quotient for logarithms."""

    model_config = ConfigDict(frozen=True)

    one: str
    other: str
    difference: Figure
    ratio: Figure | None


class Match(BaseModel):
    """All methods at one gain; `at` says which."""

    model_config = ConfigDict(frozen=True)

    at: str
    gain: Figure
    methods: tuple[AtGain, ...]
    differences: tuple[Apart, ...]


class MatchedGain(BaseModel):
    """One cost at the gains that methods have in common: an entry of `matched_gain` in summary.json.

    `covers`: what the intervals are over, documents alone below FEWEST seeds. `variants`: those of each method.
    """

    model_config = ConfigDict(frozen=True)

    measure: str
    logarithmic: bool
    seeds: int
    covers: str
    variants: dict[str, tuple[str, ...]]
    gains: tuple[Match, ...]

    def methods(self) -> list[str]:
        """Return every method that is at one of the gains."""
        return list(dict.fromkeys(entry.method for match in self.gains for entry in match.methods))


class Curve(NamedTuple):
    """One method's strengths K, with gain and cost of each in every resample."""

    strengths: tuple[float, ...]
    gain_BK: Floats
    cost_BK: Floats

    def ends(self) -> tuple[Floats, Floats]:
        """Return the least and the largest gain in every resample."""
        return self.gain_BK.min(1), self.gain_BK.max(1)


class Crossing(NamedTuple):
    """Where a method has a gain: its least cost in every resample (NaN: nowhere), and how it is come by as measured."""

    cost_B: Floats
    strengths: tuple[float, ...]
    crossings: int


def matched(models: Sequence[Trained], *, log: bool, seed: int = 0) -> list[Match]:
    """Return the methods at gains that they have in common.

    These are four gains evenly over what all swept methods reach, or, if nothing, the largest of each; and the gain of
    each method that was not swept. They are found anew in each resample, so that the error of a gain that all share
    is in no difference. `log`: costs are interpolated in their logarithms where both neighbours are above 0. Only
    seeds that every method has at every strength count. Fewer than two methods, or none with two strengths, give
    nothing.
    """
    models = _complete(models)
    curves = _curves(models, seed)
    swept = {name: curve for name, curve in curves.items() if len(curve.strengths) > 1}
    if not swept or len(curves) < 2:
        return []
    return [_match(level, swept | curves, models, log) for level in _levels(curves, swept)]


def seeds_of(models: Sequence[Trained]) -> int:
    """Return over how many seeds `matched` counts."""
    return len({model.seed for model in _complete(models)})


def _complete(models: Sequence[Trained]) -> list[Trained]:
    points = {(model.method, model.strength) for model in models}
    have = {
        seed: {(m.method, m.strength) for m in models if m.seed == seed}
        for seed in dict.fromkeys(m.seed for m in models)
    }
    return [model for model in models if have[model.seed] == points]


def _curves(models: Sequence[Trained], seed: int) -> dict[str, Curve]:
    """Return each method's curve, over documents and, from FEWEST seeds on, seeds resampled together."""
    if not models:
        return {}
    parts = [part for model in models for part in (model.gain, model.cost)]
    value_BN = _resampled(parts, [model.method for model in models for _ in range(2)], seed)
    points = sorted({(m.method, m.strength) for m in models}, key=lambda p: (p[1] is not None, p[1] or 0.0))
    seeds = list(dict.fromkeys(model.seed for model in models))
    place = {(m.method, m.strength, m.seed): 2 * i for i, m in enumerate(models)}
    order_PS = np.array([[place[*point, s] for s in seeds] for point in points])
    gain_BP, cost_BP = (_over_seeds(value_BN[:, order_PS + k], seed) for k in (0, 1))
    curves = {}
    for name in dict.fromkeys(model.method for model in models):
        own = [i for i, (method, _) in enumerate(points) if method == name]
        strengths = tuple(strength for i in own if (strength := points[i][1]) is not None)
        curves[name] = Curve(strengths, gain_BP[:, own], cost_BP[:, own])
    return curves


def _resampled(figures: Sequence[Sequence[Units]], methods: Sequence[str], seed: int) -> Floats:
    """Return (1 + B, N): each figure as measured, then in every resample, the same units drawn for all figures."""
    groups: dict[tuple[str, ...], list[tuple[int, Units]]] = {}
    for i, parts in enumerate(figures):
        for part in parts:
            groups.setdefault(part.names, []).append((i, part))
    value_BN = np.zeros((1 + RESAMPLES, len(figures)))
    for number, group in enumerate(groups.values()):
        drawn_BM = _group(group, [methods[i] for i, _ in group], seed + number)
        for m, (i, part) in enumerate(group):
            value_BN[:, i] += drawn_BM[:, m] * part.scale / len(figures[i])
    return value_BN


def _group(group: Sequence[tuple[int, Units]], methods: Sequence[str], seed: int) -> Floats:
    """Return sum(sums)/sum(counts) of figures on the same units: as measured, then in every resample.

    As in `bootstrap_change`, scores get two imagined documents, above and below a model's mean, by as much for all of
    a method's models.
    """
    parts = [part for _, part in group]
    sums_RM, counts_RM = (np.stack([getattr(part, name) for part in parts], axis=1) for name in ("sums", "counts"))
    value_M, rows = sums_RM.sum(0) / counts_RM.sum(0), len(sums_RM)
    sums_BM, counts_BM = np.split(resampled_sums(np.hstack([sums_RM, counts_RM]), seed), 2, axis=1)
    sizes = [0.0 if part.reach is None else float(np.ptp(padded(part.sums, part.reach)[-2:])) / 2 for part in parts]
    rng = np.random.default_rng([seed, 1])
    for name in dict.fromkeys(methods):
        own = [m for m, method in enumerate(methods) if method == name]
        if size := max(sizes[m] for m in own):
            up_B, down_B = rng.binomial(rows + 2, 1 / (rows + 2), (2, RESAMPLES))
            sums_BM[:, own] += 2 * value_M[own] + size * (up_B - down_B)[:, None]
            counts_BM[:, own] += 2
    return np.vstack([value_M, value_M + _widening(rows) * (sums_BM / counts_BM - value_M)])


def _over_seeds(value_BPS: Floats, seed: int) -> Floats:
    """Return the mean over seeds, from FEWEST on of as many drawn seeds, the same for all points and figures."""
    mean_BP: Floats = value_BPS.mean(2)
    count = value_BPS.shape[2]
    if count < FEWEST:
        return mean_BP
    drawn_BS = np.random.default_rng([seed, 2]).integers(0, count, (RESAMPLES, count))
    drawn_BP = np.take_along_axis(value_BPS[1:], drawn_BS[:, None, :], axis=2).mean(2)
    return np.vstack([mean_BP[:1], mean_BP[1:] + _widening(count) * (drawn_BP - mean_BP[1:])])


def _widening(count: int) -> float:
    """Return by what to stretch resampled means of `count`: they scatter too little, and as normal ones, not by t."""
    return float(special.stdtrit(count - 1, 0.975) / Z * np.sqrt(count / (count - 1))) if count > 1 else 1.0


class Level(NamedTuple):
    """A gain at which methods are compared: which it is, in every resample, and whose own."""

    at: str
    gain_B: Floats
    method: str | None = None  # that was not swept, and has its cost at this gain alone


def _levels(curves: dict[str, Curve], swept: dict[str, Curve]) -> Iterator[Level]:
    if len(swept) > 1:
        lows, highs = zip(*(curve.ends() for curve in swept.values()), strict=True)
        low_B, high_B = np.max(lows, axis=0), np.min(highs, axis=0)
        if low_B[0] > high_B[0]:
            yield from (Level(f"the largest gain of {name}", curve.ends()[1]) for name, curve in swept.items())
        else:
            gap_B = np.where(low_B > high_B, np.nan, high_B - low_B)
            for part in PARTS if gap_B[0] > 0 else PARTS[:1]:
                words = "the largest gain that all sweeps reach" if part == 1 else f"{part:g} of the way there"
                yield Level(words, high_B - (1 - part) * gap_B)
    yield from (Level(f"the gain of {n}", c.gain_BK[:, 0], n) for n, c in curves.items() if n not in swept)


def _match(level: Level, curves: dict[str, Curve], models: Sequence[Trained], log: bool) -> Match:
    gain_unit, cost_unit = models[0].gain[0].unit, models[0].cost[0].unit
    known = min(len(part.names) for model in models for part in (*model.gain, *model.cost)) >= MIN_ROWS
    of_level = {n: c for n, c in curves.items() if len(c.strengths) > 1 or n == level.method}
    found = {name: _crossing(curve, level.gain_B, log) for name, curve in of_level.items()}
    methods = [
        AtGain(
            method=name,
            cost=_figure(cost_B, cost_unit, known=known),
            strengths=strengths,
            crossings=crossings,
            reached=float(np.isfinite(cost_B[1:]).mean()),
        )
        for name, (cost_B, strengths, crossings) in found.items()
    ]
    pairs = combinations([entry.method for entry in methods if entry.cost], 2)
    apart = [
        _apart(pair, *(found[name].cost_B for name in pair), unit=cost_unit, known=known, log=log) for pair in pairs
    ]
    gain = _figure(level.gain_B, gain_unit, known=known)
    assert gain
    return Match(at=level.at, gain=gain, methods=tuple(methods), differences=tuple(apart))


def _apart(pair: tuple[str, str], one_B: Floats, other_B: Floats, *, unit: str, known: bool, log: bool) -> Apart:
    difference = _figure(one_B - other_B, unit, known=known)
    assert difference
    positive = log and not ((one_B <= 0) | (other_B <= 0)).any()
    ratio = _figure(one_B / other_B, "factor", known=known) if positive else None
    return Apart(one=pair[0], other=pair[1], difference=difference, ratio=ratio)


def _figure(value_B: Floats, unit: str, *, known: bool) -> Figure | None:
    """Return the figure of what was measured and resampled; resamples without a value count against both ends."""
    if not np.isfinite(value_B[0]):
        return None
    low, high = (np.nan_to_num(value_B[1:], nan=unknown) for unknown in (-np.inf, np.inf))
    ends = float(np.quantile(low, 0.025, method="lower")), float(np.quantile(high, 0.975, method="higher"))
    return figure_of(value_B[0], Interval(*ends) if known and np.isfinite(ends).all() else None, unit)


def _crossing(curve: Curve, gain_B: Floats, log: bool) -> Crossing:
    """Return the least cost at which the curve has each gain, at a point or on the line between two neighbours."""
    near_BK = np.abs(curve.gain_BK - gain_B[:, None]) <= EQUAL * np.abs(gain_B[:, None])
    costs = [np.where(near_BK, curve.cost_BK, np.nan)]
    if len(curve.strengths) > 1:
        (gain_BJ, next_BJ), (cost_BJ, dear_BJ) = ((v[:, :-1], v[:, 1:]) for v in (curve.gain_BK, curve.cost_BK))
        with np.errstate(divide="ignore", invalid="ignore"):
            way_BJ = (gain_B[:, None] - gain_BJ) / (next_BJ - gain_BJ)
        inside_BJ = (way_BJ > 0) & (way_BJ < 1) & ~near_BK[:, :-1] & ~near_BK[:, 1:]
        costs.append(np.where(inside_BJ, _between(cost_BJ, dear_BJ, np.where(inside_BJ, way_BJ, 0.0), log), np.nan))
    cost_BC = np.hstack(costs)
    found_C = np.flatnonzero(np.isfinite(cost_BC[0]))
    with np.errstate(invalid="ignore"):
        least_B: Floats = np.fmin.reduce(cost_BC, axis=1)
    best = min(found_C, key=lambda c: cost_BC[0, c], default=None)
    count = len(curve.strengths)
    if best is None or not count:
        return Crossing(least_B, (), len(found_C))
    here = slice(best, best + 1) if best < count else slice(best - count, best - count + 2)
    return Crossing(least_B, curve.strengths[here], len(found_C))


def _between(one: Floats, other: Floats, way: Floats, log: bool) -> Floats:
    """Return what lies `way` from `one` to `other`, by logarithms if `log` and both are above 0."""
    straight: Floats = one + way * (other - one)
    if not log:
        return straight
    with np.errstate(divide="ignore", invalid="ignore"):
        curved = np.exp(np.log(one) + way * (np.log(other) - np.log(one)))
    return np.where((one > 0) & (other > 0), curved, straight)
