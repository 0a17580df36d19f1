"""The report: what each variant learned and forgot, as one HTML file.

Made from the artifacts of a store alone. The page is `report.html.j2`; it loads nothing from anywhere.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from cfsd.artifact import Artifact, Store
from cfsd.corpus_page import corpora_of
from cfsd.page import write_page
from cfsd.summary import Scores, Summary, Trail, table
from cfsd.table import lines_of, number, unit_of
from cfsd.training_story import names_of_models, panels_of
from cfsd.verdict import verdict, warnings

MOST_WORSE, MOST_BETTER = 3, 1  # items shown per benchmark
FACTS = 8
TEMPLATE = "report.html.j2"
ROLES = ("final", "tuned", "mixture", "chosen", "target", "selected", "kept", "corpus", "probe", "base")
SELECTED_FROM = {"chosen": "target", "selected": "kept"}  # the same artifact where nothing was selected
MADE_FROM = {  # an artifact whose first source is not there came from outside
    "final": ("tuned", "base"),
    "tuned": ("mixture", "base"),
    "mixture": ("chosen", "selected"),
    "chosen": ("target",),
    "selected": ("kept",),
    "kept": ("corpus",),
    "target": ("base",),
    "corpus": ("base",),
    "probe": ("base",),
}  # fmt: skip


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
        verdict=verdict(summaries),
        warnings=warnings(summaries),
        notes=notes,
        summaries=summaries,
        lines=lines_of(summaries),
        unit_of=unit_of,
        drawn=_drawn(store, trails, summaries),
        flips={trail.name: _flips(store, trail) for trail in trails},
        corpora=corpora_of(store, {trail.name: trail.artifacts for trail in trails}),
        dropped=_dropped(trails),
        lineage={trail.name: _lineage(trail) for trail in trails},
        recipes=_recipes(trails),
        costs=_costs(trails),
        models=names_of_models(trails),
        trainings=_trainings(trails, summaries),
        versions=_versions(store, trails),
    )


def _drawn(store: Store, trails: list[Trail], summaries: list[Summary]) -> dict[str, dict[str, Any]]:
    """Return the figures of each section as SVG, which the template may trust."""
    from markupsafe import Markup

    from cfsd import curves, figures

    panels, models = panels_of(store, trails), names_of_models(trails)
    names = [summary.name for summary in summaries]
    benchmarks = {panel.name for panel in panels if panel.is_benchmark}
    drawn = curves.curve_figures(panels, names, models)
    measured = [name for name in figures.QUANTITIES if figures.frontier_points(summaries, name)]
    sections = {
        "frontier": {name: figures.frontier_figure(summaries, [name]) for name in measured},
        "forest": figures.forest_figures(summaries),
        "curves": {name: figure for name, figure in drawn.items() if name not in benchmarks},
        "watched": {name: figure for name, figure in drawn.items() if name in benchmarks},
    }
    return {
        section: {
            name: Markup(figures.svg_of(f, f"{section} {name}", f"{section}: {name}")) for name, f in found.items()
        }
        for section, found in sections.items()
    }


def _flips(store: Store, trail: Trail) -> dict[str, list[dict[str, Any]]]:
    """Return per benchmark a few items whose score changed: first worse, then better, most changed first.

    As in the figures, an answer counts as the benchmark's first filter reads it.
    """
    found = {}
    for name, before in trail.before.benchmarks.items():
        base, tuned = (table(store, scores, "scores") for scores in (before, trail.after.benchmarks[name]))
        facts: dict[str, Any] = before.facts
        base = base[base["filter"] == facts["filters"][0]]
        joined = base.merge(tuned, on=["filter", "doc_id"], suffixes=("_base", "_tuned"))
        sign = 1 if facts["higher_is_better"] else -1
        joined["worse"] = sign * (joined["value_base"] - joined["value_tuned"]) / joined["count_base"]
        joined = joined.sort_values("worse", ascending=False, kind="stable")
        joined["change"] = joined["worse"].gt(0).map({True: "worse", False: "better"})
        joined["binary"] = facts["kind"] == "binary"
        parts = [joined[joined["worse"] > 0].head(MOST_WORSE), joined[joined["worse"] < 0].tail(MOST_BETTER)]
        if items := [item for part in parts for item in part.to_dict("records")]:
            found[name] = items
    return found


def _dropped(trails: list[Trail]) -> list[dict[str, Any]]:
    """Return per target how many of its rows were not used, and why, with the variants it is of."""
    found: dict[str, dict[str, Any]] = {}
    for trail in trails:
        if artifact := trail.artifacts.get("chosen") or trail.artifacts.get("target"):
            fresh = {"facts": artifact.facts, "reasons": artifact.facts.get("dropped") or {}, "variants": []}
            found.setdefault(artifact.key, fresh)["variants"].append(trail.name)
    return list(found.values())


def _lineage(trail: Trail) -> dict[str, Any]:
    """Return the tree of what the variant's model was made from, and what was measured on base and tuned."""
    placed: set[str] = set()
    known = {role: trail.artifacts[whole] for role, whole in SELECTED_FROM.items() if whole in trail.artifacts}
    artifacts = known | trail.artifacts

    def node(role: str) -> dict[str, Any]:
        artifact = artifacts[role]
        roles = [other for other in ROLES if artifacts.get(other) == artifact] or [role]
        described = _described(artifact, ", ".join(r for r in roles if SELECTED_FROM.get(r) not in roles))
        if role in placed:
            return described | {"facts": "as above"}
        placed.update(roles)
        parents = MADE_FROM.get(roles[-1], ())
        if not parents or parents[0] not in artifacts:
            return described
        return described | {"made_from": [node(parent) for parent in parents if parent in artifacts]}

    roots = [node(role) for role in (*ROLES, *artifacts) if role in artifacts and role not in placed]
    return {"roots": roots, "scores": [*_scores_of(trail.before, "base"), *_scores_of(trail.after, "tuned")]}


def _scores_of(scores: Scores, role: str) -> Iterator[dict[str, Any]]:
    for name, artifact in scores.benchmarks.items():
        yield _described(artifact, f"{role} on {name}")
    for name, found in (
        ("held-out target rows", scores.target),
        ("the probe, against the base", scores.probe),
    ):
        if found:
            yield _described(found, f"{role} on {name}")


def _described(artifact: Artifact, role: str) -> dict[str, Any]:
    plain = {k: v for k, v in artifact.facts.items() if isinstance(v, int | float | str) and v != ""}
    facts = [f"{k} {_fact(v)}" for k, v in islice(plain.items(), FACTS)]
    return {
        "role": role,
        "kind": artifact.kind,
        "key": artifact.key,
        "facts": ", ".join(facts),
        "made_from": [],
    }


def _fact(value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{value}"
    return f"{value:,}" if isinstance(value, int) else number(value)


def _recipes(trails: list[Trail]) -> dict[str, dict[str, str]]:
    """Return each recipe's digest and YAML: the first in full, of the others what differs from it."""
    found: dict[str, dict[str, str]] = {}
    first: dict[str, Any] = {}
    for trail in trails:
        if not trail.recipe:
            continue
        flat = dict(_flat(trail.recipe))
        changed = {k: flat.get(k) for k in flat | first if first and flat.get(k) != first.get(k)}
        text = _yaml(changed if first else trail.recipe)
        found[trail.name] = {
            "digest": trail.digest,
            "yaml": text if changed or not first else "the same",
            "of": next(iter(found), ""),
        }
        first = first or flat
    return found


def _yaml(content: dict[str, Any]) -> str:
    class Readable(yaml.SafeDumper):
        pass

    def quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)

    Readable.add_representer(str, quoted)  # otherwise a line break is shown as an empty line
    return yaml.dump(content, Dumper=Readable, sort_keys=False, allow_unicode=True, width=88)


def _flat(content: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _costs(trails: list[Trail]) -> list[dict[str, Any]]:
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


def _trainings(trails: list[Trail], summaries: list[Summary]) -> list[dict[str, Any]]:
    """Return a row per trained model: its variants and what its training cost."""
    names = names_of_models(trails)
    return [{"name": names[s.name], **s.training} for s in summaries if s.name in names and s.training]


def _versions(store: Store, trails: list[Trail]) -> dict[str, str]:
    """Return what the artifacts were made with; several values where they differ."""
    values: dict[str, dict[str, None]] = {}
    artifacts = {a.key: a for t in trails for a in (*t.artifacts.values(), *(step.artifact for step in t.steps))}
    for artifact in artifacts.values():
        for name, value in store.manifest(artifact).get("environment", {}).items():
            values.setdefault(name, {})[str(value)] = None
    return {name: ", ".join(found) for name, found in values.items()}
