"""Stage evaluate: what a model scores on benchmarks, texts, held-out rows; its divergence from the base."""

from typing import Any, ClassVar

from pydantic import Field, PositiveInt, field_validator

from cfsd.artifact import Artifact, Draft, Store
from cfsd.benchmark import Benchmark
from cfsd.errors import BadInput
from cfsd.machine import Machine, home
from cfsd.perplexity import Text
from cfsd.spec import Spec


class EvaluateSpec(Spec):
    """What is measured on base and tuned."""

    neutral: ClassVar[dict[str, Any]] = {"texts": ()}

    benchmarks: tuple[Benchmark, ...] = Field(
        (), description="Names of bundled or lm-eval tasks, {name, folder, limit, …} for your own YAML, or {task: {…}}"
    )
    held_out_rows: PositiveInt | None = Field(None, description="Most held-out target rows to score; empty: all")
    texts: tuple[Text, ...] = Field((), description="Your own texts, {name, path, …}: their perplexity is measured")

    @field_validator("benchmarks", "texts")
    @classmethod
    def _named_once(cls, parts: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [part.name for part in parts]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            kind = f"{type(parts[0]).__name__.lower()}s"
            raise ValueError(f"{kind} named twice: {', '.join(twice)}; results are kept by name")
        return parts

    def check(self) -> None:
        """Raise BadInput for whatever can be told to be wrong without a model."""
        for benchmark in self.benchmarks:
            benchmark.check()
        for text in self.texts:
            text.check()

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput if the base, once it is there, lacks the chat template that a benchmark asks for."""
        asking = [benchmark.name for benchmark in self.benchmarks if benchmark.chat_template]
        if not asking or not base.content:
            return
        from cfsd.checkpoint import load_tokenizer

        if not load_tokenizer(Store(home()).path(base)).chat_template:
            raise BadInput(
                f"benchmark {asking[0]}: chat_template is on, but the model's tokenizer has no chat template; turn it "
                "off, or measure a model that has one"
            )


def score_benchmark(model: Artifact, benchmark: Benchmark, draft: Draft, machine: Machine) -> None:
    """Write one row per document as the `scores` table; the facts say what the values mean."""
    import pyarrow as pa

    from cfsd.checkpoint import load_for_measuring, load_tokenizer
    from cfsd.rows import write_shard
    from cfsd.score import score
    from cfsd.scoring_memory import tokens_that_fit

    machine.settle()
    loaded = load_for_measuring(draft.store, model, machine.resolved_device())
    tokenizer = load_tokenizer(draft.store.path(model))

    def progress(done: int, total: int) -> None:
        draft.journal.progress(done, total, "requests")

    most = tokens_that_fit(loaded, machine)
    scores = score(loaded, tokenizer, benchmark, most_tokens=most, on_progress=progress)
    write_shard(draft.folder, "scores", 0, pa.Table.from_pandas(scores.rows, preserve_index=False))
    draft.facts |= {"benchmark": benchmark.name, **scores.facts}
    draft.journal.metrics(0, {f"eval/{benchmark.name}/{scores.facts['metric']}": float(scores.facts["score"])})


def score_text(model: Artifact, text: Text, draft: Draft, machine: Machine) -> None:
    """Write each document's negative log-likelihood as the `texts` table."""
    import pyarrow as pa

    from cfsd.checkpoint import load_for_measuring, load_tokenizer, read_start_token
    from cfsd.perplexity import text_likelihoods
    from cfsd.rows import write_shard

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
    draft.facts |= {
        "text": text.name,
        "documents": len(records),
        "tokens": sums["tokens"],
        "bytes": sums["bytes"],
    } | loss
    draft.journal.metrics(0, {f"eval/{text.name}/{name}": value for name, value in loss.items()})


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
    from cfsd.divergence import divergences
    from cfsd.rows import DIVERGENCE, read_rows, table_of, write_shard

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
    draft.facts |= {
        "rows": len(records),
        "tokens": tokens,
        "probe_kl": means["kl"],
        "probe_kl_sampled": means["sampled"],
    }
    draft.journal.metrics(0, {"forgetting/probe_kl": means["kl"], "forgetting/probe_kl_sampled": means["sampled"]})


def score_target_divergence(
    base: Artifact, tuned: Artifact, target: Artifact, most_rows: int | None, draft: Draft, machine: Machine
) -> None:
    """Write KL(base || tuned) on each held-out response as the `divergence` table, and the mean per token as a fact."""
    import pyarrow as pa

    from cfsd.checkpoint import load_for_measuring
    from cfsd.rows import read_rows, write_shard
    from cfsd.target_divergence import target_divergence

    machine.settle()
    device = machine.resolved_device()
    models = [load_for_measuring(draft.store, model, device) for model in (base, tuned)]
    rows = read_rows(draft.store.path(target), "held_out")[:most_rows]

    def progress(done: int) -> None:
        draft.journal.progress(done, len(rows), "rows")

    records = target_divergence(models[0], models[1], rows, machine.micro_batch_tokens, progress)
    write_shard(draft.folder, "divergence", 0, pa.Table.from_pylist(records))
    tokens = sum(record["count"] for record in records)
    mean = sum(record["kl"] for record in records) / tokens
    draft.facts |= {"rows": len(records), "tokens": tokens, "target_divergence": mean}
    draft.journal.metrics(0, {"forgetting/target_divergence": mean})
