"""Stage evaluate: what every measurement of a model shares, and the measurement of held-out responses.

A measurement loads its models, makes a table, and writes it with its figures. It is in the module of its mathematics
(`harness/score.py`, `perplexity.py`, `divergence.py`), and a task of `tasks/evaluate.py` calls it.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from transformers import PreTrainedModel

from cfsd.errors import NotFinite
from cfsd.machine import Machine
from cfsd.model.likelihood import score_responses
from cfsd.model.loading import load_for_measuring
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import RESPONSES, read_rows, table_of, write_shard


def load_models(models: Sequence[Artifact], draft: Draft, machine: Machine) -> list[PreTrainedModel]:
    """Return `models` ready for measuring on the device of `machine`."""
    machine.settle()
    device = machine.resolved_device()
    return [load_for_measuring(draft.store, model, device) for model in models]


def write_result(draft: Draft, table: str, rows: pa.Table, metadata: dict[str, Any], figures: dict[str, float]) -> None:
    """Write what was measured: a table with its name, metadata of the artifact, and figures by their metric names."""
    write_shard(draft.folder, table, 0, rows)
    draft.metadata |= metadata
    draft.journal.metrics(0, figures)


def per_token(records: Sequence[dict[str, Any]], *columns: str) -> list[float]:
    """Return the mean per token of `columns`, which are sums over the `count` tokens of each record.

    Raises: NotFinite naming the first row in which one of them is not.
    """
    check_finite(records, *columns)
    tokens = sum(record["count"] for record in records)
    return [sum(record[column] for record in records) / tokens for column in columns]


def check_finite(records: Sequence[dict[str, Any]], *columns: str) -> None:
    """Raise NotFinite where a model gave NaN or no probability at all: no figure would come of it."""
    for record in records:
        if odd := [column for column in columns if not math.isfinite(record[column])]:
            raise NotFinite(
                f"{odd[0]} of row {record['row_id']} is {record[odd[0]]}: the model's logits are not finite there, and "
                "nothing can be measured; train it with a lower learning rate, or look for damage in its weights"
            )


def size_of(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """Return how many rows and tokens were measured, as metadata."""
    return {"rows": len(records), "tokens": sum(record["count"] for record in records)}


def score_target(model: Artifact, target: Artifact, max_rows: int | None, draft: Draft, machine: Machine) -> None:
    """Write the loss and the greedily correct tokens of each held-out response as the `responses` table."""
    rows = read_rows(draft.store.path(target), "held_out")[:max_rows]
    (loaded,) = load_models([model], draft, machine)
    records = score_responses(
        loaded, rows, machine.micro_batch_tokens, lambda done: draft.journal.progress(done, len(rows), "rows")
    )
    (loss,) = per_token(records, "nll")
    accuracy = sum(record["correct"] == record["count"] for record in records) / len(records)
    metadata = size_of(records) | {"loss": loss, "accuracy": accuracy}
    figures = {"target/loss": loss, "target/accuracy": accuracy}
    write_result(draft, "responses", table_of(RESPONSES, records), metadata, figures)
