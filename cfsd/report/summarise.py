"""Summary: what one variant learned and forgot, joined from its artifacts; `summary.json` for many variants."""

from collections.abc import Sequence
from typing import Any

from cfsd.evaluate.corpus_check import warnings_of
from cfsd.report.answer_endings import answers_of
from cfsd.report.budget import budget_of
from cfsd.report.corpus.view import corpus_warnings
from cfsd.report.run_record import RunRecord, Step
from cfsd.report.scores import first_scores, table
from cfsd.report.summary import Summary
from cfsd.report.training import stability_gap, training_of
from cfsd.statistics.discoveries import controlled
from cfsd.statistics.figures import difference_per_token, mean_per_token, paired_share_difference
from cfsd.statistics.forgetting import BenchmarkForgetting, Measure, benchmark_forgetting, mean_forgetting
from cfsd.statistics.texts import text_forgetting
from cfsd.store.artifact import Store


def summarise(store: Store, run_record: RunRecord, run_records: Sequence[RunRecord] = ()) -> Summary:
    """Return the figures of `run_record`, computed from its score tables and the metrics of its training.

    Among `run_records`, those of the same comparison, is the plain variant that a budget's cost is counted against.
    """
    benchmarks = controlled([benchmark_of(store, run_record, name) for name in run_record.before.benchmarks])
    mean = mean_forgetting(benchmarks)
    summary = Summary(
        name=run_record.name,
        digest=run_record.digest,
        **_target(store, run_record),
        **_probe(store, run_record),
        target_divergence=_target_divergence(store, run_record),
        texts={name: _text(store, run_record, name) for name in run_record.before.texts},
        mean_forgetting=mean.model_dump() if mean else None,
        benchmarks={b.benchmark: b.model_dump(mode="json") for b in benchmarks},
        **answers_of(run_record.before.benchmarks, run_record.after.benchmarks),
        corpus_warnings=_corpus_warnings(run_record),
        stability_gap=stability_gap(store, run_record),
        training=training_of(store, run_record),
        seconds=_seconds(run_record.steps),
        executed=[_label(step) for step in run_record.steps if step.executed],
        cached=[_label(step) for step in run_record.steps if not step.executed],
    )
    return summary.model_copy(update={"budget": budget_of(store, run_record, run_records, summary)})


def _corpus_warnings(run_record: RunRecord) -> list[str]:

    found = corpus_warnings(run_record.artifacts["corpus"].metadata) if "corpus" in run_record.artifacts else []
    return found + (warnings_of(run_record.artifacts["checked"].metadata) if "checked" in run_record.artifacts else [])


def benchmark_of(store: Store, run_record: RunRecord, name: str) -> "BenchmarkForgetting":
    """Return what the benchmark lost from before to after, paired by document."""
    before, after = run_record.before.benchmarks[name], run_record.after.benchmarks[name]
    measure = Measure(**{field: before.metadata[field] for field in Measure.model_fields})
    return benchmark_forgetting(name, measure, *(first_scores(store, artifact) for artifact in (before, after)))


def _target(store: Store, run_record: RunRecord) -> dict[str, Any]:

    if run_record.before.target is None or run_record.after.target is None:
        return {"target_gain": None, "target_accuracy_gain": None, "target": {}}
    base, tuned = (table(store, t, "responses") for t in (run_record.before.target, run_record.after.target))
    counts = base["count"].to_numpy(float)
    gain = difference_per_token(base["nll"].to_numpy(), tuned["nll"].to_numpy(), counts, seed=0)
    right = [(t["correct"] == t["count"]).to_numpy() for t in (base, tuned)]
    means = {
        f"{role}_{figure}": float(artifact.metadata[figure])  # type: ignore[arg-type]
        for role, artifact in (("base", run_record.before.target), ("tuned", run_record.after.target))
        for figure in ("loss", "accuracy")
    }
    accuracy = paired_share_difference(*right)
    return {"target_gain": gain.model_dump(), "target_accuracy_gain": accuracy.model_dump(), "target": means}


def _probe(store: Store, run_record: RunRecord) -> dict[str, Any]:

    if run_record.after.probe is None:
        return {"probe_kl": None, "probe_kl_sampled": None}
    rows = table(store, run_record.after.probe, "divergence")
    counts = rows["count"].to_numpy(float)
    found = {name: mean_per_token(rows[name].to_numpy(), counts, seed=0) for name in ("kl", "sampled")}
    return {"probe_kl": found["kl"].model_dump(), "probe_kl_sampled": found["sampled"].model_dump()}


def _target_divergence(store: Store, run_record: RunRecord) -> dict[str, Any] | None:

    if run_record.after.target_divergence is None:
        return None
    rows = table(store, run_record.after.target_divergence, "divergence")
    return mean_per_token(rows["kl"].to_numpy(), rows["count"].to_numpy(float), seed=0).model_dump()


def _text(store: Store, run_record: RunRecord, name: str) -> dict[str, Any]:

    tables = [table(store, scores.texts[name], "texts") for scores in (run_record.before, run_record.after)]
    return text_forgetting(name, *tables)


def _label(step: Step) -> str:
    return f"{step.stage} {step.artifact.key}"


def _seconds(steps: tuple[Step, ...]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for step in steps:
        if step.executed:
            seconds[step.stage] = round(seconds.get(step.stage, 0.0) + step.seconds, 3)
    return seconds
