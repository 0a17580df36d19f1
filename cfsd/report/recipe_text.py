"""Recipes as YAML for people to read: the first in full, of the others what differs from it."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from cfsd.report.run_record import RunRecord


def recipes_of(run_records: list[RunRecord]) -> dict[str, dict[str, str]]:
    """Return each recipe's digest and YAML: the first in full, of the others what differs from it."""
    texts: dict[str, dict[str, str]] = {}
    first: dict[str, Any] = {}
    for run_record in run_records:
        if run_record.recipe is None:
            continue
        recipe = run_record.recipe.model_dump(mode="json")
        flat = dict(flattened(recipe))
        changed = {k: flat.get(k) for k in flat | first if flat.get(k) != first.get(k)} if first else recipe
        text = readable_yaml(changed) if changed else "the same"
        texts[run_record.name] = {"digest": run_record.digest, "yaml": text, "of": next(iter(texts), "")}
        first = first or flat
    return texts


def readable_yaml(content: dict[str, Any]) -> str:
    """Return `content` as YAML in its own order; texts with line breaks in quotes, not over empty lines."""

    class Readable(yaml.SafeDumper):
        pass

    def quoted(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)

    Readable.add_representer(str, quoted)  # otherwise a line break is shown as an empty line
    return yaml.dump(content, Dumper=Readable, sort_keys=False, allow_unicode=True, width=88)


def flattened(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values of nested mappings; an empty mapping is a value."""
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
