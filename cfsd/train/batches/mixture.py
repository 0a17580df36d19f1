"""A mixture in memory: five bytes per token and 22 per row, with weights per token nine and 30. R rows, T tokens."""

from array import array
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cfsd.store.tables import batches, shards
from cfsd.train.batches.micro_batches import Row


class MixtureRows:
    """The rows of a mixture, each made from flat arrays when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the `mixture` table in `folder`."""
        codes: dict[str, int] = {}
        # They grow in place; to join as many NumPy arrays would take twice the memory.
        ids_T, supervised_T, ends_R = array("i"), array("b"), array("q", [0])
        counts_R, weight_R, source_R = array("q"), array("f"), array("h")
        token_weight_T, weight_ends_R = array("f"), array("q", [0])
        names = ["source", "token_ids", "supervised", "weight"]
        self._per_token = "token_weights" in pq.read_schema(shards(folder, "mixture")[0]).names
        for batch in batches(folder, "mixture", [*names, "token_weights"] if self._per_token else names):
            flags = batch["supervised"].flatten().to_numpy(zero_copy_only=False)
            row_T = pc.list_parent_indices(batch["supervised"]).to_numpy()
            lengths = pc.list_value_length(batch["token_ids"]).to_numpy()
            ids_T.frombytes(batch["token_ids"].flatten().to_numpy().tobytes())
            supervised_T.frombytes(flags.tobytes())
            ends_R.frombytes((ends_R[-1] + lengths.cumsum(dtype=np.int64)).tobytes())
            counts_R.frombytes(np.bincount(row_T[flags], minlength=batch.num_rows).tobytes())
            weight_R.frombytes(batch["weight"].to_numpy().tobytes())
            if self._per_token:
                token_weight_T.frombytes(batch["token_weights"].flatten().to_numpy().tobytes())
                lengths = pc.fill_null(pc.list_value_length(batch["token_weights"]), 0).to_numpy()
                weight_ends_R.frombytes((weight_ends_R[-1] + lengths.cumsum(dtype=np.int64)).tobytes())
            source_R.extend(codes.setdefault(name, len(codes)) for name in batch["source"].to_pylist())
        self._ids_T, self._supervised_T = np.asarray(ids_T), np.asarray(supervised_T).view(np.bool_)
        self._ends_R, self._weight_R, self._source_R = ends_R, weight_R, source_R
        self._token_weight_T, self._weight_ends_R = np.asarray(token_weight_T), weight_ends_R
        self._names, self._counts_R = list(codes), counts_R

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._source_R)

    def __getitem__(self, index: int) -> Row:
        """Return one row."""
        tokens = slice(self._ends_R[index], self._ends_R[index + 1])
        return Row(
            self._names[self._source_R[index]],
            self._ids_T[tokens].tolist(),
            self._supervised_T[tokens].tolist(),
            self._weight_R[index],
            self._token_weights(index),
        )

    def _token_weights(self, index: int) -> list[float] | None:
        if not self._per_token or self._weight_ends_R[index] == self._weight_ends_R[index + 1]:
            return None
        weights: list[float] = self._token_weight_T[slice(*self._weight_ends_R[index : index + 2])].tolist()
        return weights

    def first_rehearsal_row(self) -> int:
        """Return how many rows the target has; the corpus' row j is row j + this of the mixture."""
        return sum(self._names[code] == "target" for code in self._source_R)

    def lengths(self) -> list[int]:
        """Return how many tokens every row has."""
        lengths: list[int] = np.diff(np.asarray(self._ends_R)).tolist()
        return lengths

    def sources(self) -> list[str]:
        """Return the source of every row."""
        return [self._names[code] for code in self._source_R]

    def supervised_tokens(self) -> list[int]:
        """Return how many tokens of every row count in a loss."""
        return self._counts_R.tolist()
