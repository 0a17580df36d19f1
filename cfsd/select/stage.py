"""Stage select: keep k of N rows of a target or a corpus, by the geometric median of what the base makes of them."""

import random
import shutil
from collections import Counter
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
from cfsd.store.tables import TableWriter, batches, shards

Array = np.ndarray[Any, Any]


def select(rows: Artifact, spec: SelectSpec, draft: Draft, embedding: Array | None = None) -> None:
    """Write the selected rows of `rows`, in their order and with all their columns; `held_out` of a target as it is.

    `embedding` has one vector per row, in order; random choice needs none. Raises BadInput when k is too large.
    """
    selects(spec, rows)
    assert (embedding is None) == (spec.method == "random"), "matching, and only that, needs vectors"
    folder, table = draft.store.path(rows), TABLES[rows.kind]
    have: Any = rows.metadata[COUNTS[rows.kind]]
    k = spec.wanted(rows.kind) or have
    draft.metadata |= {"selected": k, "of": have, "method": spec.method}
    if embedding is None:  # the first k of a permutation: a smaller k selects a part of what a larger one does
        selected = random.Random(f"select {rows.kind} {seed_of(spec)}").sample(range(have), have)[:k]
    else:
        center = geometric_median(embedding)
        draft.metadata |= {"weiszfeld_iterations": center.steps}
        selected = match(embedding, center.point, k, lambda picked: draft.journal.progress(picked, k, "rows"))
    is_selected = np.zeros(have, dtype=bool)
    is_selected[selected] = True
    writer, row = TableWriter(draft.folder, table), 0
    for batch in batches(folder, table):
        writer.add(batch.filter(pa.array(is_selected[row : row + batch.num_rows])))
        row += batch.num_rows
    writer.close()
    if rows.kind == "target":
        for path in shards(folder, "held_out"):
            shutil.copyfile(path, draft.folder / path.name)
        draft.metadata |= _target_metadata(rows, draft.folder)
    else:
        draft.metadata |= _corpus_metadata(rows, draft.folder)


def _target_metadata(rows: Artifact, folder: Path) -> dict[str, JsonValue]:
    counts: Counter[str] = Counter()
    for batch in batches(folder, "train", ["token_ids", "supervised"]):
        counts["train_rows"] += batch.num_rows
        counts["train_tokens"] += len(batch["token_ids"].flatten())
        counts["supervised_tokens"] += pc.sum(batch["supervised"].flatten()).as_py() or 0
    return {**rows.metadata, **counts}


def _corpus_metadata(rows: Artifact, folder: Path) -> dict[str, JsonValue]:
    """Return the metadata of the selected rows. Of those before, words (how rows were sampled) stay, counts do not."""
    before: Any = rows.metadata
    stored = ("top_logprobs", "tail_samples")
    words: dict[str, JsonValue] = {k: v for k, v in before.items() if isinstance(v, str | bool) or k in stored}
    metadata: Any = corpus_metadata(folder)
    selected: dict[str, JsonValue] = words | metadata | {"accepted_fraction": metadata["rows"] / before["rows"]}
    if "mean_logprob" in metadata and "mean_logprob" in before:
        selected["mean_logprob_shift"] = metadata["mean_logprob"] - before["mean_logprob"]
    return selected
