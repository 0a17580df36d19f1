"""The report folder of several targets in turn: page, pictures and figures, from the artifacts of a store alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsd.report.changed_answers import changed_answers
from cfsd.report.figures.curves import curve_figures
from cfsd.report.figures.forest import forest_figures
from cfsd.report.figures.svg import embedded
from cfsd.report.files import SCHEMA, ReportSource, check_artifacts, read_part, write_numbers
from cfsd.report.provenance import provenance_of
from cfsd.report.rendering import rendered, write_page
from cfsd.report.run_record import Measured
from cfsd.report.sequence.drawing import matrix_figure, since_base_figures, stages_of
from cfsd.report.sequence.retention import (
    CHANGED,
    GAP,
    LEARNED,
    OF_BASE,
    WHOLE,
    Retention,
    retention_of,
    since_the_base,
)
from cfsd.report.sequence.verdict import learned_and_lost
from cfsd.report.summary import Summary
from cfsd.report.table import lines_of
from cfsd.report.training import names_of_models, panels_of
from cfsd.report.verdict import budget_lines, warnings
from cfsd.statistics.continual import OF_TARGETS, described
from cfsd.store.artifact import Store
from cfsd.store.digests import write_json

SEQUENCE = "sequence.json"
LOSS = "Held-out loss, nats per token: lower is better."
EXACT = "Held-out responses answered exactly, %: higher is better."


def read_measured(folder: Path) -> Measured | None:
    """Return what was measured over the sequence that the report in `folder` is of; None if it is of none.

    Raises BadInput.
    """
    return read_part(folder / SEQUENCE, Measured) if (folder / SEQUENCE).is_file() else None


def write_sequence_files(
    folder: Path, store: Store, kept: ReportSource, measured: Measured
) -> tuple[Retention, list[Path]]:
    """Write everything that people open, from artifacts alone; return the figures and the files, the page first.

    Raises BadInput where the store lacks an artifact.
    """
    check_artifacts(store, [*measured.probes, *(scores for row in measured.scored for scores in row)])
    (stages, _), numbers = write_numbers(folder, store, kept)
    retention = retention_of(store, kept.run_records, stages, measured)
    write_json(folder / SEQUENCE, {"schema": SCHEMA, **measured.model_dump(mode="json")})
    page, picture, text, figures = (folder / n for n in ("report.html", "matrix.png", "continual.md", "continual.json"))
    write_sequence_page(page, store, kept, stages, measured, retention)
    matrix_figure(retention.losses, losses=True).savefig(picture, dpi=150)
    text.write_text(described_sequence(kept.title, kept.notes, retention))
    write_json(figures, _figures(retention))
    return retention, [page, *numbers, picture, text, figures]


def write_sequence_page(
    path: Path, store: Store, kept: ReportSource, stages: list[Summary], measured: Measured, retention: Retention
) -> None:
    """Write the page of a sequence to `path`; `stages` are the summaries of the stages, each against its own base."""
    run_records, since = list(kept.run_records), list(retention.since_base)
    names, last = [stage.name for stage in run_records], since_the_base(run_records, measured)[-1]
    figures = {
        "matrix": {
            LOSS: matrix_figure(retention.losses, losses=True),
            EXACT: matrix_figure(retention.exact, losses=False),
        },
        "since the first base": since_base_figures(since),
        "forest": forest_figures(since),
        "curves": curve_figures(panels_of(store, run_records), names, names_of_models(run_records)),
    }
    write_page(
        path,
        "sequence.html.j2",
        **_contents(kept.title, retention),
        notes=[*budget_lines(stages), *kept.notes],
        warnings=warnings(stages),
        stages=stages_of(retention.losses.targets),
        whole_sequence=WHOLE,
        summaries=since,
        lines=lines_of(since),
        drawn=embedded(figures),
        changed=changed_answers(store, [last.model_copy(update={"name": f"first base against the model {last.name}"})]),
        **provenance_of(store, run_records, stages),
    )


def _contents(title: str, retention: Retention) -> dict[str, Any]:
    content = retention.model_dump()
    of_targets = {name.replace("_", " "): text for name, text in OF_TARGETS.items()}
    return {
        "title": title,
        "verdict": " ".join(learned_and_lost(retention)),
        "targets": retention.losses.targets,
        **{name: content[name] for name in ("losses", "exact", "learned", "benchmarks", "gaps")},
        "changed_targets": content["changed"],
        "definitions": {"learned": LEARNED, "change": CHANGED, **of_targets},
        "gap_definition": GAP,
        "of_base": OF_BASE,
    }


def _figures(retention: Retention) -> dict[str, Any]:
    content = retention.model_dump(mode="json")
    targets, summaries, gaps = (content.pop(name) for name in ("losses", "since_base", "gaps"))
    shared = ("probe_kl", "mean_forgetting", "benchmarks", "texts")
    return {
        "targets": targets,
        **content,
        "since_base": {summary["name"]: {name: summary[name] for name in shared} for summary in summaries},
        "stability_gap": {"definition": GAP, "found": gaps},
        "definitions": {"learned": LEARNED, "changed": CHANGED, "since_base": OF_BASE},
    }


def described_sequence(title: str, notes: Sequence[str], retention: Retention) -> str:
    """Return the figures as Markdown, each with its definition, after the two sentences."""
    texts = [described(retention.losses), described(retention.exact), *map(described, retention.benchmarks)]
    since = [summary.model_dump() for summary in retention.since_base]
    return rendered("continual.md.j2", **_contents(title, retention), notes=notes, described=texts, since_base=since)
