"""What a chat template writes around the words of a user, as tokens."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from cfsd.data.chat import dated_template
from cfsd.errors import BadInput

CONTENT = "Xqzcontentqzx"  # marks the place of a user's words; no template writes or changes it
OTHER_SOURCES = "set generate.source to context-free, or take a model tuned for chats"
NO_CHATS = "leave chat out of probe.modes (as [unprompted])"


class Turn(NamedTuple):
    """The tokens of a chat around the words of a user.

    `prefix_ids` come before it. The user's turn ends when `end_id` is sampled; after that `between_ids` open the
    assistant's turn. `end_id` None: the template closes the turn with plain text, so the model writes that and the
    answer in one go, until an end token. `answer_end_id` closes the assistant's turn; None where no token does.
    """

    prefix_ids: list[int]
    between_ids: list[int]
    end_id: int | None
    answer_end_id: int | None = None


def template_start(tokenizer: PreTrainedTokenizerBase) -> Turn:
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
    if end is None:
        return Turn(prefix, [], None)
    return Turn(prefix, whole[end + 1 :], whole[end], _answer_end(tokenizer, marks))


def _answer_end(tokenizer: PreTrainedTokenizerBase, marks: set[int]) -> int | None:
    """Return the first of `marks` after an answer.

    It may be another one than the user's turn ends with: GPT-OSS closes both the user's turn and its own analysis with
    <|end|>, and the answer that follows with <|return|>.
    """
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": CONTENT}]
    template = dated_template(tokenizer)
    try:
        text: Any = tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    except Exception:  # of any kind, from the template's own code; it wrote the user's turn before
        return None
    _, content, after = str(text).rpartition(CONTENT)
    return next((token for token in _encode(tokenizer, after) if token in marks), None) if content else None


def chat_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[Turn, int]:
    """Return what the chat template writes around a user's turn, and the token that ends it, for the mode chat.

    Raises BadInput also where plain text ends the turn: then nothing tells which tokens are the answer's.
    """
    try:
        turn = template_start(tokenizer)
    except BadInput as error:
        raise BadInput(f"probe.modes: {str(error).replace(OTHER_SOURCES, NO_CHATS)}") from error
    if turn.end_id is None:
        raise BadInput(
            "probe.modes: this model's chat template ends a user's turn with plain text, so that nothing tells where "
            f"the answer begins; {NO_CHATS}"
        )
    return turn, turn.end_id


def _around_content(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not tokenizer.chat_template:
        raise BadInput(f"this model has no chat template for rows to begin with; {OTHER_SOURCES}")
    try:
        text: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": CONTENT}], chat_template=dated_template(tokenizer),
            add_generation_prompt=True, tokenize=False,
        )  # fmt: skip
    except Exception as error:  # of any kind, from the template's own code
        raise BadInput(f"this model's chat template cannot write a user's turn ({error}); {OTHER_SOURCES}") from error
    parts = str(text).split(CONTENT)
    if len(parts) != 2:
        raise BadInput(
            f"this model's chat template writes a user's words {len(parts) - 1} times; once is needed; {OTHER_SOURCES}"
        )
    return parts[0], parts[1]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    encoded: Any = tokenizer(text, add_special_tokens=False)
    return list(encoded["input_ids"])
