"""The rules of the filter stage. Each says which rows of a batch it rejects, and why."""

import operator
from collections.abc import Callable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cfsd.filter.overlap import Grams, Reference
from cfsd.filter.repetition import excess
from cfsd.filter.spec import FilterSpec

Places = NDArray[np.int64]  # rows of a batch


class Rows(NamedTuple):
    """A batch of the corpus, and sums over each row."""

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


Rule = Callable[[Rows, Places], Iterator[Verdict]]  # judges the places that no earlier rule rejected
Maker = Callable[[FilterSpec, Reference | None], Rule]


def measured(batch: pa.RecordBatch, first: int) -> Rows:
    """Return `batch`, before which there were `first` rows, with the sums over each row's log-probabilities."""
    row_T, flat = pc.list_parent_indices(batch["logprobs"]).to_numpy(), batch["logprobs"].flatten()
    is_sampled_T = flat.is_valid().to_numpy(zero_copy_only=False)
    counts = np.bincount(row_T[is_sampled_T], minlength=batch.num_rows)
    values_T = flat.fill_null(0).to_numpy(zero_copy_only=False)
    nats = np.bincount(row_T, values_T, batch.num_rows).astype(np.float64)
    return Rows(batch, first, counts, nats)


def _bound(name: str, values: Callable[[Rows], NDArray[Any]], reason: str) -> Maker:
    """Return the maker of the rule that `values` are not beyond the spec's field `name`, a minimum or a maximum."""
    is_beyond = operator.lt if name.startswith("min_") else operator.gt

    def make(spec: FilterSpec, reference: Reference | None) -> Rule:
        limit = getattr(spec, name)

        def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
            values_R = values(rows)
            for place in left[is_beyond(values_R[left], limit)].tolist():
                yield Verdict(place, reason.format(limit), f"{values_R[place]:.4g}")

        return rule

    return make


def _duplicates(spec: FilterSpec, reference: Reference | None) -> Rule:
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


def _by_text(reject: Callable[[str], tuple[str, str] | None]) -> Rule:
    """Return the rule that asks `reject` about each text, which answers with reason and detail, or None."""

    def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
        for place, text in zip(left.tolist(), rows.texts(left), strict=True):
            if rejection := reject(text):
                yield Verdict(place, *rejection)

    return rule


def _repetition(spec: FilterSpec, reference: Reference | None) -> Rule:
    def reject(text: str) -> tuple[str, str] | None:
        measure = excess(text)
        return measure and (f"{measure.name} above {measure.limit:g}", f"{measure.share:.3f}")

    return _by_text(reject)


def _overlap(spec: FilterSpec, reference: Reference | None) -> Rule:
    assert reference is not None and spec.overlap_words, "overlap_words needs the texts that no row may overlap"
    grams = Grams(reference, spec.overlap_words)

    def reject(text: str) -> tuple[str, str] | None:
        overlap = grams.overlap(text)
        return overlap and (f"overlaps {overlap[0]}", overlap[1])

    return _by_text(reject)


COUNTS = operator.attrgetter("counts")
# A rule is one function here and one field of the spec, off by default. Cheap rules come first.
RULES: dict[str, Maker] = {
    "min_tokens": _bound("min_tokens", COUNTS, "fewer than {} tokens"),
    "max_tokens": _bound("max_tokens", COUNTS, "more than {} tokens"),
    "min_mean_logprob": _bound("min_mean_logprob", Rows.means, "mean log-probability below {} nats"),
    "max_mean_logprob": _bound("max_mean_logprob", Rows.means, "mean log-probability above {} nats"),
    "duplicates": _duplicates,
    "repetition": _repetition,
    "overlap_words": _overlap,
}


def rules_of(spec: FilterSpec, reference: Reference | None) -> dict[str, Rule]:
    """Return the rules of `spec` that are on, by field, in the order of `RULES`.

    Near duplicates are not among them: a search over the whole table gives their places to `listed`.
    """
    off = {name: FilterSpec.model_fields[name].default for name in RULES}
    return {name: make(spec, reference) for name, make in RULES.items() if getattr(spec, name) != off[name]}


def listed(places: Places, reason: str) -> Rule:
    """Return the rule against the rows at `places`, sorted, of the whole table."""

    def rule(rows: Rows, left: Places) -> Iterator[Verdict]:
        low, high = np.searchsorted(places, [rows.first, rows.first + rows.batch.num_rows])
        for place in np.intersect1d(places[low:high] - rows.first, left).tolist():
            yield Verdict(place, reason)

    return rule
