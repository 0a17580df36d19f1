"""How much a model forgot of a benchmark, with intervals, from its scores before and after.

Sign: positive forgetting is always worse, positive gain always better.
"""

from collections.abc import Iterable
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from cfsd.statistics.figures import (
    FRACTION,
    Figure,
    all_zero_or_one,
    exponential,
    figure_of,
    mean_of,
    mean_per_token,
    share_difference,
)
from cfsd.statistics.intervals import Floats, bootstrap_change, is_above, mcnemar_p, mean_change_p
from cfsd.statistics.pairing import paired_by_document, refuse
from cfsd.statistics.power import detectable_change, detectable_share
from cfsd.statistics.retention import retention_of
from cfsd.statistics.units import Units

WALD = "adjusted Wald interval for paired shares (Bonett and Price)"
BOOTSTRAP = "studentised bootstrap over paired documents"
TOO_FEW = "none: fewer than 5 documents, a few that hold most tokens, or a metric that cannot change"
MCNEMAR = "exact McNemar"
PERMUTATION = "paired permutation"
NO_SCORE = "not a score from 0 to 1"


class Measure(BaseModel):
    """The metric of one benchmark.

    `chance` is the score of guessing, in [0, 1). `binary`: every document scores 0 or 1; `mean`: a number
    per document, averaged; `perplexity`: a summed negative log-likelihood in nats and a count of tokens, or of
    what `per` names: a log of lm-eval's counts words or bytes, or nothing, which is per document.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    higher_is_better: bool
    chance: float | None = Field(ge=0, lt=1)
    kind: Literal["binary", "mean", "perplexity"]
    per: str = "token"
    left_out: int | None = None  # documents without a value, of a metric that need not apply to an answer; None: of all

    def paired(self, before: pd.DataFrame, after: pd.DataFrame) -> tuple[Self, pd.DataFrame]:
        """Return the scores of both models paired, and the measure with the kind that holds for both.

        A metric that gave one model 0 and 1 alone may give the other a share.

        Raises: ValueError naming the documents, as `paired_by_document`, and for several filters or impossible counts.
        """
        pairs = paired_by_document(before, after, common=self.left_out is not None)
        _check_pairs(pairs, self)
        between = self.kind == "binary" and not pairs[["base", "tuned"]].isin([0.0, 1.0]).to_numpy().all()
        return self.model_copy(update={"kind": "mean"} if between else {}), pairs

    @model_validator(mode="after")
    def _perplexity_is_a_loss(self) -> Self:
        if self.kind == "perplexity" and (self.higher_is_better or self.chance is not None):
            raise ValueError(f"{self.metric}: a perplexity is better when lower and has no chance level")
        return self


class BenchmarkForgetting(BaseModel):
    """Forgetting on one benchmark; `base`, `tuned`, `forgetting` in its own unit (perplexities: see `Measure.per`).

    `p_value`: exact McNemar test for 0/1 scores, otherwise the paired permutation test over documents (below its
    resolution of 1/5000 a t test: `cfsd.statistics.intervals.mean_change_p`). Near 0.05 it
    may disagree with the interval, since McNemar's test is the more cautious of the two.
    `detectable`: smallest worsening that is detected with 80 % power at 5 %, of all benchmarks together after
    `controlled`, in the benchmark's unit; above 1 where no drop of a share is; None without an interval, or with one of
    width 0.
    `q_value`: `p_value` after the false-discovery control of `cfsd.statistics.discoveries.controlled`, None before it.
    `retention`: tuned/base, both less chance, as a fraction; None where the base is not above chance, or for the reason
    that `retention_note` gives.
    `perplexity_factor`: tuned perplexity / base perplexity, the exponential of `forgetting`.
    `interval_method`, `test`: the methods of `forgetting`'s interval and of `p_value`.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str
    metric: str
    higher_is_better: bool = True
    num_documents: int
    base: FiniteFloat
    tuned: FiniteFloat
    forgetting: Figure
    chance_corrected: Figure | None
    retention: Figure | None
    retention_note: str
    right_to_wrong: float | None = None
    wrong_to_right: float | None = None
    p_value: float | None
    detectable: float | None
    q_value: float | None = None
    perplexity_factor: Figure | None = None
    interval_method: str = ""
    test: str = ""


def benchmark_forgetting(
    name: str, measure: Measure, before: pd.DataFrame, after: pd.DataFrame, *, seed: int = 0
) -> BenchmarkForgetting:
    """Return the forgetting from `before` to `after`, on the same documents.

    One row per document: `doc_id`, `filter`, `doc_hash`, `value`, `count` (tokens for a perplexity, else 1).
    The result does not depend on the order of the rows, and is fixed by `seed`.

    Raises: ValueError naming benchmark and documents: unpaired, repeated or different ones, values not finite, several
        filters at once.
    """
    try:
        measure, pairs = measure.paired(before, after)
    except ValueError as error:
        raise ValueError(f"benchmark {name}: {error}") from error
    base, tuned, counts = (pairs[column].to_numpy() for column in ("base", "tuned", "count"))
    worse = worsening(measure, base, tuned)
    forgetting, method = _forgetting(measure, base, tuned, counts, seed)
    retention, note = _retention(measure, base, tuned)
    correction = chance_correction(measure, base, tuned)
    return BenchmarkForgetting(
        benchmark=name,
        metric=measure.metric,
        higher_is_better=measure.higher_is_better,
        num_documents=len(pairs),
        base=base.sum() / counts.sum(),
        tuned=tuned.sum() / counts.sum(),
        forgetting=forgetting,
        chance_corrected=None if correction is None else forgetting.scaled(correction, FRACTION),
        retention=retention,
        retention_note=note,
        perplexity_factor=exponential(forgetting) if measure.kind == "perplexity" else None,
        interval_method=method,
        **_tested(measure, worse, counts, reach_of(measure, base, tuned), forgetting, seed),
    )


def benchmark_units(name: str, measure: Measure, before: pd.DataFrame, after: pd.DataFrame) -> Units:
    """Return a benchmark's forgetting document by document; for arguments and errors see `benchmark_forgetting`."""
    measure, pairs = measure.paired(before, after)
    base, tuned, counts = (pairs[column].to_numpy() for column in ("base", "tuned", "count"))
    documents = pairs[["filter", "doc_id", "doc_hash"]].astype(str).itertuples(index=False)
    names = tuple(":".join((name, *document)) for document in documents)
    reach = reach_of(measure, base, tuned)
    return Units(
        names, worsening(measure, base, tuned), counts, _unit(measure), reach, part_of=name, metric=measure.metric
    )


def chance_corrected_units(name: str, measure: Measure, before: pd.DataFrame, after: pd.DataFrame) -> Units | None:
    """Return the same as a part of mean forgetting; None where the benchmark does not count for it."""
    units, (measure, pairs) = benchmark_units(name, measure, before, after), measure.paired(before, after)
    correction = chance_correction(measure, *(pairs[side].to_numpy() for side in ("base", "tuned")))
    return None if correction is None else units._replace(unit=FRACTION, scale=correction)


def reach_of(measure: Measure, base: Floats, tuned: Floats) -> float | None:
    """Return the largest possible change of a document: of scores beyond 1 the largest seen; None of a perplexity."""
    return None if measure.kind == "perplexity" else _reach(base, tuned)


def worsening(measure: Measure, base: Floats, tuned: Floats) -> Floats:
    """Return by how much each document's score became worse: positive is worse."""
    return base - tuned if measure.higher_is_better else tuned - base


def chance_correction(measure: Measure, base: Floats, tuned: Floats) -> float | None:
    """Return 1/(1 - chance), by which a loss is multiplied for the mean over benchmarks.

    None where chance is not known or the scores are not from 0 to 1; such a benchmark does not count for the mean.
    """
    if measure.chance is None or not _is_score(measure, base, tuned):
        return None
    return 1 / (1 - measure.chance)


def _tested(
    measure: Measure, worse: Floats, counts: Floats, reach: float | None, forgetting: Figure, seed: int
) -> dict[str, Any]:
    if measure.kind != "binary":
        p, detectable = mean_change_p(worse, counts, reach, seed=seed), detectable_change(forgetting)
        return {"p_value": p, "detectable": detectable, "test": PERMUTATION}
    lost, gained, total = int((worse > 0).sum()), int((worse < 0).sum()), len(worse)
    return {
        "right_to_wrong": lost / total,
        "wrong_to_right": gained / total,
        "p_value": mcnemar_p(lost, gained),
        "detectable": detectable_share((lost + gained) / total, total),
        "test": MCNEMAR,
    }


def _forgetting(measure: Measure, base: Floats, tuned: Floats, counts: Floats, seed: int) -> tuple[Figure, str]:
    """Return the figure and the method of its interval."""
    unit, worse = _unit(measure), worsening(measure, base, tuned)
    if measure.kind == "perplexity":
        figure = mean_per_token(worse, counts, seed=seed).scaled(1, unit)
    elif all_zero_or_one(base) and all_zero_or_one(tuned):
        return share_difference(worse > 0, worse < 0, unit), WALD
    else:
        interval = bootstrap_change(worse, reach=_reach(base, tuned), seed=seed)
        figure = figure_of(worse.sum() / len(worse), interval, unit)
    return figure, TOO_FEW if figure.low is None else BOOTSTRAP


def _unit(measure: Measure) -> str:
    return {"binary": FRACTION, "perplexity": f"nats/{measure.per}"}.get(measure.kind, measure.metric)


def _reach(base: Floats, tuned: Floats) -> float:
    """Return the largest possible change."""
    return 1.0 if _are_scores(base, tuned) else float(np.ptp([base, tuned]))


def _retention(measure: Measure, base: Floats, tuned: Floats) -> tuple[Figure | None, str]:
    """Return tuned/base, both less chance, or None and the reason why there is none."""
    if not measure.higher_is_better:
        return None, "better when lower"
    if not _is_score(measure, base, tuned):
        return None, NO_SCORE
    if measure.chance is None:
        return None, "chance level unknown"
    if not is_above(base, measure.chance, binary=all_zero_or_one(base)):
        return None, "base at chance"
    return retention_of(base, tuned, measure.chance), ""


def _is_score(measure: Measure, base: Floats, tuned: Floats) -> bool:
    return measure.higher_is_better and _are_scores(base, tuned)  # a perplexity is better when lower


def _are_scores(*values: Floats) -> bool:
    return bool(np.min(values) >= 0 and np.max(values) <= 1)


def mean_forgetting(forgotten: Iterable[BenchmarkForgetting]) -> Figure | None:
    """Return the mean of the chance-corrected differences as a fraction: 0.05 is 5 points worse.

    Benchmarks without a chance-corrected figure are left out; None if none has one. The interval takes the
    benchmarks as independent samples of documents, and holds for these benchmarks only. No interval where one of
    them has none.

    Raises: ValueError for a benchmark that comes twice, since its figures would share their documents.
    """
    corrected = [(entry.benchmark, entry.chance_corrected) for entry in forgotten if entry.chance_corrected]
    names = [name for name, _ in corrected]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"benchmark {twice} comes twice; give one metric and filter of each")
    return mean_of([figure for _, figure in corrected], FRACTION) if corrected else None


def _check_pairs(pairs: pd.DataFrame, measure: Measure) -> None:
    filters = sorted(pairs["filter"].unique())
    if len(filters) > 1:
        raise ValueError(f"scores of several filters ({', '.join(map(str, filters))}); give those of one")
    counts, sums = pairs["count"].to_numpy(), pairs[["base", "tuned"]].to_numpy()
    if measure.kind == "perplexity":
        tokenless = (counts < 0) | ((counts == 0) & (sums != 0).any(axis=1)) | (counts.sum() == 0)
        refuse(pairs, tokenless, "without a positive count of tokens")
        return
    refuse(pairs, counts != 1, "with a count other than 1, which only a perplexity may have")
