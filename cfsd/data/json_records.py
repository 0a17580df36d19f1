"""Records of JSON: an object to a line, one list of objects, or an object that holds such a list."""

import json
from collections.abc import Iterator
from typing import Any

from cfsd.data.contents import Contents
from cfsd.data.records import Number, Said

MARK = "\ufeff"
DEEPEST = 100  # lists and objects within each other
MOST_DIGITS = 3000  # Python turns integers of 4,300 digits into text, and no more
JOINED = "a byte order mark within the file, left out: files were put one behind the other"


def json_records(contents: Contents, column: str | None, split: str, said: Said) -> Iterator[tuple[str, Any]]:
    """Yield each record with its line, or with its row where it is one of a list.

    A file that is one object may hold a list of records; it is itself a record if it has the `column` that is needed,
    and `split` is the field that is meant where it holds several lists. Only a file that is one list or one object is
    held whole. Raises ValueError naming line and column.
    """
    first, more = _first_lines(contents)
    if not first:
        return
    if more and _is_list(first):
        raise ValueError('line 1 is a list, and more lines follow; write each line as an object: {"messages": [...]}')
    if _is_whole(contents, first) or (contents.suffix == ".json" and not more):
        with contents.text() as file:
            whole = _parsed(file.read(), 1)
        records = _unwrapped(whole, column, split, said, repr(str(contents.path)))
        yield from ((f"row {number}", record) for number, record in enumerate(records, 1))
        return
    with contents.text() as file:
        for number, line in enumerate(file, 1):
            if line.startswith(MARK):
                said.add(JOINED, f"{str(contents.path)!r} line {number}")
            if (written := line.lstrip(MARK)).strip():
                yield f"line {number}", _parsed(written.rstrip("\n"), number)


def _first_lines(contents: Contents) -> tuple[str, bool]:
    """Return the first line that is not blank, and whether there is one more."""
    with contents.text() as file:
        lines = (line for line in file if line.strip())
        return next(lines, ""), next(lines, None) is not None


def _is_list(line: str) -> bool:
    try:
        return isinstance(_parsed(line, 1), list)
    except ValueError:
        return False


def _is_whole(contents: Contents, first: str) -> bool:
    if first.lstrip().startswith("["):
        return True
    try:
        _parsed(first, 1)
    except ValueError:
        return contents.suffix == ".json" and first.strip().endswith(("{", "[", ",", ":"))
    return False


def _parsed(text: str, line: int) -> Any:
    """Return the value of `text`, which begins in `line`. Raises ValueError naming line and column."""
    try:
        value = DECODER.decode(text)
        if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
            raise RecursionError
        return value
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1} column {error.colno}"
        found = f"at {text[error.pos : error.pos + 20]!r}" if error.pos < len(text) else "at its end"
        raise ValueError(f"{place}: {error.msg} {found}") from None
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"line {line}: {reason}") from None


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(DEEPEST):
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in inner for item in part if isinstance(item, dict | list)]
    return bool(level)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is there twice in one object")
    return record


def _integer(written: str) -> int:
    if len(written) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(written):,} digits; write it as a text, in quotes")
    return int(written)


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=Number, parse_int=_integer)


def _unwrapped(whole: Any, column: str | None, split: str, said: Said, place: str) -> list[Any]:
    """Return the records of a file that is one value: of a list, of a list that an object holds, or that object."""
    if isinstance(whole, list):
        return whole
    if not isinstance(whole, dict) or column in whole or any(map(_are_messages, whole.values())):
        return [whole]
    lists = {name: value for name, value in whole.items() if _is_list_of_records(value)}
    if not lists:
        _refuse_columns(whole)
        return [whole]
    if len(lists) > 1 and split not in lists:
        raise ValueError(f"it holds several lists of records, {', '.join(map(repr, lists))}: set `split` to one")
    taken = split if split in lists else next(iter(lists))
    left = [name for name in whole if name != taken]
    said.add(f"the records are those of {taken!r}" + (f", not {', '.join(left)}" if left else ""), place)
    return list(lists[taken])


def _is_list_of_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _are_messages(value: Any) -> bool:
    """Say whether `value` is the list of a chat's messages."""
    return _is_list_of_records(value) and any({"role", "from"} & item.keys() for item in value)


def _refuse_columns(whole: dict[str, Any]) -> None:
    columns = [
        v
        for v in whole.values()
        if isinstance(v, dict) or (isinstance(v, list) and not any(isinstance(i, dict) for i in v))
    ]
    if whole and len(columns) == len(whole):
        raise ValueError(
            "it is one object of columns; write an object for each row, as pandas does by "
            'to_json(orient="records", lines=True)'
        )
