"""What the variants cost, and with which versions they were made: the report's tables, from artifacts alone."""

from typing import Any

from cfsd.report.run_record import RunRecord
from cfsd.report.summary import Summary
from cfsd.report.training import names_of_models
from cfsd.store.artifact import Store


def costs_of(run_records: list[RunRecord]) -> list[dict[str, Any]]:
    """Return a row per artifact of the steps: seconds, tokens, for whom it was made and who found it."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for run_record in run_records:
        for step in run_record.steps:
            names = (step.stage, step.artifact.key)
            row = rows.setdefault(names, dict(zip(("stage", "key"), names, strict=True), made=[], found=[]))
            row.setdefault("seconds", step.seconds)
            row["tokens"] = step.artifact.metadata.get("tokens")
            row["made" if step.executed else "found"].append(run_record.name)
    return list(rows.values())


def trainings_of(run_records: list[RunRecord], summaries: list[Summary]) -> list[dict[str, Any]]:
    """Return a row per trained model: its variants and what its training cost."""
    names = names_of_models(run_records)
    return [{"name": names[s.name], **s.training} for s in summaries if s.name in names and s.training]


def versions_of(store: Store, run_records: list[RunRecord]) -> dict[str, str]:
    """Return what the artifacts were made with; several values where they differ."""
    values: dict[str, dict[str, None]] = {}
    artifacts = {a.key: a for t in run_records for a in (*t.artifacts.values(), *(step.artifact for step in t.steps))}
    for artifact in artifacts.values():
        for name, value in store.manifest(artifact).get("environment", {}).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(texts) for name, texts in values.items()}
