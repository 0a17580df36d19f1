"""The user's own prompts as the tokens after which the base answers."""

from collections import Counter

from cfsd.data.chat import Rendering
from cfsd.data.conversation import Conversation
from cfsd.data.records import Said
from cfsd.data.stage import SPECIAL
from cfsd.data.tokenised import added_in_front, special_tokens, tokenise
from cfsd.data.written import check_written
from cfsd.errors import BadInput
from cfsd.generate.prompts import SETTING, Prompt, Prompts
from cfsd.model.loading import Tokenization

PLAIN = "prompts of plain text are continued as they stand, without the chat template that this model has"
NO_TOKEN = "without a token of this model"


def prompt_rows(
    prompts: Prompts, base: Tokenization, max_tokens: int, dropped: Counter[str], said: Said
) -> list[list[int]]:  # fmt: skip
    """Return the tokens of each prompt: what a chat template or the tokenizer puts in front is part of them.

    Prompts of more than `max_tokens` are left out, counted in `dropped` and said. Raises BadInput when none is left.
    """
    rows, special = [], special_tokens(base.tokenizer)
    for prompt in prompts.read(said, dropped):
        is_chat = isinstance(prompt.content, Conversation)
        if not is_chat and base.tokenizer.chat_template:
            said.add(PLAIN, prompt.place)
        if any(map(special.search, _texts(prompt))):
            said.add(SPECIAL, prompt.place)
        ids = tokens_of(prompt, base, said)
        if not ids:
            dropped[NO_TOKEN] += 1
        elif len(ids) > max_tokens:
            dropped[f"longer than {max_tokens} tokens"] += 1
        else:
            rows.append(ids)
    for reason, count in dropped.items():
        said.add(f"{count} {reason}, left out", f"prompts {prompts.name}")
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none is there"
        raise BadInput(
            f"prompts {prompts.name}: none can be answered ({reasons}); give other prompts, or a smaller `length` "
            f"in {SETTING}"
        )
    return rows


def _texts(prompt: Prompt) -> list[str]:
    if isinstance(prompt.content, str):
        return [prompt.content]
    return [str(message.get("content", "")) for message in prompt.content.messages]


def tokens_of(prompt: Prompt, base: Tokenization, said: Said | None = None) -> list[int]:
    """Return the tokens of a prompt; empty where the tokenizer has none for it.

    Raises BadInput, also where the chat template leaves out a part of it.
    """
    if isinstance(prompt.content, Conversation):
        rendering, notes = Rendering(base.tokenizer, prompt.content), Counter[str]()
        check_written(rendering, (), set(), notes, meant=("tool_calls",))  # templates leave earlier thoughts out
        for sentence in notes:
            (said or Said()).add(sentence, prompt.place)
        return _encoded(prompt.place, rendering.render(rendering.messages, open_turn=True), base)
    ids = _encoded(prompt.place, prompt.content, base)
    front = added_in_front(base.tokenizer, prompt.content)
    return [*(front[:-1] if front[-1:] == ids[:1] else front), *ids] if ids else []  # the text may have its own


def _encoded(place: str, text: str, base: Tokenization) -> list[int]:
    try:
        return tokenise(base.tokenizer, text, []).ids
    except Exception as error:  # tokenizers raise plain exceptions
        raise BadInput(f"{place} cannot be turned into tokens: {error}") from error
