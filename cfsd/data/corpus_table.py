"""Sampled rows as the corpus table, and the metadata of such a table: counts, shares, mean log-probability."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import JsonValue
from transformers import PreTrainedTokenizerBase

from cfsd.model.sample import Sample
from cfsd.store.tables import batches, shards

HALVED = b"halved"  # notes of a shard, in its Parquet metadata: they are not row values and not in the content digest
DROPPED = b"dropped"


def corpus_table(
    samples: Mapping[int, Sample],
    tokenizer: PreTrainedTokenizerBase,
    schema: pa.Schema,
    *,
    source: str,
    shard: int,
    seed: int,
) -> pa.Table:
    """Return `samples`, by row id, as rows of a corpus with the columns of `schema`."""
    rows = samples.values()
    columns: dict[str, Any] = {
        "row_id": list(samples),
        "source": [source] * len(rows),
        "token_ids": [row.token_ids for row in rows],
        "logprobs": [row.logprobs for row in rows],
        "finish_reason": [row.finish_reason for row in rows],
        "shard": [shard] * len(rows),
        "seed": [seed] * len(rows),
        "text": tokenizer.batch_decode([row.token_ids for row in rows]),
    }
    arrays = {name: pa.array(values, type=schema.field(name).type) for name, values in columns.items()}
    if "topk_ids" in schema.names:
        arrays |= _top_columns(rows, schema)
    return pa.table(arrays, schema=schema)


def _top_columns(samples: Iterable[Sample], schema: pa.Schema) -> dict[str, pa.Array]:
    tops = [s.top for s in samples if s.top is not None]
    counts = [len(top.rest) for top in tops]
    width = tops[0].ids.shape[1] if tops else 0
    parts = {
        "topk_ids": ([top.ids.ravel() for top in tops], width),
        "topk_logprobs": ([top.logprobs.ravel() for top in tops], width),
        "rest_logprob": ([top.rest for top in tops], 1),
    }
    return {name: _lists(values, counts, times, schema.field(name).type) for name, (values, times) in parts.items()}


def _lists(values: list[Any], counts: list[int], times: int, kind: pa.DataType) -> pa.Array:
    """Return one list per row; nan becomes null."""
    flat = np.concatenate(values) if values else np.empty(0, dtype=np.float32)
    missing = np.isnan(flat) if flat.dtype.kind == "f" else None
    numbers = flat.astype(kind.value_type.to_pandas_dtype())
    offsets = np.concatenate([[0], np.cumsum(counts)]) * times
    return pa.ListArray.from_arrays(
        pa.array(offsets, type=pa.int32()), pa.array(numbers, type=kind.value_type, mask=missing)
    )


def sampled_per_row(logprobs: pa.ListArray) -> NDArray[Any]:
    """Return how many tokens of each row were sampled."""
    known = np.concatenate([[0], np.cumsum(np.asarray(logprobs.flatten().is_valid()))])
    offsets = np.asarray(logprobs.offsets) - logprobs.offsets[0].as_py()
    counts: NDArray[Any] = known[offsets[1:]] - known[offsets[:-1]]
    return counts


def sampled_sums(shard: Path) -> tuple[int, float]:
    """Return how many tokens of one shard were sampled, and the sum of their log-probabilities, in nats."""
    chunks = [chunk.flatten() for chunk in pq.read_table(shard, columns=["logprobs"])["logprobs"].chunks]
    nats = sum(pc.sum(chunk.cast(pa.float64())).as_py() or 0.0 for chunk in chunks)
    return sum(len(chunk) - chunk.null_count for chunk in chunks), nats


def corpus_metadata(folder: Path) -> dict[str, JsonValue]:
    """Return the counts of a corpus, its mean log-probability in nats per token, and the notes of its shards."""
    rows, tokens = Counter[str](), Counter[str]()
    ended, nats = 0, 0.0
    for batch in batches(folder, "corpus", ["source", "logprobs", "finish_reason"]):
        counts = sampled_per_row(batch["logprobs"])
        for source in pc.unique(batch["source"]).to_pylist():
            own = np.asarray(pc.equal(batch["source"], source))
            rows[source] += int(own.sum())
            tokens[source] += int(counts[own].sum())
        nats += pc.sum(batch["logprobs"].flatten().cast(pa.float64())).as_py() or 0.0
        ended += pc.sum(pc.equal(batch["finish_reason"], "eos")).as_py() or 0
    metadata: dict[str, JsonValue] = {"rows": rows.total(), "tokens": tokens.total()}
    if tokens.total():
        metadata |= {"mean_logprob": nats / tokens.total(), "ended_fraction": ended / rows.total()}
    if len(tokens) > 1:
        metadata["token_fractions"] = {source: count / tokens.total() for source, count in tokens.items()}
    return metadata | _notes(folder)


def _notes(folder: Path) -> dict[str, JsonValue]:
    """Return which shards were sampled in how many parts for want of memory, and which rows a server lost."""
    halved: dict[str, JsonValue] = {}
    dropped = Counter[str]()
    for path in shards(folder, "corpus"):
        notes = pq.read_schema(path).metadata or {}
        if HALVED in notes:
            halved[path.stem.rsplit("-", 1)[1]] = int(notes[HALVED])
        dropped.update(json.loads(notes.get(DROPPED, b"{}")))
    notes_of_all: dict[str, JsonValue] = {"halved_shards": halved} if halved else {}
    return notes_of_all | ({"dropped_rows": dict(dropped)} if dropped else {})
