"""The contract between stages: the columns of each table, and how a table is written, read and digested.

Tables are Parquet shards `<name>-00000.parquet`, so that `datasets.load_dataset("parquet", …)` reads them too.
A written shard is whole: it appears under its name only when every row is on the disk.
"""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cfsd.store.digests import DERIVED

SHARD = "{}-[0-9]*.parquet"  # of a table

# logprobs[t] = log p*(token t | tokens < t) in nats; null for prompt tokens, as the start token is
SEQUENCE = [("row_id", pa.int64()), ("source", pa.string()), ("token_ids", pa.list_(pa.int32()))]
CORPUS = pa.schema(
    [
        *SEQUENCE,
        ("logprobs", pa.list_(pa.float32())),
        ("finish_reason", pa.string()),  # eos | length
        ("shard", pa.int32()),
        ("seed", pa.int64()),
        ("text", pa.string()),  # for reading only, never tokenised again
    ]
)
TURNS = pa.schema([("row_id", pa.int64()), ("answer", pa.int64())])  # of chats: the place of the answer's first token
NARROW_IDS = 1 << 16  # vocabularies up to here have their ids in two bytes
SHARD_ROWS, SHARD_BYTES = 16384, 64 << 20  # a shard ends with the rows that reach either
TARGET = pa.schema(
    [*SEQUENCE, ("supervised", pa.list_(pa.bool_())), ("prompt", pa.string()), ("response", pa.string())]
)
MIXTURE = pa.schema(
    [
        *SEQUENCE,
        # the row's number in the corpus, null for the target: follows from source and row_id
        pa.field("corpus_row", pa.int64(), metadata={DERIVED: b"yes"}),
        ("supervised", pa.list_(pa.bool_())),
        ("weight", pa.float32()),
    ]
)
LOSSES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("nll", pa.float64()),  # summed over supervised tokens, nats
        ("count", pa.int64()),
        ("token_nll", pa.list_(pa.float32())),  # of each supervised token
    ]
)
REJECTS = pa.schema(
    [
        ("row_id", pa.int64()),
        ("source", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),  # the number or the words that the reason is about
        ("text", pa.string()),
    ]
)
DIVERGENCE = pa.schema(
    [
        ("row_id", pa.int64()),
        ("kl", pa.float64()),  # summed over the row's predicted tokens, nats
        ("sampled", pa.float64()),  # sum of log p*(x_t) - log p(x_t), nats
        ("base_nll", pa.float64()),
        ("tuned_nll", pa.float64()),
        ("count", pa.int64()),
        ("reverse_kl", pa.float64()),  # as kl, with the two models swapped
        ("token_kl", pa.list_(pa.float32())),  # of each predicted token
        ("token_entropy", pa.list_(pa.float32())),  # of the base's distribution there, nats
    ]
)
MOVED_POSITIONS = pa.schema(  # those of the largest divergence, largest first, of equal contexts one
    [
        ("row_id", pa.int64()),
        ("place", pa.int64()),  # in the row, of the token that is predicted
        ("kl", pa.float64()),
        ("context", pa.string()),  # the text before
        ("next", pa.string()),  # the token that the row has there
        ("next_base_p", pa.float32()),
        ("next_tuned_p", pa.float32()),
        ("base", pa.list_(pa.string())),  # its likeliest tokens, likeliest first
        ("base_p", pa.list_(pa.float32())),
        ("tuned", pa.list_(pa.string())),
        ("tuned_p", pa.list_(pa.float32())),
    ]
)
MOVED_TOKENS = pa.schema(  # of the vocabulary: those whose mean probability rose most, then those for which it fell
    [
        ("token_id", pa.int64()),
        ("text", pa.string()),
        ("base_p", pa.float64()),  # mean over the positions
        ("tuned_p", pa.float64()),
        ("kl", pa.float64()),  # what the token adds to the mean divergence; over the vocabulary it is the divergence
    ]
)
RESPONSES = pa.schema(
    [
        ("row_id", pa.int64()),
        ("nll", pa.float64()),  # summed over supervised tokens, nats
        ("correct", pa.int64()),  # supervised tokens that are the model's first choice
        ("count", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
    ]
)
SHOWN = pa.schema(
    [
        ("row_id", pa.int64()),
        ("kind", pa.string()),  # chat | text | target | unprompted
        ("prompt", pa.string()),  # as people read it
        ("answer", pa.string()),
        ("expected", pa.string()),  # of held-out target rows
        ("finish_reason", pa.string()),  # eos | length | context: the model attends to too few tokens to answer
        ("temperature", pa.float64()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer_ids", pa.list_(pa.int32())),
    ]
)


def corpus_schema(top_logprobs: int, vocabulary: int, tail_samples: int = 0) -> pa.Schema:
    """Return the columns of a corpus that stores the `top_logprobs` likeliest tokens of each position (0: none).

    `topk_ids` and `topk_logprobs` hold length x k entries per row, `rest_logprob` the log of the remaining mass;
    `tail_ids` and `tail_logprobs` length x `tail_samples` entries, sampled from the tokens that are not in the top.
    """
    if not top_logprobs:
        return CORPUS
    ids = pa.uint16() if vocabulary <= NARROW_IDS else pa.int32()
    stored = {"topk_ids": ids, "topk_logprobs": pa.float16(), "rest_logprob": pa.float32()}
    if tail_samples:
        stored |= {"tail_ids": ids, "tail_logprobs": pa.float16()}
    return pa.schema([*CORPUS, *((name, pa.list_(kind)) for name, kind in stored.items())])


BATCHES = "batches.json"  # beside a mixture: its global batches, by their sizes and the seed of their order


def mixture_schema(*, token_weights: bool) -> pa.Schema:
    """Return the columns of a mixture; `token_weights` has an entry per token, null where all of a row's are 1."""
    return MIXTURE.append(pa.field("token_weights", pa.list_(pa.float32()))) if token_weights else MIXTURE


def shard_path(folder: Path, name: str, index: int) -> Path:
    """Return the place of one shard."""
    return folder / f"{name}-{index:05}.parquet"


def write_shard(folder: Path, name: str, index: int, table: pa.Table) -> None:
    """Write `table` whole or not at all."""
    temporary = folder / f".{name}-{index:05}.{os.getpid()}.partial"
    pq.write_table(table, temporary, compression="zstd")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(shard_path(folder, name, index))


class TableWriter:
    """Writes a table while its rows arrive: each shard has at most `max_rows` rows and about `max_bytes` bytes."""

    def __init__(self, folder: Path, name: str, max_rows: int = SHARD_ROWS, max_bytes: int = SHARD_BYTES) -> None:
        """Write `<name>-NNNNN.parquet` into `folder`, which is made if it is missing."""
        folder.mkdir(exist_ok=True)
        self.folder, self.name, self.max_rows, self.max_bytes = folder, name, max_rows, max_bytes
        self.shards = 0  # that are written
        self.waiting: list[pa.RecordBatch] = []

    def add(self, batch: pa.RecordBatch) -> None:
        """Take more rows. Their columns may differ from those of the rows before: a shard ends there."""
        if self.waiting and self.waiting[0].schema != batch.schema:
            self.close()
        self.waiting.append(batch)
        while self._is_full():
            self._write()

    def _is_full(self) -> bool:
        rows, size = sum(part.num_rows for part in self.waiting), sum(part.nbytes for part in self.waiting)
        return bool(rows >= self.max_rows or size >= self.max_bytes)

    def close(self) -> None:
        """Write the rows that wait; a table without rows is one empty shard."""
        if self.waiting:
            self._write()

    def _write(self) -> None:
        # notes of the shards that rows come from (a halved batch) would be untrue of this one
        table = pa.Table.from_batches(self.waiting).replace_schema_metadata(None)
        if table.num_rows or not self.shards:
            write_shard(self.folder, self.name, self.shards, table.slice(0, self.max_rows))
            self.shards += 1
        self.waiting = table.slice(self.max_rows).to_batches()


def table_of(schema: pa.Schema, rows: list[dict[str, Any]]) -> pa.Table:
    """Return `rows` as a table with exactly the columns of `schema`."""
    return pa.Table.from_pylist(rows, schema=schema)


def shards(folder: Path, name: str) -> list[Path]:
    """Return the shards of a table in order."""
    return sorted(folder.glob(SHARD.format(name)), key=lambda path: int(path.stem.rsplit("-", 1)[1]))


def is_shard(file: str, name: str) -> bool:
    """Say whether a file is a shard of the table, by its name."""
    return fnmatch(file, SHARD.format(name))


def batches(folder: Path, name: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table in order, a few thousand at a time."""
    for path in shards(folder, name):
        yield from pq.ParquetFile(path).iter_batches(batch_size=4096, columns=columns)


def count_true(lists: pa.ListArray) -> NDArray[np.int64]:
    """Return how many entries of each list of booleans are true."""
    row_T = pc.list_parent_indices(lists).to_numpy()
    return np.bincount(row_T[lists.flatten().to_numpy(zero_copy_only=False)], minlength=len(lists))


def blocks(folder: Path, name: str, columns: list[str], rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield (number of its first row, at most `rows` rows) of a table in order."""
    number = 0
    for batch in batches(folder, name, columns):
        for first in range(0, batch.num_rows, rows):
            block = batch.slice(first, rows)
            yield number, block
            number += block.num_rows


def num_rows(folder: Path, name: str) -> int:
    """Return how many rows a table has."""
    return sum(pq.read_metadata(path).num_rows for path in shards(folder, name))


def read_rows(folder: Path, name: str, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Return all rows of a small table."""
    return [row for batch in batches(folder, name, columns) for row in batch.to_pylist()]
