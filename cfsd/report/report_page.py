"""The report: what each variant learned and forgot, as one HTML file that loads nothing from anywhere."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cfsd.report.changed_answers import changed_answers
from cfsd.report.compared import Comparisons
from cfsd.report.differences import differences_of
from cfsd.report.figures.curves import curve_figures
from cfsd.report.figures.forest import forest_figures
from cfsd.report.figures.frontier import QUANTITIES, frontier_figure, frontier_points
from cfsd.report.figures.matched_gain import matched_figure
from cfsd.report.figures.moved import moved_figures
from cfsd.report.figures.svg import embedded
from cfsd.report.moved import Moved, sections_of
from cfsd.report.provenance import provenance_of
from cfsd.report.rendering import write_page
from cfsd.report.run_record import RunRecord
from cfsd.report.shown import shown_answers
from cfsd.report.summary import Summary
from cfsd.report.table import forgotten_of, lines_of
from cfsd.report.training import names_of_models, panels_of
from cfsd.report.verdict import remarks, two_sentences, warnings
from cfsd.statistics import differences, matched_gain, null_band
from cfsd.statistics.discoveries import DEFINITION, finding
from cfsd.store.artifact import Store
from cfsd.train.spec import WATCH


def write_report(
    path: Path,
    store: Store,
    title: str,
    run_records: list[RunRecord],
    summaries: list[Summary],
    comparisons: Comparisons,
    notes: Sequence[str] = (),
) -> None:
    """Write the report of one to twenty variants to `path`; what was not measured is left out."""
    moved = sections_of(store, run_records, summaries)
    write_page(
        path,
        "report.html.j2",
        title=title,
        verdict=" ".join(two_sentences(summaries, comparisons)),
        notes=[*remarks(summaries, comparisons), *notes],
        warnings=warnings(summaries),
        summaries=summaries,
        shown=shown_answers(store, run_records),
        lines=lines_of(summaries),
        findings={s.name: {entry.benchmark: finding(entry) for entry in forgotten_of(s)} for s in summaries},
        control=DEFINITION,
        null_band=null_band.DEFINITION,
        differences=differences_of(summaries, comparisons),
        how_compared=differences.DEFINITION,
        of_benchmarks=differences.OF_BENCHMARKS,
        over_seeds=differences.OF_SEEDS if any(c.seeds > 1 for c in comparisons.entries) else "",
        matched=comparisons.matched,
        how_matched=matched_gain.DEFINITION,
        moved=moved,
        drawn=_drawn(store, run_records, summaries, moved)
        | embedded({"matched": {m.measure: matched_figure(summaries, m) for m in comparisons.matched}}),
        changed=changed_answers(store, run_records),
        **provenance_of(store, run_records, summaries),
    )


def _drawn(
    store: Store, run_records: list[RunRecord], summaries: list[Summary], moved: list[Moved]
) -> dict[str, dict[str, Any]]:  # fmt: skip
    panels, models = panels_of(store, run_records), names_of_models(run_records)
    drawn = curve_figures(panels, [summary.name for summary in summaries], models)
    measured = [name for name in QUANTITIES if frontier_points(summaries, name)]
    return embedded({
        "frontier": {name: frontier_figure(summaries, [name]) for name in measured},
        "forest": forest_figures(summaries),
        **{f"moved {m.name}": moved_figures(m.name, m.bins, [s.name for s in summaries]) for m in moved},
        "curves": {name: figure for name, figure in drawn.items() if not name.startswith(WATCH)},
        "watched": {name: figure for name, figure in drawn.items() if name.startswith(WATCH)},
    })  # fmt: skip
