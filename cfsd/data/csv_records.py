"""Records of CSV: texts all, as they are written; the first row names the columns."""

import csv
from collections.abc import Iterator
from typing import Any

from cfsd.data.contents import Contents
from cfsd.data.records import Said

LONGEST_CELL = 2**31 - 1  # characters; the csv module's own limit of 131,072 is less than a long document
DELIMITERS = {".csv": ",", ".tsv": "\t"}
QUOTED = "a cell in quotes holds tabs or ends of lines; where these quotes are the text's own, write each of them twice"
OTHERS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}


def csv_records(contents: Contents, said: Said) -> Iterator[tuple[str, Any]]:
    """Yield each record with the line in which it begins; cells that a row lacks are empty.

    Tables divided by tabs are often written without quoting: there a cell in quotes that goes over tabs or lines is
    said. Raises ValueError naming the line.
    """
    csv.field_size_limit(LONGEST_CELL)
    with contents.text(newline="") as file:
        rows = _rows(csv.reader(file, delimiter=DELIMITERS[contents.suffix], strict=True))
        line, header = next(rows, (1, []))
        _check_header(header, line, contents.suffix)
        for line, cells in rows:
            if _is_header(cells, header):
                raise ValueError(f"line {line} is a header again: files were put one behind the other; give a folder")
            if len(cells) > len(header):
                raise ValueError(f"line {line} has {len(cells)} cells, more than the {len(header)} columns")
            if contents.suffix == ".tsv" and any("\t" in cell or "\n" in cell for cell in cells):
                said.add(QUOTED, f"{str(contents.path)!r} line {line}")
            filled = [*cells, *[""] * (len(header) - len(cells))]
            yield f"line {line}", {name: cell for name, cell in zip(header, filled, strict=True) if name}


def _is_header(cells: list[str], header: list[str]) -> bool:
    """Say whether a row is the header of another file; in one column, where it may be a datum, only by its mark."""
    same = [cells[0].removeprefix("\ufeff"), *cells[1:]] == header
    return same and (len(header) > 1 or cells != header)


def _rows(reader: Any) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows that are not blank, each with its first line."""
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"the row that begins in line {line} breaks off or has a stray quote: {error}") from None
        if cells is None:
            return
        if cells:
            yield line, cells


def _check_header(header: list[str], line: int, suffix: str) -> None:
    names = [name for name in header if name]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"line {line} names the column {min(twice)!r} twice; rename one")
    if header and not names:
        raise ValueError(f"line {line}, the header, names no column")
    if len(header) <= 2 and header[:1] and header[0].lower().startswith("sep="):
        raise ValueError(f"line {line} is Excel's {header[0]!r}, no header; remove that line")
    for delimiter, words in OTHERS.items():
        if len(header) == 1 and delimiter in header[0]:
            remedy = "name it .tsv" if delimiter == "\t" else "write it with commas, and quotes where a cell has one"
            raise ValueError(
                f"its header {header[0]!r:.80} is one column: the cells seem to be divided by {words} ({delimiter!r}); "
                f"{'name it .csv' if suffix == '.tsv' and delimiter == ',' else remedy}"
            )
