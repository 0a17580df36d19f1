"""What every report says last: corpora, what was left out, lineage, recipes, cost and versions; and how it draws."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cfsd.artifact import Store
from cfsd.corpus_page import corpora_of
from cfsd.costs import costs_of, trainings_of, versions_of
from cfsd.lineage import lineage
from cfsd.recipe_text import recipes_of
from cfsd.summary import Summary, Trail
from cfsd.training_story import names_of_models

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def provenance_of(store: Store, trails: list[Trail], summaries: list[Summary]) -> dict[str, Any]:
    """Return what `corpus.html.j2` and `provenance.html.j2` read; `summaries` are those of `trails`."""
    return {
        "corpora": corpora_of(store, {trail.name: trail.artifacts for trail in trails}),
        "dropped": _dropped(trails),
        "lineage": {trail.name: lineage(trail) for trail in trails},
        "recipes": recipes_of(trails),
        "costs": costs_of(trails),
        "models": names_of_models(trails),
        "trainings": trainings_of(trails, summaries),
        "versions": versions_of(store, trails),
    }


def _dropped(trails: list[Trail]) -> list[dict[str, Any]]:
    """Return per target how many of its rows were not used, and why, with the variants it is of."""
    found: dict[str, dict[str, Any]] = {}
    for trail in trails:
        if artifact := trail.artifacts.get("chosen") or trail.artifacts.get("target"):
            fresh = {"facts": artifact.facts, "reasons": artifact.facts.get("dropped") or {}, "variants": []}
            found.setdefault(artifact.key, fresh)["variants"].append(trail.name)
    return list(found.values())


def embedded(sections: "Mapping[str, Mapping[str, Figure]]") -> dict[str, dict[str, Any]]:
    """Return the figures of each section as SVG, which a template may trust."""
    from markupsafe import Markup

    from cfsd.figures import svg_of

    return {
        section: {name: Markup(svg_of(f, f"{section} {name}", f"{section}: {name}")) for name, f in found.items()}
        for section, found in sections.items()
    }
