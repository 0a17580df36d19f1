"""How near the stored forms of the divergence come to the whole of it, and what they take on the disk.

N tokens, V vocabulary, K stored likeliest tokens.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from benchmarks._training_bench import LEARNING_RATE, Answer, Bench, request_of
from cfsd.model.head import Head
from cfsd.model.loading import load_model
from cfsd.store.tables import corpus_schema, read_rows, shard_path, shards, write_shard
from cfsd.train.loss.token_loss import Reference, Stored, token_losses
from cfsd.train.spec import TrainSpec
from cfsd.train.trainer import fit

TOPS = (16, 64, 256)
MOVED = "moved"


def tuned(data: Path) -> Answer:
    """Fine-tune on the target alone, one epoch: the model whose divergence from the base is measured."""
    bench, folder = Bench.at(data), data / "runs" / MOVED
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"learning_rate": LEARNING_RATE, "precision": "float32", "seed": 0, "rehearsal": {"weight": 0}}
    return dict(fit(folder, request_of(bench, TrainSpec.model_validate(spec))))


@torch.inference_mode()
def tail(data: Path) -> Answer:
    """Return for each k and form its ratio to the whole divergence, over tokens, with the standard error over rows."""
    bench = Bench.at(data)
    folder, moved = bench.store.path(bench.base), data / "runs" / MOVED
    base, model = (load_model(place, "cpu", "float32").eval() for place in (folder, moved))
    tops = [k for k in TOPS if k <= base.config.vocab_size]
    rows = read_rows(bench.store.path(bench.probe), "corpus")
    sums: dict[str, list[float]] = {}
    for row in rows:
        for name, loss_N in _forms(base, model, row, tops).items():
            sums.setdefault(name, []).append(loss_N.double().sum().item())
    tokens = sum(sum(value is not None for value in row["logprobs"]) for row in rows)
    whole = np.asarray(sums.pop("whole"))
    forms = {name: _ratio(np.asarray(values), whole) for name, values in sums.items()}
    stored = bench.store.path(bench.probe)
    sizes = {k: _bytes(stored, data, k, base.config.vocab_size) / tokens for k in (0, *tops)}
    return {"forms": forms, "bytes_per_token": sizes, "nats_per_token": whole.sum() / tokens, "rows": len(rows)}


def _forms(base: Any, model: Any, row: dict[str, Any], tops: list[int]) -> dict[str, Tensor]:
    """Return the losses of the row's sampled tokens: whole, and as stored with each k and either tail."""
    ids_T = torch.tensor(row["token_ids"])
    at = [t for t, value in enumerate(row["logprobs"]) if value is not None]
    before_N, next_N = torch.tensor(at) - 1, ids_T[at]
    base_NV, model_NV = (
        distribution(input_ids=ids_T[None], use_cache=False).logits[0, before_N] for distribution in (base, model)
    )
    ones_N = torch.ones(len(at))

    def loss(reference: Reference) -> Tensor:
        return token_losses(model_NV, Head(None), next_N, ones_N, reference).loss_N

    found = {"whole": loss(Reference(hidden_MD=base_NV))}
    for k in tops:
        stored = _first(row, at, k, base.config.vocab_size)
        for form in ("sampled", "bucket"):
            found[f"{form} {k}"] = loss(Reference(stored=stored, tail=form))
    return found


def _first(row: dict[str, Any], at: list[int], k: int, vocabulary: int) -> Stored:
    """Return what would be stored with only the first `k` of the row's likeliest tokens."""
    width = len(row["topk_ids"]) // len(row["token_ids"])
    spans = [slice(t * width, t * width + min(width, vocabulary)) for t in at]  # a small vocabulary does not fill it
    ids_NK, logprobs_NK = (torch.tensor([row[name][span] for span in spans]) for name in ("topk_ids", "topk_logprobs"))
    rest_N = torch.tensor([row["rest_logprob"][t] for t in at])
    sampled_N = torch.tensor([row["logprobs"][t] for t in at])
    left_N = torch.cat([logprobs_NK[:, k:], rest_N[:, None]], 1).logsumexp(1)
    return Stored(ids_NK[:, :k], logprobs_NK[:, :k], left_N, sampled_N)


def _ratio(part: Any, whole: Any) -> dict[str, float]:
    """Return the ratio of two sums over rows and its standard error, by the delta method."""
    ratio = part.sum() / whole.sum()
    spread = ((part - ratio * whole) ** 2).sum() * len(whole) / max(1, len(whole) - 1)
    return {"ratio": float(ratio), "error": math.sqrt(spread) / float(whole.sum())}


def _bytes(stored: Path, data: Path, k: int, vocabulary: int) -> int:
    """Return the size of the table when it keeps `k` likeliest tokens."""
    table = pa.concat_tables([pq.read_table(path) for path in shards(stored, "corpus")])
    schema = corpus_schema(k, vocabulary)
    kept = {name: table[name] for name in schema.names if not name.startswith("topk")}
    for name in (name for name in schema.names if name.startswith("topk")):
        lists = [_prefixes(entry, len(ids), k) for entry, ids in _pairs(table, name)]
        kept[name] = pa.array(lists, type=schema.field(name).type)
    if k:
        kept["rest_logprob"] = table["rest_logprob"]
    write_shard(data, f"top{k}", 0, pa.table(kept, schema=schema))
    return shard_path(data, f"top{k}", 0).stat().st_size


def _pairs(table: pa.Table, name: str) -> Any:
    return zip(table[name].to_pylist(), table["token_ids"].to_pylist(), strict=True)


def _prefixes(values: list[Any], length: int, k: int) -> list[Any]:
    """Return the first `k` entries of each of `length` positions."""
    width = len(values) // length
    return [value for t in range(length) for value in values[t * width : t * width + k]]
