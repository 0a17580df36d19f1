"""Lineage: what a variant's model was made from, as a tree of artifacts, and what was measured on it."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

from cfsd.report.run_record import RunRecord, Scores
from cfsd.report.table import number
from cfsd.store.artifact import Artifact

METADATA = 8
ROLES = (
    "final",
    "tuned",
    "mixture",
    "selected_target",
    "target",
    "selected_corpus",
    "filtered",
    "corpus",
    "probe",
    "base",
)
SELECTED_FROM = {
    "selected_target": "target",
    "selected_corpus": "filtered",
}  # the same artifact where nothing was selected
MADE_FROM = {  # an artifact whose first source is not there came from outside
    "final": ("tuned", "base"),
    "tuned": ("mixture", "base"),
    "mixture": ("selected_target", "selected_corpus"),
    "selected_target": ("target",),
    "selected_corpus": ("filtered",),
    "filtered": ("corpus",),
    "target": ("base",),
    "corpus": ("base",),
    "probe": ("base",),
    "control": ("base",),
    "fitted": ("tuned", "control"),
}  # fmt: skip


def lineage(run_record: RunRecord) -> dict[str, Any]:
    """Return the tree of what the variant's model was made from, and what was measured on base and tuned."""
    placed: set[str] = set()
    known = {
        role: run_record.artifacts[whole] for role, whole in SELECTED_FROM.items() if whole in run_record.artifacts
    }
    artifacts = known | run_record.artifacts

    def node(role: str) -> dict[str, Any]:
        artifact = artifacts[role]
        roles = [other for other in ROLES if artifacts.get(other) == artifact] or [role]
        described = _described(artifact, ", ".join(r for r in roles if SELECTED_FROM.get(r) not in roles))
        if role in placed:
            return described | {"metadata": "as above"}
        placed.update(roles)
        parents = MADE_FROM.get(roles[-1], ())
        if not parents or parents[0] not in artifacts:
            return described
        return described | {"made_from": [node(parent) for parent in parents if parent in artifacts]}

    roots = [node(role) for role in (*ROLES, *artifacts) if role in artifacts and role not in placed]
    return {"roots": roots, "scores": [*_scores_of(run_record.before, "base"), *_scores_of(run_record.after, "tuned")]}


def lines_of_tree(nodes: list[dict[str, Any]], depth: int = 0) -> Iterator[str]:
    """Return the tree as lines of text, `role key`, indented under what was made from them."""
    for node in nodes:
        yield f"{'  ' * depth}{node['role']} {node['key']}"
        yield from lines_of_tree(node["made_from"], depth + 1)


def _scores_of(scores: Scores, role: str) -> Iterator[dict[str, Any]]:
    for name, artifact in scores.benchmarks.items():
        yield _described(artifact, f"{role} on {name}")
    for name, found in (
        ("held-out target rows", scores.target),
        ("the probe, against the base", scores.probe),
        ("held-out target rows, against the base", scores.target_divergence),
        *scores.texts.items(),
    ):
        if found:
            yield _described(found, f"{role} on {name}")


def _described(artifact: Artifact, role: str) -> dict[str, Any]:
    plain = {k: v for k, v in artifact.metadata.items() if isinstance(v, int | float | str) and v != ""}
    metadata = [f"{k} {_fact(v)}" for k, v in islice(plain.items(), METADATA)]
    return {
        "role": role,
        "kind": artifact.kind,
        "key": artifact.key,
        "metadata": ", ".join(metadata),
        "made_from": [],
    }


def _fact(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value}"
    return f"{value:,}" if isinstance(value, int) else number(value)
