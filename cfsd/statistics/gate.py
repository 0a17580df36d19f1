"""The gate: is a figure worse than the baseline's by more than another seed would make it?

Models that were trained with different seeds differ significantly on the same documents, so an interval over
documents alone would fail honest runs. The question here is whether the fresh models could be further seeds of the
baseline. Figures that are positive and skewed over seeds are judged by their logarithms, so by ratios.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from scipy import special  # scipy.stats takes 0.7 s to import, and commands import this module

from cfsd.statistics.further_seeds import chance
from cfsd.statistics.multiplicity import rejected

Outcome = Literal["fail", "pass", "cannot tell"]
Floats = NDArray[np.float64]

FAMILY_WISE = 0.01  # probability that any figure of an unchanged program fails
CONFIDENCE = 0.95  # of either bound of the intervals, so that they hold 90 %
USUAL_SEEDS = 2  # fresh ones, for which margins are made
MAX_SEEDS, MAX_TIMES = 100, 64  # of seeds, and times as many documents, that are still proposed
MAX_TO_FAIL = 20  # of more fresh seeds one is too good too often
ROUNDING = 1e-9  # no worsening, where nothing varies between seeds
LEAST_VALUE = 1e-6  # of what has a logarithm; a model against itself comes to as much, in nats per token
LEAST_SEEDS = 5
AT_LEAST_SPREADS = 2


class Guarded(BaseModel):
    """One figure for every seed of the baseline and for the fresh ones.

    `as_ratio`: judged by its logarithm. `margin`: in `unit`, or a factor where `as_ratio`. `least_spread`: the smallest
    standard deviation between seeds that counts; for scores of 0 or 1 that of one document, since a few seeds may
    agree by chance. `document_variance`: squared standard error of the difference, of the logarithms' where
    `as_ratio`, that comes from the choice of documents, 0 where it is unknown. `same_documents`: the fresh seeds are
    measured on the baseline's.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    unit: str
    higher_is_better: bool
    baseline: tuple[FiniteFloat, ...] = Field(min_length=LEAST_SEEDS)
    fresh: tuple[FiniteFloat, ...] = Field(min_length=1)
    margin: FiniteFloat = Field(ge=0)
    as_ratio: bool = False
    least_spread: FiniteFloat = Field(0.0, ge=0)
    document_variance: FiniteFloat = Field(0.0, ge=0)
    num_documents: int = Field(ge=1)
    same_documents: bool = True


class Finding(BaseModel):
    """The judgement of one figure; `worsening`, `low`, `high` positive = worse.

    `before`, `after`: means over seeds in `unit`, geometric ones where `as_ratio`. All else is in `unit`, too, or,
    where `as_ratio`, the logarithm of a factor: exp(worsening) = after / before. `low`, `high` are infinite (`null` in
    JSON) where no interval is known.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    unit: str
    as_ratio: bool = False
    outcome: Outcome
    before: float
    after: float
    worsening: float
    low: float
    high: float
    margin: float
    p_value: float
    significant: bool
    needed: str = ""

    def verdict(self) -> str:
        """Return the outcome as tables show it, with what it would take to tell."""
        return self.outcome.upper() + (f": needs {self.needed}" if self.needed else "")


class Judgement(BaseModel):
    """The findings, worst first, and the outcome of the whole: the worst of theirs."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    findings: tuple[Finding, ...]


class Error(NamedTuple):
    """Standard error of a worsening and its degrees of freedom."""

    size: float
    freedom: float

    def half(self) -> float:
        """Return the distance from the worsening to either of its bounds."""
        return float(special.stdtrit(self.freedom, CONFIDENCE)) * self.size


def judge(guarded: Sequence[Guarded]) -> Judgement:
    """Return FAIL where a worsening is above its margin and significant, PASS where it surely is below it.

    The test takes the fresh models for further seeds of the baseline: the least bad of them is expected where
    `cfsd.statistics.further_seeds.chance` says. Holm's correction bounds the probability of any wrong FAIL by 1 %,
    for normal seeds and for those with heavy tails, of ratios also for log-normal ones. `low` and `high` are one-sided
    95 % bounds of the mean worsening each, by t with the baseline's seeds less one degrees of freedom; they also
    count the choice of documents. That fresh seeds spread more than the baseline's is noticed only where all of them
    are worse.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6.
    """
    scaled = [_in_logs(figure) if figure.as_ratio else figure for figure in guarded]
    p_values = [_p(figure) for figure in scaled]
    parts = zip(scaled, p_values, rejected(p_values, FAMILY_WISE), strict=True)
    order: list[Outcome] = ["fail", "cannot tell", "pass"]
    findings = sorted(
        (_finding(*part, len(guarded)) for part in parts), key=lambda finding: order.index(finding.outcome)
    )
    return Judgement(outcome=findings[0].outcome if findings else "pass", findings=tuple(findings))


def logarithms(values: Sequence[float]) -> list[float]:
    """Return the logarithms, a value below LEAST_VALUE counting as that."""
    return [math.log(max(value, LEAST_VALUE)) for value in values]


def _in_logs(figure: Guarded) -> Guarded:
    return figure.model_copy(
        update={
            "baseline": tuple(logarithms(figure.baseline)),
            "fresh": tuple(logarithms(figure.fresh)),
            "margin": math.log(figure.margin),
        }
    )


def margin_of(values: Sequence[float], *, least: float, least_spread: float = 0.0) -> float:
    """Return the largest worsening that passes: two standard deviations between seeds, `least`, or a bound.

    The bound, usually the largest of the three, is what the interval of two honest fresh seeds stays below with 99 %
    probability where seeds are normal; more seeds of the baseline make it smaller.
    """
    seeds, spread = len(values), max(float(np.std(values, ddof=1)), least_spread)
    deviates = special.stdtrit(seeds - 1, CONFIDENCE) + special.stdtrit(seeds - 1, 0.99)
    reach = float(deviates * math.sqrt(1 / USUAL_SEEDS + 1 / seeds))
    return max(reach * spread, AT_LEAST_SPREADS * spread, least)


def margin_factor_of(values: Sequence[float], *, least: float) -> float:
    """Return the largest factor that passes, as `margin_of` of the logarithms; `least` is in the values' unit."""
    return math.exp(margin_of(logarithms(values), least=math.log(as_factor(values, least))))


def as_factor(values: Sequence[float], worsening: float) -> float:
    """Return the factor by which the geometric mean of `values` grows when `worsening`, in their unit, is added."""
    return 1 + worsening / math.exp(float(np.mean(logarithms(values))))


def document_noise(sums: ArrayLike, counts: ArrayLike) -> float:
    """Return the part of a figure's document variance that comes from one seed.

    `sums` (seeds, documents) and `counts` (documents): the figure is sum(sums)/sum(counts). It is the variance of
    each document from seed to seed, apart from the figure's own.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    rest = _rest(values, weights)
    return float(rest.var(axis=0, ddof=1).sum()) if len(values) > 1 else 0.0


def document_variance(before: ArrayLike, after: ArrayLike, counts: ArrayLike, *, noise: float = 0.0) -> float:
    """Return the squared standard error, from the choice of documents, of the figure's change on the same ones.

    `before`, `after` and `counts` (documents): sums per document, means over seeds. `noise` is the seeds' part,
    `document_noise` times (1/seeds + 1/fresh seeds), which the spread between seeds counts already.
    """
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    weights = np.asarray(counts, dtype=np.float64)
    rest = _rest(change[None], weights)[0]
    many = int(np.count_nonzero(weights))
    return max(0.0, float(rest @ rest) - noise) * many / max(1, many - 1)


def _rest(sums: Floats, counts: Floats) -> Floats:
    total = float(counts.sum())
    rest: Floats = (sums - sums.sum(axis=1, keepdims=True) / total * counts) / total
    return rest


def _worsenings(figure: Guarded) -> Floats:
    """Return by how much each fresh seed is worse than the baseline's mean."""
    changes: Floats = np.array(figure.fresh) - np.mean(figure.baseline)
    return -changes if figure.higher_is_better else changes


def _spread(figure: Guarded) -> float:
    return max(float(np.std(figure.baseline, ddof=1)), figure.least_spread)


def _p(figure: Guarded) -> float:
    """Return the probability that further seeds of the baseline are all at least as bad as the least bad fresh one.

    On other documents than the baseline's all fresh seeds are as much worse as these documents are harder, so that they
    count as one, whose spread is that of documents, too. As seeds alone they failed 5 to 14 % of honest programs.
    """
    least = float(_worsenings(figure).min())
    if figure.same_documents:
        return _chance(least, _spread(figure), len(figure.fresh), len(figure.baseline))
    return _chance(least, math.hypot(_spread(figure), math.sqrt(figure.document_variance)), 1, len(figure.baseline))


def _chance(least: float, spread: float, fresh: int, baseline: int) -> float:
    if spread == 0:
        return 0.0 if least > ROUNDING else 1.0
    return chance(least / spread, fresh, baseline)


def _error(figure: Guarded, fresh: int, baseline: int, documents: float = 1.0) -> Error:
    """Return the error with that many seeds, and with `documents` times as many documents as there are."""
    freedom = baseline - 1
    seeds_part = _spread(figure) ** 2 * (1 / fresh + 1 / baseline)
    documents_part = figure.document_variance / documents
    if (total := seeds_part + documents_part) == 0:
        return Error(0.0, freedom)
    # Satterthwaite 1946
    joint = total**2 / (seeds_part**2 / freedom + documents_part**2 / max(1, figure.num_documents - 1))
    return Error(math.sqrt(total), joint)


def _finding(figure: Guarded, p: float, significant: bool, family: int) -> Finding:
    worsening = float(_worsenings(figure).mean()) + 0.0  # -0.0 would be printed with its sign
    half = _error(figure, len(figure.fresh), len(figure.baseline)).half()
    outcome: Outcome = "cannot tell"
    if worsening > figure.margin and significant:
        outcome = "fail"
    elif worsening + half < figure.margin or worsening + half <= 0:
        outcome = "pass"
    before, after = (float(np.mean(values)) for values in (figure.baseline, figure.fresh))
    return Finding(
        name=figure.name,
        unit=figure.unit,
        as_ratio=figure.as_ratio,
        outcome=outcome,
        before=math.exp(before) if figure.as_ratio else before,
        after=math.exp(after) if figure.as_ratio else after,
        worsening=worsening,
        low=worsening - half,
        high=worsening + half,
        margin=figure.margin,
        p_value=p,
        significant=significant,
        needed=_needed(figure, worsening, family) if outcome == "cannot tell" else "",
    )


def _needed(figure: Guarded, worsening: float, family: int) -> str:
    """Return how many seeds, the present ones among them, or documents would decide if the worsening stayed."""
    above, seeds, spread = worsening > figure.margin, len(figure.baseline), _spread(figure)
    least_now = float(_worsenings(figure).min())

    def decides(fresh: int, baseline: int, documents: float = 1.0) -> bool:
        if above:
            least = min(least_now, worsening - spread * _expected_largest(fresh))
            return least > 0 and _chance(least, spread, fresh, baseline) <= FAMILY_WISE / family
        return worsening + _error(figure, fresh, baseline, documents).half() < figure.margin

    first, most = len(figure.fresh) + 1, MAX_TO_FAIL if above else MAX_SEEDS
    for fresh in range(first, most + 1):
        if decides(fresh, seeds):
            return f"{fresh} fresh seeds"
    for both in range(max(first, seeds + 1), most + 1):
        if decides(both, both):
            return f"{both} seeds, fresh and in the baseline"
    for times in (2, 4, 8, 16, 32, MAX_TIMES):
        if not above and decides(MAX_SEEDS, MAX_SEEDS, times):
            return f"{times * figure.num_documents} documents, and {MAX_SEEDS} seeds"
    if not above and figure.document_variance:
        return f"more than {MAX_TIMES * figure.num_documents} documents, or the baseline's own"
    return f"more than {most} seeds: {'not every seed is that much worse' if above else 'it lies at the margin'}"


def _expected_largest(seeds: int) -> float:
    """Return the mean of the largest of that many standard normal deviates. Source: Blom 1958, to 0.02."""
    return float(special.ndtri((seeds - 0.375) / (seeds + 0.25)))
