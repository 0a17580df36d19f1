"""Every field of recipes, comparisons, sequences and the machine, with its type, default, unit and effect.

python -m flows.fields
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from cfsd.comparison import Comparison
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.target_sequence import TargetSequence

TITLES: dict[type[BaseModel], str] = {
    Recipe: "A recipe: YAML, or --set FIELD=VALUE",
    Comparison: "A comparison: python -m flows.compare",
    TargetSequence: "Several targets in turn: python -m flows.continual",
    Machine: "The machine: --machine FIELD=VALUE",
}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class Described(NamedTuple):
    """A field as users see it. `default` is as in YAML, or "empty", or "required"."""

    name: str  # dotted; `[]` after what is a list
    kind: str
    default: str
    description: str
    is_section: bool  # its own fields are listed as well

    def holds_a_value(self) -> bool:
        """Say whether it is set itself, and not only field by field."""
        return not self.is_section or self.kind.startswith("list")


def sections(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type[BaseModel], list[Described]]]:
    """Yield (dotted prefix, spec, fields) of `model` and of every spec in its fields, parents first.

    A list of specs that a field before it holds already, as `earlier` of targets, is not described again.
    """
    schema, inner, known = model.model_json_schema(), dict[str, list[tuple[type[BaseModel], bool]]](), set[Any]()
    for name, own in model.model_fields.items():
        inner[name] = [
            (spec, is_list) for spec, is_list in _specs_in(own.annotation) if not (is_list and spec in known)
        ]
        known.update(spec for spec, _ in inner[name])
    yield (
        prefix,
        model,
        [
            Described(
                prefix + name,
                _kind(field),
                _default(name, field, schema),
                field.get("description", ""),
                bool(inner[name]),
            )
            for name, field in schema["properties"].items()
        ],
    )
    for name, specs in inner.items():
        for spec, is_list in specs:
            yield from sections(spec, f"{prefix}{name}{'[]' if is_list else ''}.")


def rows(model: type[BaseModel]) -> list[Described]:
    """Return every field that holds a value or a list, by dotted name."""
    return [field for _, _, fields in sections(model) for field in fields if field.holds_a_value()]


def parts() -> Iterator[tuple[type[BaseModel], str, type[BaseModel], list[Described]]]:
    """Yield (the one of TITLES, dotted prefix, spec, fields) of every spec, each once."""
    seen = set[type[BaseModel]]()
    for top in TITLES:
        for prefix, model, fields in sections(top):
            if model not in seen:
                seen.add(model)
                yield top, prefix, model, fields


def _specs_in(annotation: Any, is_list: bool = False) -> Iterator[tuple[type[BaseModel], bool]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation, is_list
    for part in get_args(annotation):
        yield from _specs_in(part, is_list or get_origin(annotation) in (tuple, list))


def _kind(field: dict[str, Any]) -> str:
    """Return a field's JSON schema in words, such as `integer > 0, or empty`."""
    if options := field.get("anyOf"):
        return ", or ".join("empty" if option.get("type") == "null" else _kind(option) for option in options)
    if "enum" in field or "const" in field:
        return " · ".join(map(str, field.get("enum", [field.get("const")])))
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    if field.get("type") == "array":
        return f"list of {_kind(field.get('items', {}))}"
    word = {"object": "mapping"}.get(field.get("type", ""), field.get("type", "value"))
    return " ".join([word, *(f"{sign} {field[key]}" for key, sign in LIMITS.items() if key in field)])


def _default(name: str, field: dict[str, Any], schema: dict[str, Any]) -> str:
    if name in schema.get("required", ()):
        return "required"
    default = field.get("default")
    if default in (None, "", [], {}):
        return "empty"
    return default if isinstance(default, str) else json.dumps(default, ensure_ascii=False)


def main() -> None:
    """Print every field that holds a value or a list: its name, type and default, and below them what it does."""
    console, last = Console(), None
    for top, _, _, fields in parts():
        if top != last:
            console.print(Text(f"\n{TITLES[top]}\n", style="bold underline"))
        last = top
        for field in filter(Described.holds_a_value, fields):
            console.print(Text.assemble((field.name, "bold"), f"  {field.kind}; default: {field.default}"))
            console.print(Padding(Text(field.description), (0, 0, 0, 4)))


if __name__ == "__main__":
    main()
