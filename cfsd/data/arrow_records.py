"""Records of Parquet and of Arrow, as a file or as a stream (what `datasets` saves)."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from cfsd.data.contents import Contents

ROWS = 1024  # turned into Python at once
SAID = ("content", "value")  # of a message: null says that it has no text, absent that it is no message
SHORT: dict[str, Any] = {  # numbers of fewer than 64 bits, as Arrow and data sets call them
    "halffloat": np.float16, "float16": np.float16, "float": np.float32, "float32": np.float32,
}  # fmt: skip
JSON = "extension<arrow.json>"
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_records(contents: Contents, column: str | None) -> Iterator[tuple[str, Any]]:
    """Yield each record with its row; a `column` that the file has comes without the others.

    Held whole only if the file as such is compressed. Raises ValueError naming the row.
    """
    import pyarrow as pa  # late: a recipe is read without pyarrow

    try:
        before = 0
        for batch in _batches(contents, column):
            for first in range(0, batch.num_rows, ROWS):
                yield from records_of_batch(batch.slice(first, ROWS), before + first)
            before += batch.num_rows
    except pa.ArrowException as error:
        raise ValueError(str(error)) from None


def without_nulls(record: dict[str, Any]) -> dict[str, Any]:
    """Return a table's row without the null entries of mappings in its lists, such as messages and tools.

    A table gives every mapping the entries of all rows: arguments of a tool call that nobody wrote would be learned.
    """
    return {name: _present(value, SAID) if isinstance(value, list) else value for name, value in record.items()}


def _present(value: Any, kept: tuple[str, ...] = ()) -> Any:
    if isinstance(value, dict):
        return {name: _present(entry) for name, entry in value.items() if entry is not None or name in kept}
    return [_present(entry, kept) for entry in value] if isinstance(value, list) else value


def _batches(contents: Contents, column: str | None) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _source(contents) as source:
        if contents.suffix == ".parquet":
            yield from _parquet_batches(pq.ParquetFile(source), column)
            return
        begin = source.read(6)
        source.seek(0)
        if begin == b"ARROW1":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            _check_end(source)
            reader = batches = pa.ipc.open_stream(source)
        columns = _columns(reader.schema.names, column)
        yield from (batch.select(columns) if columns else batch for batch in batches)


def _parquet_batches(file: Any, column: str | None) -> Iterator[Any]:
    rows = 0
    for batch in file.iter_batches(batch_size=ROWS, columns=_columns(file.schema_arrow.names, column)):
        yield batch
        rows += batch.num_rows
    if rows != file.metadata.num_rows:
        raise ValueError(f"it has {rows} rows, but {file.metadata.num_rows} by its end; it is damaged")


def _source(contents: Contents) -> Any:
    import pyarrow as pa

    if not contents.packed:
        return pa.memory_map(str(contents.path))
    with contents.open() as file:
        return pa.BufferReader(file.read())


def _check_end(source: Any) -> None:
    source.seek(max(0, source.size() - len(END_OF_STREAM)))
    if source.read() != END_OF_STREAM:
        raise ValueError("it has no end: it was cut short, or is still being written")
    source.seek(0)


def _as_written(value: Any, kind: Any) -> Any:
    """Return a value of the Arrow type `kind` as it was before it was stored.

    SHORT numbers have the digits that tell them apart there: of 32 bits it is 3.14, not 3.140000104904175. JSON is how
    `datasets` keeps a column of several types, and a map how Spark keeps a mapping. Raises ValueError.
    """
    import pyarrow as pa

    if str(kind) == JSON:
        return None if value is None else json.loads(value)
    if isinstance(value, float) and (number := SHORT.get(str(kind))):
        return float(str(number(value)))
    if isinstance(value, list) and pa.types.is_map(kind):
        fields = {name: _as_written(entry, kind.item_type) for name, entry in value}
        if len(fields) < len(value):
            raise ValueError(f"a map has an entry twice, of {', '.join(map(repr, fields))}")
        return fields
    if isinstance(value, dict) and pa.types.is_struct(kind):
        return value | {field.name: _as_written(value[field.name], field.type) for field in kind}
    if isinstance(value, list) and _is_otherwise(kind):
        return [_as_written(item, kind.value_type) for item in value]
    return value


def _is_otherwise(kind: Any) -> bool:
    """Say whether there are SHORT numbers, JSON or maps in it, but for lists of numbers: no text is made of those."""
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return str(kind.value_type) not in SHORT and _is_otherwise(kind.value_type)
    if pa.types.is_struct(kind):
        return any(_is_otherwise(field.type) for field in kind)
    return str(kind) in SHORT or str(kind) == JSON or pa.types.is_map(kind)


def _columns(names: list[str], column: str | None) -> list[str] | None:
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"two columns are called {min(twice)!r}; rename one")
    return [column] if column in names else None


def records_of_batch(batch: Any, before: int) -> Iterator[tuple[str, Any]]:
    """Yield the records of `batch`, of which there are `before` others before it. Raises ValueError naming the row."""
    try:
        batch.validate(full=True)  # places within a damaged file may lead anywhere in memory
        records = batch.to_pylist()
    except (ValueError, OverflowError):
        records = (_record(batch.slice(i, 1), before + i + 1) for i in range(batch.num_rows))
    otherwise = [field for field in batch.schema if _is_otherwise(field.type)]
    for number, record in enumerate(records, before + 1):
        written = {field.name: _as_written(record[field.name], field.type) for field in otherwise}
        yield f"row {number}", without_nulls(record | written)


def _record(one: Any, row: int) -> Any:
    try:
        one.validate(full=True)
        return one.to_pylist()[0]
    except (ValueError, OverflowError) as error:
        remedy = "; write its texts as UTF-8" if "UTF8" in str(error) else ""
        raise ValueError(f"row {row}: {error}{remedy}") from None
