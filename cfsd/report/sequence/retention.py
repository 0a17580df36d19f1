"""What is left of earlier targets and of the first base after several targets, joined from their stages' artifacts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cfsd.report.measures import benchmark_of
from cfsd.report.run_record import Measured, RunRecord, Scores
from cfsd.report.scores import table, target_gain
from cfsd.report.sequence.gaps import Gap, gaps_of
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary
from cfsd.statistics.continual import Continual, Stability, continual, stability
from cfsd.statistics.figures import FRACTION, NATS, Figure, paired_share_difference
from cfsd.store.artifact import Artifact, Store

LEARNED = (
    "held-out loss of target t before its own stage minus after it, R[t, t] - R[t-1, t]: positive = learned, paired "
    "by row."
)
CHANGED = "R[T, j] - R[j, j]: what became of target j after its own stage, positive = better, paired by row."
OF_BASE = (
    "Every model against the first base; each stage's own report compares it with the model before it. probe_kl here: "
    "the divergence KL(first base || model after stage t) on text that the first base wrote unprompted."
)


class Retention(BaseModel):
    """What a sequence of T targets learned and what is left of it; a figure per target, or per stage from 1 on.

    `learned`, `changed` (one less: not of the last target): nats per token. `exact`: the R matrix of shares answered
    exactly. `since_base`: every stage against the first base; no target in it.
    """

    model_config = ConfigDict(frozen=True)

    losses: Continual
    exact: Continual
    learned: tuple[Figure, ...]
    changed: tuple[Figure, ...]
    benchmarks: tuple[Stability, ...]
    since_base: tuple[Summary, ...]
    gaps: tuple[Gap, ...]


def retention_of(
    store: Store, run_records: Sequence[RunRecord], stages: Sequence[Summary], measured: Measured
) -> Retention:
    """Return what is left of the earlier targets and of the first base; `stages` are the summaries of `run_records`."""
    scored, last = measured.scored, len(run_records)
    names = [run_record.name for run_record in run_records]
    loss, accuracy = (
        np.array([[float(str(scores.metadata[name])) for scores in row] for row in scored])
        for name in ("loss", "accuracy")
    )
    later = [(scored[j + 1][j], scored[last][j]) for j in range(last - 1)]  # after the target's own stage, and all
    changed = tuple(_fall_of_loss(store, *pair) for pair in later)
    exact = [_rise_of_exact(store, *pair) for pair in later]
    return Retention(
        losses=continual(names, loss, higher_is_better=False, unit=NATS, changes=changed),
        exact=continual(names, accuracy, higher_is_better=True, unit=FRACTION, changes=exact),
        learned=tuple(_fall_of_loss(store, scored[t][t], scored[t + 1][t]) for t in range(last)),
        changed=changed,
        benchmarks=tuple(_stability_of_benchmarks(store, run_records)),
        since_base=tuple(summarise(store, run_record) for run_record in since_the_base(run_records, measured)),
        gaps=tuple(gaps_of(stages)),
    )


def _fall_of_loss(store: Store, before: Artifact, after: Artifact) -> Figure:
    """Return by how much the loss fell, in nats per token, paired by row."""
    return target_gain(*(table(store, scores, "responses") for scores in (before, after)))


def _rise_of_exact(store: Store, before: Artifact, after: Artifact) -> Figure:
    """Return by how much the share of responses that the model writes exactly rose, paired by row."""
    rows = (table(store, scores, "responses") for scores in (before, after))
    right: Any = [(responses["correct"] == responses["count"]).to_numpy() for responses in rows]
    return paired_share_difference(*right)


def _stability_of_benchmarks(store: Store, run_records: Sequence[RunRecord]) -> list[Stability]:
    """Return how each benchmark of the first base held through the stages that `run_records` are of."""
    before = _scores_of_all(run_records)
    against_base = [run_record.model_copy(update={"before": before}) for run_record in run_records]
    return [stability([benchmark_of(store, stage, name) for stage in against_base]) for name in before.benchmarks]


def since_the_base(run_records: Sequence[RunRecord], measured: Measured) -> list[RunRecord]:
    """Return each stage as a run record that starts from the first base, with what is compared with it."""
    before, artifacts = _scores_of_all(run_records), run_records[0].artifacts
    return [
        RunRecord(
            name=f"after {stage.name}",
            artifacts={"base": artifacts["base"], "final": stage.artifacts["final"], "probe": artifacts["probe"]},
            before=before,
            after=Scores(benchmarks=stage.after.benchmarks, texts=stage.after.texts, probe=probe),
        )
        for stage, probe in zip(run_records, measured.probes, strict=True)
    ]


def _scores_of_all(run_records: Sequence[RunRecord]) -> Scores:
    """Return the first base's scores on what every stage was measured on; a target may bring benchmarks of its own."""
    first, after = run_records[0].before, [run_record.after for run_record in run_records]
    return Scores(
        benchmarks={n: scores for n, scores in first.benchmarks.items() if all(n in s.benchmarks for s in after)},
        texts={n: scores for n, scores in first.texts.items() if all(n in s.texts for s in after)},
    )
