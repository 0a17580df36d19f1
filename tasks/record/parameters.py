"""Settings as MLflow's parameters: dotted names and texts."""

import json
from collections.abc import Mapping
from typing import Any

from cfsd.recipe import Recipe
from cfsd.report import recipe_text


def flattened(content: Mapping[str, Any]) -> dict[str, str]:
    """Return nested mappings as dotted names with text values."""
    named = recipe_text.flattened(content)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in named}


def chosen(recipe: Recipe) -> dict[str, str]:
    """Return what a recipe sets apart from defaults, so that two runs differ in what differs; always base and target.

    A part's seed that the recipe's own seed filled counts as a default.
    """
    content = recipe.model_dump(mode="json", exclude_defaults=True)
    for part in content.values():
        if isinstance(part, dict) and part.get("seed") == recipe.seed:
            del part["seed"]
    target = recipe.target
    label = target.name or (target.path or target.kind).rpartition("/")[2]
    named = {"base": recipe.base.label(), "target": label}
    return named | flattened({name: part for name, part in content.items() if part != {}})
