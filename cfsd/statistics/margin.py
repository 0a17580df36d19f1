"""The gate on two models: did one lose more of any benchmark than a margin lets pass?

Unlike `cfsd.statistics.gate` it knows no seeds: it judges these two models, not the recipe that made them.
"""

import math
from collections.abc import Iterable, Sequence

from scipy import special  # scipy.stats takes 0.7 s to import, and commands import this module

from cfsd.statistics.figures import FRACTION, MEAN, Figure, figure_p
from cfsd.statistics.forgetting import NO_SCORE, BenchmarkForgetting
from cfsd.statistics.gate import FAMILY_WISE, Finding, Judgement, Outcome
from cfsd.statistics.intervals import Z
from cfsd.statistics.multiplicity import rejected

LEAST_TIMES, MOST_TIMES = 1.1, 100  # times as many documents, that are proposed


def judge_losses(lost: Sequence[BenchmarkForgetting], mean: Figure | None, margin: float) -> Judgement:
    """Return FAIL where a loss is above `margin` and significant, PASS where its whole interval is below it.

    `margin`: a fraction, 0.02 is 2 points; it holds for each benchmark that is scored from 0 to 1 where more is better,
    and for their chance-corrected mean. Holm's correction bounds by 1 % the probability of any FAIL where nothing was
    lost. That the loss on all such documents is above the margin, too, is certain only where the interval is above it.
    """
    guarded = [entry for entry in lost if not _why_unguarded(entry)]
    figures = {entry.benchmark: entry.forgetting for entry in guarded} | ({MEAN: mean} if mean else {})
    known = [entry.p_value for entry in guarded] + ([figure_p(mean)] if mean else [])
    p_values = [1.0 if p is None else p for p in known]
    documents = [entry.num_documents for entry in guarded]
    counts = [*documents, *([sum(documents)] if mean else [])]
    scores = [(e.base, e.tuned) for e in guarded] + ([(0.0, mean.value)] if mean else [])
    found = [
        _finding(name, figure, margin, p, count, score, len(figures))
        for (name, figure), p, count, score in zip(
            figures.items(), zip(p_values, rejected(p_values, FAMILY_WISE), strict=True), counts, scores, strict=True
        )
    ]
    order: list[Outcome] = ["fail", "cannot tell", "pass"]
    found.sort(key=lambda finding: order.index(finding.outcome))
    return Judgement(outcome=found[0].outcome if found else "cannot tell", findings=tuple(found))


def unguarded(lost: Iterable[BenchmarkForgetting]) -> dict[str, str]:
    """Return the benchmarks that are not judged, with the reason why a margin in points does not hold for them."""
    return {entry.benchmark: why for entry in lost if (why := _why_unguarded(entry))}


def _why_unguarded(entry: BenchmarkForgetting) -> str:
    if not entry.higher_is_better:
        return "of which less is better"
    return NO_SCORE if entry.retention_note == NO_SCORE else ""


def _finding(
    name: str,
    figure: Figure,
    margin: float,
    p: tuple[float, bool],
    documents: int,
    score: tuple[float, float],
    family: int,
) -> Finding:
    p_value, significant = p
    outcome: Outcome = "cannot tell"
    low, high = (-math.inf, math.inf) if figure.low is None or figure.high is None else (figure.low, figure.high)
    if figure.value > margin and significant:
        outcome = "fail"
    elif high < margin or high <= 0:
        outcome = "pass"
    return Finding(
        name=name, unit=FRACTION, outcome=outcome, before=score[0], after=score[1], worsening=figure.value,
        low=low, high=high, margin=margin, p_value=p_value, significant=significant,
        needed=_needed(figure.value, high, margin, documents, family) if outcome == "cannot tell" else "",
    )  # fmt: skip


def _needed(value: float, high: float, margin: float, documents: int, family: int) -> str:
    """Return how many documents would decide if the loss and the scatter of documents stayed."""
    if math.isinf(high):
        return "5 documents or more"
    half, room = high - value, margin - value
    if value > margin:  # what lacks is significance
        half, room = half / Z * -float(special.ndtri(FAMILY_WISE / family / 2)), value
    times = (half / room) ** 2 if room else math.inf
    if times > MOST_TIMES:
        return f"more than {MOST_TIMES * documents:,} documents"
    return f"about {math.ceil(max(times, LEAST_TIMES) * documents):,} documents"
