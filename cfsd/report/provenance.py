"""What every report says last: corpora, what was left out, lineage, recipes, cost and versions; and how it draws."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from cfsd.report.corpus.page import corpora_of
from cfsd.report.costs import costs_of, trainings_of, versions_of
from cfsd.report.figures.frontier import svg_of
from cfsd.report.lineage import lineage
from cfsd.report.recipe_text import recipes_of
from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.report.training import names_of_models
from cfsd.store.artifact import Store


def provenance_of(store: Store, run_records: list[RunRecord], summaries: list[Summary]) -> dict[str, Any]:
    """Return what `corpus.html.j2` and `provenance.html.j2` read; `summaries` are those of `run_records`."""
    return {
        "corpora": corpora_of(store, {run_record.name: run_record.artifacts for run_record in run_records}),
        "dropped": _dropped(run_records),
        "lineage": {run_record.name: lineage(run_record) for run_record in run_records},
        "recipes": recipes_of(run_records),
        "costs": costs_of(run_records),
        "models": names_of_models(run_records),
        "trainings": trainings_of(run_records, summaries),
        "versions": versions_of(store, run_records),
    }


def _dropped(run_records: list[RunRecord]) -> list[dict[str, Any]]:
    """Return per target how many of its rows were not used, and why, with the variants it is of."""
    found: dict[str, dict[str, Any]] = {}
    for run_record in run_records:
        if artifact := run_record.artifacts.get("selected_target") or run_record.artifacts.get("target"):
            fresh = {"metadata": artifact.metadata, "reasons": artifact.metadata.get("dropped") or {}, "variants": []}
            found.setdefault(artifact.key, fresh)["variants"].append(run_record.name)
    return list(found.values())


def embedded(sections: "Mapping[str, Mapping[str, Figure]]") -> dict[str, dict[str, Any]]:
    """Return the figures of each section as SVG, which a template may trust."""
    from markupsafe import Markup

    return {
        section: {name: Markup(svg_of(f, f"{section} {name}", f"{section}: {name}")) for name, f in found.items()}
        for section, found in sections.items()
    }
