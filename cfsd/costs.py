"""What the variants cost, and with which versions they were made: the report's tables, from artifacts alone."""

from typing import Any

from cfsd.artifact import Store
from cfsd.summary import Summary, Trail
from cfsd.training_story import names_of_models


def costs_of(trails: list[Trail]) -> list[dict[str, Any]]:
    """Return a row per artifact of the steps: seconds, tokens, for whom it was made and who found it."""
    found: dict[str, dict[str, Any]] = {}
    for trail in trails:
        for step in trail.steps:
            fresh = {
                "stage": step.stage,
                "key": step.artifact.key,
                "seconds": step.seconds,
                "made": [],
                "found": [],
            }
            entry = found.setdefault(f"{step.stage} {step.artifact.key}", fresh)
            entry["tokens"] = step.artifact.facts.get("tokens")
            entry["made" if step.executed else "found"].append(trail.name)
    return list(found.values())


def trainings_of(trails: list[Trail], summaries: list[Summary]) -> list[dict[str, Any]]:
    """Return a row per trained model: its variants and what its training cost."""
    names = names_of_models(trails)
    return [{"name": names[s.name], **s.training} for s in summaries if s.name in names and s.training]


def versions_of(store: Store, trails: list[Trail]) -> dict[str, str]:
    """Return what the artifacts were made with; several values where they differ."""
    values: dict[str, dict[str, None]] = {}
    artifacts = {a.key: a for t in trails for a in (*t.artifacts.values(), *(step.artifact for step in t.steps))}
    for artifact in artifacts.values():
        for name, value in store.manifest(artifact).get("environment", {}).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(found) for name, found in values.items()}
