"""One pass over a corpus table, a record batch at a time: what is counted of every row, and of rows evenly spread.

What grows with the table is 8 bytes per row. T tokens, R rows of a batch.
"""

from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cfsd.data.ngrams import PAIR_ORDER, Hashes, Ints, Rows, ngrams, repetition, spread
from cfsd.store.tables import batches, shards

ORDERS = (1, 2, 3, 4)
COLUMNS = ["source", "token_ids", "logprobs", "finish_reason"]
Floats = NDArray[np.float32]


class Inventory(NamedTuple):
    """What the footers of a table's shards say, without reading a row."""

    rows: int
    tokens: int  # given ones included
    top_k: int  # log-probabilities stored per token; 0: none. The most of any shard, as sources may differ
    bytes_of: dict[str, int]  # per column, as compressed on the disk


def inventory(folder: Path) -> Inventory:
    """Return the size of the corpus table in `folder`."""
    rows = tokens = top_k = 0
    bytes_of: Counter[str] = Counter()
    for path in shards(folder, "corpus"):
        footer = pq.ParquetFile(path).metadata
        rows += footer.num_rows
        for group in (footer.row_group(index) for index in range(footer.num_row_groups)):
            columns = {c.path_in_schema.split(".")[0]: c for c in map(group.column, range(group.num_columns))}
            values = {name: column.num_values for name, column in columns.items()}  # a list counts by its items
            bytes_of.update({name: column.total_compressed_size for name, column in columns.items()})
            tokens += values.get("token_ids", 0)
            top_k = max(top_k, round(values.get("topk_ids", 0) / max(1, values.get("token_ids", 0))))
    return Inventory(rows, tokens, top_k, dict(bytes_of))


class Fractions(NamedTuple):
    """Which part of the rows each figure of n-grams is computed on; 1 or more: all."""

    distinct: float
    repetition: float
    pairs: float


class Measured:
    """What was counted; `add` takes one more batch."""

    def __init__(self, fractions: Fractions) -> None:
        """Start with nothing counted."""
        self.fractions = fractions
        self.rows = self.tokens = self.given = self.ngram_tokens = 0
        self.nats = 0.0
        self.has_logprobs = False
        self.sources: Counter[str] = Counter()  # sampled tokens
        self.finish_reasons: Counter[str] = Counter()
        self.first_tokens: dict[int, list[float]] = {}  # token -> rows that begin with it, their summed probability
        self.repetition: list[float] = []  # per row that was looked at
        self.places: list[int] = []  # of the rows whose n-grams are in `sets`
        self.sets: list[Hashes] = []
        self._lengths: list[Ints] = []
        self._means: list[Floats] = []
        self._hashes: dict[int, list[Hashes]] = defaultdict(list)

    def add(self, batch: pa.RecordBatch) -> None:
        """Count one more batch of rows."""
        rows, logprobs_T = _rows_of(batch)
        count = batch.num_rows
        length_R = np.bincount(rows.row_T[rows.sampled_T], minlength=count)
        self._add_logprobs(rows, logprobs_T, length_R)
        self._add_first_tokens(rows, logprobs_T)
        if "source" in batch.schema.names:
            for source, length in zip(batch.column("source").to_pylist(), length_R.tolist(), strict=True):
                self.sources[source or "unknown"] += length
        if "finish_reason" in batch.schema.names:
            self.finish_reasons.update(reason or "unknown" for reason in batch.column("finish_reason").to_pylist())
        self._add_distinct(rows.of(spread(self.rows, count, self.fractions.distinct)))
        self.repetition += repetition(ngrams(rows.of(spread(self.rows, count, self.fractions.repetition)), PAIR_ORDER))
        self._add_pairs(rows, spread(self.rows, count, self.fractions.pairs))
        self.rows += count
        self.tokens += int(length_R.sum())
        self.given += len(rows.ids_T) - int(length_R.sum())
        self._lengths.append(length_R.astype(np.int32))

    def _add_logprobs(self, rows: Rows, logprobs_T: Floats | None, length_R: Ints) -> None:
        if logprobs_T is None:
            self._means.append(np.full(len(length_R), np.nan, np.float32))
            return
        self.has_logprobs = True
        there = rows.sampled_T
        nats_R = np.bincount(rows.row_T[there], logprobs_T[there].astype(np.float64), minlength=len(length_R))
        self.nats += float(nats_R.sum())
        mean_R = np.where(length_R > 0, nats_R / np.maximum(length_R, 1), np.nan)
        self._means.append(mean_R.astype(np.float32))

    def _add_first_tokens(self, rows: Rows, logprobs_T: Floats | None) -> None:
        place_T = np.flatnonzero(rows.sampled_T)
        _, first = np.unique(rows.row_T[place_T], return_index=True)
        place_R = place_T[first]
        token_F, inverse, count_F = np.unique(rows.ids_T[place_R], return_inverse=True, return_counts=True)
        probability = np.zeros(len(place_R)) if logprobs_T is None else np.exp(logprobs_T[place_R].astype(np.float64))
        summed_F = np.bincount(inverse, probability, minlength=len(token_F))
        for token, count, summed in zip(token_F.tolist(), count_F.tolist(), summed_F.tolist(), strict=True):
            entry = self.first_tokens.setdefault(token, [0, 0.0])
            entry[0] += count
            entry[1] += summed

    def _add_distinct(self, rows: Rows) -> None:
        self.ngram_tokens += int(rows.sampled_T.sum())
        for order in ORDERS:
            self._hashes[order].append(ngrams(rows, order).hash_G)

    def _add_pairs(self, rows: Rows, chosen_R: NDArray[np.bool_]) -> None:
        grams = ngrams(rows.of(chosen_R), PAIR_ORDER)
        edges = np.searchsorted(grams.row_G, np.arange(len(chosen_R) + 1))
        for row in np.flatnonzero(chosen_R).tolist():
            self.places.append(self.rows + row)
            self.sets.append(np.unique(grams.hash_G[edges[row] : edges[row + 1]]))

    def lengths(self) -> Ints:
        """Return the number of sampled tokens of every row."""
        return np.concatenate([np.zeros(0, np.int32), *self._lengths])

    def means(self) -> Floats:
        """Return the mean log-probability of every row's sampled tokens, nats; nan where there is none."""
        return np.concatenate([np.zeros(0, np.float32), *self._means])

    def distinct(self) -> dict[int, float]:
        """Return distinct-n: different n-grams / n-grams, of `ngram_tokens` sampled tokens.

        Source: Li et al. 2016, arXiv:1510.03055, where the metric is introduced. Differs: n-grams of the model's
        tokens, not of words; divided by the n-grams of that order, not by all tokens, so that 1 is the most.
        """
        shares = {}
        for order, parts in self._hashes.items():
            hashes = np.concatenate(parts)
            hashes.sort()  # np.unique of numpy 2.4 builds a hash table: 0.4 s in place of 0.05 for a million
            if len(hashes):
                shares[order] = (1 + int((hashes[1:] != hashes[:-1]).sum())) / len(hashes)
        return shares


def measure(folder: Path, fractions: Fractions) -> Measured:
    """Return what is counted of the corpus table in `folder`."""
    measured = Measured(fractions)
    for batch in batches(folder, "corpus", COLUMNS):
        measured.add(batch)
    return measured


def _rows_of(batch: pa.RecordBatch) -> tuple[Rows, Floats | None]:
    """Return the tokens of a batch and their log-probabilities; without these, all but the start token is sampled."""
    token_ids = batch.column("token_ids")
    length_R = pc.list_value_length(token_ids).fill_null(0).to_numpy()
    ids_T = token_ids.flatten().to_numpy()
    row_T = np.repeat(np.arange(len(length_R)), length_R)
    logprobs = batch.column("logprobs").flatten() if "logprobs" in batch.schema.names else None
    if logprobs is None or len(logprobs) != len(ids_T):
        sampled_T = np.ones(len(ids_T), bool)
        sampled_T[(np.cumsum(length_R) - length_R)[length_R > 0]] = False
        return Rows(ids_T, row_T, sampled_T), None
    sampled_T = logprobs.is_valid().to_numpy(zero_copy_only=False)
    return Rows(ids_T, row_T, sampled_T), logprobs.to_numpy(zero_copy_only=False)
