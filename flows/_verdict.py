"""The gate's verdict in words: what got worse, by how much, since which run."""

import math
import statistics
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from pydantic import ValidationError

from cfsd.baseline.file import Baseline, BaselineFigure, Measured, other_documents, provenance
from cfsd.recipe import Recipe
from cfsd.report.markdown import plain, row
from cfsd.report.run_record import RunRecord
from cfsd.stages import GENERATE, MIX, SELECT, TRAIN
from cfsd.statistics.gate import Finding, Judgement, logarithms
from cfsd.store.artifact import Store
from tasks import record

RESEEDED = (GENERATE, SELECT, MIX, TRAIN)  # the parts whose seed is varied
SLOWER = 1.5  # times the slowest training of the baseline, above which the verdict warns
SHOWN, CONTEXT = 60, 20  # most characters of a changed field, and how many of them precede the change


def warnings(known: Baseline, recipe: Recipe, seconds: Sequence[float], run: dict[str, Measured]) -> list[str]:
    """Return what readers of the verdict must know beside it."""
    notes = [*known.said, *(f"changed in the recipe: {change}" for change in changes(known, recipe))]
    now = provenance(recipe).versions
    notes += [
        f"{name} is {now[name]}, was {was}" for name, was in known.provenance.versions.items() if now.get(name) != was
    ]
    if others := other_documents(known, run):
        notes.append(f"not on the documents of the baseline, so less sharp: {', '.join(others)}")
    if new := sorted(set(run) - set(known.figures)):
        notes.append(f"not guarded, as the baseline does not know it: {', '.join(new)} (--update-baseline)")
    before, after = max(known.training_seconds, default=0.0), statistics.fmean(seconds)
    if before and after > SLOWER * before:
        notes.append(f"slower: training took {after:.0f} s, at most {before:.0f} s in the baseline (only a warning)")
    return notes


def found_trained(store: Store, run_records: Sequence[RunRecord]) -> list[str]:
    """Return a note on trainings that were not made now: neither code nor package versions are part of a key."""
    steps = [step for run_record in run_records for step in run_record.steps if step.stage == TRAIN]
    dates = [store.manifest(step.artifact)["created"] for step in steps if not step.executed]
    if not dates:
        return []
    first = datetime.fromtimestamp(min(dates), UTC).strftime("%Y-%m-%d %H:%M UTC")
    return [
        f"{len(dates)} of {len(steps)} trainings were found in the store, the oldest of {first}: code and packages "
        "that changed since are not judged by them; for that, let --home name an empty folder"
    ]


def changes(known: Baseline, recipe: Recipe) -> list[str]:
    """Return the fields in which the recipe is not the baseline's, `field: old -> new`."""
    before, after = (record.flattened(content) for content in (_as_now(known.recipe), recipe.model_dump(mode="json")))
    skip = {"name", "seed"} | {f"{part}.seed" for part in RESEEDED}
    names = [name for name in {**before, **after} if name not in skip and before.get(name) != after.get(name)]
    return [f"{name}: {_abridged(before.get(name, 'absent'), after.get(name, 'absent'))}" for name in names]


def _abridged(before: str, after: str) -> str:
    """Return `before -> after` on one line; of long texts, the part around their first difference."""
    before, after = (text.replace("\n", "\\n") for text in (before, after))
    shorter = min(len(before), len(after))
    at = next((i for i in range(shorter) if before[i] != after[i]), shorter)
    first = max(0, at - CONTEXT) if max(len(before), len(after)) > SHOWN else 0
    return " -> ".join(("…" if first else "") + text[first:][:SHOWN] for text in (before, after))


def _as_now(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a baseline with fields added since then, or as it is where it is no recipe any more."""
    try:
        return Recipe.model_validate(recipe).model_dump(mode="json")
    except ValidationError:
        return recipe


def sentence_of(judgement: Judgement, known: Baseline) -> str:
    """Return the verdict in a sentence."""
    since = f"since the baseline of {origin(known)}"
    named = [finding for finding in judgement.findings if finding.outcome == judgement.outcome]
    if judgement.outcome == "pass":
        return f"PASS: none of {len(named)} figures got worse by its margin {since}"
    if judgement.outcome == "fail":
        worse = "; ".join(f"{f.name} by {_shown(f.worsening, f)} (margin {_shown(f.margin, f)})" for f in named)
        return f"FAIL: got worse {since}: {worse}"
    open_ = "; ".join(
        f"{f.name} (worse by {_bounds(f)}, margin {_shown(f.margin, f)}; needs {f.needed})" for f in named
    )
    return f"CANNOT TELL {since}: {open_}"


def origin(known: Baseline) -> str:
    """Return when and from which code a baseline was made."""
    return f"{known.provenance.date} (commit {known.provenance.commit})"


def _shown(value: float, finding: Finding) -> str:
    """Return a change, or a bound of it: as points, in the figure's unit, or as a factor and in its unit."""
    if finding.as_ratio:
        return f"{math.exp(value):.3g} times ({finding.before * math.expm1(value):+.3g} {finding.unit})"
    return _in_unit(value, finding)


def _in_unit(value: float, finding: Finding) -> str:
    return f"{value * 100:.3g} points" if finding.unit == "fraction" else f"{value:.3g} {finding.unit}"


def _bounds(finding: Finding) -> str:
    if finding.as_ratio:
        return f"{math.exp(finding.low):.3g} to {_shown(finding.high, finding)}"
    scale = 100 if finding.unit == "fraction" else 1
    return f"{finding.low * scale:.3g} to {_shown(finding.high, finding)}"


def table(judgement: Judgement, known: Baseline, recipe: Recipe, notes: Sequence[str]) -> str:
    """Return the figures as a Markdown table, and below it the notes and how to read it."""
    rows = [
        row(
            f.name, _in_unit(f.before, f), _in_unit(f.after, f), _shown(f.worsening, f), _bounds(f),
            _shown(f.margin, f), f"{f.p_value:.2g}{' (significant)' if f.significant else ''}",
            f.verdict(),
        )
        for f in judgement.findings
    ]  # fmt: skip
    now = provenance(recipe)
    return "\n".join(
        [
            "| figure | baseline | now | worse by | 90 % interval | margin | p | verdict |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            *(f"* {plain(note)}" for note in notes),
            f"* baseline: {len(known.seeds)} seeds, {origin(known)}, recipe {known.provenance.recipe_digest}",
            f"* now: commit {now.commit}, recipe {now.recipe_digest}",
            "* FAIL: worse by more than the margin, and every fresh seed worse than further seeds of the baseline "
            "would be (Holm, 1 % over all figures). PASS: the whole interval is below the margin. Times: of the "
            "baseline's geometric mean.",
        ]
    )


def listed(made: Baseline) -> str:
    """Return the figures of a new baseline as a Markdown table."""
    rows = [row(name, *_listed(figure), figure.unit) for name, figure in made.figures.items()]
    head = ["| figure | mean | deviation between seeds | margin | unit |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows, "", f"* {origin(made)}, recipe {made.provenance.recipe_digest}"])


def _listed(figure: BaselineFigure) -> list[str]:
    values, margin = figure.values, figure.margin
    if figure.margin_is == "difference":
        return [f"{statistics.fmean(values):.4g}", f"{statistics.stdev(values):.3g}", f"{margin:.3g}"]
    logs = logarithms(values)
    mean = math.exp(statistics.fmean(logs))
    spread = math.exp(statistics.stdev(logs))
    return [f"{mean:.4g}", f"{spread:.3g} times", f"{margin:.3g} times ({mean * (margin - 1):+.3g})"]
