"""Replay: the user's own documents, tokenised and cut like sampled rows, the baseline that needs real text."""

import random
from array import array
from collections.abc import Iterator
from heapq import heappop, heappush
from typing import Any, NamedTuple

from cfsd.data.records import Said
from cfsd.data.replay import Replay, documents
from cfsd.errors import BadInput
from cfsd.model.loading import Tokenization

PASSAGE_CHARACTERS = 64  # per token of a row's length: about 16 rows of English
BATCH_CHARACTERS = 1 << 19  # per call of the tokenizer, which needs 150 bytes a character while it works


def replay_rows(
    replay: Replay, base: Tokenization, *, rows: int, length: int, seed: int, said: Said | None = None
) -> Iterator[list[int]]:
    """Yield `rows` rows: the base's start token and at most `length` tokens, an eos id where a document ends.

    Documents come in a seeded order that does not depend on `rows`: more rows begin with the same ones. A document's
    rows follow each other; one longer than PASSAGE_CHARACTERS x `length` takes part as several passages, cut at the
    ends of lines, so that a book is not a corpus of its own. An eos id within the text ends the document there; a
    start token in front of the text is not doubled.
    Reads all documents once and holds only the wanted rows; what is read in one of several ways is added to `said`.
    Raises BadInput when the documents do not suffice.
    """
    selected = _FirstPassages(rows)
    tokenizer: Any = base.tokenizer
    for batch in _batches(_passages(documents(replay, said), length, seed), selected):
        texts = [passage.text for passage in batch]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for passage, ids in zip(batch, encoded["input_ids"], strict=True):
            ended = [*ids, *base.end()] if passage.last else ids
            selected.add(passage.key, list(_pieces(ended, base, length)))
    if selected.rows < rows:
        raise BadInput(
            f"generate.replay gives {selected.rows} rows of at most {length} tokens ({selected.tokens()} tokens in "
            f"all), but {rows} rows are wanted; give more documents, or ask for fewer or shorter rows"
        )
    return selected.drain(base.start)


class _Passage(NamedTuple):
    """A document or a part of one; the order is by `key`, `last` says whether the document ends here."""

    key: float
    text: str
    last: bool


class _FirstPassages:
    """The first passages of the shuffled order that make `wanted` rows, after one reading of all."""

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


def _passages(texts: Iterator[str], length: int, seed: int) -> Iterator[_Passage]:
    order = random.Random(f"replay {seed}")
    max_characters = PASSAGE_CHARACTERS * length
    for text in texts:
        begin = 0
        while len(text) - begin > max_characters:
            middle, end = begin + max_characters // 2, begin + max_characters
            cut = text.rfind("\n", middle, end) + 1 or max(text.rfind(" ", middle, end), 0) or end
            yield _Passage(order.random(), text[begin:cut], last=False)
            begin = cut
        yield _Passage(order.random(), text[begin:], last=True)


def _batches(passages: Iterator[_Passage], selected: _FirstPassages) -> Iterator[list[_Passage]]:
    """Yield passages that may be selected, several at a time: the tokenizer is twice as fast so."""
    batch: list[_Passage] = []
    size = 0
    for passage in passages:
        if selected.wants(passage.key):
            batch.append(passage)
            size += len(passage.text)
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(ids: list[int], base: Tokenization, length: int) -> Iterator["array[int]"]:
    for text in _texts_of(ids, base.eos_ids):
        first = 1 if text[0] == base.start else 0
        for begin in range(first, len(text), length):
            piece = text[begin : begin + length]
            if len(piece) > 1 or piece[0] not in base.eos_ids:  # an end alone would say that texts are empty
                yield array("i", piece)


def _texts_of(ids: list[int], eos_ids: tuple[int, ...]) -> Iterator[list[int]]:
    begin = 0
    for place, token in enumerate(ids, 1):
        if token in eos_ids or place == len(ids):
            yield ids[begin:place]
            begin = place
