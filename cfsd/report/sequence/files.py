"""The files of a sequence's report folder, and how to make them again from what lies among them."""

import json
from pathlib import Path

from pydantic import ValidationError

from cfsd.errors import BadInput
from cfsd.report.files import Kept, check_artifacts, with_present_names, write_numbers
from cfsd.report.run_record import Measured
from cfsd.report.sequence.drawing import matrix_figure
from cfsd.report.sequence.gaps import DEFINITION, described_gaps
from cfsd.report.sequence.measured import CHANGED, LEARNED, OF_BASE, Remains, remains_of
from cfsd.report.sequence.page import write_sequence_page
from cfsd.report.sequence.verdict import learned_and_lost
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, shown
from cfsd.statistics.continual import Continual, Stability, described
from cfsd.store.artifact import Store
from cfsd.store.digests import write_json

SCHEMA = 1
SEQUENCE = "sequence.json"


def keep_measured(folder: Path, measured: Measured) -> Path:
    """Write beside the run records what else the page of a sequence is made from, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SEQUENCE, {"schema": SCHEMA, **measured.model_dump(mode="json")})
    return folder / SEQUENCE


def read_measured(folder: Path) -> Measured | None:
    """Return what was measured over the sequence that the report in `folder` is of; None if it is of none.

    Raises BadInput.
    """
    file = folder / SEQUENCE
    if not file.is_file():
        return None
    try:
        content = with_present_names(json.loads(file.read_text()))
        if content.pop("schema") != SCHEMA:
            raise ValueError("its schema is another one")
        return Measured.model_validate(content)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise BadInput(f"{file} is not what the page of a sequence (schema {SCHEMA}) is made from: {error}") from error


def write_sequence_files(folder: Path, store: Store, kept: Kept, measured: Measured) -> tuple[Remains, list[Path]]:
    """Write everything that people open, from artifacts alone; return the figures and the files, the page first.

    Raises BadInput where the store lacks an artifact.
    """
    check_artifacts(store, [*measured.probes, *(scores for row in measured.scored for scores in row)])
    stages, numbers = write_numbers(folder, store, kept)
    run_records = list(kept.run_records)
    remains = remains_of(store, run_records, stages, measured)
    keep_measured(folder, measured)
    page, picture = folder / "report.html", folder / "matrix.png"
    write_sequence_page(page, store, kept.title, run_records, stages, measured, remains, kept.notes)
    matrix_figure(remains.losses, losses=True).savefig(picture, dpi=150)
    return remains, [page, *numbers, picture, *_write_figures(folder, kept.title, remains)]


def _write_figures(folder: Path, title: str, remains: Remains) -> list[Path]:
    """Write continual.md, for the terminal, and continual.json."""
    page, numbers = folder / "continual.md", folder / "continual.json"
    page.write_text(described_sequence(title, remains))
    content = remains.model_dump(mode="json", exclude={"losses", "since_base", "gaps"})
    since = {s.name: _left(s) for s in remains.since_base}
    gaps = {"definition": DEFINITION, "found": [gap.model_dump(mode="json") for gap in remains.gaps]}
    definitions = {"learned": LEARNED, "changed": CHANGED, "since_base": OF_BASE}
    write_json(
        numbers,
        {"targets": remains.losses.model_dump(mode="json"), **content, "since_base": since, "stability_gap": gaps,
         "definitions": definitions},
    )  # fmt: skip
    return [page, numbers]


def _left(summary: Summary) -> dict[str, object]:
    content = summary.model_dump(mode="json")
    return {name: content[name] for name in ("probe_kl", "mean_forgetting", "benchmarks", "texts")}


def described_sequence(title: str, remains: Remains) -> str:
    """Return the figures as Markdown, each with its definition, after the two sentences."""
    figures: list[Continual | Stability] = [remains.losses, remains.exact, *remains.benchmarks]
    blocks = [_of_targets(remains), *map(described, figures[:2]), _of_base(remains), *map(described, figures[2:])]
    text = "\n\n".join(f"```\n{block}\n```" for block in (*blocks, described_gaps(remains.gaps)) if block)
    return f"# {title}: targets in turn\n\n{' '.join(learned_and_lost(remains))}\n\n{text}\n"


def _of_targets(remains: Remains) -> str:
    names = remains.losses.targets
    learned = [f"{n}: {shown(f.model_dump())} {f.unit}" for n, f in zip(names, remains.learned, strict=True)]
    changed = [f"{n}: {shown(f.model_dump())} {f.unit}" for n, f in zip(names, remains.changed, strict=False)]
    return "\n".join(["learned", *learned, f"  {LEARNED}", "change", *changed, f"  {CHANGED}"])


def _of_base(remains: Remains) -> str:
    lines = []
    for summary in remains.since_base:
        parts = [f"probe_kl {shown(summary.probe_kl)} nats/token"] if summary.probe_kl else []
        if summary.mean_forgetting:
            parts.append(f"mean forgetting {shown(summary.mean_forgetting, POINTS)} points")
        lines.append(f"{summary.name}: {', '.join(parts) or 'nothing measured'}")
    return "\n".join(["left of the first base", *lines, f"  {OF_BASE}"])
