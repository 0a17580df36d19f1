"""What a row begins with where it is not the start token alone: a chat template's opening, or a target's prompt."""

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from cfsd.data.chat import dated_template
from cfsd.errors import BadInput
from cfsd.store.tables import batches

CONTENT = "Xqzcontentqzx"  # what a user says so that the place can be found; no template writes or changes it
OTHER_SOURCES = "set generate.source to context-free, or take a model tuned for chats"


class Turn(NamedTuple):
    """A chat's tokens around what a user says.

    `prefix_ids` come before it. The user's turn ends when `end_id` is drawn; after that `between_ids` open the
    assistant's turn. `end_id` None: the template closes the turn with plain text, so the model writes that and the
    answer in one go, until an end token.
    """

    prefix_ids: list[int]
    between_ids: list[int]
    end_id: int | None


def template_start(tokenizer: "PreTrainedTokenizerBase") -> Turn:
    """Return what the chat template writes around a user's first turn, so that the model can say both turns.

    A default system prompt of the template stays: it is what the model was tuned with. Today's date becomes a fixed
    one, or a corpus continued tomorrow would have another prefix. No start token is added to what the template writes.
    `end_id` need not be among the model's end tokens: where nothing else closes the user's turn, it is the token that
    opens the assistant's.

    Source: Xu et al. 2024, arXiv:2406.08464: the pre-query template. Differs: the turn's end is read from it too.
    Raises BadInput when there is no template, or when its text cannot be cut into tokens before the content.
    """
    before, after = _around_content(tokenizer)
    whole = _encode(tokenizer, before + CONTENT + after)
    candidates = (_encode(tokenizer, text) for text in (before, before.rstrip(" ")))  # a space may belong to a word
    prefix = next((ids for ids in candidates if ids and whole[: len(ids)] == ids), None)
    if prefix is None:
        raise BadInput(
            f"the tokens of {before[-40:]!r}, which this model's chat template writes before a user's words, change "
            f"with the words that follow, so a row cannot begin with them; {OTHER_SOURCES}"
        )
    marks = {token for token, added in tokenizer.added_tokens_decoder.items() if added.content.strip()}
    end = next((place for place in range(len(prefix), len(whole)) if whole[place] in marks), None)
    return Turn(prefix, [], None) if end is None else Turn(prefix, whole[end + 1 :], whole[end])


def _around_content(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise BadInput(f"generate.source is template, but this model has no chat template; {OTHER_SOURCES}")
    try:
        text: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": CONTENT}], chat_template=dated_template(tokenizer),
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError) as error:
        raise BadInput(f"this model's chat template cannot write a user's turn ({error}); {OTHER_SOURCES}") from error
    parts = str(text).split(CONTENT)
    if len(parts) != 2:
        raise BadInput(
            f"this model's chat template writes a user's words {len(parts) - 1} times; once is needed; {OTHER_SOURCES}"
        )
    return parts[0], parts[1]


def _encode(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])


def contextual_starts(
    target: Path, rows: int, seed: int, most: int, dropped: Counter[str] | None = None
) -> list[list[int]]:
    """Return `rows` prompts of the target's training rows, all tokens before the first supervised one.

    They come in one seeded order, again and again; more rows begin with the same ones. Prompts of more than `most`
    tokens are left out and counted in `dropped`. Raises BadInput when none is left.
    """
    lengths = np.array([len(prompt) for prompt in _prompts(target)], dtype=np.int64)
    fitting = np.flatnonzero(lengths <= most).tolist()
    if dropped is not None and len(fitting) < len(lengths):
        dropped[f"longer than {most} tokens"] += len(lengths) - len(fitting)
    if not fitting:
        shortest = f"the shortest has {lengths.min()} tokens" if len(lengths) else "there are none to train on"
        raise BadInput(
            f"no prompt of the target leaves room for generate.length: at most {most} tokens fit, but {shortest}; "
            "set a smaller generate.length, or another generate.source"
        )
    order = random.Random(f"contextual {seed}").sample(fitting, len(fitting))[:rows]
    wanted = set(order)
    kept = {place: prompt for place, prompt in enumerate(_prompts(target)) if place in wanted}
    return [list(kept[order[row % len(order)]]) for row in range(rows)]


def _prompts(target: Path) -> Iterator[list[int]]:
    for batch in batches(target, "train", ["token_ids", "supervised"]):
        for token_ids, supervised in zip(*batch.to_pydict().values(), strict=True):
            yield token_ids[: supervised.index(True)]
