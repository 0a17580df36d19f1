"""The report: what each variant learned and forgot, as one HTML file.

Made from the artifacts of a store alone. The page is `report.html.j2`; it loads nothing from anywhere.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsd.artifact import Store
from cfsd.changed_answers import changed_answers
from cfsd.discoveries import DEFINITION, finding
from cfsd.page import write_page
from cfsd.provenance import embedded, provenance_of
from cfsd.summary import Summary, Trail
from cfsd.table import forgotten_of, lines_of, unit_of
from cfsd.training_story import names_of_models, panels_of
from cfsd.verdict import remarks, two_sentences, warnings

TEMPLATE = "report.html.j2"


def write_report(
    path: Path,
    store: Store,
    title: str,
    trails: list[Trail],
    summaries: list[Summary],
    notes: Sequence[str] = (),
) -> None:
    """Write the report of one to twenty variants to `path`; what was not measured is left out."""
    write_page(
        path,
        TEMPLATE,
        title=title,
        verdict=" ".join(two_sentences(summaries)),
        notes=[*remarks(summaries), *notes],
        warnings=warnings(summaries),
        summaries=summaries,
        lines=lines_of(summaries),
        unit_of=unit_of,
        findings=_findings(summaries),
        control=DEFINITION,
        drawn=_drawn(store, trails, summaries),
        changed=changed_answers(store, trails),
        **provenance_of(store, trails, summaries),
    )


def _findings(summaries: list[Summary]) -> dict[str, dict[str, str]]:
    """Return per variant and benchmark what may be said of it, with the power where nothing was found."""
    return {s.name: {entry.benchmark: finding(entry) for entry in forgotten_of(s)} for s in summaries}


def _drawn(store: Store, trails: list[Trail], summaries: list[Summary]) -> dict[str, dict[str, Any]]:
    """Return the figures of each section as SVG, which the template may trust."""
    from cfsd import curves, figures

    panels, models = panels_of(store, trails), names_of_models(trails)
    names = [summary.name for summary in summaries]
    benchmarks = {panel.name for panel in panels if panel.is_benchmark}
    drawn = curves.curve_figures(panels, names, models)
    measured = [name for name in figures.QUANTITIES if figures.frontier_points(summaries, name)]
    return embedded({
        "frontier": {name: figures.frontier_figure(summaries, [name]) for name in measured},
        "forest": figures.forest_figures(summaries),
        "curves": {name: figure for name, figure in drawn.items() if name not in benchmarks},
        "watched": {name: figure for name, figure in drawn.items() if name in benchmarks},
    })  # fmt: skip
