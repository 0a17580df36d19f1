"""Scores before, scores after -> what was forgotten, with intervals. Numbers in, numbers out.

Sign: positive forgetting is always worse, positive gain always better.
"""

from collections.abc import Iterable
from typing import Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from cfsd.intervals import (
    Floats,
    Interval,
    bootstrap_change,
    bootstrap_ratio,
    detectable_share,
    interval_of_mean,
    is_above,
    mcnemar_p,
    paired_share_bounds,
    reach_of,
    sign_flip_p,
)

NATS = "nats/token"
FRACTION = "fraction"
KEY = ["filter", "doc_id"]
COLUMNS = [*KEY, "doc_hash", "value", "count"]


class Figure(BaseModel):
    """A value with its 95 % interval; both ends are None where no interval is known."""

    model_config = ConfigDict(frozen=True)

    value: FiniteFloat
    low: FiniteFloat | None
    high: FiniteFloat | None
    unit: str

    def scaled(self, factor: float, unit: str) -> "Figure":
        """Return the figure times a positive `factor`, in `unit`."""
        low, high = (None if end is None else end * factor for end in (self.low, self.high))
        return Figure(value=self.value * factor, low=low, high=high, unit=unit)


class Measure(BaseModel):
    """What is known of one benchmark's metric.

    `chance` is the score of guessing, in [0, 1). `binary`: every document scores 0 or 1; `mean`: a number
    per document, averaged; `perplexity`: a summed negative log-likelihood in nats and a count of tokens.
    """

    model_config = ConfigDict(frozen=True)

    metric: str
    higher_is_better: bool
    chance: float | None = Field(ge=0, lt=1)
    kind: Literal["binary", "mean", "perplexity"]

    @model_validator(mode="after")
    def _perplexity_is_a_loss(self) -> Self:
        if self.kind == "perplexity" and (self.higher_is_better or self.chance is not None):
            raise ValueError(f"{self.metric}: a perplexity is better when lower and has no chance level")
        return self


class BenchmarkForgetting(BaseModel):
    """What one benchmark says; `base`, `tuned`, `forgetting` in its own unit (perplexities: nats per token).

    `p_value`: exact McNemar test for 0/1 scores, otherwise the paired permutation test over documents; it
    may disagree with the interval near 0.05, McNemar's test being the more cautious of the two.
    `detectable`: smallest drop found with 80 % power at 5 %; above 1 where no drop would be.
    """

    model_config = ConfigDict(frozen=True)

    benchmark: str
    metric: str
    num_documents: int
    base: FiniteFloat
    tuned: FiniteFloat
    forgetting: Figure
    chance_corrected: Figure | None
    retention: float | None
    retention_note: str
    right_to_wrong: float | None
    wrong_to_right: float | None
    p_value: float | None
    detectable: float | None


def benchmark_forgetting(
    name: str, measure: Measure, before: pd.DataFrame, after: pd.DataFrame, *, seed: int = 0
) -> BenchmarkForgetting:
    """Return what `after` lost against `before` on the same documents.

    One row per document: `doc_id`, `filter`, `doc_hash`, `value`, `count` (tokens for a perplexity, else 1).
    The result does not depend on the order of the rows, and is fixed by `seed`.

    Raises:
        ValueError: documents unpaired, repeated or different, values not finite or not of the measure's
            kind, several filters at once; the message names the benchmark and the documents.
    """
    try:
        pairs = paired_by_document(before, after)
        _check_kind(pairs, measure)
    except ValueError as error:
        raise ValueError(f"benchmark {name}: {error}") from error
    base, tuned, counts = (pairs[column].to_numpy() for column in ("base", "tuned", "count"))
    worse = base - tuned if measure.higher_is_better else tuned - base
    up, down = int(np.count_nonzero(worse > 0)), int(np.count_nonzero(worse < 0))
    binary, total = measure.kind == "binary", len(pairs)
    forgetting = _forgetting(measure, base, tuned, worse, counts, seed)
    corrected = _chance_corrected(measure, forgetting, base, tuned)
    retention, note = _retention(measure, base, tuned)
    return BenchmarkForgetting(
        benchmark=name,
        metric=measure.metric,
        num_documents=total,
        base=base.sum() / counts.sum(),
        tuned=tuned.sum() / counts.sum(),
        forgetting=forgetting,
        chance_corrected=corrected,
        retention=retention,
        retention_note=note,
        right_to_wrong=up / total if binary else None,
        wrong_to_right=down / total if binary else None,
        p_value=mcnemar_p(up, down) if binary else sign_flip_p(worse, seed=seed),
        detectable=detectable_share((up + down) / total, total) if binary else None,
    )


def _forgetting(measure: Measure, base: Floats, tuned: Floats, worse: Floats, counts: Floats, seed: int) -> Figure:
    if measure.kind == "perplexity":
        return _per_token(worse, counts, seed)
    unit = FRACTION if measure.kind == "binary" else measure.metric
    if _all_zero_or_one(base) and _all_zero_or_one(tuned):
        return _share_difference(worse > 0, worse < 0, unit)
    interval = bootstrap_change(worse, reach=reach_of([base, tuned]), seed=seed)
    return _figure(worse.sum() / len(worse), interval, unit)


def _chance_corrected(measure: Measure, forgetting: Figure, base: Floats, tuned: Floats) -> Figure | None:
    if measure.chance is None or not _is_score(measure, base, tuned):
        return None
    return forgetting.scaled(1 / (1 - measure.chance), FRACTION)


def _retention(measure: Measure, base: Floats, tuned: Floats) -> tuple[float | None, str]:
    """Return tuned/base, both less chance, or None and the reason why there is none."""
    if not _is_score(measure, base, tuned):
        return None, "not a score from 0 to 1"
    if measure.chance is None:
        return None, "chance level unknown"
    if not is_above(base, measure.chance, binary=_all_zero_or_one(base)):
        return None, "base at chance"
    return float((tuned.mean() - measure.chance) / (base.mean() - measure.chance)), ""


def _is_score(measure: Measure, base: Floats, tuned: Floats) -> bool:
    within = all(values.min() >= 0 and values.max() <= 1 for values in (base, tuned))
    return measure.kind != "perplexity" and measure.higher_is_better and within


def mean_forgetting(forgotten: Iterable[BenchmarkForgetting]) -> Figure | None:
    """Return the mean of the chance-corrected differences as a fraction: 0.05 is 5 points worse.

    Benchmarks without a chance-corrected figure are left out; None if none has one. The interval takes the
    benchmarks as independent samples of documents and as the only ones of interest (it does not speak for
    benchmarks not run): `cfsd.intervals.interval_of_mean`. No interval where one of them has none.

    Raises:
        ValueError: a benchmark comes twice, whose figures would share their documents.
    """
    figures: dict[str, Figure] = {}
    for entry in forgotten:
        if entry.chance_corrected is None:
            continue
        if entry.benchmark in figures:
            raise ValueError(f"benchmark {entry.benchmark} comes twice; give one metric and filter of each")
        figures[entry.benchmark] = entry.chance_corrected
    if not figures:
        return None
    values = np.array([figure.value for figure in figures.values()])
    ends = [(figure.low, figure.high) for figure in figures.values()]
    known = all(low is not None for low, _ in ends)
    interval = interval_of_mean(values, *np.array(ends, dtype=np.float64).T) if known else None
    return _figure(values.mean(), interval, FRACTION)


def paired_by_document(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """Return one row per document, sorted: `filter`, `doc_id`, `doc_hash`, `count`, `base`, `tuned`.

    Raises:
        ValueError: columns missing, no rows, a document repeated, on one side only, or with another hash or
            count on either side, a value that is not finite; the message names the documents.
    """
    sides = [_checked(side, frame) for side, frame in (("base", before), ("tuned", after))]
    joined = sides[0].merge(sides[1], on=KEY, how="outer", suffixes=("_base", "_tuned"), indicator=True)
    for side, only in (("base", "left_only"), ("tuned", "right_only")):
        _refuse(joined, joined["_merge"] == only, f"scored for the {side} model only; score both on the same")
    changed = joined["doc_hash_base"] != joined["doc_hash_tuned"]
    _refuse(joined, changed, "different in text (doc_hash) for base and tuned; score both on the same data")
    recounted = joined["count_base"] != joined["count_tuned"]
    _refuse(joined, recounted, "of different count for base and tuned; their figures have different units")
    names = {"doc_hash_base": "doc_hash", "count_base": "count", "value_base": "base", "value_tuned": "tuned"}
    joined = joined.rename(columns=names)[[*KEY, "doc_hash", "count", "base", "tuned"]]
    return joined.sort_values(KEY, ignore_index=True)


def _checked(side: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return the columns needed, numbers as floats."""
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing or frame.empty:
        lack = f"no column {', '.join(missing)}" if missing else "no documents"
        raise ValueError(f"the scores of the {side} model have {lack}; one row per document is needed")
    _refuse(frame, frame.duplicated(KEY), f"more than once among the scores of the {side} model")
    kept = frame[COLUMNS].copy()
    for column in ("value", "count"):
        numbers = pd.to_numeric(frame[column], errors="coerce").to_numpy(np.float64, na_value=np.nan)
        _refuse(frame, ~np.isfinite(numbers), f"with a {column} that is not a finite number ({side} model)")
        kept[column] = numbers
    return kept


def _check_kind(pairs: pd.DataFrame, measure: Measure) -> None:
    filters = sorted(pairs["filter"].unique())
    if len(filters) > 1:
        raise ValueError(f"scores of several filters ({', '.join(map(str, filters))}); give those of one")
    counts, sums = pairs["count"].to_numpy(), pairs[["base", "tuned"]].to_numpy()
    if measure.kind == "perplexity":
        tokenless = (counts < 0) | ((counts == 0) & (sums != 0).any(axis=1)) | (counts.sum() == 0)
        _refuse(pairs, tokenless, "without a positive count of tokens")
        return
    _refuse(pairs, counts != 1, "with a count other than 1, which only a perplexity may have")
    if measure.kind == "binary":
        between = ((sums != 0) & (sums != 1)).any(axis=1)
        _refuse(pairs, between, f"whose {measure.metric} is neither 0 nor 1; its kind is mean, not binary")


def _refuse(frame: pd.DataFrame, bad: ArrayLike, reason: str) -> None:
    """Raise if any row is `bad`, naming the first five."""
    rows = frame.loc[np.asarray(bad, dtype=bool), KEY]
    if rows.empty:
        return
    named = ", ".join(f"{doc_id} ({filter_})" for filter_, doc_id in rows.head(5).itertuples(index=False))
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    raise ValueError(f"{len(rows)} of {len(frame)} documents {reason}: {named}{more}")


def mean_per_token(sums: ArrayLike, counts: ArrayLike, *, seed: int) -> Figure:
    """Return sum(sums)/sum(counts) in nats per token, with a bootstrap over rows (one row per sequence).

    For `probe_kl` and losses. Rows without tokens add nothing. No interval below 5 rows.

    Raises:
        ValueError: shapes differ, no tokens at all, a number that is not finite, a sum without tokens.
    """
    return _per_token(np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64), seed)


def difference_per_token(base_sums: ArrayLike, tuned_sums: ArrayLike, counts: ArrayLike, *, seed: int) -> Figure:
    """Return (sum(base_sums) - sum(tuned_sums))/sum(counts): target gain, nats per token, positive = learned.

    A paired bootstrap over rows: the same row holds the same tokens for both models. Raises as
    `mean_per_token` does.
    """
    base, tuned = np.asarray(base_sums, dtype=np.float64), np.asarray(tuned_sums, dtype=np.float64)
    if base.shape != tuned.shape:
        raise ValueError(f"rows of base {base.shape} and tuned {tuned.shape} differ; give the same rows")
    return _per_token(base - tuned, np.asarray(counts, dtype=np.float64), seed)


def _per_token(sums: Floats, counts: Floats, seed: int) -> Figure:
    if sums.shape != counts.shape or sums.ndim != 1:
        raise ValueError(f"sums {sums.shape} and counts {counts.shape} must be of one dimension and equal")
    bad = ~np.isfinite(sums) | ~np.isfinite(counts) | (counts < 0) | ((counts == 0) & (sums != 0))
    if bad.any():
        rows = ", ".join(map(str, np.flatnonzero(bad)[:5]))
        raise ValueError(f"{bad.sum()} rows (first: {rows}) are not finite or have a sum but no tokens")
    if counts.sum() == 0:
        raise ValueError("no row has any tokens; nothing can be measured per token")
    sums, counts = sums[counts > 0], counts[counts > 0]
    return _figure(sums.sum() / counts.sum(), bootstrap_ratio(sums, counts, seed=seed), NATS)


def paired_share_difference(base: ArrayLike, tuned: ArrayLike) -> Figure:
    """Return the share of True in `tuned` less that in `base`, on the same documents: positive = more.

    So it is `target_accuracy_gain` as it stands. Interval: `cfsd.intervals.paired_share_bounds`.

    Raises:
        ValueError: shapes differ, no documents, values other than 0 and 1.
    """
    before, after = np.asarray(base, dtype=np.float64), np.asarray(tuned, dtype=np.float64)
    if before.shape != after.shape or before.ndim != 1 or not len(before):
        raise ValueError(f"base {before.shape} and tuned {after.shape} must be the same documents, 1 or more")
    if not (_all_zero_or_one(before) and _all_zero_or_one(after)):
        raise ValueError("values other than 0 and 1 in base or tuned; shares are of documents right or wrong")
    return _share_difference(after > before, after < before, FRACTION)


def _share_difference(up: NDArray[np.bool_], down: NDArray[np.bool_], unit: str) -> Figure:
    ups, downs, total = int(up.sum()), int(down.sum()), len(up)
    low, high = paired_share_bounds(ups, downs, total)
    return _figure((ups - downs) / total, Interval(float(low), float(high)), unit)


def _figure(value: float, interval: Interval | None, unit: str) -> Figure:
    """Return the figure; a shrunken interval is stretched to hold its own estimate."""
    value = float(value) + 0.0  # -0.0 would be printed with its sign
    if interval is None:
        return Figure(value=value, low=None, high=None, unit=unit)
    return Figure(value=value, low=min(interval.low, value), high=max(interval.high, value), unit=unit)


def _all_zero_or_one(values: Floats) -> bool:
    return bool(((values == 0) | (values == 1)).all())
