"""Why the data of a benchmark could not be read: file and line, which the library that reads them does not say."""

import gzip
import json
from pathlib import Path

from cfsd.evaluate.benchmark_files import Definition

JSON = (".json", ".jsonl", ".ndjson")


def mistake_in(definition: Definition) -> str | None:
    """Return the first place in the JSON data files that is not JSON, or not a document."""
    return next((found for path in definition.data if (found := _mistake(path))), None)


def _mistake(path: Path) -> str | None:
    packed = path.suffix == ".gz"
    if (path.with_suffix("") if packed else path).suffix not in JSON:
        return None
    try:
        text = (gzip.decompress(path.read_bytes()) if packed else path.read_bytes()).decode()
    except UnicodeDecodeError as error:
        return f"{path}: byte {error.start} is not UTF-8"
    except (OSError, EOFError) as error:
        return f"{path} cannot be read ({error})"
    return None if _is_whole(text) else _mistaken_line(path, text)


def _is_whole(text: str) -> bool:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(row, dict) for row in value))


def _mistaken_line(path: Path, text: str) -> str | None:
    if text.lstrip().startswith("["):
        return _in_array(path, text)
    kinds: dict[str, tuple[type, int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return f"{path}, line {number}: not JSON ({error}): {line[:60]!r}"
        if not isinstance(row, dict):
            return f"{path}, line {number}: {line[:60]!r} is no document; it needs an object with fields"
        for field, value in row.items():
            kind, first = kinds.setdefault(field, (type(value), number)) if value is not None else (type(None), 0)
            if value is not None and type(value) is not kind and {type(value), kind} != {int, float}:
                return (
                    f"{path}, line {number}: {field} is {value!r}, a {type(value).__name__}, and a {kind.__name__} in "
                    f"line {first}; a field has one type"
                )
    return None


def _in_array(path: Path, text: str) -> str:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: not JSON ({error.msg})"
    number = next(i for i, row in enumerate(rows, 1) if not isinstance(row, dict))
    return f"{path}, row {number}: {str(rows[number - 1])[:60]!r} is no document; it needs an object with fields"
