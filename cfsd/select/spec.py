"""Settings of the select stage."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from cfsd.errors import BadInput
from cfsd.spec import Spec
from cfsd.store.artifact import Artifact

TABLES = {"target": "train", "corpus": "corpus"}  # the table that is selected from, by kind of artifact
COUNTS = {"target": "train_rows", "corpus": "rows"}  # the metadata that says how many rows it has


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

    def unread(self) -> dict[str, str]:
        """Return what has no effect where all rows are kept."""
        return {} if self.target_rows or self.corpus_rows else {"method": "target_rows or corpus_rows"}

    def wanted(self, kind: str) -> int | None:
        """Return how many rows of an artifact of `kind` are kept; None: all."""
        return self.target_rows if kind == "target" else self.corpus_rows

    def used_on(self, kind: str) -> "SelectSpec":
        """Return the spec without what does not matter for `kind`, so that it is not in the key."""
        unused = ["corpus_rows" if kind == "target" else "target_rows", *(["seed"] if self.method != "random" else [])]
        return self.model_copy(update=dict.fromkeys(unused))


def selects(spec: SelectSpec, rows: Artifact) -> bool:
    """Say whether `spec` leaves out any of `rows`. Raises BadInput when it wants more than there are.

    An artifact that is only planned does not say how many it has; one without rows, as the corpus of plain
    fine-tuning, stays as it is.
    """
    wanted, have = spec.wanted(rows.kind), rows.metadata.get(COUNTS[rows.kind])
    if wanted is None or have == 0 or wanted == have:
        return False
    if isinstance(have, int) and wanted > have:
        raise BadInput(
            f"select.{rows.kind}_rows is {wanted}, but the {rows.kind} has {have} rows to select from; "
            f"allowed: 1 to {have}, or nothing to keep them all"
        )
    return True
