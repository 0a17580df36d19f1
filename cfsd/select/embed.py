"""Stage embed: each row of a table as one vector, the mean of the base's last hidden states over the row's tokens.

The last hidden state is what the model's head reads, after the final norm. The paper that selects by such vectors
(openreview pxfpGbeVx2, section on proxy encoders) takes what an encoder gives to its classifier; this is the same
place in a language model. `embedding.npy`, float32 [rows, width], grows block by block; finished blocks are kept.
"""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from cfsd.errors import NotFinite
from cfsd.machine import Machine
from cfsd.model.batching import arrange, pad
from cfsd.model.decoder import decoder_of
from cfsd.model.loading import load_for_measuring
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.digests import write_json
from cfsd.store.tables import blocks, num_rows

Array = np.ndarray[Any, Any]

EMBEDDING = "embedding.npy"
MARK = ".embedded.json"  # how many rows are safely on the disk
BLOCK = 128  # rows between two marks: what a kill can cost


def embed(base: Artifact, rows: Artifact, table: str, draft: Draft, machine: Machine) -> None:
    """Write one vector per row of `table` of `rows`, in order. Raises NotFinite naming the rows."""
    machine.settle()
    folder, mark, path = draft.store.path(rows), draft.folder / MARK, draft.folder / EMBEDDING
    model = load_for_measuring(draft.store, base, machine.resolved_device())
    head: Any = model.get_output_embeddings()
    total, width = num_rows(folder, table), int(head.weight.shape[1])
    done = int(json.loads(mark.read_text())["rows"]) if mark.exists() else 0
    # Not through a memory map: on a full disk that ends in SIGBUS, this in an error.
    with path.open("r+b" if done else "wb") as file:
        header: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (total, width)}
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(done * width * 4, os.SEEK_CUR)
        for first, block in blocks(folder, table, ["token_ids"], BLOCK):
            if first < done:
                continue
            vectors = _means(model, block["token_ids"].to_pylist(), width, machine.micro_batch_tokens)
            done = first + len(vectors)
            if not np.isfinite(vectors).all():
                raise NotFinite(
                    f"the base gives NaN or infinite hidden states for rows {first} to {done - 1} of {table}"
                )
            file.write(vectors.astype("<f4").tobytes())
            file.flush()
            os.fsync(file.fileno())
            write_json(mark, {"rows": done})
            draft.journal.progress(done, total, "rows")
    draft.metadata |= {"rows": total, "width": width}


def open_embedding(folder: Path) -> Array:
    """Return the vectors in `folder` as a memory map, float32 [rows, width]."""
    vectors: Array = np.load(folder / EMBEDDING, mmap_mode="r", allow_pickle=False)
    return vectors


def _means(model: PreTrainedModel, rows: list[list[int]], width: int, max_tokens: int) -> Array:
    """Return the mean hidden state of each row; padding is known by length. B rows, T tokens, D numbers."""
    means = np.empty((len(rows), width), dtype=np.float32)
    backbone: Any = decoder_of(model)
    with torch.inference_mode():
        for group in arrange([len(row) for row in rows], max_tokens):
            token_ids_BT = pad([rows[i] for i in group]).to(model.device)
            length_B1 = torch.tensor([[len(rows[i])] for i in group], device=model.device)
            padding_BT = torch.arange(token_ids_BT.shape[1], device=model.device) >= length_B1
            states_BTD = backbone(input_ids=token_ids_BT, use_cache=False).last_hidden_state.float()
            sums_BD = states_BTD.masked_fill(padding_BT[:, :, None], 0).sum(1)
            means[group] = (sums_BD / length_B1).cpu().numpy()
    return means
