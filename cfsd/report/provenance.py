"""What every report says last: corpora, what was left out, lineage, recipes, cost and versions."""

from typing import Any

from cfsd.report.corpus.page import corpora_of
from cfsd.report.costs import costs_of, trainings_of, versions_of
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
    targets: dict[str, dict[str, Any]] = {}
    for run_record in run_records:
        if artifact := run_record.artifacts.get("selected_target") or run_record.artifacts.get("target"):
            fresh = {"metadata": artifact.metadata, "reasons": artifact.metadata.get("dropped") or {}, "variants": []}
            targets.setdefault(artifact.key, fresh)["variants"].append(run_record.name)
    return list(targets.values())
