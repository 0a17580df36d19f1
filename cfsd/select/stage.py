"""Stage select: keep k of N rows of a target or a corpus, by the geometric median of what the base makes of them."""

import random
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import JsonValue

from cfsd.data.corpus_table import corpus_metadata
from cfsd.select.geometric_median import geometric_median, match
from cfsd.select.spec import COUNTS, TABLES, SelectSpec, selects
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import TableWriter, batches, shards

Array = np.ndarray[Any, Any]


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
    writer = TableWriter(draft.folder, table)
    for batch in _kept(folder, table, keep):
        writer.add(batch)
    writer.close()
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
    return random.Random(f"select {kind} {spec.seed or 0}").sample(range(have), have)[:k]


def _kept(folder: Path, table: str, keep: Array) -> Iterator["pa.RecordBatch"]:

    position = 0
    for batch in batches(folder, table):
        yield batch.filter(pa.array(keep[position : position + batch.num_rows]))
        position += batch.num_rows
    assert position == len(keep), "the facts say how many rows there are"


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
