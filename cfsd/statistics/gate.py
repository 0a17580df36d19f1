"""The gate: is a figure worse than the baseline's by more than another seed would make it?

Models that were trained with different seeds differ significantly on the same documents, so an interval over
documents alone would fail honest runs. The question here is whether the fresh models could be further seeds of the
baseline.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from scipy import special  # scipy.stats takes 0.7 s to import, and commands import this module

from cfsd.statistics import multiplicity

Outcome = Literal["fail", "pass", "cannot tell"]
Floats = NDArray[np.float64]

FAMILY_WISE = 0.01  # probability that any figure of an unchanged program fails
CONFIDENCE = 0.95  # of either bound of the intervals, so that they hold 90 %
USUAL_SEEDS = 2  # fresh ones, for which margins are made
MAX_SEEDS, MAX_TIMES = 100, 64  # of seeds, and times as many documents, that are still proposed
ROUNDING = 1e-9  # no worsening, where nothing varies between seeds
LEAST_SEEDS = 5
AT_LEAST_SPREADS = 2


class Guarded(BaseModel):
    """One figure for every seed of the baseline and for the fresh ones.

    `least_spread`: the smallest standard deviation between seeds that counts; for scores of 0 or 1 that of one
    document, since a few seeds may agree by chance. `document_variance`: squared standard error of the difference
    that comes from the choice of documents, 0 where it is unknown.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    unit: str
    higher_is_better: bool
    baseline: tuple[FiniteFloat, ...] = Field(min_length=LEAST_SEEDS)
    fresh: tuple[FiniteFloat, ...] = Field(min_length=1)
    margin: FiniteFloat = Field(ge=0)
    least_spread: FiniteFloat = Field(0.0, ge=0)
    document_variance: FiniteFloat = Field(0.0, ge=0)
    num_documents: int = Field(ge=1)


class Finding(BaseModel):
    """The judgement of one figure; `worsening`, `low`, `high` positive = worse, in `unit`."""

    model_config = ConfigDict(frozen=True)

    name: str
    unit: str
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


class Judgement(BaseModel):
    """The findings, worst first, and the outcome of the whole: the worst of theirs."""

    model_config = ConfigDict(frozen=True)

    outcome: Outcome
    findings: tuple[Finding, ...]


class Error(NamedTuple):
    """Standard error of a worsening and its degrees of freedom."""

    size: float
    freedom: float

    def p(self, worsening: float) -> float:
        """Return the one-sided p that the error explains a worsening of this size or more."""
        if self.size == 0:
            return 0.0 if worsening > ROUNDING else 1.0
        return float(special.stdtr(self.freedom, -worsening / self.size))

    def half(self) -> float:
        """Return the distance from the worsening to either of its bounds."""
        return float(special.stdtrit(self.freedom, CONFIDENCE)) * self.size


def judge(guarded: Sequence[Guarded]) -> Judgement:
    """Return FAIL where a worsening is above its margin and significant, PASS where it surely is below it.

    The test takes the fresh models for further seeds of the baseline: their mean is expected within the
    prediction interval of the baseline's, t with its seeds less one degrees of freedom, which is exact for one
    fresh seed as for many. Holm's correction bounds the probability of any wrong FAIL by 1 %. `low` and `high` are
    one-sided 95 % bounds each; they also count the choice of documents. That fresh seeds spread more than the
    baseline's is noticed only where their mean is worse.

    Source: Hahn 1969, Factors for calculating two-sided prediction intervals, JASA 64 (the mean of k further
    samples); Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6.
    """
    p_values = [_of_seeds(figure, len(figure.fresh), len(figure.baseline)).p(_worsening(figure)) for figure in guarded]
    parts = zip(guarded, p_values, holm(p_values), strict=True)
    order: list[Outcome] = ["fail", "cannot tell", "pass"]
    findings = sorted(
        (_finding(*part, len(guarded)) for part in parts), key=lambda finding: order.index(finding.outcome)
    )
    return Judgement(outcome=findings[0].outcome if findings else "pass", findings=tuple(findings))


def holm(p_values: Sequence[float], level: float = FAMILY_WISE) -> list[bool]:
    """Return which hypotheses are rejected so that any wrong rejection has at most probability `level`."""
    return [p <= level for p in multiplicity.holm(p_values)]


def margin_of(values: Sequence[float], *, least: float, least_spread: float = 0.0) -> float:
    """Return the largest worsening that passes: two standard deviations between seeds, `least`, or a bound.

    The bound, usually the largest of the three, is what the interval of two honest fresh seeds stays below with 99 %
    probability; more seeds of the baseline make it smaller.
    """
    seeds, spread = len(values), max(float(np.std(values, ddof=1)), least_spread)
    deviates = special.stdtrit(seeds - 1, CONFIDENCE) + special.stdtrit(seeds - 1, 0.99)
    reach = float(deviates * math.sqrt(1 / USUAL_SEEDS + 1 / seeds))
    return max(reach * spread, AT_LEAST_SPREADS * spread, least)


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


def _worsening(figure: Guarded) -> float:
    change = float(np.mean(figure.fresh) - np.mean(figure.baseline))
    return (-change if figure.higher_is_better else change) + 0.0


def _of_seeds(figure: Guarded, fresh: int, baseline: int) -> Error:
    """Return the error as if the fresh models were further seeds of the baseline, measured on the same documents."""
    spread = max(float(np.std(figure.baseline, ddof=1)), figure.least_spread)
    return Error(spread * math.sqrt(1 / fresh + 1 / baseline), baseline - 1)


def _error(figure: Guarded, fresh: int, baseline: int, documents: float = 1.0) -> Error:
    """Return the error with that many seeds, and with `documents` times as many documents as there are."""
    of_seeds, freedom = _of_seeds(figure, fresh, baseline)
    seeds_part, documents_part = of_seeds**2, figure.document_variance / documents
    if (total := seeds_part + documents_part) == 0:
        return Error(0.0, freedom)
    # Satterthwaite 1946
    joint = total**2 / (seeds_part**2 / freedom + documents_part**2 / max(1, figure.num_documents - 1))
    return Error(math.sqrt(total), joint)


def _finding(figure: Guarded, p: float, significant: bool, family: int) -> Finding:
    worsening = _worsening(figure)
    half = _error(figure, len(figure.fresh), len(figure.baseline)).half()
    outcome: Outcome = "cannot tell"
    if worsening > figure.margin and significant:
        outcome = "fail"
    elif worsening + half < figure.margin or worsening + half <= 0:
        outcome = "pass"
    return Finding(
        name=figure.name,
        unit=figure.unit,
        outcome=outcome,
        before=float(np.mean(figure.baseline)),
        after=float(np.mean(figure.fresh)),
        worsening=worsening,
        low=worsening - half,
        high=worsening + half,
        margin=figure.margin,
        p_value=p,
        significant=significant,
        needed=_needed(figure, worsening, family) if outcome == "cannot tell" else "",
    )


def _needed(figure: Guarded, worsening: float, family: int) -> str:
    """Return how many seeds or documents would decide, if the worsening stayed as it is."""
    above, seeds = worsening > figure.margin, len(figure.baseline)

    def decides(fresh: int, baseline: int, documents: float = 1.0) -> bool:
        if above:
            return _of_seeds(figure, fresh, baseline).p(worsening) <= FAMILY_WISE / family
        return worsening + _error(figure, fresh, baseline, documents).half() < figure.margin

    first = len(figure.fresh) + 1
    for fresh in range(first, MAX_SEEDS + 1):
        if decides(fresh, seeds):
            return f"{fresh} fresh seeds"
    for both in range(max(first, seeds + 1), MAX_SEEDS + 1):
        if decides(both, both):
            return f"{both} seeds, fresh and in the baseline"
    for times in (2, 4, 8, 16, 32, MAX_TIMES):
        if not above and decides(MAX_SEEDS, MAX_SEEDS, times):
            return f"{times * figure.num_documents} documents, and {MAX_SEEDS} seeds"
    if not above and figure.document_variance:
        return f"more than {MAX_TIMES * figure.num_documents} documents, or the baseline's own"
    return f"more than {MAX_SEEDS} seeds: it lies at the margin"
