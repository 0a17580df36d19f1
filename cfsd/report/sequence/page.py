"""The page of several targets in turn: the R matrix, what is read from it, what is left of the first base.

Made from the artifacts of a store alone, as every report is. The page is `sequence.html.j2`.
"""

from pathlib import Path
from typing import Any

from cfsd.report.budget import budget_sentences
from cfsd.report.changed_answers import changed_answers
from cfsd.report.figures.curves import curve_figures
from cfsd.report.figures.frontier import embedded, forest_figures
from cfsd.report.files import Kept
from cfsd.report.provenance import provenance_of
from cfsd.report.rendering import write_page
from cfsd.report.run_record import Measured
from cfsd.report.sequence.drawing import matrix_figure, since_base_figures, stages_of
from cfsd.report.sequence.gaps import DEFINITION, WHOLE
from cfsd.report.sequence.retention import CHANGED, LEARNED, OF_BASE, Retention, since_the_base
from cfsd.report.sequence.verdict import learned_and_lost
from cfsd.report.summary import Summary
from cfsd.report.table import lines_of, unit_of
from cfsd.report.training import names_of_models, panels_of
from cfsd.report.verdict import warnings
from cfsd.statistics.continual import OF_TARGETS
from cfsd.store.artifact import Store

LOSS = "Held-out loss, nats per token: lower is better."
EXACT = "Held-out responses answered exactly, %: higher is better."


def write_sequence_page(
    path: Path, store: Store, kept: Kept, stages: list[Summary], measured: Measured, retention: Retention
) -> None:
    """Write the page of a sequence to `path`; `stages` are the summaries of the stages, each against its own base."""
    run_records, since = list(kept.run_records), list(retention.since_base)
    last = since_the_base(run_records, measured)[-1]
    figures = {
        "matrix": {
            LOSS: matrix_figure(retention.losses, losses=True),
            EXACT: matrix_figure(retention.exact, losses=False),
        },
        "since the first base": since_base_figures(since),
        "forest": forest_figures(since),
        "curves": curve_figures(
            panels_of(store, run_records), [stage.name for stage in run_records], names_of_models(run_records)
        ),
    }
    write_page(
        path,
        "sequence.html.j2",
        **figures_of(kept.title, retention),
        notes=[*budget_sentences(stages), *kept.notes],
        warnings=warnings(stages),
        stages=stages_of(retention.losses.targets),
        whole_sequence=WHOLE,
        summaries=since,
        lines=lines_of(since),
        unit_of=unit_of,
        drawn=embedded(figures),
        changed=changed_answers(store, [last.model_copy(update={"name": f"first base against the model {last.name}"})]),
        **provenance_of(store, run_records, stages),
    )


def figures_of(title: str, retention: Retention) -> dict[str, Any]:
    """Return the figures and their definitions as `sequence.html.j2` and `continual.md.j2` read them."""
    content = retention.model_dump()
    return {
        "title": title,
        "verdict": " ".join(learned_and_lost(retention)),
        "targets": retention.losses.targets,
        **{name: content[name] for name in ("losses", "exact", "learned", "benchmarks", "gaps")},
        "changed_targets": content["changed"],
        "definitions": {"learned": LEARNED, "change": CHANGED}
        | {name.replace("_", " "): text for name, text in OF_TARGETS.items()},
        "gap_definition": DEFINITION,
        "of_base": OF_BASE,
    }
