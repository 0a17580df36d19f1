"""Stage mix: target rows and rehearsal rows as one table."""

from pathlib import Path

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
