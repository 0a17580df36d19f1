"""Stage mix: target rows and rehearsal rows as one table, and the global batches they are trained in."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt

from cfsd.artifact import Draft
from cfsd.spec import Spec


class MixSpec(Spec):
    """What one global batch holds. Devices and micro-batches only arrange its rows."""

    target_rows: PositiveInt = Field(8, description="Target rows per global batch")
    rehearsal_tokens: NonNegativeInt = Field(
        1024, description="Most rehearsal tokens per global batch, in whole rows, at least one"
    )
    seed: NonNegativeInt | None = Field(None, description="Order of the rows of each source; empty: the recipe's")


class GlobalBatch(NamedTuple):
    """Positions in the mixture of the rows of one optimizer step."""

    target: list[int]
    rehearsal: list[int]


def mix(target: Path, corpus: Path, spec: MixSpec, draft: Draft) -> None:
    """Write the `mixture` table: target rows first, then the corpus, each supervised where its loss lies.

    Rehearsal rows count from the first sampled token on, the one predicted from the start token included.
    """
    from cfsd.rows import MIXTURE, read_rows, table_of, write_shard

    rows = [
        {**row, "weight": 1.0} for row in read_rows(target, "train", ["row_id", "source", "token_ids", "supervised"])
    ]
    for row in read_rows(corpus, "corpus", ["row_id", "source", "token_ids"]):
        rows.append({**row, "supervised": [False] + [True] * (len(row["token_ids"]) - 1), "weight": 1.0})
    write_shard(draft.folder, "mixture", 0, table_of(MIXTURE, rows))
    sizes = {True: [0, 0], False: [0, 0]}
    for row in rows:
        size = sizes[row["source"] == "target"]
        size[0] += 1
        size[1] += sum(row["supervised"])
    (target_rows, target_tokens), (rehearsal_rows, rehearsal_tokens) = sizes[True], sizes[False]
    draft.facts |= {
        "target_rows": target_rows,
        "target_tokens": target_tokens,
        "rehearsal_rows": rehearsal_rows,
        "rehearsal_tokens": rehearsal_tokens,
        "batch_target_rows": spec.target_rows,
        "batch_rehearsal_tokens": spec.rehearsal_tokens if rehearsal_rows else 0,
        "seed": spec.seed,
    }


def plan_batches(
    sources: list[str], lengths: list[int], *, target_rows: int, rehearsal_tokens: int, epochs: int, seed: int
) -> list[GlobalBatch]:
    """Return the global batches of a whole training, a function of its arguments alone.

    Each epoch passes over the target in a new order; rehearsal rows cycle in theirs, each batch taking
    whole rows while they fit in `rehearsal_tokens` (0: none). `lengths` are supervised tokens per row.
    """
    target = [i for i, source in enumerate(sources) if source == "target"]
    rehearsal = [i for i, source in enumerate(sources) if source != "target"]
    stream = _cycle(rehearsal, f"rehearsal {seed}") if rehearsal and rehearsal_tokens else iter(())
    pending = next(stream, None)
    plan = []
    for epoch in range(epochs):
        order = _shuffled(target, f"target {seed} {epoch}")
        for first in range(0, len(order), target_rows):
            drawn: list[int] = []
            used = 0
            while pending is not None and (not drawn or used + lengths[pending] <= rehearsal_tokens):
                drawn.append(pending)
                used += lengths[pending]
                pending = next(stream)
            plan.append(GlobalBatch(order[first : first + target_rows], drawn))
    return plan


def _shuffled(rows: list[int], seed: str) -> list[int]:
    return random.Random(seed).sample(rows, len(rows))


def _cycle(rows: list[int], seed: str) -> Iterator[int]:
    turn = 0
    while True:
        yield from _shuffled(rows, f"{seed} {turn}")
        turn += 1
