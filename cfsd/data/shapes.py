"""Shapes: what the columns of a target mean, by its settings or recognised by names that well-known formats use."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from cfsd.data.columns import Part, parse
from cfsd.data.records import Located
from cfsd.errors import BadInput

HEAD = 1000  # rows whose columns are known before the first one is read; what none of them has is an error
PROMPT, RESPONSE = "prompt", "response"  # the defaults of target.prompt and target.response
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
    turns: two columns hold lists of messages, of which those of the second are learned. messages: one column does.
    """

    kind: Literal["texts", "turns", "messages"]
    columns: tuple[str, ...] = ()
    prompt: list[Part] = []
    response: list[Part] = []
    short: list[Part] = []
    recognised: str = ""


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
    return _pair(prompt, response, known, rows)


def _pair(prompt: str, response: str, known: list[str], rows: Sequence[Located], recognised: str = "") -> Shape:
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
    return Shape("texts", prompt=parts[0], response=parts[1], recognised=recognised)


def _recognised(known: list[str], rows: Sequence[Located]) -> Shape:
    """Return the shape of rows without the columns prompt and response, by the names that others use."""
    place, names = rows[0].place, set(known)
    if not {"chosen", "rejected"} & names or "messages" in names:
        for column in ("messages", "conversations"):
            if column in names:
                said = f"column {column!r} is taken as chats, written by the chat template"
                return Shape("messages", (column,), recognised=said)
        if {"prompt", "completion"} <= names:
            return _pair(PROMPT, "completion", known, rows, "columns 'prompt' and 'completion' are taken as the pair")
        if {"instruction", "output"} <= names:
            return _alpaca(known, place)
    raise BadInput(
        f"target {place} has no column {next(name for name in (PROMPT, RESPONSE) if name not in names)!r}; its columns "
        f"are {', '.join(map(repr, known)) or 'none'}; {_remedy(names)}"
    )


def _alpaca(known: list[str], place: str) -> Shape:
    said = "columns 'instruction', 'input' and 'output' are written in the layout of Alpaca"
    long = ALPACA if "input" in known else ALPACA_WITHOUT_INPUT
    prompt, short, output = (
        parse(template, known, place, "target.prompt") for template in (long, ALPACA_WITHOUT_INPUT, "output")
    )
    return Shape("texts", prompt=prompt, response=output, short=short, recognised=said)


def _remedy(names: set[str]) -> str:
    if {"chosen", "rejected"} <= names:
        return (
            "these are rows of preferences, of which fine-tuning takes one response: set target.response=chosen, or "
            "target.messages=chosen where `chosen` is a whole chat"
        )
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
    """Say whether the first value of `column` that is not null is a list of messages."""
    value = next((row.record[column] for row in rows if row.record.get(column) is not None), None)
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)
