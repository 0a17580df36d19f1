"""The page of several targets in turn: the R matrix, what is read from it, what is left of the first base.

Made from the artifacts of a store alone, as every report is. The page is `sequence.html.j2`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsd.report.changed_answers import changed_answers
from cfsd.report.figures.curves import curve_figures
from cfsd.report.figures.frontier import forest_figures
from cfsd.report.provenance import embedded, provenance_of
from cfsd.report.rendering import write_page
from cfsd.report.run_record import Measured, RunRecord
from cfsd.report.sequence.drawing import left_figures, matrix_figure, stages_of
from cfsd.report.sequence.gaps import DEFINITION, WHOLE
from cfsd.report.sequence.measured import CHANGED, LEARNED, OF_BASE, Remains, since_the_base
from cfsd.report.sequence.verdict import learned_and_lost
from cfsd.report.summary import Summary
from cfsd.report.table import lines_of, unit_of
from cfsd.report.training import names_of_models, panels_of
from cfsd.report.verdict import budget_lines, warnings
from cfsd.statistics.continual import OF_TARGETS
from cfsd.store.artifact import Store

TEMPLATE = "sequence.html.j2"
LOSS = "Held-out loss, nats per token: lower is better."
EXACT = "Held-out responses answered exactly, %: higher is better."


def write_sequence_page(
    path: Path, store: Store, title: str, run_records: list[RunRecord], stages: list[Summary], measured: Measured,
    remains: Remains, notes: Sequence[str] = (),
) -> None:  # fmt: skip
    """Write the page of a sequence to `path`; `stages` are the summaries of `run_records`, each against its base."""
    since = since_the_base(run_records, measured)[-1]
    write_page(
        path,
        TEMPLATE,
        title=title,
        verdict=" ".join(learned_and_lost(remains)),
        notes=[*budget_lines(stages), *notes],
        warnings=warnings(stages),
        targets=remains.losses.targets,
        stages=stages_of(remains.losses.targets),
        **_numbers(remains),
        summaries=list(remains.since_base),
        lines=lines_of(list(remains.since_base)),
        unit_of=unit_of,
        drawn=_drawn(store, run_records, remains),
        changed=changed_answers(
            store, [since.model_copy(update={"name": f"first base against the model {since.name}"})]
        ),
        **provenance_of(store, run_records, stages),
    )


def _numbers(remains: Remains) -> dict[str, Any]:
    """Return the figures as the template reads them, and their definitions."""
    return {
        "losses": remains.losses.model_dump(),
        "exact": remains.exact.model_dump(),
        "learned": [figure.model_dump() for figure in remains.learned],
        "changed_targets": [figure.model_dump() for figure in remains.changed],
        "definitions": {"learned": LEARNED, "change": CHANGED}
        | {name.replace("_", " "): text for name, text in OF_TARGETS.items()},
        "benchmarks": [found.model_dump() for found in remains.benchmarks],
        "gaps": [gap.model_dump() for gap in remains.gaps],
        "gap_definition": DEFINITION,
        "whole_sequence": WHOLE,
        "of_base": OF_BASE,
    }


def _drawn(store: Store, run_records: list[RunRecord], remains: Remains) -> dict[str, dict[str, Any]]:
    """Return the figures of each section as SVG, which the template may trust."""
    names = [run_record.name for run_record in run_records]
    return embedded({
        "matrix": {LOSS: matrix_figure(remains.losses, losses=True), EXACT: matrix_figure(remains.exact, losses=False)},
        "left": left_figures(remains.since_base),
        "forest": forest_figures(list(remains.since_base)),
        "curves": curve_figures(panels_of(store, run_records), names, names_of_models(run_records)),
    })  # fmt: skip
