"""The stability gap over several targets: the worst moment while training, stage by stage and over all of them."""

from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat

from cfsd.report.summary import Summary

WHOLE = "all stages"
DEFINITION = (
    "stability gap: by how much the worst moment watched while training was worse than both the start and the end, at "
    "least 0 (De Lange et al. 2022, counted from the worse of the two ends). Over all stages the start is the first "
    "base and the end the last model; only benchmarks are watched alike in every stage: probe_kl and target_loss "
    "change their base and their target, and earlier targets are not watched while a later one is trained. The worst "
    "of many looks is worse by chance too."
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


def gaps_of(stages: Sequence[Summary]) -> list[Gap]:
    """Return the gaps of every stage that was watched, then those of benchmarks watched in all of them."""
    gaps = [
        Gap(stage=summary.name, measure=measure, worst_stage=number, **watched)
        for number, summary in enumerate(stages, 1)
        for measure, watched in (summary.stability_gap or {}).items()
    ]
    measures = dict.fromkeys(gap.measure for gap in gaps if "/" in gap.measure)  # <benchmark>/<metric>
    alike = {name: [gap for gap in gaps if gap.measure == name] for name in measures}
    return [*gaps, *(_joined(group) for group in alike.values() if len(group) == len(stages) > 1)]


def _joined(gaps: list[Gap]) -> Gap:
    """Return the gap of one measure over all stages."""
    first, last = gaps[0], gaps[-1]
    sign = -1 if first.higher_is_better else 1
    worst = max(gaps, key=lambda gap: sign * gap.worst)
    ends: dict[str, Any] = {"stage": WHOLE, "start": first.start, "final": last.final}
    gap = min(sign * (worst.worst - end) for end in (first.start, last.final))
    return worst.model_copy(update={**ends, "gap": gap})
