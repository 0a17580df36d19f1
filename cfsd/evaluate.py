"""Stage evaluate: what a model scores on benchmarks, on held-out target rows, and on the probe against the base."""

from typing import Any

from pydantic import Field, PositiveInt, field_validator

from cfsd.artifact import Artifact, Draft
from cfsd.benchmark import Benchmark
from cfsd.machine import Machine
from cfsd.spec import Spec


class EvaluateSpec(Spec):
    """What is measured on base and tuned."""

    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="Names of bundled or lm-eval tasks, or {name, folder, limit, …} for your own YAML"
    )
    held_out_rows: PositiveInt | None = Field(None, description="Most held-out target rows to score; empty: all")

    @field_validator("benchmarks")
    @classmethod
    def _named_once(cls, benchmarks: tuple[Benchmark, ...]) -> tuple[Benchmark, ...]:
        names = [benchmark.name for benchmark in benchmarks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"benchmarks named twice: {', '.join(twice)}; results are kept by name")
        return benchmarks


def score_benchmark(model: Artifact, benchmark: Benchmark, draft: Draft, machine: Machine) -> None:
    """Write one row per document as the `scores` table; the facts say what the values mean."""
    import pyarrow as pa

    from cfsd.checkpoint import load_for_measuring, load_tokenizer
    from cfsd.rows import write_shard
    from cfsd.score import score

    machine.settle()
    loaded = load_for_measuring(draft.store, model, machine.resolved_device())
    tokenizer = load_tokenizer(draft.store.path(model))

    def progress(done: int, total: int) -> None:
        draft.journal.progress(done, total, "requests")

    scores = score(loaded, tokenizer, benchmark, batch_size=16, on_progress=progress)
    write_shard(draft.folder, "scores", 0, pa.Table.from_pandas(scores.rows, preserve_index=False))
    draft.facts |= {"benchmark": benchmark.name, **scores.facts}
    draft.journal.metrics(0, {f"eval/{benchmark.name}/{scores.facts['metric']}": float(scores.facts["score"])})


def score_target(model: Artifact, target: Artifact, most_rows: int | None, draft: Draft, machine: Machine) -> None:
    """Write the loss and the greedily correct tokens of each held-out response as the `responses` table."""
    from cfsd.checkpoint import load_for_measuring
    from cfsd.responses import score_responses
    from cfsd.rows import RESPONSES, read_rows, table_of, write_shard

    machine.settle()
    loaded = load_for_measuring(draft.store, model, machine.resolved_device())
    rows = read_rows(draft.store.path(target), "held_out")[:most_rows]

    def progress(done: int) -> None:
        draft.journal.progress(done, len(rows), "rows")

    records = score_responses(loaded, rows, machine.micro_batch_tokens, progress)
    write_shard(draft.folder, "responses", 0, table_of(RESPONSES, records))
    tokens = sum(record["count"] for record in records)
    exact = sum(record["correct"] == record["count"] for record in records) / len(records)
    loss = sum(record["nll"] for record in records) / tokens
    draft.facts |= {"rows": len(records), "tokens": tokens, "loss": loss, "accuracy": exact}
    draft.journal.metrics(0, {"target/loss": loss, "target/accuracy": exact})


def score_probe(base: Artifact, tuned: Artifact, probe: Artifact, draft: Draft, machine: Machine) -> None:
    """Write the divergence of each probe row as the `divergence` table, and the mean per token as a fact."""
    from cfsd.checkpoint import load_for_measuring
    from cfsd.divergence import divergence
    from cfsd.microbatch import arrange
    from cfsd.rows import DIVERGENCE, read_rows, table_of, write_shard

    machine.settle()
    device = machine.resolved_device()
    models = [load_for_measuring(draft.store, model, device) for model in (base, tuned)]
    rows = read_rows(draft.store.path(probe), "corpus", ["row_id", "token_ids"])
    records: list[dict[str, Any]] = []
    for group in arrange([len(row["token_ids"]) for row in rows], machine.micro_batch_tokens):
        found = divergence(models[0], models[1], [rows[i]["token_ids"] for i in group])
        for i, part in zip(group, found, strict=True):
            sums = part._asdict()
            records.append({"row_id": rows[i]["row_id"], "count": sums.pop("num_tokens"), **sums})
        draft.journal.progress(len(records), len(rows), "rows")
    records.sort(key=lambda record: record["row_id"])
    write_shard(draft.folder, "divergence", 0, table_of(DIVERGENCE, records))
    tokens = sum(record["count"] for record in records)
    means = {k: sum(record[k] for record in records) / tokens for k in ("kl", "sampled")}
    draft.facts |= {
        "rows": len(records),
        "tokens": tokens,
        "probe_kl": means["kl"],
        "probe_kl_sampled": means["sampled"],
    }
    draft.journal.metrics(0, {"forgetting/probe_kl": means["kl"], "forgetting/probe_kl_sampled": means["sampled"]})
