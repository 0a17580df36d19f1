"""What is left of earlier targets and of the first base after several targets, joined from their stages' artifacts."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict, FiniteFloat

from cfsd.report.run_record import Measured, RunRecord, Scores
from cfsd.report.scores import accuracy_gain, response_pair, target_gain
from cfsd.report.summarise import summarise
from cfsd.report.summary import Summary
from cfsd.report.table import forgotten_of
from cfsd.statistics.continual import Continual, Stability, continual, stability
from cfsd.statistics.figures import FRACTION, NATS, Figure
from cfsd.statistics.null_band import DEFINITION
from cfsd.store.artifact import Store

LEARNED = (
    "held-out loss of target t before its own stage minus after it, R[t, t] - R[t-1, t]: positive = learned, paired "
    "by row."
)
CHANGED = "R[T, j] - R[j, j]: what became of target j after its own stage, positive = better, paired by row."
OF_BASE = (
    "Every model against the first base; each stage's own report compares it with the model before it. probe_kl here: "
    "the divergence KL(first base || model after stage t) on text that the first base wrote unprompted."
)
WHOLE = "all stages"
GAP = (
    "stability gap: by how much the worst moment watched while training was worse than both the start and the end, at "
    "least 0 (De Lange et al. 2022, counted from the worse of the two ends). Over all stages the start is the first "
    "base and the end the last model; only benchmarks are watched alike in every stage: probe_kl and target_loss "
    "change their base and their target, and earlier targets are not watched while a later one is trained. The worst "
    "of many looks is worse by chance too: up to the null band, where one is known. It is not over all stages, whose "
    f"changes have several first looks. {DEFINITION}."
)


class Gap(BaseModel):
    """One watched measure in one stage, or in all (`stage` is WHOLE); `worst_stage` counts from 1."""

    model_config = ConfigDict(frozen=True)

    stage: str
    measure: str
    unit: str
    higher_is_better: bool
    start: FiniteFloat
    worst: FiniteFloat
    worst_stage: int
    worst_step: int
    final: FiniteFloat
    gap: FiniteFloat
    null_band: FiniteFloat | None = None
    looks: int = 0


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
    own = [response_pair(store, scored[t][t], scored[t + 1][t]) for t in range(last)]
    later = [response_pair(store, scored[t + 1][t], scored[last][t]) for t in range(last - 1)]
    changed = tuple(target_gain(*pair) for pair in later)
    exact = [accuracy_gain(*pair) for pair in later]
    since_base = tuple(summarise(store, run_record) for run_record in since_the_base(run_records, measured))
    return Retention(
        losses=continual(names, loss, higher_is_better=False, unit=NATS, changes=changed),
        exact=continual(names, accuracy, higher_is_better=True, unit=FRACTION, changes=exact),
        learned=tuple(target_gain(*pair) for pair in own),
        changed=changed,
        benchmarks=tuple(map(stability, zip(*map(forgotten_of, since_base), strict=True))),
        since_base=since_base,
        gaps=tuple(gaps_of(stages)),
    )


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


def gaps_of(stages: Sequence[Summary]) -> list[Gap]:
    """Return the gaps of every stage that was watched, then those of benchmarks watched in all of them."""
    gaps = [
        Gap(stage=summary.name, measure=measure, worst_stage=number, **watched)
        for number, summary in enumerate(stages, 1)
        for measure, watched in (summary.stability_gap or {}).items()
    ]
    measures = dict.fromkeys(gap.measure for gap in gaps if "/" in gap.measure)  # <benchmark>/<metric>
    alike = [[gap for gap in gaps if gap.measure == name] for name in measures]
    return [*gaps, *(_over_all_stages(group) for group in alike if len(group) == len(stages) > 1)]


def _over_all_stages(gaps: list[Gap]) -> Gap:
    start, final, sign = gaps[0].start, gaps[-1].final, -1 if gaps[0].higher_is_better else 1
    worst = max(gaps, key=lambda gap: sign * gap.worst)
    gap = min(sign * (worst.worst - end) for end in (start, final))
    looks = sum(own.looks for own in gaps)
    changes = {"start": start, "final": final, "gap": gap, "null_band": None, "looks": looks}
    return worst.model_copy(update={"stage": WHOLE, **changes})
