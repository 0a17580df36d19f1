"""Lineage: what a variant's model was made from, as a tree of artifacts, and what was measured on it."""

from collections.abc import Iterator
from typing import Any

from cfsd.report.run_record import RunRecord, Scores
from cfsd.report.table import number
from cfsd.store.artifact import Artifact

METADATA = 8  # entries shown of an artifact
MADE_FROM = {  # by role, the last product first; an artifact whose first source is missing came from outside
    "final": ("tuned", "base"),
    "tuned": ("mixture", "base"),
    "mixture": ("selected_target", "selected_corpus"),
    "selected_target": ("target",),
    "target": ("base",),
    "selected_corpus": ("filtered",),
    "filtered": ("corpus",),
    "corpus": ("base",),
    "probe": ("base",),
    "base": (),
}
OF_MERGING = {"control": ("base",), "fitted": ("tuned", "control")}
SELECTED = {"selected_target": "target", "selected_corpus": "filtered"}  # the same artifact where nothing was selected


def lineage(run_record: RunRecord) -> dict[str, Any]:
    """Return the tree of what the variant's model was made from, and what was measured on base and tuned."""
    placed: set[str] = set()
    artifacts = dict(run_record.artifacts)
    for role, whole in SELECTED.items():
        if whole in artifacts:
            artifacts.setdefault(role, artifacts[whole])

    def node(role: str) -> dict[str, Any]:
        roles = [other for other in MADE_FROM if artifacts.get(other) == artifacts[role]] or [role]
        described = _described(artifacts[role], ", ".join(r for r in roles if SELECTED.get(r) not in roles))
        if role in placed:
            return described | {"metadata": "as above"}
        placed.update(roles)
        parents = (MADE_FROM | OF_MERGING).get(roles[-1], ())
        if parents and parents[0] in artifacts:
            described["made_from"] = [node(parent) for parent in parents if parent in artifacts]
        return described

    roots = [node(role) for role in (*MADE_FROM, *artifacts) if role in artifacts and role not in placed]
    return {"roots": roots, "scores": [*_scores_of(run_record.before, "base"), *_scores_of(run_record.after, "tuned")]}


def lines_of_tree(nodes: list[dict[str, Any]], depth: int = 0) -> Iterator[str]:
    """Return the tree as lines of text, `role key`, indented under what was made from them."""
    for node in nodes:
        yield f"{'  ' * depth}{node['role']} {node['key']}"
        yield from lines_of_tree(node["made_from"], depth + 1)


def _scores_of(scores: Scores, role: str) -> Iterator[dict[str, Any]]:
    measured = [
        *scores.benchmarks.items(),
        ("held-out target rows", scores.target),
        ("the probe, against the base", scores.probe),
        ("chats, against the base", scores.chat),
        ("held-out target rows, against the base", scores.target_divergence),
        *scores.texts.items(),
        *((f"the answers to {name}, against the base", artifact) for name, artifact in scores.prompts.items()),
        ("prompts to be read", scores.shown),
    ]
    yield from (_described(artifact, f"{role} on {name}") for name, artifact in measured if artifact)


def _described(artifact: Artifact, role: str) -> dict[str, Any]:
    plain = {name: value for name, value in artifact.metadata.items() if isinstance(value, int | float | str)}
    metadata = ", ".join([f"{name} {_shown(value)}" for name, value in plain.items() if value != ""][:METADATA])
    return {"role": role, "kind": artifact.kind, "key": artifact.key, "metadata": metadata, "made_from": []}


def _shown(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value}"
    return f"{value:,}" if isinstance(value, int) else number(value)
