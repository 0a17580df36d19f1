"""The reference of every field that a user can set, made from the specs when the site is built.

python docs/reference_fields.py     prints the page
"""

from collections.abc import Iterator

from pydantic import BaseModel

from flows.fields import TITLES, Described, parts

INTRODUCTION = """# Every field

Made from the specs when the site is built; `python -m flows.fields` prints the same in a terminal. A recipe is a YAML
file; `--set FIELD=VALUE` changes a field of it by its dotted name. Fields of the machine are set by
`--machine FIELD=VALUE`, change nothing that is estimated and are in no key.
"""


def page() -> str:
    """Return the whole page, as Markdown: one table per spec, each spec once."""
    written = [INTRODUCTION]
    for _, prefix, model, fields in parts():
        written += _section(prefix, model, fields)
    return "\n".join(written) + "\n"


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
