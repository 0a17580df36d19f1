"""The base's distributions as stored with each corpus row, on the disk and read a few rows at a time.

T tokens of a row, K stored likeliest tokens, S samples of the others, M tokens that count.
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfsd.errors import StoreError
from cfsd.store.tables import batches, shards
from cfsd.train.loss.token_loss import Stored

TOP = ("topk_ids", "topk_logprobs", "rest_logprob")
TAIL = ("tail_ids", "tail_logprobs")
FILE = "corpus.arrow"


def lay_out(corpus: Path, scratch: Path, *, top: bool) -> None:
    """Write the columns of a corpus as an uncompressed file into `scratch`; without `top` only the sampled tokens'.

    Parquet cannot give row 7 of a million without its neighbours, and a training takes rows in a shuffled order.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    known = pq.read_schema(shards(corpus, "corpus")[0]).names
    wanted = ["token_ids", "logprobs", *((*TOP, *(name for name in TAIL if name in known)) if top else ())]
    parts = batches(corpus, "corpus", wanted)
    first = next(parts)
    with pa.OSFile(str(scratch / FILE), "wb") as sink, pa.ipc.new_file(sink, first.schema) as writer:
        for part in chain([first], parts):
            writer.write_batch(part)


class StoredDistributions:
    """The file of `lay_out`, mapped into memory: only the pages that are read are loaded."""

    def __init__(self, scratch: Path, corpus: Path | None = None) -> None:
        """Open what was laid out in `scratch` from `corpus`."""
        self.corpus = corpus
        self._table = pa.ipc.open_file(pa.memory_map(str(scratch / FILE))).read_all()

    def at(self, rows: Sequence[tuple[int | None, list[int], list[bool]]]) -> Stored:
        """Return what is stored at the tokens that count, for rows given as (corpus_row, token_ids, supervised).

        Raises StoreError when the tokens are others than the corpus has there.
        """
        parts = {name: [values[:0]] for name, values in self._row(0).items()}
        for place, token_ids, supervised in rows:
            row = {} if place is None else self._row(place)
            if not row or row["token_ids"].tolist() != token_ids:
                raise StoreError(f"row {place} of the corpus is not the mixture's: it was mixed from another corpus")
            for name, values in row.items():
                parts[name].append(values[np.asarray(supervised, bool)])
        stored = {name: np.concatenate(part) for name, part in parts.items()}
        sampled_M = torch.from_numpy(stored["logprobs"])
        if "topk_ids" not in stored:
            none_MK = torch.zeros(len(sampled_M), 0)
            return Stored(none_MK.int(), none_MK, torch.zeros(len(sampled_M)), sampled_M)
        top, tail = ([_tensor(stored[name]) for name in names if name in stored] for names in (TOP, TAIL))
        return Stored(*[*top, sampled_M, *tail])

    def _row(self, place: int) -> dict[str, NDArray[Any]]:
        """Return each column's values in one row, (T,), (T, K) or (T, S); a null is NaN."""
        columns = {name: self._table[name][place].values for name in self._table.column_names}
        row = {name: values.to_numpy(zero_copy_only=False) for name, values in columns.items()}
        length = len(row["token_ids"])
        wide = {*TOP[:2], *TAIL}
        return {name: row[name].reshape(length, -1) if name in wide else row[name] for name in row}


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(values.astype(np.int32) if values.dtype.kind == "u" else values)  # no index is unsigned
