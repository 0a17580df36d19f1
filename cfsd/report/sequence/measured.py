"""What was kept over several targets, joined from the artifacts of their stages."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from cfsd.report.measures import benchmark_of
from cfsd.report.run_record import Measured, RunRecord, Scored, Scores
from cfsd.report.scores import table
from cfsd.report.sequence.gaps import Gap, gaps_of
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary
from cfsd.statistics.continual import Continual, Stability, continual, stability
from cfsd.statistics.figures import FRACTION, NATS, Figure, difference_per_token, paired_share_difference
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


class Remains(BaseModel):
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


def remains_of(
    store: Store, run_records: Sequence[RunRecord], stages: Sequence[Summary], measured: Measured
) -> Remains:
    """Return what is left of the earlier targets and of the first base; `stages` are the summaries of `run_records`."""
    scored, last = measured.scored, len(run_records)
    changed = tuple(_fall(store, scored[j + 1][j], scored[last][j]) for j in range(last - 1))
    names = [run_record.name for run_record in run_records]
    return Remains(
        losses=continual(names, _metadata(scored, "loss"), higher_is_better=False, unit=NATS, changes=changed),
        exact=_exact(store, names, scored),
        learned=tuple(_fall(store, scored[t][t], scored[t + 1][t]) for t in range(last)),
        changed=changed,
        benchmarks=tuple(kept_of_benchmarks(store, run_records)),
        since_base=tuple(summarise(store, run_record) for run_record in since_the_base(run_records, measured)),
        gaps=tuple(gaps_of(stages)),
    )


def _exact(store: Store, names: Sequence[str], scored: Scored) -> Continual:
    last = len(names)
    changes = [
        paired_share_difference(_right(store, scored[j + 1][j]), _right(store, scored[last][j]))
        for j in range(last - 1)
    ]
    return continual(names, _metadata(scored, "accuracy"), higher_is_better=True, unit=FRACTION, changes=changes)


def _metadata(scored: Scored, fact: str) -> Any:
    return np.array([[float(str(artifact.metadata[fact])) for artifact in row] for row in scored])


def _right(store: Store, scores: Artifact) -> Any:
    rows = table(store, scores, "responses")
    return (rows["correct"] == rows["count"]).to_numpy()


def _fall(store: Store, before: Artifact, after: Artifact) -> Figure:
    """Return by how much the loss fell, in nats per token, paired by row."""
    first, second = (table(store, scores, "responses") for scores in (before, after))
    counts = first["count"].to_numpy(float)
    return difference_per_token(first["nll"].to_numpy(), second["nll"].to_numpy(), counts, seed=0)


def kept_of_benchmarks(store: Store, run_records: Sequence[RunRecord]) -> list[Stability]:
    """Return how each benchmark of the first base held through the stages that `run_records` are of."""
    before = _general(run_records)
    return [
        stability(
            [benchmark_of(store, run_record.model_copy(update={"before": before}), name) for run_record in run_records]
        )
        for name in before.benchmarks
    ]


def since_the_base(run_records: Sequence[RunRecord], measured: Measured) -> list[RunRecord]:
    """Return each stage as a trail that starts from the first base, with what is compared with it."""
    before, base = _general(run_records), run_records[0].artifacts["base"]
    return [
        RunRecord(
            name=f"after {run_record.name}",
            artifacts={
                "base": base,
                "final": run_record.artifacts["final"],
                "probe": run_records[0].artifacts["probe"],
            },
            before=before,
            after=Scores(benchmarks=run_record.after.benchmarks, texts=run_record.after.texts, probe=probe),
        )
        for run_record, probe in zip(run_records, measured.probes, strict=True)
    ]


def _general(run_records: Sequence[RunRecord]) -> Scores:
    """Return the first base's scores on what every stage was measured on; a target may bring benchmarks of its own."""
    first = run_records[0].before
    benchmarks = {
        n: a for n, a in first.benchmarks.items() if all(n in run_record.after.benchmarks for run_record in run_records)
    }
    texts = {n: a for n, a in first.texts.items() if all(n in run_record.after.texts for run_record in run_records)}
    return Scores(benchmarks=benchmarks, texts=texts)
