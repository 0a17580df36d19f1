"""The reference of every field that a user can set, made from the specs when the site is built.

python docs/reference_fields.py     prints the page
"""

from collections.abc import Iterator

from pydantic import BaseModel

from cfsd.comparison import Comparison
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.target_sequence import TargetSequence
from flows.fields import Described, sections

INTRODUCTION = """# Every field

Made from the specs when the site is built; `python -m flows.fields` prints the same in a terminal. A recipe is a YAML
file; `--set FIELD=VALUE` changes a field of it by its dotted name. Fields of the machine are set by
`--machine FIELD=VALUE`, change nothing that is estimated and are in no key.
"""
TITLES: dict[type[BaseModel], str] = {
    Recipe: "A recipe",
    Comparison: "A comparison: `python -m flows.compare`",
    TargetSequence: "Several targets in turn: `python -m flows.continual`",
    Machine: "The machine: `--machine FIELD=VALUE`",
}


def page() -> str:
    """Return the whole page, as Markdown: one table per spec, each spec once."""
    seen: set[type[BaseModel]] = set()
    parts = [INTRODUCTION]
    for top in TITLES:
        for prefix, model, fields in sections(top):
            if model not in seen:
                parts += _section(prefix, model, fields)
                seen.add(model)
    return "\n".join(parts) + "\n"


def _section(prefix: str, model: type[BaseModel], fields: list[Described]) -> Iterator[str]:
    package = ".".join(model.__module__.split(".")[:2])
    yield f"\n## {TITLES.get(model) or f'`{prefix.rstrip(chr(46))}`'}\n"
    yield f"{(model.__doc__ or '').strip()}\n\n`{model.__name__}` of `{package}`\n"
    yield "| field | type | default | what it does |\n|---|---|---|---|"
    for field in fields:
        yield f"| `{field.name}` | {_cell(field.kind)} | {_default(field)} | {_cell(field.description)} |"


def _default(field: Described) -> str:
    if field.default in ("empty", "required"):
        return field.default
    return "as below" if field.is_section else f"`{_cell(field.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", "⏎").replace("<", "&lt;")


if __name__ == "__main__":
    print(page())
