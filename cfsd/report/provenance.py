"""What every report says last: corpora, what was left out, lineage, recipes, cost and versions."""

from typing import Any

from cfsd.report.corpus.page import corpora_of
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
        "costs": _costs_of(run_records),
        "models": names_of_models(run_records),
        "trainings": _trainings_of(run_records, summaries),
        "versions": versions_of(store, run_records),
    }


def _dropped(run_records: list[RunRecord]) -> list[dict[str, Any]]:
    """Return per target how many of its rows were not used, and why, with the variants it is of."""
    targets: dict[str, dict[str, Any]] = {}
    for run_record in run_records:
        if artifact := run_record.artifacts.get("selected_target") or run_record.artifacts.get("target"):
            entry = targets.setdefault(artifact.key, {"metadata": artifact.metadata, "variants": []})
            entry["variants"].append(run_record.name)
    return list(targets.values())


def _costs_of(run_records: list[RunRecord]) -> list[dict[str, Any]]:
    """Return a row per different step, with the variants that executed it and those that found its result."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run_record in run_records:
        for step in run_record.steps:
            row = rows.setdefault((step.stage, step.artifact.key), {"step": step, "made": [], "found": []})
            row["made" if step.executed else "found"].append(run_record.name)
    return list(rows.values())


def _trainings_of(run_records: list[RunRecord], summaries: list[Summary]) -> list[dict[str, Any]]:
    names = names_of_models(run_records)
    return [{"name": names[s.name], **s.training} for s in summaries if s.name in names and s.training]


def versions_of(store: Store, run_records: list[RunRecord]) -> dict[str, str]:
    """Return what the artifacts were made with; several values where they differ."""
    values: dict[str, dict[str, None]] = {}
    artifacts = {artifact.key: artifact for r in run_records for artifact in r.made()}
    for artifact in artifacts.values():
        for name, value in store.manifest(artifact).get("environment", {}).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(texts) for name, texts in values.items()}
