"""Stage weigh: the base's cross-entropy on each of the target's training rows, from which FLOW weighs them.

One shard per block of rows: a run that was killed keeps the blocks that are done.
"""

import math
from typing import Any

from cfsd.errors import NotFinite
from cfsd.machine import Machine
from cfsd.model.likelihood import score_responses
from cfsd.model.loading import load_for_measuring
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import LOSSES, batches, blocks, num_rows, shard_path, table_of, write_shard

BLOCK = 512  # rows in memory, and what a kill can cost
COLUMNS = ["row_id", "token_ids", "supervised"]


def weigh(base: Artifact, target: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the `losses` table, a row per row of `train` in its order. Raises NotFinite naming the rows."""
    machine.settle()
    model = load_for_measuring(draft.store, base, machine.resolved_device())
    folder = draft.store.path(target)
    total = num_rows(folder, "train")
    for index, (first, block) in enumerate(blocks(folder, "train", COLUMNS, BLOCK)):
        if not shard_path(draft.folder, "losses", index).exists():

            def progress(done: int, before: int = first) -> None:
                draft.journal.progress(before + done, total, "rows")

            records = score_responses(model, block.to_pylist(), machine.micro_batch_tokens, progress, per_token=True)
            _check_finite(records)
            write_shard(draft.folder, "losses", index, table_of(LOSSES, records))
    draft.journal.progress(total, total, "rows")
    nats, tokens = 0.0, 0
    for batch in batches(draft.folder, "losses", ["nll", "count"]):
        nats += float(batch["nll"].to_numpy().sum())
        tokens += int(batch["count"].to_numpy().sum())
    draft.metadata |= {"rows": total, "tokens": tokens, "loss": nats / max(tokens, 1)}


def _check_finite(records: list[dict[str, Any]]) -> None:
    if bad := [record["row_id"] for record in records if not math.isfinite(record["nll"])]:
        raise NotFinite(
            f"the base's loss on rows {bad[:5]} of the target is NaN or infinite, so they have no weight; "
            "look at the base's weights, or set mix.flow to off"
        )
