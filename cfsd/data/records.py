"""Records: rows with named fields, read from the user's own files or from a pinned data set of a hub.

Readers that guess types turn the answer 007 into 7, so these do not guess.
"""

import csv
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cfsd.errors import BadInput
from cfsd.machine import home

FILES = (".jsonl", ".json", ".csv", ".parquet")
LONGEST_CELL = 2**31 - 1  # characters; the csv module's own limit of 131,072 is less than a long document

HALF = re.compile("[\ud800-\udfff]")
KINDS = {list: "a list", dict: "a mapping", bool: "a truth value", bytes: "bytes", float: "no finite number"}

Record = dict[str, Any]


class Located(NamedTuple):
    """A record and where it is, in the words of a message: `'rows.jsonl' line 7`."""

    place: str
    record: Record


def text_of(value: Any, place: str, column: str) -> str:
    """Return the text of a cell: null is empty text, half of a surrogate pair becomes U+FFFD, a number is written.

    Raises BadInput naming place and column for what is no text: true or false, NaN, lists, mappings and bytes.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return whole_characters(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    kind = KINDS.get(type(value), f"a value of type {type(value).__name__}")
    raise BadInput(
        f"column {column!r} of {place} holds {kind}, {value!r:.60}, where a text is needed; write it as text in the "
        "file, or name another column"
    )


def whole_characters(text: str) -> str:
    """Return `text` with two halves of a surrogate pair put together and half of one as U+FFFD."""
    if text.isascii() or not HALF.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def is_pinned(name: str | None, revision: str | None) -> bool:
    """Return whether both name one commit of a hub: an id, and 40 hex digits."""
    return bool(name and re.fullmatch(r"[0-9a-f]{40}", revision or ""))


def check_file(path: Path, what: str, setting: str, needed: str, allowed: Sequence[str] = FILES) -> None:
    """Raise BadInput if `path` is no readable kind of file, or empty.

    `what` names it, `setting` is where the user gave it, `needed` says what it should hold.
    """
    if not path.is_file():
        raise BadInput(f"{what} {str(path)!r} does not exist (working directory {Path.cwd()}); fix {setting}")
    if path.suffix not in allowed:
        raise BadInput(f"{what} {str(path)!r} ends in {path.suffix!r}; allowed: {', '.join(allowed)}")
    if path.stat().st_size == 0:
        raise BadInput(f"{what} {str(path)!r} is empty; {needed}")


def file_records(path: Path, what: str, column: str | None = None) -> Iterator[Located]:
    """Yield the records of a file in order; a `column` that the file has may come without the others.

    A `.txt` file is one record, its text in `column`. It is held whole, as is a `.json` file that is one list.
    Raises BadInput naming `what`, the file and the place when it is not what its suffix says.
    """
    try:
        for place, record in READERS[path.suffix](path, column):
            if not isinstance(record, dict):
                raise ValueError(f"{place} is not an object with named fields")
            yield Located(f"{str(path)!r} {place}", record)
    except (ValueError, OSError, csv.Error) as error:  # errors of json, Arrow and text encodings are ValueErrors
        raise BadInput(f"{what} {str(path)!r} could not be read as {path.suffix[1:]}: {error}") from error


def _json(path: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        if path.suffix == ".json" and (content := file.read()).lstrip().startswith("["):
            yield from ((f"row {number}", record) for number, record in enumerate(json.loads(content), 1))
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}: {error}") from error


def _csv(path: Path, _: str | None) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in (reader := csv.DictReader(file)):
            if None in row:
                raise ValueError(f"line {reader.line_num} has more cells than there are columns")
            yield f"line {reader.line_num}", row


def _parquet(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as pq  # late: a recipe is read without pyarrow

    file = pq.ParquetFile(path)
    columns = [column] if column in file.schema_arrow.names else None
    batches = file.iter_batches(batch_size=1024, columns=columns)
    records = (record for batch in batches for record in batch.to_pylist())
    yield from ((f"row {number}", record) for number, record in enumerate(records, 1))


def _text(path: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    yield "", {column: path.read_text(encoding="utf-8-sig")}


READERS = {".jsonl": _json, ".json": _json, ".csv": _csv, ".parquet": _parquet, ".txt": _text}


def hub_records(
    name: str, revision: str, split: str, subset: str | None = None, column: str | None = None
) -> Iterator[Located]:
    """Yield the records of a pinned data set, memory-mapped from a cache in the data folder; raises BadInput."""
    from datasets import load_dataset  # late: takes seconds, and only a data set of a hub needs it
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(name, subset, revision=revision, split=split, cache_dir=str(home() / "datasets"))
        records = loaded.select_columns([column]) if column in loaded.column_names else loaded
        yield from (Located(f"{name!r} row {number}", record) for number, record in enumerate(records, 1))
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:  # RuntimeError: the data set is a script
        raise BadInput(
            f"data set {name}@{revision} could not be loaded: {error}; check the id, the split "
            f"{split!r} and the network, or give a local file"
        ) from error
