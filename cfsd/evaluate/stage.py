"""Stage evaluate: what a model scores on benchmarks, texts, held-out rows; its divergence from the base."""

from typing import Any

import pyarrow as pa

from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.divergence import divergences, target_divergence
from cfsd.evaluate.harness.score import score
from cfsd.evaluate.perplexity import text_likelihoods
from cfsd.evaluate.text import Text
from cfsd.machine import Machine
from cfsd.model.batching import tokens_that_fit
from cfsd.model.likelihood import score_responses
from cfsd.model.loading import load_for_measuring, load_tokenizer, read_start_token
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import DIVERGENCE, RESPONSES, read_rows, table_of, write_shard


def score_benchmark(model: Artifact, benchmark: Benchmark, draft: Draft, machine: Machine) -> None:
    """Write one row per document as the `scores` table; the facts say what the values mean."""
    machine.settle()
    loaded = load_for_measuring(draft.store, model, machine.resolved_device())
    tokenizer = load_tokenizer(draft.store.path(model))

    def progress(done: int, total: int) -> None:
        draft.journal.progress(done, total, "requests")

    most = tokens_that_fit(loaded, machine)
    scores = score(loaded, tokenizer, benchmark, max_tokens=most, on_progress=progress)
    write_shard(draft.folder, "scores", 0, pa.Table.from_pandas(scores.rows, preserve_index=False))
    draft.metadata |= {"benchmark": benchmark.name, **scores.metadata}
    draft.journal.metrics(0, {f"eval/{benchmark.name}/{scores.metadata['metric']}": float(scores.metadata["score"])})


def score_text(model: Artifact, text: Text, draft: Draft, machine: Machine) -> None:
    """Write each document's negative log-likelihood as the `texts` table."""
    machine.settle()
    loaded = load_for_measuring(draft.store, model, machine.resolved_device())
    folder = draft.store.path(model)

    def progress(done: int, total: int) -> None:
        draft.journal.progress(done, total, "windows")

    start = read_start_token(folder)
    found = text_likelihoods(loaded, load_tokenizer(folder), text, start, machine.micro_batch_tokens, progress)
    records = [document._asdict() for document in found]
    write_shard(draft.folder, "texts", 0, pa.Table.from_pylist(records))
    sums = {name: sum(record[name] for record in records) for name in ("nll", "tokens", "bytes")}
    loss = {"nats_per_token": sums["nll"] / sums["tokens"], "nats_per_byte": sums["nll"] / sums["bytes"]}
    draft.metadata |= {
        "text": text.name,
        "documents": len(records),
        "tokens": sums["tokens"],
        "bytes": sums["bytes"],
    } | loss
    draft.journal.metrics(0, {f"eval/{text.name}/{name}": value for name, value in loss.items()})


def score_target(model: Artifact, target: Artifact, max_rows: int | None, draft: Draft, machine: Machine) -> None:
    """Write the loss and the greedily correct tokens of each held-out response as the `responses` table."""
    machine.settle()
    loaded = load_for_measuring(draft.store, model, machine.resolved_device())
    rows = read_rows(draft.store.path(target), "held_out")[:max_rows]

    def progress(done: int) -> None:
        draft.journal.progress(done, len(rows), "rows")

    records = score_responses(loaded, rows, machine.micro_batch_tokens, progress)
    write_shard(draft.folder, "responses", 0, table_of(RESPONSES, records))
    tokens = sum(record["count"] for record in records)
    exact = sum(record["correct"] == record["count"] for record in records) / len(records)
    loss = sum(record["nll"] for record in records) / tokens
    draft.metadata |= {"rows": len(records), "tokens": tokens, "loss": loss, "accuracy": exact}
    draft.journal.metrics(0, {"target/loss": loss, "target/accuracy": exact})


def score_probe(base: Artifact, tuned: Artifact, probe: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the divergence of each probe row as the `divergence` table, and the mean per token as a fact."""
    machine.settle()
    device = machine.resolved_device()
    models = [load_for_measuring(draft.store, model, device) for model in (base, tuned)]
    rows = read_rows(draft.store.path(probe), "corpus", ["row_id", "token_ids"])

    def progress(done: int) -> None:
        draft.journal.progress(done, len(rows), "rows")

    token_rows = [row["token_ids"] for row in rows]
    found = divergences(models[0], models[1], token_rows, machine.micro_batch_tokens, progress)
    records: list[dict[str, Any]] = []
    for row, part in zip(rows, found, strict=True):
        sums = part._asdict()
        records.append({"row_id": row["row_id"], "count": sums.pop("num_tokens"), **sums})
    records.sort(key=lambda record: record["row_id"])
    write_shard(draft.folder, "divergence", 0, table_of(DIVERGENCE, records))
    tokens = sum(record["count"] for record in records)
    means = {k: sum(record[k] for record in records) / tokens for k in ("kl", "sampled")}
    draft.metadata |= {
        "rows": len(records),
        "tokens": tokens,
        "probe_kl": means["kl"],
        "probe_kl_sampled": means["sampled"],
    }
    draft.journal.metrics(0, {"forgetting/probe_kl": means["kl"], "forgetting/probe_kl_sampled": means["sampled"]})


def score_target_divergence(
    base: Artifact, tuned: Artifact, target: Artifact, max_rows: int | None, draft: Draft, machine: Machine
) -> None:
    """Write KL(base || tuned) on each held-out response as the `divergence` table, and the mean per token as a fact."""
    machine.settle()
    device = machine.resolved_device()
    models = [load_for_measuring(draft.store, model, device) for model in (base, tuned)]
    rows = read_rows(draft.store.path(target), "held_out")[:max_rows]

    def progress(done: int) -> None:
        draft.journal.progress(done, len(rows), "rows")

    records = target_divergence(models[0], models[1], rows, machine.micro_batch_tokens, progress)
    write_shard(draft.folder, "divergence", 0, pa.Table.from_pylist(records))
    tokens = sum(record["count"] for record in records)
    mean = sum(record["kl"] for record in records) / tokens
    draft.metadata |= {"rows": len(records), "tokens": tokens, "target_divergence": mean}
    draft.journal.metrics(0, {"forgetting/target_divergence": mean})
