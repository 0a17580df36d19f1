"""Stage weigh: the base's cross-entropy on each of the target's training rows, from which FLOW weighs them.

One shard per block of rows: a run that was killed keeps the blocks that are done.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from transformers import PreTrainedModel

from cfsd.errors import NotFinite
from cfsd.machine import Machine
from cfsd.model.likelihood import score_responses
from cfsd.model.loading import load_for_measuring
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import LOSSES, batches, shard_path, shards, table_of, write_shard

BLOCK = 512  # rows in memory, and what a kill can cost
COLUMNS = ["row_id", "token_ids", "supervised"]


def weigh(base: Artifact, target: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the `losses` table, a row per row of `train` in its order. Raises NotFinite naming the rows."""
    machine.settle()
    model = load_for_measuring(draft.store, base, machine.resolved_device())
    folder = draft.store.path(target)
    done, total = 0, _count(folder)
    for index, rows in enumerate(_blocks(folder)):
        if not shard_path(draft.folder, "losses", index).exists():
            records = _scored(model, rows, machine.micro_batch_tokens, draft, done, total)
            write_shard(draft.folder, "losses", index, table_of(LOSSES, records))
        done += len(rows)
        draft.journal.progress(done, total, "rows")
    nats, tokens = 0.0, 0
    for batch in batches(draft.folder, "losses", ["nll", "count"]):
        nats += float(batch["nll"].to_numpy().sum())
        tokens += int(batch["count"].to_numpy().sum())
    draft.metadata |= {"rows": done, "tokens": tokens, "loss": nats / max(tokens, 1)}


def _scored(
    model: "PreTrainedModel", rows: list[dict[str, Any]], max_tokens: int, draft: Draft, before: int, total: int
) -> list[dict[str, Any]]:

    def progress(done: int) -> None:
        draft.journal.progress(before + done, total, "rows")

    records = score_responses(model, rows, max_tokens, progress, per_token=True)
    if bad := [record["row_id"] for record in records if not math.isfinite(record["nll"])]:
        raise NotFinite(
            f"the base's loss on rows {bad[:5]} of the target is NaN or infinite, so they have no weight; "
            "look at the base's weights, or set mix.flow to off"
        )
    return records


def _count(folder: Path) -> int:

    return sum(pq.read_metadata(path).num_rows for path in shards(folder, "train"))


def _blocks(folder: Path) -> Iterator[list[dict[str, Any]]]:

    for batch in batches(folder, "train", COLUMNS):
        for first in range(0, batch.num_rows, BLOCK):
            yield batch.slice(first, BLOCK).to_pylist()
