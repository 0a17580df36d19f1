"""The gate: did a figure get worse than the baseline's, by more than another seed makes? Numbers in, verdict out.

Models trained alike but for their seeds differ for certain on the same documents, so a document interval alone
would fail honest runs. What is asked here is whether the fresh models could be further seeds of the baseline.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from scipy import stats

Outcome = Literal["fail", "pass", "cannot tell"]
Floats = NDArray[np.float64]

FAMILY_WISE = 0.01  # probability that any figure of an unchanged program fails
CONFIDENCE = 0.95  # of either end of the intervals, so that they hold 90 %
USUAL_SEEDS = 2  # fresh ones, for which margins are made
MAX_SEEDS, MAX_TIMES = 100, 64  # of seeds, and times as many documents, that are still proposed
ROUNDING = 1e-9  # no worsening, where nothing varies between seeds
LEAST_SEEDS = 5
AT_LEAST_SPREADS = 2


class Guarded(BaseModel):
    """One figure for every seed of the baseline and for the fresh ones.

    `least_spread`: the smallest standard deviation between seeds that is believed; one document for scores of
    0 or 1, of which a few seeds may well agree by chance. `document_variance`: squared standard error of the
    difference that comes from the choice of documents, 0 where they say nothing.
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
    """What the gate says of one figure; `worsening`, `low`, `high` positive = worse, in `unit`."""

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


def judge(guarded: Sequence[Guarded]) -> Judgement:
    """Return FAIL where a worsening is above its margin and significant, PASS where it surely is below it.

    The test takes the fresh models for further seeds of the baseline: their mean is expected within the
    prediction interval of the baseline's, t with its seeds less one degrees of freedom, which is exact for one
    fresh seed as for many. Holm's correction makes 1 % of all figures together. `low` and `high` are one-sided
    95 % bounds each; they also count the choice of documents. Seeds that spread more than the baseline's show
    only where their mean gets worse.

    Source: Hahn 1969, Factors for calculating two-sided prediction intervals, JASA 64 (the mean of k further
    samples); Holm 1979, A simple sequentially rejective multiple test procedure, Scand. J. Statistics 6.
    """
    tests = [_test(figure) for figure in guarded]
    significant = holm([p for _, p in tests])
    found = [
        _finding(figure, d, p, sure, len(guarded))
        for figure, (d, p), sure in zip(guarded, tests, significant, strict=True)
    ]
    order: list[Outcome] = ["fail", "cannot tell", "pass"]
    found.sort(key=lambda finding: order.index(finding.outcome))
    return Judgement(outcome=found[0].outcome if found else "pass", findings=tuple(found))


def holm(p_values: Sequence[float], level: float = FAMILY_WISE) -> list[bool]:
    """Return which hypotheses are rejected so that any wrong rejection has at most probability `level`."""
    rejected, left = [False] * len(p_values), len(p_values)
    for i in sorted(range(len(p_values)), key=lambda i: p_values[i]):
        if p_values[i] > level / left:
            break
        rejected[i], left = True, left - 1
    return rejected


def margin_of(values: Sequence[float], *, least: float, least_spread: float = 0.0) -> float:
    """Return the worsening that is let pass: two standard deviations between seeds, `least`, or, most often,
    what two honest fresh seeds stay below for certain with 99 % probability; more seeds make it sharper.
    """  # noqa: D205
    seeds, spread = len(values), max(float(np.std(values, ddof=1)), least_spread)
    reach = (stats.t.ppf(CONFIDENCE, seeds - 1) + stats.t.ppf(0.99, seeds - 1)) * math.sqrt(1 / USUAL_SEEDS + 1 / seeds)
    return max(float(reach) * spread, AT_LEAST_SPREADS * spread, least)


def document_noise(sums: ArrayLike, counts: ArrayLike) -> float:
    """Return how much of a figure's document variance is the seeds' doing, for one seed.

    `sums` (seeds, documents) and `counts` (documents): the figure is sum(sums)/sum(counts). Each document's
    own ups and downs from seed to seed, the figure's left out.
    """
    values, weights = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    rest = _rest(values, weights)
    return float(rest.var(axis=0, ddof=1).sum()) if len(values) > 1 else 0.0


def document_variance(before: ArrayLike, after: ArrayLike, counts: ArrayLike, *, noise: float = 0.0) -> float:
    """Return the squared standard error, from the choice of documents, of the figure's change on the same ones.

    `before`, `after` and `counts` (documents): sums per document, means over seeds. `noise` is what the seeds
    add to it, `document_noise` times (1/seeds + 1/fresh seeds): it is counted between seeds already.
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


def _test(figure: Guarded) -> tuple[float, float]:
    """Return the worsening, positive = worse, and the one-sided p that the seeds' spread explains it."""
    change = float(np.mean(figure.fresh) - np.mean(figure.baseline))
    worsening = (-change if figure.higher_is_better else change) + 0.0
    error = _error(figure, len(figure.fresh), honest=True)
    return worsening, _p(worsening, error)


def _p(worsening: float, error: Error) -> float:
    if error.size == 0:
        return 0.0 if worsening > ROUNDING else 1.0
    return float(stats.t.sf(worsening / error.size, error.freedom))


def _error(
    figure: Guarded, fresh: int, *, honest: bool = False, baseline: int | None = None, documents: float = 1.0
) -> Error:
    """Return the error with so many seeds, and `documents` times as many documents as there are.

    `honest`: were the fresh models further seeds of the baseline, whose documents are the same.
    """
    spread = max(float(np.std(figure.baseline, ddof=1)), figure.least_spread)
    seeds = baseline or len(figure.baseline)
    if honest:
        return Error(spread * math.sqrt(1 / fresh + 1 / seeds), seeds - 1)
    seen = spread**2 * (1 / fresh + 1 / seeds)
    read = figure.document_variance / documents
    if (total := seen + read) == 0:
        return Error(0.0, seeds - 1)
    freedom = total**2 / (seen**2 / (seeds - 1) + read**2 / max(1, figure.num_documents - 1))  # Satterthwaite 1946
    return Error(math.sqrt(total), freedom)


def _finding(figure: Guarded, worsening: float, p: float, significant: bool, family: int) -> Finding:
    error = _error(figure, len(figure.fresh))
    half = _half(error)
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


def _half(error: Error) -> float:
    return float(stats.t.ppf(CONFIDENCE, error.freedom)) * error.size


def _needed(figure: Guarded, worsening: float, family: int) -> str:
    """Return how many seeds or documents would tell, if the worsening stayed what it is."""
    above = worsening > figure.margin

    def told(fresh: int, baseline: int | None, documents: float) -> bool:
        if above:
            return _p(worsening, _error(figure, fresh, honest=True, baseline=baseline)) <= FAMILY_WISE / family
        return worsening + _half(_error(figure, fresh, baseline=baseline, documents=documents)) < figure.margin

    first = len(figure.fresh) + 1
    for fresh in range(first, MAX_SEEDS + 1):
        if told(fresh, None, 1.0):
            return f"{fresh} fresh seeds"
    for both in range(max(first, len(figure.baseline) + 1), MAX_SEEDS + 1):
        if told(both, both, 1.0):
            return f"{both} seeds, fresh and in the baseline"
    for times in (2, 4, 8, 16, 32, MAX_TIMES):
        if not above and told(MAX_SEEDS, MAX_SEEDS, times):
            return f"{times * figure.num_documents} documents, and {MAX_SEEDS} seeds"
    if not above and figure.document_variance:
        return f"more than {MAX_TIMES * figure.num_documents} documents, or the baseline's own"
    return f"more than {MAX_SEEDS} seeds: it lies at the margin"
