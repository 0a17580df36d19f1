"""The rules of the filter stage. Each tells which rows of a batch it rejects, and why."""

import operator
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cfsd.filter.overlap import Grams, Reference
from cfsd.filter.repetition import excess
from cfsd.filter.spec import FilterSpec

Places = NDArray[np.int64]  # rows of a batch


class Rows(NamedTuple):
    """A batch of the corpus, and what is known of each row."""

    batch: pa.RecordBatch
    first: int  # how many rows came before the batch
    counts: NDArray[np.int64]  # sampled tokens
    nats: NDArray[np.float64]  # their summed log-probability

    def means(self) -> NDArray[np.float64]:
        """Return the mean log-probability per sampled token; NaN for a row without, which no bound rejects."""
        means: NDArray[np.float64] = np.full(len(self.nats), np.nan)
        np.divide(self.nats, self.counts, out=means, where=self.counts > 0)
        return means

    def texts(self, left: Places) -> list[str]:
        """Return the texts of the rows at `left`."""
        texts: list[str | None] = self.batch["text"].take(pa.array(left)).to_pylist()
        return [text or "" for text in texts]


class Verdict(NamedTuple):
    """Why one row of a batch is rejected; `detail` is the number or the words that the reason is about."""

    place: int
    reason: str
    detail: str | None = None


Rule = Callable[[Rows, Places], Iterator[Verdict]]  # is asked about the places that no rule before rejected


def measured(batch: pa.RecordBatch, first: int) -> Rows:
    """Return `batch`, before which there were `first` rows, with the sums over each row's log-probabilities."""
    logprobs = batch["logprobs"]
    starts = logprobs.offsets.to_numpy().astype(np.int64)
    is_sampled = logprobs.values.is_valid().to_numpy(zero_copy_only=False)
    sampled_before = np.append(0, np.cumsum(is_sampled))
    # one more value, so that the start of an empty last row is inside
    values = np.append(logprobs.values.fill_null(0).to_numpy(zero_copy_only=False).astype(np.float64), 0)
    # each row is summed by itself: a difference of running sums would depend on the rows before it
    nats = np.where(np.diff(starts) > 0, np.add.reduceat(values, starts[:-1]), 0)
    return Rows(batch, first, np.diff(sampled_before[starts]), nats)


def rules_of(spec: FilterSpec, reference: Reference | None) -> dict[str, Rule]:
    """Return the rules that are on, by field, in the order of `cfsd.filter.stage`; `listed` makes the last one."""

    def counts(rows: Rows) -> NDArray[np.int64]:
        return rows.counts

    low, high = spec.min_mean_logprob, spec.max_mean_logprob
    bounds: list[tuple[str, Callable[[Rows], NDArray[Any]], Callable[[Any, Any], Any], str]] = [
        ("min_tokens", counts, operator.lt, f"fewer than {spec.min_tokens} tokens"),
        ("max_tokens", counts, operator.gt, f"more than {spec.max_tokens} tokens"),
        ("min_mean_logprob", Rows.means, operator.lt, f"mean log-probability below {low} nats"),
        ("max_mean_logprob", Rows.means, operator.gt, f"mean log-probability above {high} nats"),
    ]
    rules: dict[str, Rule] = {}
    for name, values, is_beyond, reason in bounds:
        if (limit := getattr(spec, name)) is not None:
            rules[name] = _bound(values, is_beyond, limit, reason)
    if spec.duplicates:
        rules["duplicates"] = _repeats()
    if spec.repetition:
        rules["repetition"] = _repetition
    if spec.overlap_words is not None:
        assert reference is not None, "overlap_words needs the texts that no row may overlap"
        rules["overlap_words"] = _overlap(reference, spec.overlap_words)
    return rules


def _bound(
    values: Callable[[Rows], NDArray[Any]], is_beyond: Callable[[Any, Any], Any], limit: float, reason: str
) -> Rule:
    def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
        found = values(rows)
        for place in left[is_beyond(found[left], limit)].tolist():
            yield Verdict(place, reason, f"{found[place]:.4g}")

    return rule


def _repeats() -> Rule:
    """Return the rule against rows with the tokens of an earlier row; it remembers about 80 bytes per row."""
    seen: set[bytes] = set()

    def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
        tokens = rows.batch["token_ids"]
        starts = tokens.offsets.to_numpy().astype(np.int64) * tokens.values.type.byte_width
        data = tokens.values.to_numpy().view(np.uint8).data
        for place in left.tolist():
            # 64 bits: among a million rows a false match has odds of 3e-8
            mark = blake2b(data[starts[place] : starts[place + 1]], digest_size=8).digest()
            if mark in seen:
                yield Verdict(place, "duplicate")
            seen.add(mark)

    return rule


def _repetition(rows: Rows, left: Places) -> Iterator[Verdict]:
    for place, text in zip(left.tolist(), rows.texts(left), strict=True):
        if found := excess(text):
            yield Verdict(place, f"{found.name} above {found.limit:g}", f"{found.share:.3f}")


def _overlap(reference: Reference, words: int) -> Rule:
    grams = Grams(reference, words)

    def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
        for place, text in zip(left.tolist(), rows.texts(left), strict=True):
            if found := grams.found(text):
                yield Verdict(place, f"overlaps {found.name}", found.gram)

    return rule


def listed(places: Places, reason: str) -> Rule:
    """Return the rule against the rows at `places`, sorted, of the whole table."""

    def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
        low, high = np.searchsorted(places, [rows.first, rows.first + rows.batch.num_rows])
        for place in np.intersect1d(places[low:high] - rows.first, left).tolist():
            yield Verdict(place, reason)

    return rule
