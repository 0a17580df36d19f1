"""The verdict on two models with a margin: in words, and as files in the report's folder."""

from pathlib import Path

from cfsd.report.markdown import inert
from cfsd.report.summary import Summary
from cfsd.report.table import forgotten_of
from cfsd.statistics.figures import Figure
from cfsd.statistics.gate import Finding, Judgement, Outcome
from cfsd.statistics.margin import judge_losses, unguarded

HOW = (
    "FAIL: lost more than the margin, and more than chance explains (Holm, 1 % over all figures). PASS: the whole "
    "95 % interval is below the margin."
)


def write_verdict(folder: Path, summary: Summary, points: float) -> tuple[Outcome, str]:
    """Write verdict.md and verdict.json; return the outcome, and the verdict in a sentence."""
    lost = forgotten_of(summary)
    mean = Figure.model_validate(summary.mean_forgetting) if summary.mean_forgetting else None
    judgement = judge_losses(lost, mean, points / 100)
    notes = [f"not guarded, being no score from 0 to 1: {', '.join(names)}" for names in [unguarded(lost)] if names]
    sentence = _sentence(judgement, points)
    text = inert("\n".join([f"# {summary.name}", "", sentence, "", *_table(judgement), "", *_listed([*notes, HOW])]))
    (folder / "verdict.md").write_text(f"{text}\n", encoding="utf-8")
    (folder / "verdict.json").write_text(judgement.model_dump_json(indent=1), encoding="utf-8")
    return judgement.outcome, sentence


def _sentence(judgement: Judgement, points: float) -> str:
    named = [finding for finding in judgement.findings if finding.outcome == judgement.outcome]
    if judgement.outcome == "pass":
        return f"PASS: none of {len(named)} figures lost {points:g} points"
    if judgement.outcome == "fail":
        return f"FAIL: lost more than {points:g} points: {'; '.join(f'{f.name} {_points(f.worsening)}' for f in named)}"
    open_ = "; ".join(f"{f.name} {_points(f.worsening)} [{_bounds(f)}], needs {f.needed}" for f in named)
    return (
        f"CANNOT TELL whether more than {points:g} points were lost: {open_ or 'no benchmark has a score from 0 to 1'}"
    )


def _table(judgement: Judgement) -> list[str]:
    rows = [
        f"| {f.name} | {_points(f.worsening)} | {_bounds(f)} | {_points(f.margin)} | {f.p_value:.2g} "
        f"| {f.outcome.upper()}{f': needs {f.needed}' if f.needed else ''} |"
        for f in judgement.findings
    ]
    return ["| figure | points lost | 95 % interval | margin | p | verdict |", "|---|--:|---|--:|--:|---|", *rows]


def _listed(lines: list[str]) -> list[str]:
    return [f"* {line}" for line in lines]


def _points(value: float) -> str:
    return f"{value * 100:.3g}"


def _bounds(finding: Finding) -> str:
    return f"{_points(finding.low)} to {_points(finding.high)}"
