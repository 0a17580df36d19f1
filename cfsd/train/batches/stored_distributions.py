"""The base's distributions as stored with each corpus row, on the disk and read a few rows at a time.

R rows, T tokens of the corpus, K stored likeliest tokens, M tokens that count.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from cfsd.errors import StoreError
from cfsd.store.digests import write_json
from cfsd.store.tables import batches
from cfsd.train.loss.token_loss import Stored

TOP = ("topk_ids", "topk_logprobs", "rest_logprob")
SHAPE = "shape.json"


def lay_out(corpus: Path, scratch: Path, *, top: bool) -> None:
    """Write the columns of a corpus as flat files into `scratch`; without `top` only the sampled tokens' part.

    Parquet cannot give row 7 of a million without its neighbours, and a training takes rows in a shuffled order.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    names = ["token_ids", "logprobs", *(TOP if top else ())]
    kinds: dict[str, str] = {}
    lengths: list[NDArray[Any]] = [np.zeros(1, np.int64)]
    with ExitStack() as files:
        opened = {name: files.enter_context((scratch / name).open("wb")) for name in names}
        for batch in batches(corpus, "corpus", names):
            lengths.append(pc.list_value_length(batch["token_ids"]).to_numpy().astype(np.int64))
            for name, file in opened.items():
                values = batch[name].flatten().to_numpy(zero_copy_only=False)  # a null becomes NaN
                kinds[name] = values.dtype.name
                file.write(values.tobytes())
    np.save(scratch / "ends.npy", np.concatenate(lengths).cumsum())
    write_json(scratch / SHAPE, kinds)


class StoredDistributions:
    """The flat files of `lay_out`, mapped into memory: only the pages that are read are loaded."""

    def __init__(self, scratch: Path, corpus: Path | None = None) -> None:
        """Open what was laid out in `scratch` from `corpus`."""
        self.corpus = corpus
        kinds: dict[str, str] = json.loads((scratch / SHAPE).read_text())
        self.ends_R = np.load(scratch / "ends.npy")
        self.flat: dict[str, NDArray[Any]] = {}
        for name, kind in kinds.items():
            column = np.memmap(scratch / name, kind, mode="r")
            self.flat[name] = column.reshape(self.ends_R[-1], -1) if name.startswith("topk") else column

    def at(self, rows: Sequence[tuple[int | None, list[int], list[bool]]]) -> Stored:
        """Return what is stored at the tokens that count, for rows given as (corpus_row, token_ids, supervised).

        Raises StoreError when the tokens are others than the corpus has there.
        """
        parts: dict[str, list[NDArray[Any]]] = {name: [] for name in self.flat if name != "token_ids"}
        for place, token_ids, supervised in rows:
            tokens = slice(0, 0) if place is None else slice(self.ends_R[place], self.ends_R[place + 1])
            if self.flat["token_ids"][tokens].tolist() != token_ids:
                raise StoreError(f"row {place} of the corpus is not the mixture's: it was mixed from another corpus")
            counted = np.asarray(supervised, bool)
            for name, part in parts.items():
                part.append(np.asarray(self.flat[name][tokens])[counted])
        sampled_M = _tensor(parts["logprobs"], 0)
        if "topk_ids" not in parts:
            none_MK = torch.zeros(len(sampled_M), 0)
            return Stored(none_MK.int(), none_MK, torch.zeros(len(sampled_M)), sampled_M)
        width = self.flat["topk_ids"].shape[1]
        top = [_tensor(parts[name], width if name.startswith("topk") else 0) for name in TOP]
        return Stored(top[0], top[1], top[2], sampled_M)


def _tensor(parts: list[NDArray[Any]], width: int) -> torch.Tensor:
    """Join the parts; no part at all is an empty tensor of the right shape."""
    whole = np.concatenate(parts) if parts else np.zeros((0, width) if width else 0, np.float32)
    return torch.from_numpy(
        whole.astype(np.int32) if whole.dtype == np.uint16 else whole
    )  # torch cannot index by these
