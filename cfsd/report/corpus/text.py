"""Rows of a corpus to read: samples with their prompt set apart from what was sampled, and rejected rows."""

from collections import Counter
from collections.abc import Callable, Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from cfsd.model.loading import load_tokenizer
from cfsd.store.artifact import Artifact, Store
from cfsd.store.tables import batches, shards

FIRST, LAST = 1200, 200  # characters shown of a longer text
EXAMPLES = 3  # rejected rows shown per reason
COLUMNS = ["row_id", "source", "token_ids", "logprobs", "finish_reason", "text"]
Decode = Callable[[list[int]], str]


class Piece(NamedTuple):
    """A run of text that the model was given, or that it sampled."""

    text: str
    is_prompt: bool


class TextRow(NamedTuple):
    """One row to read."""

    row_id: int
    source: str
    finish_reason: str
    tokens: int  # sampled
    mean_logprob: float | None  # of the sampled tokens, nats
    pieces: tuple[Piece, ...]


class Rejected(NamedTuple):
    """How many rows were rejected for one reason, and a few rows of the table of rejects."""

    reason: str
    number: int
    examples: list[dict[str, Any]]


def decoder(store: Store, base: Artifact | None) -> Decode | None:
    """Return the base's way from token ids to text; None where there is no tokenizer."""
    if base is None or not any((folder := store.path(base, weights=False)).glob("tokenizer*")):
        return None
    decode: Any = load_tokenizer(folder).decode
    return lambda token_ids: str(decode(token_ids))


def rows_at(folder: Path, places: Iterable[int], decode: Decode | None) -> dict[int, TextRow]:
    """Return the rows at `places`, counted from 0 through the whole corpus table; shards without one stay closed."""
    rows: dict[int, TextRow] = {}
    wanted, first = set(places), 0
    for path in shards(folder, "corpus"):
        file = pq.ParquetFile(path)
        end = first + file.metadata.num_rows
        if wanted.intersection(range(first, end)):
            for batch in file.iter_batches(batch_size=4096, columns=COLUMNS):
                here = sorted(wanted.intersection(range(first, first + batch.num_rows)))
                taken = batch.take([place - first for place in here]).to_pylist()
                rows |= {place: _text_row(row, decode) for place, row in zip(here, taken, strict=True)}
                first += batch.num_rows
        first = end
    return rows


def _text_row(row: dict[str, Any], decode: Decode | None) -> TextRow:
    sampled = [value for value in row["logprobs"] if value is not None]
    return TextRow(
        row_id=row["row_id"],
        source=row["source"],
        finish_reason=row["finish_reason"],
        tokens=len(sampled),
        mean_logprob=sum(sampled) / len(sampled) if sampled else None,
        pieces=_pieces(row["text"], row["token_ids"], [value is None for value in row["logprobs"]], decode),
    )


def _pieces(text: str, token_ids: list[int], is_prompt: list[bool], decode: Decode | None) -> tuple[Piece, ...]:
    """Return `text` cut where prompt and sampled tokens meet, without its middle if it is long.

    A cut is where the text of the tokens before it ends; a character of several tokens goes to the later ones.
    """
    edges, starts_with_prompt = [0], False
    if decode is not None:
        turns = [i for i in range(1, len(is_prompt)) if is_prompt[i] != is_prompt[i - 1]]
        edges += [_length_in_common(decode(token_ids[:turn]), text) for turn in turns]
        starts_with_prompt = is_prompt[0]
    runs = list(zip(edges, [*edges[1:], len(text)], strict=True))

    def between(start: int, end: int) -> list[Piece]:
        cut = [text[max(low, start) : min(high, end)] for low, high in runs]
        return [Piece(part, starts_with_prompt ^ bool(i % 2)) for i, part in enumerate(cut) if part]

    if len(text) <= FIRST + LAST:
        return tuple(between(0, len(text)))
    return (*between(0, FIRST), Piece(" […] ", False), *between(len(text) - LAST, len(text)))


def _length_in_common(one: str, other: str) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def rejected_by(store: Store, filtered: Artifact) -> tuple[Rejected, ...]:
    """Return what the filter rejected, the most frequent reason first."""
    known: Any = filtered.metadata["rejected"]
    rejected = {reason: Rejected(reason, number, []) for reason, number in Counter(known).most_common()}
    for batch in batches(store.path(filtered), "rejects", ["reason", "detail", "text"]):
        for row in batch.to_pylist():
            if len(examples := rejected[row["reason"]].examples) < EXAMPLES:
                examples.append(row)
        if all(len(each.examples) >= min(EXAMPLES, each.number) for each in rejected.values()):
            break
    return tuple(rejected.values())
