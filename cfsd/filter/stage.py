"""Stage filter: accept or reject each row, with a reason.

Off by default: rejecting rows biases the estimate of the divergence, and the metadata say by how much.

A row gets the reason of the first rule that rejects it, in the order of `cfsd.filter.rules.RULES` and then
near_duplicates. So a copy counts as an exact duplicate, not as a near one, and a row is compared only with rows that
passed the rules before.
"""

import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cfsd.filter.near_duplicates import duplicates_of
from cfsd.filter.overlap import Reference, count_short, least_words
from cfsd.filter.rules import Rows, Rule, Verdict, listed, measured, rules_of
from cfsd.filter.spec import FilterSpec
from cfsd.store.artifact import Draft
from cfsd.store.tables import REJECTS, TableWriter, shards

PASSED = ".passed"  # in the draft: rows that passed every rule but near_duplicates
SCRATCH = ".scratch"
READ_BYTES, READ_ROWS = 32 << 20, 4096  # one batch at most, about


@dataclass
class Sums:
    """Sums over rows, for the metadata."""

    rows: int = 0
    tokens: int = 0
    nats: float = 0.0

    def add(self, counts: NDArray[np.int64], nats: NDArray[np.float64]) -> None:
        """Count more rows."""
        self.rows += len(counts)
        self.tokens += int(counts.sum())
        self.nats = float(np.add.accumulate(np.append(self.nats, nats))[-1])  # row by row: equal for any batches


@dataclass
class Outcome:
    """Counts of the rows that were judged."""

    judged: Sums = field(default_factory=Sums)
    filtered: Sums = field(default_factory=Sums)  # accepted by every rule
    reasons: Counter[str] = field(default_factory=Counter)
    accepted: dict[str, float] = field(default_factory=dict)  # by rule: the fraction of the rows that it judged


def filter_rows(corpus: Path, spec: FilterSpec, draft: Draft, reference: Reference | None = None) -> None:
    """Write the accepted rows of `corpus` as a `corpus` table and the others, with reasons, as `rejects`.

    All columns stay. `reference`, needed with `overlap_words`, holds the texts that no row may overlap.
    A million rows of 128 tokens take about 120 MB more than a thousand. After an interruption it starts anew.
    """
    _clear(draft.folder)
    rules = rules_of(spec, reference)
    if not rules and spec.near_duplicates is None:
        outcomes = [_copy(corpus, draft)]
    else:
        outcomes = list(_judge(corpus, rules, spec.near_duplicates, draft))
    _clear_scratch(draft.folder)
    draft.metadata |= _metadata(outcomes) | _said(spec, reference)


def _clear(folder: Path) -> None:
    _clear_scratch(folder)
    for path in (*shards(folder, "corpus"), *shards(folder, "rejects")):
        path.unlink()


def _clear_scratch(folder: Path) -> None:
    for name in (PASSED, SCRATCH):
        shutil.rmtree(folder / name, ignore_errors=True)


def _copy(corpus: Path, draft: Draft) -> Outcome:
    """Copy the shards as they are; only log-probabilities are read, for the metadata."""
    for path in shards(corpus, "corpus"):
        shutil.copyfile(path, draft.folder / path.name)
    sums = Sums()
    for rows in _read(corpus, draft, ["logprobs"]):
        sums.add(rows.counts, rows.nats)
    return Outcome(judged=sums, filtered=sums)


def _judge(corpus: Path, rules: Mapping[str, Rule], near: float | None, draft: Draft) -> Iterator[Outcome]:
    """Write the tables; near duplicates are sought among the rows that pass all `rules`."""
    rejects = TableWriter(draft.folder, "rejects")
    if rules:
        passed = draft.folder / PASSED if near is not None else draft.folder
        yield _part(_read(corpus, draft), rules, TableWriter(passed, "corpus"), rejects)
        corpus = passed
    if near is not None:
        progress = partial(draft.journal.progress, unit="rows searched for near duplicates")
        places = duplicates_of(corpus, near, draft.folder / SCRATCH, progress)
        near_rule = {"near_duplicates": listed(places, "near duplicate")}
        accepted = TableWriter(draft.folder, "corpus")
        yield _part(_read(corpus, draft), near_rule, accepted, rejects)
    rejects.close()


def _part(batches: Iterable[Rows], rules: Mapping[str, Rule], accepted: TableWriter, rejects: TableWriter) -> Outcome:
    """Ask the rules about every row, and write each row where it belongs."""
    outcome = Outcome()
    asked: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for rows in batches:
        left = np.arange(rows.batch.num_rows)
        verdicts: list[Verdict] = []
        for name, rule in rules.items():
            rejected = list(rule(rows, left))
            asked[name] += len(left)
            left = np.setdiff1d(left, [verdict.place for verdict in rejected], assume_unique=True)
            passed[name] += len(left)
            verdicts += rejected
        outcome.judged.add(rows.counts, rows.nats)
        outcome.filtered.add(rows.counts[left], rows.nats[left])
        outcome.reasons.update(verdict.reason for verdict in verdicts)
        accepted.add(rows.batch.take(pa.array(left)) if verdicts else rows.batch)
        if verdicts:
            rejects.add(_rejected(rows.batch, sorted(verdicts)))
    accepted.close()
    outcome.accepted = {name: passed[name] / asked[name] for name in rules if asked[name]}
    return outcome


def _rejected(batch: pa.RecordBatch, verdicts: list[Verdict]) -> pa.RecordBatch:
    rows = batch.take(pa.array([verdict.place for verdict in verdicts], pa.int64()))
    reasons = {name: pa.array([getattr(v, name) for v in verdicts], pa.string()) for name in ("reason", "detail")}
    columns = [reasons[name] if name in reasons else rows[name] for name in REJECTS.names]
    return pa.RecordBatch.from_arrays(columns, schema=REJECTS)


def _metadata(outcomes: list[Outcome]) -> dict[str, Any]:
    before, after = outcomes[0].judged, outcomes[-1].filtered
    metadata: dict[str, Any] = {"rows": after.rows, "tokens": after.tokens, "rejected": {}, "accepted_by_rule": {}}
    for outcome in outcomes:
        metadata["rejected"] |= outcome.reasons
        metadata["accepted_by_rule"] |= outcome.accepted
    if before.rows:
        metadata["accepted_fraction"] = after.rows / before.rows
    if after.tokens:
        mean = after.nats / after.tokens
        metadata |= {"mean_logprob": mean, "mean_logprob_shift": mean - before.nats / before.tokens}
    return metadata


def _said(spec: FilterSpec, reference: Reference | None) -> dict[str, Any]:
    """Return what was not compared with `reference`."""
    if reference is None or spec.overlap_words is None or not (short := count_short(reference, spec.overlap_words)):
        return {}
    least = least_words(spec.overlap_words)
    return {"said": [f"held-back texts of fewer than {least} words, which no row was compared with: {short:,}"]}


def _read(corpus: Path, draft: Draft, columns: list[str] | None = None) -> Iterator[Rows]:
    """Yield the table in batches of bounded size, and report the progress."""
    footers = [pq.read_metadata(path) for path in shards(corpus, "corpus")]
    total = sum(footer.num_rows for footer in footers)
    size = sum(footer.row_group(i).total_byte_size for footer in footers for i in range(footer.num_row_groups))
    max_rows = max(1, min(READ_ROWS, READ_BYTES * max(total, 1) // max(size, 1)))
    done = reported = 0
    for path in shards(corpus, "corpus"):
        for batch in pq.ParquetFile(path).iter_batches(batch_size=max_rows, columns=columns):
            yield measured(batch, done)
            done += batch.num_rows
            if done - reported >= max_rows or done == total:  # a file is synced each time
                draft.journal.progress(done, total, "rows")
                reported = done
