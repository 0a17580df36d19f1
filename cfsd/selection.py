"""Stage select: keep k of N rows of a target or a corpus, by the geometric median of what the base makes of them."""

import random
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, JsonValue, NonNegativeInt, PositiveInt

from cfsd.artifact import Artifact, Draft
from cfsd.errors import BadInput
from cfsd.spec import Spec

if TYPE_CHECKING:
    import pyarrow as pa

Array = np.ndarray[Any, Any]

TABLES = {"target": "train", "corpus": "corpus"}  # the table that is selected from, by kind of artifact
COUNTS = {"target": "train_rows", "corpus": "rows"}  # the fact that says how many rows it has
SHARD_ROWS, SHARD_BYTES = 16384, 64 << 20  # a shard ends when it has either


class SelectSpec(Spec):
    """How many rows to keep, and which. Nothing is selected unless a number is given."""

    target_rows: PositiveInt | None = Field(None, description="Training rows of the target to keep; empty: all")
    corpus_rows: PositiveInt | None = Field(
        None, description="Rows of the filtered corpus to keep; empty: all. Selecting bends the estimate, as filters do"
    )
    method: Literal["geometric-median", "random"] = Field(
        "geometric-median",
        description="geometric-median: rows whose mean is that of the bulk, which leaves out most bad rows while they "
        "are fewer than half; random: what it is compared with",
    )
    seed: NonNegativeInt | None = Field(None, description="random only; empty: the recipe's")

    def wanted(self, kind: str) -> int | None:
        """Return how many rows of an artifact of `kind` are kept; None: all."""
        return self.target_rows if kind == "target" else self.corpus_rows

    def used_on(self, kind: str) -> "SelectSpec":
        """Return the spec without what does not matter for `kind`, so that it is not in the key."""
        return SelectSpec(
            target_rows=self.target_rows if kind == "target" else None,
            corpus_rows=self.corpus_rows if kind == "corpus" else None,
            method=self.method,
            seed=self.seed if self.method == "random" else None,
        )


def selects(spec: SelectSpec, rows: Artifact) -> bool:
    """Say whether `spec` leaves out any of `rows`. Raises BadInput when it wants more than there are.

    An artifact that is only planned does not say how many it has; one without rows, as the corpus of plain
    fine-tuning, stays as it is.
    """
    wanted, have = spec.wanted(rows.kind), rows.facts.get(COUNTS[rows.kind])
    if wanted is None or have == 0 or wanted == have:
        return False
    if isinstance(have, int) and wanted > have:
        raise BadInput(
            f"select.{rows.kind}_rows is {wanted}, but the {rows.kind} has {have} rows to select from; "
            f"allowed: 1 to {have}, or nothing to keep them all"
        )
    return True


def select(rows: Artifact, spec: SelectSpec, draft: Draft, embedding: Array | None = None) -> None:
    """Write the chosen rows of `rows`, in their order and with all their columns; `held_out` of a target as it is.

    `embedding` has one vector per row, in order; random choice needs none. Raises BadInput when k is too large.
    """
    from cfsd.rows import shards

    selects(spec, rows)
    folder, table = draft.store.path(rows), TABLES[rows.kind]
    have: Any = rows.facts[COUNTS[rows.kind]]
    k = spec.wanted(rows.kind) or have
    draft.facts |= {"selected": k, "of": have, "method": spec.method}
    chosen = _drawn(rows.kind, have, k, spec) if spec.method == "random" else _matched(embedding, k, draft)
    keep = np.zeros(have, dtype=bool)
    keep[chosen] = True
    _write(draft.folder, table, _kept(folder, table, keep))
    if rows.kind == "target":
        for path in shards(folder, "held_out"):
            shutil.copyfile(path, draft.folder / path.name)
    draft.facts |= (_target_facts if rows.kind == "target" else _corpus_facts)(rows, draft.folder)


def _matched(embedding: Array | None, k: int, draft: Draft) -> list[int]:
    from cfsd.geometric_median import geometric_median, match

    assert embedding is not None, "matching needs vectors"
    center = geometric_median(embedding)
    draft.facts |= {"weiszfeld_iterations": center.steps}
    return match(embedding, center.point, k, lambda picked: draft.journal.progress(picked, k, "rows"))


def _drawn(kind: str, have: int, k: int, spec: SelectSpec) -> list[int]:
    """Return the first k of a permutation: a smaller k keeps a part of what a larger one keeps."""
    return random.Random(f"select {kind} {spec.seed or 0}").sample(range(have), have)[:k]


def _kept(folder: Path, table: str, keep: Array) -> Iterator["pa.RecordBatch"]:
    import pyarrow as pa

    from cfsd.rows import batches

    position = 0
    for batch in batches(folder, table):
        yield batch.filter(pa.array(keep[position : position + batch.num_rows]))
        position += batch.num_rows
    assert position == len(keep), "the facts say how many rows there are"


def _write(folder: Path, table: str, kept: Iterable["pa.RecordBatch"]) -> None:
    from cfsd.rows import write_shard

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
    import pyarrow as pa

    return pa.Table.from_batches(batches).replace_schema_metadata(None)  # notes of a shard do not hold for its rows


def _target_facts(rows: Artifact, folder: Path) -> dict[str, JsonValue]:
    import pyarrow.compute as pc

    from cfsd.rows import batches

    counts: Counter[str] = Counter()
    for batch in batches(folder, "train", ["token_ids", "supervised"]):
        counts["train_rows"] += batch.num_rows
        counts["train_tokens"] += len(batch["token_ids"].flatten())
        counts["supervised_tokens"] += pc.sum(batch["supervised"].flatten()).as_py() or 0
    return {**rows.facts, **counts}


def _corpus_facts(rows: Artifact, folder: Path) -> dict[str, JsonValue]:
    """Return the facts of the chosen rows. Of those before, words (how rows were sampled) stay, and counts do not."""
    from cfsd.corpus_table import corpus_facts

    before: Any = rows.facts
    words: dict[str, JsonValue] = {k: v for k, v in before.items() if isinstance(v, str | bool) or k == "top_logprobs"}
    facts: Any = corpus_facts(folder)
    found: dict[str, JsonValue] = words | facts | {"accepted_fraction": facts["rows"] / before["rows"]}
    if "mean_logprob" in facts and "mean_logprob" in before:
        found["mean_logprob_shift"] = facts["mean_logprob"] - before["mean_logprob"]
    return found
