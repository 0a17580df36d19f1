"""Tokens of a whole text, and which of them count in the loss, by where they stand in the text."""

import re
import unicodedata
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from cfsd.errors import BadInput

Span = tuple[int, int]  # first character and the one after the last


class Tokens(NamedTuple):
    """The tokens of a text; `shared` of them hold characters of both sides of a border; `lost` is without a token."""

    ids: list[int]
    supervised: list[bool]
    shared: int = 0
    lost: str = ""


def tokenise(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> Tokens:
    """Return the tokens of `text`, none added; those within `spans` (in order, apart) are supervised.

    A token on a border is supervised if it holds nothing but spaces besides characters of a span: of `Answer: ` and
    `A` the token ` A` is the response's, of `un` and `happy` the token `unhappy` is the prompt's.
    Differs: lm-eval counts the context's tokens instead, and moves its last spaces to the continuation.
    Raises BadInput where the tokenizer has no offsets and a border lies within a token.
    """
    if not tokenizer.is_fast:
        return _by_prefixes(tokenizer, text, spans)
    encoded: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    lasts = [last for _, last in spans]
    near = (bisect_left(lasts, begin) for begin, _ in offsets)  # the first span that does not end before the token
    places = [_place(text, begin, end, spans[i : i + 2]) for (begin, end), i in zip(offsets, near, strict=True)]
    ids, shared = list(encoded["input_ids"]), sum(both for _, both in places)
    return Tokens(ids, [inside for inside, _ in places], shared, "".join(_lost(text, offsets)))


def added_in_front(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens that the tokenizer puts before `text` and every other by itself, such as a start token."""
    call: Any = tokenizer
    plain, whole = (call(text, add_special_tokens=add, verbose=False)["input_ids"] for add in (False, True))
    starts = range(len(whole) - len(plain) + 1)
    return list(whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)])


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return what finds the tokenizer's special tokens where they are written in a text."""
    added = (known.content for known in tokenizer.added_tokens_decoder.values() if known.special)
    return re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or "(?!)")


def _place(text: str, begin: int, end: int, spans: Sequence[Span]) -> tuple[bool, bool]:
    """Return whether a token is supervised, and whether it holds characters of both sides."""
    if begin == end:  # a lone space, in tokenizers that leave spaces out of offsets; or a space put before the text
        return any(first < end <= last or first == end == 0 for first, last in spans), False
    for first, last in spans:
        inside = max(begin, first), min(end, last)
        if inside[0] < inside[1]:
            outside = text[begin : inside[0]] + text[inside[1] : end]
            return not outside.strip(), bool(outside)
    return False, False


def _lost(text: str, offsets: Sequence[Span]) -> Iterator[str]:
    """Yield the characters without a token, but for spaces and for marks, which become one with their letters."""
    done = 0
    for begin, end in [*offsets, (len(text), len(text))]:
        if begin > done:
            yield from (c for c in text[done:begin] if not c.isspace() and not unicodedata.combining(c))
        done = max(done, end)


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> Tokens:
    call: Any = tokenizer
    ids = list(call(text, add_special_tokens=False, verbose=False)["input_ids"])
    supervised = [False] * len(ids)
    for span in spans:
        first, last = (_count(call, text, border, ids) for border in span)
        supervised[first:last] = [True] * (last - first)
    return Tokens(ids, supervised)


def _count(call: Any, text: str, border: int, ids: list[int]) -> int:
    before = call(text[:border], add_special_tokens=False, verbose=False)["input_ids"] if border else []
    if ids[: len(before)] != before:
        raise BadInput(
            f"the text {text[max(0, border - 20) : border]!r} ends within a token when {text[border : border + 20]!r} "
            "follows, and this tokenizer does not say where its tokens stand; end the prompt at the end of a word, or "
            "take the model with its fast tokenizer (tokenizer.json)"
        )
    return len(before)
