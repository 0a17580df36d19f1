"""Sampled rows as the corpus table, and the metadata of such a table: counts, shares, mean log-probability."""

import json
from collections import Counter
from collections.abc import Mapping
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
REASONING = ("<think>", "</think>")  # around what a model thinks before it answers, as DeepSeek-R1 and Qwen3 write it


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
    if "topk_ids" in schema.names:
        tops = [row.top for row in rows if row.top is not None]
        columns |= {
            "topk_ids": [top.ids.ravel() for top in tops],
            "topk_logprobs": [top.logprobs.ravel().astype(np.float16) for top in tops],
            "rest_logprob": [top.rest for top in tops],
            "tail_ids": [top.tail_ids.ravel() for top in tops],
            "tail_logprobs": [top.tail_logprobs.ravel().astype(np.float16) for top in tops],
        }
    arrays = {field.name: pa.array(columns[field.name], type=field.type, from_pandas=True) for field in schema}
    return pa.table(arrays, schema=schema)  # from_pandas: nan is null


def sampled_per_row(logprobs: pa.ListArray) -> NDArray[Any]:
    """Return how many tokens of each row were sampled."""
    row_T = pc.list_parent_indices(logprobs).to_numpy()
    return np.bincount(row_T[np.asarray(logprobs.flatten().is_valid())], minlength=len(logprobs))


def sampled_sums(shard: Path) -> tuple[int, float]:
    """Return how many tokens of one shard were sampled, and the sum of their log-probabilities, in nats."""
    logprobs = pc.list_flatten(pq.read_table(shard, columns=["logprobs"])["logprobs"])
    return len(logprobs) - logprobs.null_count, pc.sum(logprobs.cast(pa.float64())).as_py() or 0.0


def corpus_metadata(folder: Path) -> dict[str, JsonValue]:
    """Return the counts of a corpus, its mean log-probability in nats per token, and the notes of its shards.

    `reasoning` and `unfinished`, of a model that thinks: in how many rows it does, and in how many without an end.
    """
    rows, tokens, thought = Counter[str](), Counter[str](), Counter[str]()
    ended, nats = 0, 0.0
    for batch in batches(folder, "corpus", ["source", "logprobs", "finish_reason", "text"]):
        counts = sampled_per_row(batch["logprobs"])
        for source in pc.unique(batch["source"]).to_pylist():
            own = np.asarray(pc.equal(batch["source"], source))
            rows[source] += int(own.sum())
            tokens[source] += int(counts[own].sum())
        nats += pc.sum(batch["logprobs"].flatten().cast(pa.float64())).as_py() or 0.0
        thought += _reasoning(batch["text"])
        ended += pc.sum(pc.equal(batch["finish_reason"], "eos")).as_py() or 0
    metadata: dict[str, JsonValue] = {"rows": rows.total(), "tokens": tokens.total(), **thought, **_notes(folder)}
    if tokens.total():
        metadata |= {"mean_logprob": nats / tokens.total(), "ended_fraction": ended / rows.total()}
    if len(tokens) > 1:
        metadata["token_fractions"] = {source: count / tokens.total() for source, count in tokens.items()}
    return metadata


def _reasoning(texts: pa.StringArray) -> Counter[str]:
    opened, closed = REASONING
    thoughts = [text for text in texts.filter(pc.match_substring(texts, opened)).to_pylist() if text]
    unfinished = sum(text.rfind(opened) > text.rfind(closed) for text in thoughts)
    return Counter({"reasoning": len(thoughts), "unfinished": unfinished}) if thoughts else Counter()


def _notes(folder: Path) -> dict[str, JsonValue]:
    """Return how many parts shards were sampled in for want of memory, and the rows of a server that were dropped."""
    halved: dict[str, JsonValue] = {}
    dropped = Counter[str]()
    for path in shards(folder, "corpus"):
        notes = pq.read_schema(path).metadata or {}
        if HALVED in notes:
            halved[path.stem.rsplit("-", 1)[1]] = int(notes[HALVED])
        dropped.update(json.loads(notes.get(DROPPED, b"{}")))
    lost = f"{dropped.total()} rows were dropped, which the server did not give whole" if dropped else ""
    noted: dict[str, JsonValue] = {"halved_shards": halved, "dropped_rows": dict(dropped), "approximate": lost}
    return {name: counts for name, counts in noted.items() if counts}
