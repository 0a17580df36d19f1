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
    return _in_array(path, text) if text.lstrip().startswith("[") else _mistaken_line(path, text)


def _mistaken_line(path: Path, text: str) -> str | None:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {}
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"{path}, line {number}: half a character (as \\ud83d, one part of an emoji): {line[:60]!r}"
        except (ValueError, RecursionError) as error:
            return f"{path}, line {number}: not JSON ({error}): {line[:60]!r}"
        if not isinstance(row, dict):
            return f"{path}, line {number}: {line[:60]!r} is no document; it needs an object with fields"
    return None


def _in_array(path: Path, text: str) -> str | None:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return f"{path}, line {error.lineno}: not JSON ({error.msg})"
    number = next((i for i, row in enumerate(rows, 1) if not isinstance(row, dict)), 0)
    if not number:
        return None
    return f"{path}, row {number}: {str(rows[number - 1])[:60]!r} is no document; it needs an object with fields"
