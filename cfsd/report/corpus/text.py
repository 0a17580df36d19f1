"""Rows of a corpus to read: chosen ones with what was given set apart from what was sampled, and the rejects."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import batches, shards

FIRST, LAST = 1200, 200  # characters shown of a longer text
EXAMPLES = 3  # rejected rows shown per reason
MAX_REASONS = 20  # with examples
COLUMNS = ["row_id", "source", "token_ids", "logprobs", "finish_reason", "text"]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Piece:
    """A run of text that was given to the model, or sampled from it."""

    text: str
    given: bool


@dataclass(frozen=True)
class TextRow:
    """One row to read."""

    row_id: int
    source: str
    finish_reason: str
    tokens: int  # sampled
    mean_logprob: float | None  # of the sampled tokens, nats
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Example:
    """A row that was left out, and what the filter found in it."""

    text: str
    detail: str


@dataclass(frozen=True)
class Rejected:
    """How many rows were left out for one reason, and a few of them."""

    reason: str
    count: int
    examples: tuple[Example, ...]


def decoder(store: Store, base: Artifact | None) -> Decode | None:
    """Return the base's way from token ids to text; None where there is no tokenizer."""
    if base is None or not any(store.path(base).glob("tokenizer*")):
        return None

    decode: Any = load_tokenizer(store.path(base)).decode
    return lambda token_ids: str(decode(token_ids))


def rows_at(folder: Path, places: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Return the rows at `places`, counted from 0 through the whole corpus table; shards without one stay closed."""
    found: dict[int, dict[str, Any]] = {}
    wanted, first = set(places), 0
    for path in shards(folder, "corpus"):
        file = pq.ParquetFile(path)
        end = first + file.metadata.num_rows
        if any(first <= place < end for place in wanted):
            for batch in file.iter_batches(batch_size=4096, columns=COLUMNS):
                here = [place for place in wanted if first <= place < first + batch.num_rows]
                rows = batch.take([place - first for place in here]).to_pylist()
                found.update(zip(here, rows, strict=True))
                first += batch.num_rows
        first = end
    return found


def text_row(row: dict[str, Any], decode: Decode | None) -> TextRow:
    """Return a row of the corpus table as it is shown; columns may be missing."""
    token_ids, logprobs = row.get("token_ids") or [], row.get("logprobs") or []
    sampled = [value for value in logprobs if value is not None]
    return TextRow(
        row_id=row.get("row_id", 0),
        source=row.get("source") or "",
        finish_reason=row.get("finish_reason") or "",
        tokens=len(sampled) if logprobs else max(0, len(token_ids) - 1),
        mean_logprob=sum(sampled) / len(sampled) if sampled else None,
        pieces=pieces_of(row.get("text") or "", token_ids, [value is None for value in logprobs], decode),
    )


def pieces_of(text: str, token_ids: list[int], given: list[bool], decode: Decode | None) -> tuple[Piece, ...]:
    """Return `text` cut where given and sampled tokens meet, its middle left out if it is long.

    A cut is where the text of the tokens before it ends; a character of several tokens goes to the later ones.
    """
    edges = [0]
    if decode is not None and len(given) == len(token_ids):
        turns = [i for i in range(1, len(given)) if given[i] != given[i - 1]]
        edges += [_shared(decode(token_ids[:turn]), text) for turn in turns]
    first_given = decode is not None and bool(given) and given[0]
    flags = [first_given ^ bool(i % 2) for i in range(len(edges))]
    runs = list(zip(edges, [*edges[1:], len(text)], flags, strict=True))
    if len(text) <= FIRST + LAST:
        return _between(text, runs, 0, len(text))
    head, tail = _between(text, runs, 0, FIRST), _between(text, runs, len(text) - LAST, len(text))
    return (*head, Piece(" […] ", False), *tail)


def _shared(one: str, other: str) -> int:
    """Return how many first characters are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _between(text: str, runs: list[tuple[int, int, bool]], start: int, end: int) -> tuple[Piece, ...]:
    cut = [(text[max(low, start) : min(high, end)], given) for low, high, given in runs]
    return tuple(Piece(part, given) for part, given in cut if part)


def rejected_by(store: Store, artifact: Artifact) -> list[Rejected]:
    """Return what a filter or selection left out, the most frequent reason first."""
    known: Any = artifact.metadata.get("rejected") or {}
    counts, examples = Counter[str](known), dict[str, list[Example]]()
    folder = store.path(artifact)
    for batch in batches(folder, "rejects", ["reason", "detail", "text"]):
        for row in batch.to_pylist():
            reason = row.get("reason") or "no reason given"
            if not known:
                counts[reason] += 1
            if len(shown := examples.setdefault(reason, [])) < EXAMPLES and len(examples) <= MAX_REASONS:
                shown.append(Example(row.get("text") or "", row.get("detail") or ""))
        if known and all(len(examples.get(reason, [])) >= min(EXAMPLES, counts[reason]) for reason in counts):
            break
    return [Rejected(reason, count, tuple(examples.get(reason, ()))) for reason, count in counts.most_common()]
