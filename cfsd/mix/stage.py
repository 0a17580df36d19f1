"""Stage mix: target rows and rehearsal rows as one table, written as they are read."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import JsonValue

from cfsd.mix.flow_weights import Weights, flow_weights
from cfsd.mix.spec import MixSpec
from cfsd.store.artifact import Draft
from cfsd.store.tables import BATCHES, SEQUENCE, TableWriter, batches, count_true, mixture_schema, num_rows

SHARD_BYTES = 16 << 20  # of one shard, about; no more waits in memory

Columns = list[pa.Array]


def mix(target: Path, corpus: Path, spec: MixSpec, draft: Draft, losses: Path | None = None) -> None:
    """Write the `mixture` table: target rows first, then the corpus, each supervised where its loss lies.

    BATCHES beside it says what a global batch holds and in which order, for training. In the metadata alone that
    would not count in the content, and training with other batches be taken for cached.
    Of a corpus row the tokens that have a log-probability count: sampled ones, not prompt tokens. Log-probabilities
    themselves stay in the corpus, where `corpus_row` finds them. With FLOW, and only then, there are `losses` of the
    base on the target rows, from which they (or their tokens) get weights; rehearsal rows weigh 1.
    Raises BadInput, see `flow_weights`.
    """
    done, total = 0, num_rows(target, "train") + num_rows(corpus, "corpus")
    rows, tokens = Counter[str](), Counter[str]()  # by source
    assert losses or spec.flow == "off", "FLOW weighs rows by the base's losses"
    weights = flow_weights(losses, spec) if losses else None
    writer = TableWriter(draft.folder, "mixture", max_bytes=SHARD_BYTES)
    for batch in _mixed(target, corpus, weights):
        counts = pa.table({"source": batch["source"], "tokens": count_true(batch["supervised"])}).group_by("source")
        for part in counts.aggregate([("tokens", "count"), ("tokens", "sum")]).to_pylist():
            rows[part["source"]] += part["tokens_count"]
            tokens[part["source"]] += part["tokens_sum"]
        writer.add(batch)
        done += batch.num_rows
        draft.journal.progress(done, total, "rows")
    writer.close()
    asked = _batches(spec, rehearses=rows.total() > rows["target"])
    (draft.folder / BATCHES).write_text(json.dumps(asked))
    draft.metadata |= _metadata(rows, tokens) | asked | _weight_metadata(spec, weights)


def _mixed(target: Path, corpus: Path, weights: Weights | None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of both in the form of the mixture."""
    names = [name for name, _ in SEQUENCE]
    schema = mixture_schema(token_weights=weights is not None and weights.token_N is not None)

    def mixed(batch: pa.RecordBatch, *added: pa.Array) -> pa.RecordBatch:
        columns = [*(batch[name] for name in names), *added]
        return pa.record_batch(columns[: len(schema)], schema=schema)

    row = 0
    for batch in batches(target, "train", [*names, "supervised"]):
        weighed = _weighed(batch, weights, row) if weights else _all_one(batch.num_rows)
        yield mixed(batch, pa.nulls(batch.num_rows, pa.int64()), batch["supervised"], *weighed)
        row += batch.num_rows
    row = 0
    for batch in batches(corpus, "corpus", [*names, "logprobs"]):
        sampled = lists_like(batch["logprobs"], batch["logprobs"].flatten().is_valid())
        yield mixed(batch, pa.array(range(row, row + batch.num_rows)), sampled, *_all_one(batch.num_rows))
        row += batch.num_rows


def lists_like(lists: pa.ListArray, values: pa.Array) -> pa.ListArray:
    """Return `values` cut into lists of the same lengths."""
    lengths = pc.list_value_length(lists).to_numpy()
    return pa.ListArray.from_arrays(pa.array(np.r_[0, lengths].cumsum(dtype=np.int32)), values)


def _all_one(rows: int) -> Columns:
    return [pa.array(np.ones(rows, np.float32)), pa.nulls(rows, pa.list_(pa.float32()))]


def _weighed(batch: pa.RecordBatch, weights: Weights, row: int) -> Columns:
    """Return the weights of the target's rows from `row` on, and of their tokens (0 where no loss lies)."""
    rows = slice(row, row + batch.num_rows)
    assert np.array_equal(weights.ids_R[rows], batch["row_id"].to_numpy()), "losses of another target"
    if weights.token_N is None:
        return [pa.array(weights.row_R[rows])]
    counted_T = batch["supervised"].flatten().to_numpy(zero_copy_only=False)
    weight_T = np.zeros(len(counted_T), np.float32)
    weight_T[counted_T] = weights.token_N[weights.ends_R[rows.start] : weights.ends_R[rows.stop]]
    return [pa.array(weights.row_R[rows]), lists_like(batch["supervised"], pa.array(weight_T))]


def _batches(spec: MixSpec, *, rehearses: bool) -> dict[str, JsonValue]:
    tokens = spec.rehearsal_tokens if rehearses else 0
    return {"batch_target_rows": spec.target_rows, "batch_rehearsal_tokens": tokens, "seed": spec.seed}


def _metadata(rows: Counter[str], tokens: Counter[str]) -> dict[str, JsonValue]:
    target_rows, target_tokens = rows.pop("target", 0), tokens.pop("target", 0)
    return {
        "target_rows": target_rows,
        "target_tokens": target_tokens,
        "rehearsal_rows": rows.total(),
        "rehearsal_tokens": tokens.total(),
        "rehearsal_rows_by_source": dict(rows),
        "rehearsal_tokens_by_source": dict(tokens),
    }


def _weight_metadata(spec: MixSpec, weights: Weights | None) -> dict[str, JsonValue]:
    if weights is None:
        return {}
    weight = weights.row_R if weights.token_N is None else weights.token_N
    return {
        "flow": spec.flow,
        "tau": weights.tau,
        "smallest_weight": float(weight.min()),
        "median_weight": float(np.median(weight)),
        "largest_weight": float(weight.max()),
    }
