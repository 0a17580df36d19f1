"""Stage mix: target rows and rehearsal rows as one table, written as they are read."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from cfsd.artifact import Draft
from cfsd.spec import Spec

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_TOKENS = 1 << 22  # a shard ends with the batch that reaches it: 17 MB, or the longest 4,096 rows


class MixSpec(Spec):
    """What one global batch holds. Devices and micro-batches only arrange its rows."""

    target_rows: PositiveInt = Field(8, description="Target rows per global batch")
    rehearsal_tokens: NonNegativeInt = Field(
        1024, description="Most rehearsal tokens per global batch, in whole rows, at least one"
    )
    seed: NonNegativeInt | None = Field(None, description="Order of the rows of each source; empty: the recipe's")


def mix(target: Path, corpus: Path, spec: MixSpec, draft: Draft) -> None:
    """Write the `mixture` table: target rows first, then the corpus, each supervised where its loss lies.

    Of a corpus row the tokens that have a log-probability count: sampled ones, not given ones. Log-probabilities
    themselves stay in the corpus, where `source` and `row_id` find them.
    """
    import pyarrow.parquet as pq

    from cfsd.rows import shards, write_shard

    paths = [*shards(target, "train"), *shards(corpus, "corpus")]
    done, total = 0, sum(pq.read_metadata(path).num_rows for path in paths)
    sizes: dict[str, tuple[int, int]] = {}
    for index, table in enumerate(_tables(_mixed(target, corpus), sizes)):
        write_shard(draft.folder, "mixture", index, table)
        done += table.num_rows
        draft.journal.progress(done, total, "rows")
    draft.facts |= _facts(sizes, spec)


def _mixed(target: Path, corpus: Path) -> "Iterator[pa.RecordBatch]":
    """Yield the rows of both in the form of the mixture."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from cfsd.rows import MIXTURE, SEQUENCE, batches

    names = [name for name, _ in SEQUENCE]

    def with_loss(batch: pa.RecordBatch, supervised: pa.ListArray) -> pa.RecordBatch:
        weight = pa.array(np.ones(batch.num_rows, np.float32))
        return pa.record_batch([*(batch[name] for name in names), supervised, weight], schema=MIXTURE)

    for batch in batches(target, "train", [*names, "supervised"]):
        yield with_loss(batch, batch["supervised"])
    for batch in batches(corpus, "corpus", [*names, "logprobs"]):
        ends = pc.list_value_length(batch["logprobs"]).to_numpy().cumsum(dtype=np.int32)
        offsets = pa.array(np.concatenate([np.zeros(1, np.int32), ends]))
        yield with_loss(batch, pa.ListArray.from_arrays(offsets, batch["logprobs"].flatten().is_valid()))


def _tables(parts: "Iterable[pa.RecordBatch]", sizes: dict[str, tuple[int, int]]) -> "Iterator[pa.Table]":
    """Join `parts` to tables of some SHARD_TOKENS tokens, and count each source's rows and supervised tokens."""
    import pyarrow as pa

    waiting: list[pa.RecordBatch] = []
    tokens = 0
    for part in parts:
        for source, rows, supervised in _counted(part):
            before = sizes.get(source, (0, 0))
            sizes[source] = before[0] + rows, before[1] + supervised
        waiting.append(part)
        tokens += len(part["token_ids"].flatten())
        if tokens >= SHARD_TOKENS:
            yield pa.Table.from_batches(waiting)
            waiting, tokens = [], 0
    if waiting:
        yield pa.Table.from_batches(waiting)


def _counted(part: "pa.RecordBatch") -> list[tuple[str, int, int]]:
    """Return source, rows and supervised tokens."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    row_T = pc.list_parent_indices(part["supervised"]).to_numpy()
    counts = np.bincount(row_T[part["supervised"].flatten().to_numpy(zero_copy_only=False)], minlength=part.num_rows)
    table = pa.table({"source": part["source"], "tokens": counts})
    grouped = table.group_by("source").aggregate([("tokens", "count"), ("tokens", "sum")])
    return [(row["source"], row["tokens_count"], row["tokens_sum"]) for row in grouped.to_pylist()]


def _facts(sizes: dict[str, tuple[int, int]], spec: MixSpec) -> dict[str, JsonValue]:
    target_rows, target_tokens = sizes.pop("target", (0, 0))
    rehearsal_rows = sum(rows for rows, _ in sizes.values())
    return {
        "target_rows": target_rows,
        "target_tokens": target_tokens,
        "rehearsal_rows": rehearsal_rows,
        "rehearsal_tokens": sum(tokens for _, tokens in sizes.values()),
        "rehearsal_rows_by_source": {source: rows for source, (rows, _) in sizes.items()},
        "rehearsal_tokens_by_source": {source: tokens for source, (_, tokens) in sizes.items()},
        "batch_target_rows": spec.target_rows,
        "batch_rehearsal_tokens": spec.rehearsal_tokens if rehearsal_rows else 0,
        "seed": spec.seed,
    }
