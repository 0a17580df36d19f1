"""The verdict on two models with a margin: in words, and as files in the report's folder."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from cfsd.report.markdown import plain, row
from cfsd.report.summary import Summary
from cfsd.report.table import forgotten_of
from cfsd.statistics.discoveries import change_of
from cfsd.statistics.figures import MEAN, Figure
from cfsd.statistics.gate import Finding, Judgement, Outcome
from cfsd.statistics.margin import judge_losses, unguarded

HOW = (
    "FAIL: the loss on these documents is above the margin, and chance does not explain a loss (Holm, 1 % over all "
    "figures); on others it may be below the margin where the interval is. PASS: the whole 95 % interval is below it. "
    "mean_forgetting is the mean of points above chance: a benchmark of two choices counts twice what it lost."
)


def write_verdict(folder: Path, summary: Summary, points: float) -> tuple[Outcome, str]:
    """Write verdict.md and verdict.json; return the outcome, and the verdict in a sentence."""
    lost = forgotten_of(summary)
    several = sum(entry.chance_corrected is not None for entry in lost) > 1
    mean = Figure.model_validate(summary.mean_forgetting) if summary.mean_forgetting and several else None
    judgement, others = judge_losses(lost, mean, points / 100), unguarded(lost)
    worse = [entry.benchmark for entry in lost if entry.benchmark in others and change_of(entry) == "worse"]
    if worse and judgement.outcome == "pass":
        judgement = judgement.model_copy(update={"outcome": "cannot tell"})
    sentence = _sentence(judgement, points, worse) + _not_judged(others)
    head = [f"# {plain(summary.name)}", "", plain(sentence)]
    text = "\n".join([*head, "", *_table(judgement), "", f"* {HOW}"])
    (folder / "verdict.md").write_text(f"{text}\n", encoding="utf-8")
    (folder / "verdict.json").write_text(judgement.model_dump_json(indent=1), encoding="utf-8")
    return judgement.outcome, sentence


def _not_judged(others: Mapping[str, str]) -> str:
    return f" (not judged: {'; '.join(f'{name}, {why}' for name, why in others.items())})" if others else ""


def _sentence(judgement: Judgement, points: float, worse: Sequence[str]) -> str:
    named = [finding for finding in judgement.findings if finding.outcome == judgement.outcome]
    if judgement.outcome == "pass":
        return f"PASS: none of {len(named)} figures lost {points:g} points"
    if judgement.outcome == "fail":
        return f"FAIL: lost more than {points:g} points: {'; '.join(map(_lost, named))}"
    open_ = [f"{_lost(f)} [{_bounds(f)}], needs {f.needed}" for f in named]
    open_ += [f"{name} became worse, which is not in points" for name in worse]
    reasons = "; ".join(open_) or "no benchmark has a score from 0 to 1"
    return f"CANNOT TELL whether more than {points:g} points were lost: {reasons}"


def _table(judgement: Judgement) -> list[str]:
    rows = [
        row(f.name, _worsening(f), _bounds(f), _points(f.margin), f"{f.p_value:.2g}", f.verdict())
        for f in judgement.findings
    ]
    return ["| figure | points lost | 95 % interval | margin | p | verdict |", "|---|--:|---|--:|--:|---|", *rows]


def _lost(finding: Finding) -> str:
    corrected = " (above chance)" if finding.name == MEAN else ""
    return f"{finding.name}{corrected} {_worsening(finding)}"


def _worsening(finding: Finding) -> str:
    """Return the points lost, with so many digits that they are not the margin's where they differ from it."""
    for digits in (3, 4, 5):
        if (shown := f"{finding.worsening * 100:.{digits}g}") != f"{finding.margin * 100:.{digits}g}":
            break
    return shown


def _points(value: float) -> str:
    return f"{value * 100:.3g}"


def _bounds(finding: Finding) -> str:
    return f"{_points(finding.low)} to {_points(finding.high)}" if math.isfinite(finding.high) else "not known"
