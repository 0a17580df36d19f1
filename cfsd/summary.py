"""Summary: what one variant learned and forgot, joined from its artifacts; `summary.json` for many variants."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, JsonValue

from cfsd.artifact import Artifact, Store
from cfsd.content import write_json

if TYPE_CHECKING:
    from cfsd.forgetting import BenchmarkForgetting

SCHEMA = 1


class Step(BaseModel):
    """One stage of a flow run: which artifact it gave, and whether the stage was executed for it."""

    model_config = ConfigDict(frozen=True)

    stage: str
    artifact: Artifact
    executed: bool
    seconds: float  # that executing it took, now or when it was made


class Scores(BaseModel):
    """What was measured on one model."""

    model_config = ConfigDict(frozen=True)

    benchmarks: dict[str, Artifact] = {}
    target: Artifact | None = None
    probe: Artifact | None = None  # divergence from the base; the tuned model only
    texts: dict[str, Artifact] = {}
    target_divergence: Artifact | None = None  # the tuned model only


class Trail(BaseModel):
    """Every artifact of one variant: enough to make its summary and report again."""

    model_config = ConfigDict(frozen=True)

    name: str
    recipe: dict[str, JsonValue] = {}
    digest: str = ""
    artifacts: dict[
        str, Artifact
    ]  # by role: base, target, chosen, probe, corpus, kept, selected, mixture, tuned, final
    before: Scores = Scores()
    after: Scores = Scores()
    steps: tuple[Step, ...] = ()


class Summary(BaseModel):
    """The figures of one variant, with 95 % intervals. Signs: gain positive = learned, forgetting positive = worse."""

    model_config = ConfigDict(frozen=True)

    name: str
    digest: str
    target_gain: dict[str, Any] | None  # base - tuned loss on held-out responses
    target_accuracy_gain: dict[str, Any] | None  # tuned - base share of responses that greedy decoding writes
    target: dict[str, float]  # base_loss, tuned_loss, base_accuracy, tuned_accuracy
    probe_kl: dict[str, Any] | None
    probe_kl_sampled: dict[str, Any] | None
    mean_forgetting: dict[str, Any] | None
    benchmarks: dict[str, dict[str, Any]]
    target_divergence: dict[str, Any] | None = None  # KL(base || tuned) on held-out responses, given their prompts
    answers: dict[str, dict[str, dict[str, Any]]] = {}  # per benchmark with written ones and role: how they ended
    evaluation_warnings: list[str] = []  # what may make a benchmark's score other than it looks
    texts: dict[str, dict[str, Any]] = {}  # the user's own: documents, tokens, bytes, per_token, per_byte
    corpus_warnings: list[str] = []  # in what the corpus is not an exact sample of the base
    budget: dict[str, Any] | None = None  # was the budget of divergence met; None without one
    stability_gap: dict[str, dict[str, Any]] | None = None  # per watched measure: start, worst, final, gap
    training: dict[str, Any] | None = None  # seconds, tokens, peak_memory, …; None for a model from outside
    seconds: dict[str, float]
    executed: list[str]
    cached: list[str]


def summarise(store: Store, trail: Trail, trails: Sequence[Trail] = ()) -> Summary:
    """Return the figures of `trail`, computed from its score tables and the metrics of its training.

    Among `trails`, those of the same comparison, is the plain variant that a budget's cost is counted against.
    """
    from cfsd.answer_endings import answers_of
    from cfsd.budget import budget_of
    from cfsd.discoveries import controlled
    from cfsd.forgetting import mean_forgetting
    from cfsd.training_story import stability_gap, training_of

    benchmarks = controlled([benchmark_of(store, trail, name) for name in trail.before.benchmarks])
    mean = mean_forgetting(benchmarks)
    summary = Summary(
        name=trail.name,
        digest=trail.digest,
        **_target(store, trail),
        **_probe(store, trail),
        target_divergence=_target_divergence(store, trail),
        texts={name: _text(store, trail, name) for name in trail.before.texts},
        mean_forgetting=mean.model_dump() if mean else None,
        benchmarks={b.benchmark: b.model_dump(mode="json") for b in benchmarks},
        **answers_of(trail.before.benchmarks, trail.after.benchmarks),
        corpus_warnings=_corpus_warnings(trail),
        stability_gap=stability_gap(store, trail),
        training=training_of(store, trail),
        seconds=_seconds(trail.steps),
        executed=[_label(step) for step in trail.steps if step.executed],
        cached=[_label(step) for step in trail.steps if not step.executed],
    )
    return summary.model_copy(update={"budget": budget_of(store, trail, trails, summary)})


def _corpus_warnings(trail: Trail) -> list[str]:
    from cfsd.corpus_check import warnings_of
    from cfsd.corpus_view import corpus_warnings

    found = corpus_warnings(trail.artifacts["corpus"].facts) if "corpus" in trail.artifacts else []
    return found + (warnings_of(trail.artifacts["checked"].facts) if "checked" in trail.artifacts else [])


def benchmark_of(store: Store, trail: Trail, name: str) -> "BenchmarkForgetting":
    """Return what the benchmark lost from before to after, paired by document."""
    from cfsd.forgetting import Measure, benchmark_forgetting

    before, after = trail.before.benchmarks[name], trail.after.benchmarks[name]
    measure = Measure(**{field: before.facts[field] for field in Measure.model_fields})
    return benchmark_forgetting(name, measure, *(first_scores(store, artifact) for artifact in (before, after)))


def first_scores(store: Store, artifact: Artifact) -> Any:
    """Return a benchmark's scores, with the answers as lm-eval's first filter reads them, as a pandas DataFrame."""
    facts: dict[str, Any] = artifact.facts
    rows = table(store, artifact, "scores")
    return rows[rows["filter"] == facts["filters"][0]]


def _target(store: Store, trail: Trail) -> dict[str, Any]:
    from cfsd.forgetting import difference_per_token, paired_share_difference

    if trail.before.target is None or trail.after.target is None:
        return {"target_gain": None, "target_accuracy_gain": None, "target": {}}
    base, tuned = (table(store, t, "responses") for t in (trail.before.target, trail.after.target))
    counts = base["count"].to_numpy(float)
    gain = difference_per_token(base["nll"].to_numpy(), tuned["nll"].to_numpy(), counts, seed=0)
    right = [(t["correct"] == t["count"]).to_numpy() for t in (base, tuned)]
    means = {
        f"{role}_{figure}": float(artifact.facts[figure])  # type: ignore[arg-type]
        for role, artifact in (("base", trail.before.target), ("tuned", trail.after.target))
        for figure in ("loss", "accuracy")
    }
    accuracy = paired_share_difference(*right)
    return {"target_gain": gain.model_dump(), "target_accuracy_gain": accuracy.model_dump(), "target": means}


def _probe(store: Store, trail: Trail) -> dict[str, Any]:
    from cfsd.forgetting import mean_per_token

    if trail.after.probe is None:
        return {"probe_kl": None, "probe_kl_sampled": None}
    rows = table(store, trail.after.probe, "divergence")
    counts = rows["count"].to_numpy(float)
    found = {name: mean_per_token(rows[name].to_numpy(), counts, seed=0) for name in ("kl", "sampled")}
    return {"probe_kl": found["kl"].model_dump(), "probe_kl_sampled": found["sampled"].model_dump()}


def _target_divergence(store: Store, trail: Trail) -> dict[str, Any] | None:
    from cfsd.forgetting import mean_per_token

    if trail.after.target_divergence is None:
        return None
    rows = table(store, trail.after.target_divergence, "divergence")
    return mean_per_token(rows["kl"].to_numpy(), rows["count"].to_numpy(float), seed=0).model_dump()


def _text(store: Store, trail: Trail, name: str) -> dict[str, Any]:
    from cfsd.text_forgetting import text_forgetting

    tables = [table(store, scores.texts[name], "texts") for scores in (trail.before, trail.after)]
    return text_forgetting(name, *tables)


def table(store: Store, artifact: Artifact, name: str) -> Any:
    """Return a small table of `artifact` as a pandas DataFrame."""
    import pandas as pd

    from cfsd.rows import shard_path

    return pd.read_parquet(shard_path(store.path(artifact), name, 0))


def _label(step: Step) -> str:
    return f"{step.stage} {step.artifact.key}"


def _seconds(steps: tuple[Step, ...]) -> dict[str, float]:
    seconds: dict[str, float] = {}
    for step in steps:
        if step.executed:
            seconds[step.stage] = round(seconds.get(step.stage, 0.0) + step.seconds, 3)
    return seconds


def write_summary(path: Path, summaries: list[Summary]) -> None:
    """Write `summary.json`; its schema is in docs/summary.md."""
    path.parent.mkdir(parents=True, exist_ok=True)
    variants = {s.name: s.model_dump(mode="json", exclude={"name"}) for s in summaries}
    write_json(path, {"schema": SCHEMA, "variants": variants})
