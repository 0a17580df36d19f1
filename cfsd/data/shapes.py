"""Shapes: what the columns of a target mean, by its settings or recognised by names that well-known formats use."""

import ast
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from cfsd.data.columns import Part, fill, is_blank, parse
from cfsd.data.records import Located, text_of
from cfsd.errors import BadInput

HEAD = 1000  # rows whose columns are known before the first one is read; what none of them has is an error
PROMPT, RESPONSE = "prompt", "response"  # the defaults of target.prompt and target.response
LEARNED = ("response", "completion", "output", "messages", "conversations")  # what known shapes learn
CONTEXT = ("system", "system_prompt", "history", "tools")  # columns that some tools put beside a prompt
UNREAD = "beside prompt and response, columns {} are not read"
FOLLOWS = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
# Source: Taori et al. 2023, the layout of the `text` column of the data set tatsu-lab/alpaca.
ALPACA = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    f"{FOLLOWS}### Input:\n{{input}}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = f"Below is an instruction that describes a task. {FOLLOWS}### Response:\n"


class Shape(NamedTuple):
    """How a row is read.

    texts: `prompt` and `response` are parts of text; `short`, if any, is the prompt of a row whose `input` is empty.
    `by_name`: the settings do not name the columns, so that those beside them that belong to a prompt are refused.
    turns: two columns hold lists of messages, of which those of the second are learned. messages: one column does.
    """

    kind: Literal["texts", "turns", "messages"]
    columns: tuple[str, ...] = ()
    prompt: list[Part] = []
    response: list[Part] = []
    short: list[Part] = []
    recognised: str = ""
    by_name: bool = False


def shape_of(prompt: str, response: str, messages: str | None, rows: Sequence[Located]) -> Shape:
    """Return how the rows are read, whose first ones are `rows`; `recognised` says so if the settings do not.

    Raises BadInput naming the columns when they are neither what the settings say nor a shape that is known.
    """
    known = list(dict.fromkeys(column for row in rows for column in row.record))
    place = rows[0].place if rows else "no row"
    if messages is not None:
        _check_column(messages, known, place)
        return Shape("messages", (messages,))
    if not rows:
        return Shape("texts")
    if (prompt, response) == (PROMPT, RESPONSE) and not {PROMPT, RESPONSE} <= set(known):
        return _recognised(known, rows)
    return _pair(prompt, response, known, rows, by_name=(prompt, response) == (PROMPT, RESPONSE))


def check_shape(shape: Shape, row: Located) -> None:
    """Raise BadInput for a row that lacks the column that is learned, and has that of another known shape."""
    if not (shape.by_name or (shape.recognised and shape.kind == "messages")):
        return
    learned = {part.path[0] for part in shape.response if part.path} or {*shape.columns}
    others = [name for name in LEARNED if name not in learned and row.record.get(name)]
    if others and all(row.record.get(name) is None for name in learned):
        raise BadInput(
            f"{row.place} has no {', '.join(map(repr, sorted(learned)))}, by which the first rows are read, but has "
            f"{others[0]!r}: rows of two shapes; give each shape a target of its own, or write them in one shape"
        )


def texts_of(shape: Shape, row: Located, notes: Counter[str]) -> tuple[str, str]:
    """Return prompt and response of a row of shape `texts`; a response of blank columns is empty, template or not.

    Raises BadInput at a value that is no text.
    """
    _check_beside(shape, row, notes)
    short = bool(shape.short) and not text_of(row.record.get("input"), row.place, "input").strip()
    response = "" if is_blank(shape.response, row) else fill(shape.response, row, notes)
    return fill(shape.short if short else shape.prompt, row, notes), response


def _check_beside(shape: Shape, row: Located, notes: Counter[str]) -> None:
    """Count columns that are not read. Raises BadInput where no setting names any and the prompt lacks one of them."""
    read = {part.path[0] for part in (*shape.prompt, *shape.response) if part.path}
    beside = [name for name in row.record if name not in read]
    for name in CONTEXT if shape.by_name else ():
        if name in beside and str(row.record[name] or "").strip() not in ("", "[]"):
            raise BadInput(
                f"{row.place} has a column {name!r}, for which the prompt has no place; set target.prompt to a "
                f"template with it, or to '{{{shape.prompt[0].path[0]}}}', and target.response"
            )
    if beside:
        notes[UNREAD.format(", ".join(map(repr, beside)))] += 1


def listed(value: Any) -> list[dict[str, Any]] | None:
    """Return a list of mappings that a cell holds, as such or as text of JSON or of Python; None for anything else."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(value.strip())  # as pandas writes a list into a CSV file
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                return None
    return value if isinstance(value, list) and all(isinstance(item, dict) for item in value) else None


def _pair(
    prompt: str, response: str, known: list[str], rows: Sequence[Located], recognised: str = "", *, by_name: bool
) -> Shape:
    if all(_holds_messages(rows, column) for column in (prompt, response)):
        said = f"columns {prompt!r} and {response!r} hold messages: the chat template writes them"
        return Shape("turns", (prompt, response), recognised=said)
    if holding := [column for column in (prompt, response) if _holds_messages(rows, column)]:
        raise BadInput(
            f"column {holding[0]!r} of the target holds lists of messages, but the other of {prompt!r} and "
            f"{response!r} does not ({rows[0].place}); give both as lists of messages, or both as texts"
        )
    parts = [
        parse(template, known, rows[0].place, f"target.{name}")
        for name, template in ((PROMPT, prompt), (RESPONSE, response))
    ]
    return Shape("texts", prompt=parts[0], response=parts[1], recognised=recognised, by_name=by_name)


def _recognised(known: list[str], rows: Sequence[Located]) -> Shape:
    """Return the shape of rows without the columns prompt and response, by the names that others use."""
    place, names = rows[0].place, set(known)
    if not {"chosen", "rejected"} & names or "messages" in names:
        for column in ("messages", "conversations"):
            if column in names:
                said = f"column {column!r} is taken as chats, written by the chat template"
                return Shape("messages", (column,), recognised=said)
        if {"prompt", "completion"} <= names and not any(isinstance(row.record.get("label"), bool) for row in rows):
            said = "columns 'prompt' and 'completion' are taken as the pair"
            return _pair(PROMPT, "completion", known, rows, said, by_name=True)
        if {"instruction", "output"} <= names:
            return _alpaca(known, place)
    raise BadInput(
        f"target {place} has no column {next(name for name in (PROMPT, RESPONSE) if name not in names)!r}; its columns "
        f"are {', '.join(map(repr, known)) or 'none'}; {_remedy(names, rows)}"
    )


def _alpaca(known: list[str], place: str) -> Shape:
    said = "columns 'instruction', 'input' and 'output' are written in the layout of Alpaca"
    long = ALPACA if "input" in known else ALPACA_WITHOUT_INPUT
    prompt, short, output = (
        parse(template, known, place, "target.prompt") for template in (long, ALPACA_WITHOUT_INPUT, "output")
    )
    return Shape("texts", prompt=prompt, response=output, short=short, recognised=said, by_name=True)


def _remedy(names: set[str], rows: Sequence[Located]) -> str:
    if "label" in names:
        return (
            "rows labelled true or false hold responses that are not to be learned: keep those of label true, and set "
            "target.response=completion"
        )
    if {"chosen", "rejected"} <= names:
        return (
            "these are rows of preferences, of which fine-tuning takes one response: set target.response=chosen, or "
            "target.messages=chosen where `chosen` is a whole chat"
        )
    if chats := [name for name in sorted(names) if _holds_messages(rows, name)]:
        return f"set target.messages={chats[0]}"
    if "text" in names:
        return "to learn whole texts set target.prompt='' and target.response=text"
    return "set target.prompt and target.response to columns or templates, or target.messages to a column of chats"


def _check_column(column: str, known: list[str], place: str) -> None:
    if known and column not in known:
        raise BadInput(
            f"target {place} has no column {column!r}; its columns are {', '.join(map(repr, known))}; "
            "set target.messages to the one that holds chats"
        )


def _holds_messages(rows: Sequence[Located], column: str) -> bool:
    """Say whether the first value of `column` that is not null is a list of messages, as such or as text."""
    value = next((row.record[column] for row in rows if row.record.get(column) is not None), None)
    if isinstance(value, str):
        return all({"role", "content"} <= message.keys() for message in listed(value) or [{}])
    return any({"role", "from"} & message.keys() for message in listed(value) or [])
