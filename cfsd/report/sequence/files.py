"""The files of a sequence's report folder, and how to make them again from what lies among them."""

import json
from pathlib import Path

from pydantic import ValidationError

from cfsd.errors import BadInput
from cfsd.report.files import Kept, check_artifacts, write_numbers
from cfsd.report.rendering import rendered
from cfsd.report.run_record import Measured
from cfsd.report.sequence.drawing import matrix_figure
from cfsd.report.sequence.gaps import DEFINITION
from cfsd.report.sequence.page import figures_of, write_sequence_page
from cfsd.report.sequence.retention import CHANGED, LEARNED, OF_BASE, Retention, retention_of
from cfsd.statistics.continual import described
from cfsd.store.artifact import Store
from cfsd.store.digests import write_json

SCHEMA = 1
SEQUENCE = "sequence.json"


def read_measured(folder: Path) -> Measured | None:
    """Return what was measured over the sequence that the report in `folder` is of; None if it is of none.

    Raises BadInput.
    """
    file = folder / SEQUENCE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
        if content.pop("schema") != SCHEMA:
            raise ValueError("its schema is another one")
        return Measured.model_validate(content)
    except (ValueError, KeyError, AttributeError, ValidationError) as error:
        raise BadInput(f"{file} is not what the page of a sequence (schema {SCHEMA}) is made from: {error}") from error


def write_sequence_files(folder: Path, store: Store, kept: Kept, measured: Measured) -> tuple[Retention, list[Path]]:
    """Write everything that people open, from artifacts alone; return the figures and the files, the page first.

    Raises BadInput where the store lacks an artifact.
    """
    check_artifacts(store, [*measured.probes, *(scores for row in measured.scored for scores in row)])
    stages, numbers = write_numbers(folder, store, kept)
    retention = retention_of(store, kept.run_records, stages, measured)
    write_json(folder / SEQUENCE, {"schema": SCHEMA, **measured.model_dump(mode="json")})
    page, picture, text, figures = (folder / n for n in ("report.html", "matrix.png", "continual.md", "continual.json"))
    write_sequence_page(page, store, kept, stages, measured, retention)
    matrix_figure(retention.losses, losses=True).savefig(picture, dpi=150)
    text.write_text(described_sequence(kept.title, retention))
    _write_figures(figures, retention)
    return retention, [page, *numbers, picture, text, figures]


def _write_figures(path: Path, retention: Retention) -> None:
    content = retention.model_dump(mode="json")
    gaps = content.pop("gaps")
    since = {
        summary["name"]: {name: summary[name] for name in ("probe_kl", "mean_forgetting", "benchmarks", "texts")}
        for summary in content.pop("since_base")
    }
    write_json(
        path,
        {
            "targets": content.pop("losses"),
            **content,
            "since_base": since,
            "stability_gap": {"definition": DEFINITION, "found": gaps},
            "definitions": {"learned": LEARNED, "changed": CHANGED, "since_base": OF_BASE},
        },
    )


def described_sequence(title: str, retention: Retention) -> str:
    """Return the figures as Markdown, each with its definition, after the two sentences."""
    described_figures = list(map(described, (retention.losses, retention.exact, *retention.benchmarks)))
    since = [summary.model_dump() for summary in retention.since_base]
    return rendered("continual.md.j2", **figures_of(title, retention), described=described_figures, since_base=since)
