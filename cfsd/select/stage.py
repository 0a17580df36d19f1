"""Stage select: keep k of N rows of a target or a corpus, by the geometric median of what the base makes of them."""

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import JsonValue

from cfsd.data.corpus_table import corpus_metadata
from cfsd.select.geometric_median import geometric_median, match
from cfsd.select.spec import COUNTS, TABLES, SelectSpec, selects
from cfsd.spec import seed_of
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import batches, shards, write_shard

Array = np.ndarray[Any, Any]

SHARD_ROWS, SHARD_BYTES = 16384, 64 << 20  # a shard ends when it has either


def select(rows: Artifact, spec: SelectSpec, draft: Draft, embedding: Array | None = None) -> None:
    """Write the chosen rows of `rows`, in their order and with all their columns; `held_out` of a target as it is.

    `embedding` has one vector per row, in order; random choice needs none. Raises BadInput when k is too large.
    """
    selects(spec, rows)
    folder, table = draft.store.path(rows), TABLES[rows.kind]
    have: Any = rows.metadata[COUNTS[rows.kind]]
    k = spec.wanted(rows.kind) or have
    draft.metadata |= {"selected": k, "of": have, "method": spec.method}
    chosen = _drawn(rows.kind, have, k, spec) if spec.method == "random" else _matched(embedding, k, draft)
    keep = np.zeros(have, dtype=bool)
    keep[chosen] = True
    _write(draft.folder, table, _kept(folder, table, keep))
    if rows.kind == "target":
        for path in shards(folder, "held_out"):
            shutil.copyfile(path, draft.folder / path.name)
    draft.metadata |= (_target_metadata if rows.kind == "target" else _corpus_metadata)(rows, draft.folder)


def _matched(embedding: Array | None, k: int, draft: Draft) -> list[int]:

    assert embedding is not None, "matching needs vectors"
    center = geometric_median(embedding)
    draft.metadata |= {"weiszfeld_iterations": center.steps}
    return match(embedding, center.point, k, lambda picked: draft.journal.progress(picked, k, "rows"))


def _drawn(kind: str, have: int, k: int, spec: SelectSpec) -> list[int]:
    """Return the first k of a permutation: a smaller k keeps a part of what a larger one keeps."""
    return random.Random(f"select {kind} {seed_of(spec)}").sample(range(have), have)[:k]


def _kept(folder: Path, table: str, keep: Array) -> Iterator["pa.RecordBatch"]:

    position = 0
    for batch in batches(folder, table):
        yield batch.filter(pa.array(keep[position : position + batch.num_rows]))
        position += batch.num_rows
    assert position == len(keep), "the facts say how many rows there are"


def _write(folder: Path, table: str, kept: Iterable["pa.RecordBatch"]) -> None:

    waiting: list[pa.RecordBatch] = []
    index = 0
    for batch in kept:
        rows, size = sum(part.num_rows for part in waiting), sum(part.nbytes for part in waiting)
        other = bool(waiting) and waiting[0].schema != batch.schema  # sources may differ in their columns
        if other or rows >= SHARD_ROWS or size >= SHARD_BYTES:
            write_shard(folder, table, index, _joined(waiting))
            waiting, index = [], index + 1
        waiting.append(batch)
    write_shard(folder, table, index, _joined(waiting))


def _joined(batches: list["pa.RecordBatch"]) -> "pa.Table":

    return pa.Table.from_batches(batches).replace_schema_metadata(None)  # notes of a shard do not hold for its rows


def _target_metadata(rows: Artifact, folder: Path) -> dict[str, JsonValue]:

    counts: Counter[str] = Counter()
    for batch in batches(folder, "train", ["token_ids", "supervised"]):
        counts["train_rows"] += batch.num_rows
        counts["train_tokens"] += len(batch["token_ids"].flatten())
        counts["supervised_tokens"] += pc.sum(batch["supervised"].flatten()).as_py() or 0
    return {**rows.metadata, **counts}


def _corpus_metadata(rows: Artifact, folder: Path) -> dict[str, JsonValue]:
    """Return the facts of the chosen rows. Of those before, words (how rows were sampled) stay, and counts do not."""
    before: Any = rows.metadata
    words: dict[str, JsonValue] = {k: v for k, v in before.items() if isinstance(v, str | bool) or k == "top_logprobs"}
    metadata: Any = corpus_metadata(folder)
    found: dict[str, JsonValue] = words | metadata | {"accepted_fraction": metadata["rows"] / before["rows"]}
    if "mean_logprob" in metadata and "mean_logprob" in before:
        found["mean_logprob_shift"] = metadata["mean_logprob"] - before["mean_logprob"]
    return found
