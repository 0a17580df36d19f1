"""A mixture in memory, as Arrow columns: a little over four bytes per token, with weights per token twice that."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cfsd.errors import BadInput
from cfsd.store.tables import batches, count_true
from cfsd.train.batches.micro_batches import Row


class Mask(NamedTuple):
    """Which of the target's tokens are learned: those that `learned` says by the base's -log p of them in `losses`."""

    losses: Path
    learned: Callable[[Any], Any]


class MixtureRows:
    """The rows of a mixture, each made when it is asked for."""

    def __init__(self, folder: Path, corpus: Path | None = None, mask: Mask | None = None) -> None:
        """Read the `mixture` table in `folder`. One without the column `corpus_row` gets it from `corpus`.

        Tokens that `mask` leaves out are not supervised. Raises BadInput where it leaves none.
        """
        table = pa.Table.from_batches(batches(folder, "mixture"))
        if "corpus_row" not in table.column_names:
            table = table.append_column("corpus_row", pa.array(_places(table, corpus), pa.int64()))
        if mask:
            place = table.column_names.index("supervised")
            table = table.set_column(place, "supervised", _masked(table, mask))
        self._target_scale = _to_mean_one(table) if mask else 1.0
        encoded = pc.dictionary_encode(table["source"])
        self._table = table.drop_columns(["row_id", "source"]).append_column("source", encoded)

    def __len__(self) -> int:
        """Return the number of rows."""
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        row = {name: self._table[name][index] for name in self._table.column_names}
        weights, source = row.get("token_weights"), row["source"].as_py()
        return Row(
            source,
            _list(row["token_ids"]),
            _list(row["supervised"]),
            row["weight"].as_py() * (self._target_scale if source == "target" else 1.0),
            _list(weights) if weights is not None and weights.is_valid else None,
            row["corpus_row"].as_py(),
        )

    def lengths(self) -> list[int]:
        """Return how many tokens every row has."""
        lengths: list[int] = pc.list_value_length(self._table["token_ids"]).to_numpy().tolist()
        return lengths

    def sources(self) -> list[str]:
        """Return the source of every row."""
        sources: list[str] = self._table["source"].to_pylist()
        return sources

    def supervised_tokens(self) -> list[int]:
        """Return how many tokens of every row count in a loss."""
        counts: list[int] = np.concatenate([count_true(part) for part in self._table["supervised"].chunks]).tolist()
        return counts


def _list(scalar: Any) -> list[Any]:
    values: list[Any] = scalar.values.to_numpy(zero_copy_only=False).tolist()
    return values


def _places(mixture: pa.Table, corpus: Path | None) -> list[int | None]:
    parts = batches(corpus, "corpus", ["source", "row_id"]) if corpus else ()
    known = (key for part in parts for key in zip(part["source"].to_pylist(), part["row_id"].to_pylist(), strict=True))
    numbers = {key: number for number, key in enumerate(known)}
    keys = zip(mixture["source"].to_pylist(), mixture["row_id"].to_pylist(), strict=True)
    return [numbers.get(key) for key in keys]


def _to_mean_one(mixture: pa.Table) -> float:
    """Return what the target's weights are multiplied by, so that those of its supervised tokens are 1 on average."""
    rows = mixture.filter(pc.equal(mixture["source"], "target"))
    lengths = pc.list_value_length(rows["token_ids"]).to_numpy()
    counted = pc.list_flatten(rows["supervised"]).to_numpy(zero_copy_only=False)
    weights = np.repeat(rows["weight"].to_numpy().astype(np.float64), lengths)
    if "token_weights" in rows.column_names:
        weights *= pc.list_flatten(rows["token_weights"]).to_numpy()
    return float(counted.sum() / weights[counted].sum())


def _masked(mixture: pa.Table, mask: Mask) -> pa.Array:
    """Return the column `supervised` without the target's tokens that are left out; the target's rows come first."""
    losses = pa.Table.from_batches(batches(mask.losses, "losses", ["row_id", "token_nll"]))
    rows = losses.num_rows
    assert mixture["row_id"][:rows].to_pylist() == losses["row_id"].to_pylist(), "losses of another target"
    supervised = mixture["supervised"].combine_chunks()
    counted = supervised.flatten().to_numpy(zero_copy_only=False).copy()
    of_target = counted[: supervised.offsets[rows].as_py()]
    learned = mask.learned(pc.list_flatten(losses["token_nll"]).to_numpy().astype(np.float64))
    if not learned.any():
        raise BadInput(
            f"train.methods leave none of the target's {len(learned)} tokens to learn: the base finds all of them less "
            "likely than they allow; raise stm.threshold, or set it to 0"
        )
    of_target[of_target] = learned
    return pa.ListArray.from_arrays(supervised.offsets, pa.array(counted))
