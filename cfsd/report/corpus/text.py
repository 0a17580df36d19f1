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
MAX_REASONS = 20  # with examples
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
    """How many rows were left out for one reason, and a few of them: the text, and what the filter says of it."""

    reason: str
    number: int
    examples: tuple[dict[str, str], ...]


def decoder(store: Store, base: Artifact | None) -> Decode | None:
    """Return the base's way from token ids to text; None where there is no tokenizer."""
    if base is None or not any(store.path(base).glob("tokenizer*")):
        return None
    decode: Any = load_tokenizer(store.path(base)).decode
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
    """Return a row of the corpus table as it is shown; columns may be missing."""
    token_ids, logprobs = row.get("token_ids") or [], row.get("logprobs") or []
    sampled = [value for value in logprobs if value is not None]
    return TextRow(
        row_id=row.get("row_id", 0),
        source=row.get("source") or "",
        finish_reason=row.get("finish_reason") or "",
        tokens=len(sampled) if logprobs else max(0, len(token_ids) - 1),
        mean_logprob=sum(sampled) / len(sampled) if sampled else None,
        pieces=_pieces(row.get("text") or "", token_ids, [value is None for value in logprobs], decode),
    )


def _pieces(text: str, token_ids: list[int], is_prompt: list[bool], decode: Decode | None) -> tuple[Piece, ...]:
    """Return `text` cut where prompt and sampled tokens meet, without its middle if it is long.

    A cut is where the text of the tokens before it ends; a character of several tokens goes to the later ones.
    """
    edges, starts_with_prompt = [0], False
    if decode is not None and is_prompt and len(is_prompt) == len(token_ids):
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
    """Return how many first characters are the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def rejected_by(store: Store, artifact: Artifact) -> tuple[Rejected, ...]:
    """Return what a filter or selection left out, the most frequent reason first."""
    known: Any = artifact.metadata.get("rejected") or {}
    counts, examples = Counter[str](known), dict[str, list[dict[str, str]]]()
    for batch in batches(store.path(artifact), "rejects", ["reason", "detail", "text"]):
        for row in batch.to_pylist():
            reason = row.get("reason") or "no reason given"
            if not known:
                counts[reason] += 1
            if len(shown := examples.setdefault(reason, [])) < EXAMPLES and len(examples) <= MAX_REASONS:
                shown.append({"text": row.get("text") or "", "detail": row.get("detail") or ""})
        if known and all(len(examples.get(reason, [])) >= min(EXAMPLES, counts[reason]) for reason in counts):
            break
    return tuple(Rejected(reason, n, tuple(examples.get(reason, ()))) for reason, n in counts.most_common())
