"""Texts made of columns: one column, or a template such as `Question: {question}`."""

import string
from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from cfsd.data.records import Located, text_of
from cfsd.errors import BadInput

WRITTEN = "numbers and dates where texts are read are written out"


class Part(NamedTuple):
    """A piece of plain text, and the place of the value after it: a column and keys within it; empty: none."""

    literal: str
    path: tuple[str, ...]


def parse(template: str, known: Collection[str], place: str, setting: str) -> list[Part]:
    """Return the parts of `template`: a column's name, an empty text, or a text with columns in braces.

    `{answers[text]}` is an entry of a mapping or a list; attributes, conversions and formats are refused. `place` and
    `setting` are for messages. Raises BadInput naming the columns when it asks for one that is not `known`.
    """
    if template in known:
        return [Part("", (template,))]
    try:
        parts = [
            _part(literal, field, spec, conversion, known)
            for literal, field, spec, conversion in string.Formatter().parse(template)
        ]
        if template and not any(part.path for part in parts):
            raise ValueError(f"no column is called {template!r}")
    except ValueError as error:
        raise BadInput(
            f"target has no column for {template!r} ({place}: {error}); its columns are "
            f"{', '.join(map(repr, known)) or 'none'}; fix {setting} (a brace that is meant as one is written twice)"
        ) from None
    return parts


def fill(parts: list[Part], row: Located, notes: Counter[str]) -> str:
    """Return the text of `row`: null and missing cells are empty. Raises BadInput at a value that is no text."""
    return "".join(part.literal + (_text(part.path, row, notes) if part.path else "") for part in parts)


def is_blank(parts: list[Part], row: Located) -> bool:
    """Say whether all columns of a template are blank in `row`, so that nothing but its own words would be left."""
    return not any(_text(part.path, row, Counter()).strip() for part in parts if part.path)


def _part(literal: str, field: str | None, spec: str | None, conversion: str | None, known: Collection[str]) -> Part:
    if field is None:
        return Part(literal, ())
    whole = field + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
    if whole in known:  # a name that only looks like more than one
        return Part(literal, (whole,))
    path = tuple(_keys(field))
    if path[0] not in known or whole != field:
        raise ValueError(f"no column is called {whole!r}")
    return Part(literal, path)


def _keys(field: str) -> Iterator[str]:
    column, *keys = field.split("[")
    yield column
    for key in keys:
        if not key.endswith("]") or key == "]":
            raise ValueError(f"no column is called {field!r}")
        yield key[:-1]


def _text(path: tuple[str, ...], row: Located, notes: Counter[str]) -> str:
    value: Any = row.record.get(path[0])
    for key in path[1:]:
        if value is None or value == []:  # nothing, as of a question without an answer
            value = None
            break
        try:
            value = value[int(key)] if isinstance(value, list) else dict(value)[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise BadInput(
                f"{row.place} has no entry {key!r} in column {path[0]!r}, which holds {value!r:.60}"
            ) from None
    if not isinstance(value, str | None):
        notes[WRITTEN] += 1
    return text_of(value, row.place, path[0])
