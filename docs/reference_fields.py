"""The reference of every field that a user can set, made from the specs when the site is built.

python docs/reference_fields.py     prints the page
"""

import json
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel

from cfsd.comparison import Comparison
from cfsd.machine import Machine
from cfsd.recipe import Recipe

INTRODUCTION = """# Every field

Made from the specs when the site is built; `python -m flows.fields` prints the same in a terminal. A recipe is a YAML
file; `--set FIELD=VALUE` changes a field of it by its dotted name. Fields of the machine are set by
`--machine FIELD=VALUE`, change no result and are in no key. A field without a default is required.
"""
TITLES = {
    Recipe: "a recipe",
    Comparison: "a comparison: `python -m flows.compare`",
    Machine: "the machine: `--machine FIELD=VALUE`",
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "pattern": "matches"}


def page() -> str:
    """Return the whole page, as Markdown: one table per spec."""
    seen: set[type[BaseModel]] = set()
    sections = [part for top in TITLES for model, prefix in _models(top, "", seen) for part in _section(model, prefix)]
    return "\n".join([INTRODUCTION, *sections])


def _models(model: type[BaseModel], prefix: str, seen: set[type[BaseModel]]) -> Iterator[tuple[type[BaseModel], str]]:
    """Yield each model once, with the dotted prefix of its fields, parents before the models in their fields."""
    if model in seen:
        return
    seen.add(model)
    yield model, prefix
    for name, field in model.model_fields.items():
        for inner, several in _models_in(field.annotation):
            yield from _models(inner, f"{prefix}{name}{'[]' if several else ''}.", seen)


def _models_in(annotation: Any, several: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    """Yield the models that an annotation names, and whether they stand in a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, several
    for inner in get_args(annotation):
        yield from _models_in(inner, several or getattr(annotation, "__origin__", None) in (tuple, list))


def _section(model: type[BaseModel], prefix: str) -> Iterator[str]:
    schema = model.model_json_schema()
    title = TITLES.get(model) or f"`{prefix.rstrip('.')}`"
    yield f"\n## {title[0].upper()}{title[1:]}\n"
    yield f"{schema.get('description', '').strip()}\n\n`{model.__name__}` of `{_package(model)}`\n"
    yield "| field | type | default | what it does |\n|---|---|---|---|"
    for name, field in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else _default(field.get("default"))
        yield f"| `{prefix}{name}` | {_type(field, schema)} | {default} | {_cell(field.get('description', ''))} |"


def _package(model: type[BaseModel]) -> str:
    return ".".join(model.__module__.split(".")[:2])


def _default(value: Any) -> str:
    if isinstance(value, dict) and value:
        return "as below"
    return "empty" if value in (None, [], {}, "") else f"`{_cell(json.dumps(value, ensure_ascii=False))}`"


def _type(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return the words for a field's JSON schema: `integer > 0, or empty`."""
    if options := field.get("anyOf"):
        words = [_type(option, schema) for option in options]
        return ", or ".join(["empty" if word == "null" else word for word in words])
    if "enum" in field or "const" in field:
        return " · ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    word = {"array": "list", "object": "mapping"}.get(field.get("type", ""), field.get("type", "any"))
    if items := field.get("items"):
        word = f"list of {_type(items, schema)}"
    return " ".join([word, *(_cell(f"{sign} {field[key]}") for key, sign in LIMITS.items() if key in field)])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "⏎").replace("<", "&lt;")


if __name__ == "__main__":
    print(page())
