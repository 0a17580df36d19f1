"""Replay: the user's own documents, tokenised and cut like sampled rows, the baseline that needs real text."""

import random
import re
from array import array
from collections.abc import Iterator
from heapq import heappop, heappush
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from cfsd.content import DigestMemory, digest_of_files, sha256_of_file
from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.records import FILES, Record, check_file, file_records, hub_records
from cfsd.spec import Spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALLOWED = (*FILES, ".txt")
REMEMBERED_FROM = 1 << 20  # bytes; a digest is remembered through a file that a thousand small ones would rewrite
PASSAGE_CHARACTERS = 64  # per token of a row's length: about 16 rows of English
BATCH_CHARACTERS = 1 << 19  # per call of the tokenizer, which needs 150 bytes a character while it works


class Replay(Spec):
    """Documents to rehearse in place of sampled text."""

    kind: Literal["file", "hub"] = Field(
        "file", description="file: a file or a folder of files; hub: a pinned data set"
    )
    path: str | None = Field(
        None, description="file only: JSONL, JSON, CSV or Parquet; .txt, one document to a file; a folder of these"
    )
    name: str | None = Field(None, description="hub only: the data set's id")
    revision: str | None = Field(None, description="hub only: the commit, 40 hex digits")
    subset: str | None = Field(None, description="hub only: one of the data set's configurations, if it has several")
    split: str = Field("train", description="hub only")
    column: str = Field("text", description="Where the text is, in files that have columns")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "file" and not self.path:
            raise ValueError("replay of kind file needs `path`")
        if self.kind == "hub" and not (self.name and re.fullmatch(r"[0-9a-f]{40}", self.revision or "")):
            raise ValueError(f"hub data set {self.name!r} needs `revision`, a commit of 40 hex digits")
        return self

    def _identity(self) -> dict[str, Any]:
        settings = super()._identity()
        if self.kind == "file":
            settings["path"] = digest_of_files({name: _sha256(path) for name, path in _files(self).items()})
        return settings

    def check(self) -> None:
        """Raise BadInput if there is no document to be had; reads no more than the first one."""
        if self.kind == "hub":
            return
        needed = "documents are needed"
        if not Path(self.path or "").is_dir():
            check_file(Path(self.path or ""), "replay", "generate.replay.path", needed, ALLOWED)
        files = _files(self)
        if wrong := [name for name, path in files.items() if path.suffix not in ALLOWED]:
            raise BadInput(
                f"replay folder {self.path!r} holds {wrong[0]!r} and {len(wrong) - 1} more files that are not "
                f"{', '.join(ALLOWED)}; move them out, or give one file"
            )
        if next(documents(self), None) is None:
            raise BadInput(f"replay {self.path!r} holds no text; {needed}")


def documents(replay: Replay) -> Iterator[str]:
    """Yield the documents in order, those without text left out. Each is held whole while it is read.

    Raises BadInput naming the file, or the columns where the wanted one is missing.
    """
    return (text for text in _texts(replay) if text.strip())


def replay_rows(
    replay: Replay,
    tokenizer: "PreTrainedTokenizerBase",
    start: int,
    ends: tuple[int, ...],
    *,
    rows: int,
    length: int,
    seed: int,
) -> Iterator[list[int]]:
    """Yield `rows` rows, each `start` and then at most `length` tokens, an end token where a document ends.

    Documents come in a seeded order, whatever the number of rows: more rows begin with the same ones. A document's
    rows follow each other; one longer than PASSAGE_CHARACTERS x `length` takes part as several passages, cut at the
    ends of lines, so that a book is not a corpus of its own. An end token written in the text ends the document
    there; a start token written in front of it is not doubled.
    Reads all documents once and holds only the wanted rows. Raises BadInput when the documents do not suffice.
    """
    chosen = _Chosen(rows)
    end = [tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]] if ends else []
    for batch in _batches(_passages(replay, length, seed), chosen):
        texts = [passage.text for passage in batch]
        encoded: Any = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for passage, ids in zip(batch, encoded["input_ids"], strict=True):
            ended = [*ids, *end] if passage.last else ids
            chosen.add(passage.key, list(_pieces(ended, start, ends, length)))
    if chosen.rows < rows:
        raise BadInput(
            f"generate.replay gives {chosen.rows} rows of at most {length} tokens ({chosen.tokens()} tokens in all), "
            f"but {rows} rows are wanted; give more documents, or ask for fewer or shorter rows"
        )
    return chosen.drain(start)


class _Passage(NamedTuple):
    """A document or a part of one; the order is by `key`, `last` says whether the document ends here."""

    key: float
    text: str
    last: bool


class _Chosen:
    """The first passages of the shuffled order that make `wanted` rows, found in one reading."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.rows = wanted, 0
        self.heap: list[tuple[float, list[array[int]]]] = []  # the last of the order comes first: keys are negated

    def wants(self, key: float) -> bool:
        return self.rows < self.wanted or (self.heap != [] and key < -self.heap[0][0])

    def add(self, key: float, pieces: list["array[int]"]) -> None:
        if pieces and self.wants(key):
            heappush(self.heap, (-key, pieces))
            self.rows += len(pieces)
            while self.rows - len(self.heap[0][1]) >= self.wanted:
                self.rows -= len(heappop(self.heap)[1])

    def tokens(self) -> int:
        return sum(len(piece) for _, pieces in self.heap for piece in pieces)

    def drain(self, start: int) -> Iterator[list[int]]:
        left = self.wanted
        self.heap.sort()
        while self.heap and left:
            _, pieces = self.heap.pop()
            for piece in pieces[:left]:
                yield [start, *piece]
            left -= min(left, len(pieces))


def _passages(replay: Replay, length: int, seed: int) -> Iterator[_Passage]:
    order = random.Random(f"replay {seed}")
    most = PASSAGE_CHARACTERS * length
    for text in documents(replay):
        begin = 0
        while len(text) - begin > most:
            middle, end = begin + most // 2, begin + most
            cut = text.rfind("\n", middle, end) + 1 or max(text.rfind(" ", middle, end), 0) or end
            yield _Passage(order.random(), text[begin:cut], last=False)
            begin = cut
        yield _Passage(order.random(), text[begin:], last=True)


def _batches(passages: Iterator[_Passage], chosen: _Chosen) -> Iterator[list[_Passage]]:
    """Yield passages that may be chosen, several at a time: the tokenizer is twice as fast so."""
    batch: list[_Passage] = []
    size = 0
    for passage in passages:
        if chosen.wants(passage.key):
            batch.append(passage)
            size += len(passage.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(ids: list[int], start: int, ends: tuple[int, ...], length: int) -> Iterator["array[int]"]:
    for text in _texts_of(ids, ends):
        first = 1 if text[0] == start else 0
        for begin in range(first, len(text), length):
            piece = text[begin : begin + length]
            if len(piece) > 1 or piece[0] not in ends:  # an end alone would say that texts are empty
                yield array("i", piece)


def _texts_of(ids: list[int], ends: tuple[int, ...]) -> Iterator[list[int]]:
    begin = 0
    for place, token in enumerate(ids, 1):
        if token in ends or place == len(ids):
            yield ids[begin:place]
            begin = place


def _texts(replay: Replay) -> Iterator[str]:
    if replay.kind == "hub":
        records = hub_records(
            replay.name or "", replay.revision or "", replay.split, replay.subset, column=replay.column
        )
        yield from (_text(record, replay, replay.name or "") for record in records)
        return
    for path in _files(replay).values():
        if path.suffix == ".txt":
            yield _whole(path)
        else:
            records = file_records(path, "replay", replay.column)
            yield from (_text(record, replay, str(path)) for record in records)


def _text(record: Record, replay: Replay, place: str) -> str:
    if replay.column not in record:
        raise BadInput(
            f"replay {place!r} has no column {replay.column!r}; its columns are {', '.join(map(repr, record))}; "
            "set generate.replay.column"
        )
    text = record[replay.column]
    if not isinstance(text, str | None):
        raise BadInput(f"column {replay.column!r} of replay {place!r} holds {text!r:.60}, not a text")
    return text or ""


def _whole(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"replay {str(path)!r} could not be read as text in UTF-8: {error}") from error


def _files(replay: Replay) -> dict[str, Path]:
    """Return the files by what counts of their names: in a folder the order and the suffix, else the suffix."""
    path = Path(replay.path or "")
    if not path.is_dir():
        return {path.suffix: path}
    found = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    names = sorted(file.as_posix() for file in found if not any(part.startswith(".") for part in file.parts))
    return {name: path / name for name in names}


def _sha256(path: Path) -> str:
    return DigestMemory(home()).sha256(path) if path.stat().st_size >= REMEMBERED_FROM else sha256_of_file(path)
