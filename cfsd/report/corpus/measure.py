"""One pass over a corpus table, a record batch at a time: figures of all rows, and of rows spread evenly over it.

What grows with the table is 8 bytes per row. T tokens, R rows of a batch.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cfsd.data.ngrams import PAIR_ORDER, Hashes, Ints, Rows, ngrams, repetition, spread
from cfsd.report.table import POINTS
from cfsd.store.tables import batches, shards

ORDERS = (1, 2, 3, 4)
COLUMNS = ["source", "token_ids", "logprobs", "finish_reason"]
FINISHED = {"eos": "ended by the model", "length": "cut off"}
Floats = NDArray[np.floating[Any]]


class Inventory(NamedTuple):
    """What the footers of a table's shards say, without reading a row."""

    rows: int
    tokens: int  # prompt tokens included
    top_k: int  # log-probabilities stored per token; 0: none. The most of any shard, as sources may differ
    bytes_of: dict[str, int]  # per column, as compressed on the disk


def inventory(folder: Path) -> Inventory:
    """Return the size of the corpus table in `folder`."""
    rows = tokens = top_k = 0
    bytes_of: Counter[str] = Counter()
    for path in shards(folder, "corpus"):
        footer = pq.ParquetFile(path).metadata
        rows += footer.num_rows
        for group in map(footer.row_group, range(footer.num_row_groups)):
            columns = {c.path_in_schema.split(".")[0]: c for c in map(group.column, range(group.num_columns))}
            values = {name: column.num_values for name, column in columns.items()}  # a list counts by its items
            bytes_of.update({name: column.total_compressed_size for name, column in columns.items()})
            tokens += values["token_ids"]
            top_k = max(top_k, round(values.get("topk_ids", 0) / max(1, values["token_ids"])))
    return Inventory(rows, tokens, top_k, dict(bytes_of))


class Fractions(NamedTuple):
    """Which part of the rows each figure of n-grams is computed on; 1 or more: all."""

    distinct: float
    repetition: float
    pairs: float


@dataclass
class Stage:
    """A corpus at one point: as sampled, after the filter, or after selection; `add` counts one more batch of rows."""

    name: str
    fractions: Fractions = field(repr=False)
    rows: int = 0
    tokens: int = 0  # sampled
    prompt_tokens: int = 0  # start token, prompts, separators: the model did not sample them
    ngram_tokens: int = 0  # on which distinct-n was measured
    nats: float = 0.0  # log-probabilities under the base, summed over the sampled tokens
    distinct: dict[int, float] = field(default_factory=dict)  # distinct-n by n; 1: no n-gram occurs twice
    sources: Counter[str] = field(default_factory=Counter)  # sampled tokens
    finish_reasons: Counter[str] = field(default_factory=Counter)
    first_tokens: Counter[int] = field(default_factory=Counter, repr=False)  # rows whose sampled text begins so
    first_probabilities: Counter[int] = field(default_factory=Counter, repr=False)  # summed over these rows
    repetitions: list[float] = field(default_factory=list, repr=False)  # share of 4-grams seen earlier in the row
    pair_sets: dict[int, Hashes] = field(default_factory=dict, repr=False)  # the n-grams of rows, by their place
    _lengths: list[Ints] = field(default_factory=list, repr=False)
    _means: list[Floats] = field(default_factory=list, repr=False)
    _hashes: dict[int, list[Hashes]] = field(default_factory=lambda: defaultdict(list), repr=False)

    def lengths(self) -> Ints:
        """Return the number of sampled tokens of every row."""
        return np.concatenate([np.zeros(0, np.int32), *self._lengths])

    def means(self) -> Floats:
        """Return the mean log-probability of every row's sampled tokens, nats; nan where there is none."""
        return np.concatenate([np.zeros(0, np.float32), *self._means])

    @property
    def mean_logprob(self) -> float | None:
        """Nats per sampled token, under the base; None without sampled tokens."""
        return self.nats / self.tokens if self.tokens else None

    def figures(self) -> dict[str, float | None]:
        """Return the figures by their labels on the page; shares in percent, log-probabilities in nats per token.

        Repetition: the mean over rows of the share of 4-grams that occur earlier in the row, and what one row in
        twenty exceeds.
        """
        shares, ends = POINTS * np.array(self.repetitions), sum(self.finish_reasons.values())
        return {
            "rows": self.rows,
            "sampled tokens": self.tokens,
            "prompt tokens": self.prompt_tokens,
            "mean log-probability": self.mean_logprob,
            **{f"{FINISHED.get(r, r)}, % of rows": POINTS * n / ends for r, n in self.finish_reasons.most_common()},
            **{f"distinct-{n}": self.distinct.get(n) for n in ORDERS},
            "repetition, %": float(shares.mean()) if len(shares) else None,
            "repetition, above in 1 row of 20, %": float(np.quantile(shares, 0.95)) if len(shares) else None,
        }

    def add(self, batch: pa.RecordBatch) -> None:
        """Count one more batch of rows."""
        rows, logprobs_T = _rows_of(batch)
        count, place_T = batch.num_rows, np.flatnonzero(rows.sampled_T)
        length_R = np.bincount(rows.row_T[place_T], minlength=count)
        nats_R = np.bincount(rows.row_T[place_T], logprobs_T[place_T], minlength=count)
        mean_R = np.divide(nats_R, length_R, out=np.full(count, np.nan), where=length_R > 0)
        self._lengths.append(length_R.astype(np.int32))
        self._means.append(mean_R.astype(np.float32))
        self.nats += float(nats_R.sum())
        self.tokens += len(place_T)
        self.prompt_tokens += len(rows.ids_T) - len(place_T)
        for source, length in zip(batch["source"].to_pylist(), length_R.tolist(), strict=True):
            self.sources[source] += length
        self.finish_reasons.update(batch["finish_reason"].to_pylist())
        _, first = np.unique(rows.row_T[place_T], return_index=True)
        self._add_first_tokens(rows.ids_T[place_T[first]], logprobs_T[place_T[first]])
        self._add_ngrams(rows, count)
        self.rows += count

    def _add_first_tokens(self, ids_R: Ints, logprobs_R: Floats) -> None:
        token_F, inverse, count_F = np.unique(ids_R, return_inverse=True, return_counts=True)
        summed_F = np.bincount(inverse, np.exp(logprobs_R), minlength=len(token_F))
        self.first_tokens.update(dict(zip(token_F.tolist(), count_F.tolist(), strict=True)))
        self.first_probabilities.update(dict(zip(token_F.tolist(), summed_F.tolist(), strict=True)))

    def _add_ngrams(self, rows: Rows, count: int) -> None:
        some, repeated, paired = (rows.of(spread(self.rows, count, fraction)) for fraction in self.fractions)
        self.ngram_tokens += int(some.sampled_T.sum())
        for order in ORDERS:
            self._hashes[order].append(ngrams(some, order).hash_G)
        self.repetitions += repetition(ngrams(repeated, PAIR_ORDER))
        grams = ngrams(paired, PAIR_ORDER)
        edges = np.searchsorted(grams.row_G, np.arange(count + 1))
        for row in np.flatnonzero(spread(self.rows, count, self.fractions.pairs)).tolist():
            self.pair_sets[self.rows + row] = np.unique(grams.hash_G[edges[row] : edges[row + 1]])

    def finish(self) -> None:
        """Measure distinct-n: different n-grams / n-grams, of `ngram_tokens` sampled tokens.

        Source: Li et al. 2016, arXiv:1510.03055, where the metric is introduced. Differs: n-grams of the model's
        tokens, not of words; divided by the n-grams of that order, not by all tokens, so that 1 is the most.
        """
        for order, parts in self._hashes.items():
            hashes = np.concatenate(parts)
            hashes.sort()  # np.unique of numpy 2.4 builds a hash table: 0.4 s in place of 0.05 for a million
            if len(hashes):
                self.distinct[order] = (1 + int((hashes[1:] != hashes[:-1]).sum())) / len(hashes)
        self._hashes.clear()


def measure_stage(name: str, folder: Path, fractions: Fractions) -> Stage:
    """Return the figures of the corpus table in `folder`."""
    stage = Stage(name, fractions)
    for batch in batches(folder, "corpus", COLUMNS):
        stage.add(batch)
    stage.finish()
    return stage


def _rows_of(batch: pa.RecordBatch) -> tuple[Rows, Floats]:
    """Return the tokens of a batch and their log-probabilities, nan for prompt tokens."""
    token_ids, logprobs = batch["token_ids"], batch["logprobs"].flatten()
    row_T = np.repeat(np.arange(batch.num_rows), pc.list_value_length(token_ids).to_numpy())
    rows = Rows(token_ids.flatten().to_numpy(), row_T, logprobs.is_valid().to_numpy(zero_copy_only=False))
    return rows, logprobs.to_numpy(zero_copy_only=False).astype(np.float64)
