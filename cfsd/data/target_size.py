"""How large a target is, read off its first rows before a model is there that could tokenise them."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from cfsd.data.contents import PACKED, contents_of
from cfsd.data.conversation import Conversation, read_row
from cfsd.data.files import READ_BY_CHECKS
from cfsd.data.records import Located
from cfsd.data.target import Target, records_of, shape_of_rows

LOOKED_AT = 200  # rows whose texts are counted
MARKS = 5  # tokens that a chat template puts around a message


class TargetSize(NamedTuple):
    """Rows that can be used and tokens of one, on average; those of them that are learned."""

    rows: int
    tokens: float
    learned: float


def size_of_target(target: Target, count: Callable[[str], float]) -> TargetSize | None:
    """Return the size of `target`; of a data set on a hub the most that it can be, None if `rows` does not bound it.

    `count` says how many tokens a text comes to. Longer rows than `max_length` are left out as the stage does; copies
    are not.
    """
    if target.kind == "hub":
        return TargetSize(target.rows, target.max_length, target.max_length) if target.rows else None
    records = islice(records_of(target), target.rows)
    head = list(islice(records, LOOKED_AT))
    shape, notes = shape_of_rows(target, head), Counter[str]()
    sizes = [_tokens(read_row(shape, row, notes), count) for row in head]
    kept = [(whole, learned) for whole, learned in sizes if learned and whole <= target.max_length]
    if not kept:
        return None
    rows = _number(target, head, records) * len(kept) / len(head)
    return TargetSize(round(rows), fmean(whole for whole, _ in kept), fmean(learned for _, learned in kept))


def _tokens(row: tuple[str, str] | Conversation, count: Callable[[str], float]) -> tuple[float, float]:
    """Return the tokens of a row, the end of its response included, and those that are learned."""
    if isinstance(row, Conversation):
        parts = [count(str(message.get("content") or "")) + MARKS for message in row.messages]
        return sum(parts), sum(part for part, learned in zip(parts, row.learned, strict=True) if learned)
    prompt, response = map(count, row)
    return prompt + response + 1, response + 1 if response else 0


def _number(target: Target, head: Sequence[Located], others: Iterator[Located]) -> int:
    """Return how many rows there are: counted where that is quick, else by the size of the files."""
    if target.kind == "gym":
        return target.rows or 0
    files = list(target.files().find().values())
    if len(head) < LOOKED_AT or sum(path.stat().st_size for path in files) <= READ_BY_CHECKS:
        return len(head) + sum(1 for _ in others)
    texts = [str(row.record).encode(errors="replace") for row in head]
    known = round(sum(_rows_in(path, texts) for path in files))
    return min(known, target.rows or known)


def _rows_in(path: Path, head: Sequence[bytes]) -> float:
    """Return about how many rows a large file has: a table says it, of others their size does, as if packed by zlib."""
    if contents_of(path).suffix == ".parquet":  # what it holds counts, not its name
        import pyarrow.parquet as pq  # late: settings are read without pyarrow

        return float(pq.read_metadata(path).num_rows)
    each = fmean(map(len, head))
    if path.suffix.lower() in PACKED.values():
        each *= len(zlib.compress(b"".join(head))) / sum(map(len, head))
    return path.stat().st_size / each
