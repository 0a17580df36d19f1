"""Tokens of a whole text, and which of them count in the loss, by where they stand in the text."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from cfsd.errors import BadInput

Span = tuple[int, int]  # first character and the one after the last


class Tokens(NamedTuple):
    """The tokens of a text; `shared` of them hold characters of both sides of a border."""

    ids: list[int]
    supervised: list[bool]
    shared: int


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
    places = [_place(text, begin, end, spans) for begin, end in encoded["offset_mapping"]]
    return Tokens(list(encoded["input_ids"]), [inside for inside, _ in places], sum(both for _, both in places))


def added_in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that the tokenizer puts before every text by itself, such as a start token."""
    call: Any = tokenizer
    plain, whole = call("a", add_special_tokens=False)["input_ids"], call("a")["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return list(whole[: next((i for i in starts if whole[i : i + len(plain)] == plain), 0)])


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


def _by_prefixes(tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]) -> Tokens:
    call: Any = tokenizer
    ids = list(call(text, add_special_tokens=False, verbose=False)["input_ids"])
    supervised = [False] * len(ids)
    for span in spans:
        first, last = (_count(call, text, border, ids) for border in span)
        supervised[first:last] = [True] * (last - first)
    return Tokens(ids, supervised, 0)


def _count(call: Any, text: str, border: int, ids: list[int]) -> int:
    before = call(text[:border], add_special_tokens=False, verbose=False)["input_ids"] if border else []
    if ids[: len(before)] != before:
        raise BadInput(
            f"the text {text[max(0, border - 20) : border]!r} ends within a token when {text[border : border + 20]!r} "
            "follows, and this tokenizer does not say where its tokens stand; end the prompt at the end of a word, or "
            "take the model with its fast tokenizer (tokenizer.json)"
        )
    return len(before)
