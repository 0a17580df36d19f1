"""Records: rows with named fields, and the texts in them; from files (`cfsd.data.files`) or a data set of a hub.

Readers that guess types turn the answer 007 into 7, so these do not guess.
"""

import math
import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import date, time
from decimal import Decimal
from typing import Any, NamedTuple

from cfsd.data.arrow_records import ROWS, records_of_batch
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.model.hub import DATA, commit_of

HALF = re.compile("[\ud800-\udfff]")
HALVES = "half of a character (an emoji that was cut), read as U+FFFD"
NUMBERS = "a number or a date where a text is read, written out"
NO_TEXT: dict[type, tuple[str, str]] = {
    bool: ("a truth value", "write it as the text that it stands for"),
    int: ("an integer of too many digits", "write it as a text, in quotes"),
    float: ("no finite number", "leave it empty, or write a number"),
    Decimal: ("no finite number", "leave it empty, or write a number"),
    list: ("a list", "make one text of its parts, or name a column of texts; chat messages belong in target.messages"),
    dict: ("a mapping", "write the part that is meant into a column of its own"),
    bytes: ("bytes", "store the column as text"),
}

Record = dict[str, Any]


class Located(NamedTuple):
    """A record and where it is, in the words of a message: `'rows.jsonl' line 7`."""

    place: str
    record: Record


class Number(float):
    """A number that is written as the file has it: 1.50 stays 1.50."""

    def __new__(cls, written: str) -> "Number":
        """Return the number and keep how it was `written`."""
        number = super().__new__(cls, written)
        number.written = written
        return number

    written: str

    def __str__(self) -> str:
        """Return it as the file has it."""
        return self.written


def text_of(value: Any, place: str, column: str) -> str:
    """Return the text of a field: nothing is the empty text, numbers are as written, dates as ISO 8601 has them.

    Half of a character becomes U+FFFD. `place` and `column` are for the message. Raises BadInput when it is no text.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    if _is_number(value):
        return str(value)
    kind, remedy = next(
        (words for of, words in NO_TEXT.items() if isinstance(value, of)),
        (f"a value of type {type(value).__name__}", "write it as a text"),
    )
    shown = "" if isinstance(value, int) and not isinstance(value, bool) else f" {reprlib.repr(value)},"
    raise BadInput(f"column {column!r} of {place} holds {kind},{shown} not a text; {remedy}")


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() < 10_000  # of more, Python makes no text
    return value.is_finite() if isinstance(value, Decimal) else isinstance(value, float) and math.isfinite(value)


def whole_characters(text: str) -> str:
    """Return `text` with two halves of a character put together, and half of one as U+FFFD."""
    if text.isascii() or not HALF.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


class Said:
    """What was read in one of several ways, or changed: a sentence for each, with how often and where first."""

    def __init__(self) -> None:
        """Begin with nothing to say."""
        self.count: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, sentence: str, place: str) -> None:
        """Note that `sentence` holds at `place`."""
        self.count[sentence] += 1
        self.first.setdefault(sentence, place)

    def sentences(self) -> list[str]:
        """Return the sentences, each with its first place."""
        more = {sentence: f" and {n - 1:,} more" if n > 1 else "" for sentence, n in self.count.items()}
        return [f"{self.first[sentence]}{more[sentence]}: {sentence}" for sentence in self.count]


def column_texts(records: Iterable[Located], column: str, what: str, setting: str, said: Said) -> Iterator[str]:
    """Yield the texts in `column`, those without text left out; a field that only some records lack is empty.

    `what` names the records and `setting` where the column is set. Raises BadInput naming the place.
    """
    seen = False
    for place, record in records:
        if column not in record and not seen:
            columns = ", ".join(map(repr, record)) or "none"
            raise BadInput(f"{what} {place} has no column {column!r}; its columns are {columns}; {setting}")
        if column not in record:
            said.add(f"no field {column!r}, taken as empty", place)
        seen, value = True, record.get(column)
        text = text_of(value, f"{what} {place}", column)
        if value is not None and value != text:
            said.add(HALVES if isinstance(value, str) else NUMBERS, place)
        if text.strip():
            yield text


def hub_records(
    name: str, revision: str, split: str, subset: str | None = None, column: str | None = None
) -> Iterator[Located]:
    """Yield the records of a data set, memory-mapped from a cache in the data folder; raises BadInput.

    A branch or tag is the commit that it is now.
    """
    from datasets import load_dataset  # late: takes seconds, and only a data set of a hub needs it
    from datasets.exceptions import DatasetsError

    commit = commit_of(DATA + name, revision)
    try:
        loaded = load_dataset(name, subset, revision=commit, split=split, cache_dir=str(home() / "datasets"))
        records = loaded.select_columns([column]) if column in loaded.column_names else loaded
        for first, batch in enumerate(records.with_format("arrow").iter(ROWS)):  # images and sounds as they are stored
            for place, record in records_of_batch(batch, first * ROWS):
                yield Located(f"{name!r} {place}", record)
    # RuntimeError: the data set is a script; the others: files that are not what their names say
    except (OSError, ValueError, RuntimeError, DatasetsError, TypeError, KeyError, NotImplementedError) as error:
        reason = f"{error} ({error.__cause__})" if error.__cause__ else error
        raise BadInput(
            f"data set {name}@{revision} could not be loaded: {reason}; check the id, the split {split!r}, the "
            f"configuration ({f'subset is {subset!r}' if subset else 'set `subset` where there are several'}) and the "
            "network, or give a local file"
        ) from error
