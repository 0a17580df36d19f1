"""Chat templates: what they write for a conversation, and where in it the assistant's turns are.

Their dates are fixed, so that rows that are made tomorrow have the same tokens as today's.
"""

import re
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from transformers import PreTrainedTokenizerBase

from cfsd.data.conversation import Conversation, Message, readings, with_arguments
from cfsd.data.tokenised import Span
from cfsd.errors import BadInput

MARKED = {"Xqzargument": "qzx"}  # arguments that no template writes otherwise
TODAY = datetime(2024, 7, 26)
# In the template's text: transformers gives templates no functions of ours, only data.
DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")
OTHERWISE = "change the messages of the row, or give prompt and response in place of messages"
BLOCKS = "what is learned is told by the chat template's generation blocks, as it rewrites earlier turns"


def dated_template(tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None = None) -> str:
    """Return the chat template with a fixed date in place of today's. Raises ValueError when there is no template."""
    return DATE.sub(lambda call: repr(TODAY.strftime(call[2])), tokenizer.get_chat_template(tools=tools))


class Rendering:
    """A conversation in a model's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat: Conversation) -> None:
        """Render the whole conversation. Raises BadInput naming the row and the template's own words."""
        if not tokenizer.chat_template:
            raise BadInput(
                f"{chat.place} is a chat, but this model has no chat template; give rows of prompt and response"
            )
        self.tokenizer: Any = tokenizer
        self.chat = chat
        try:
            self.template = dated_template(tokenizer, chat.variables.get("tools"))
        except ValueError as error:  # several templates, and none of them is the default
            raise BadInput(f"{chat.place} is a chat, but this model has no template for it: {error}") from error
        for messages in readings(chat.messages):
            if not self._prints_mappings(messages) and (text := self.attempt(messages)) is not None:
                self.messages, self.text = messages, text
                return
        self.messages = chat.messages
        self.text = self.render(self.messages)

    def _prints_mappings(self, messages: list[Message]) -> bool:
        """Say whether the template prints arguments that are mappings, which Python would write with its own quotes."""
        marked = with_arguments(messages, lambda given: MARKED if isinstance(given, dict) else given)
        return marked != messages and str(MARKED) in (self.attempt(marked) or "")

    def attempt(self, messages: list[Message], *, open_turn: bool = False, without: str = "") -> str | None:
        """Return the text of other messages or `without` one of the variables; None where the template refuses it."""
        try:
            return self._render(messages, open_turn=open_turn, without=without)
        except Exception:  # a template is a program of others, which raises what it likes
            return None

    def render(self, messages: list[Message], *, open_turn: bool = False) -> str:
        """Return the text of `messages`, after which a turn of the assistant is opened or not.

        Raises BadInput naming the row, the template's own words and what to do.
        """
        try:
            return self._render(messages, open_turn=open_turn)
        except Exception as error:
            raise BadInput(
                f"{self.chat.place}: this model's chat template refuses its messages: {type(error).__name__}: "
                f"{error}; {self._remedy(messages)}"
            ) from error

    def spans(self, notes: Counter[str]) -> list[Span] | None:
        """Return where the learned turns stand: from the end of what opens the turn to the end of what closes it.

        None: the template rewrites earlier turns, but marks the assistant's text by generation blocks; see `mask`.
        Raises BadInput when it rewrites them and marks nothing.
        """
        try:
            return list(self._spans())
        except BadInput:
            said = (i for i, message in enumerate(self.messages) if message["role"] == "assistant")
            if not all(self.chat.learned[i] for i in said) or not BLOCK.search(self.template):
                raise
            notes[BLOCKS] += 1
            return None

    def mask(self) -> tuple[list[int], list[bool]]:
        """Return the tokens, and which of them the template's generation blocks mark."""
        encoded = self._apply(
            self.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            **self.chat.variables,
        )  # fmt: skip
        return list(encoded["input_ids"][0]), [bool(marked) for marked in encoded["assistant_masks"][0]]

    def _spans(self) -> Iterator[Span]:
        for turn, learned in enumerate(self.chat.learned):
            if not learned:
                continue
            before = self.render(self.messages[:turn], open_turn=True)
            after = self._begun(self.render(self.messages[: turn + 1]))
            if not self.text.startswith(after):
                raise BadInput(
                    f"{self.chat.place}: this model's chat template rewrites earlier turns, so the loss cannot be "
                    f"laid on turn {turn + 1}; set target.turns=last (only a chat's last turn is learned), give "
                    "single-turn rows, or prompt and response"
                )
            if not after.startswith(before):
                raise BadInput(
                    f"{self.chat.place}: this model's chat template opens an assistant's turn with {before[-30:]!r}, "
                    f"but writes turn {turn + 1} otherwise, so the loss cannot be laid on it; give prompt and response"
                )
            if not turn and not before.endswith(self._opening()):
                raise BadInput(
                    f"{self.chat.place}: this model's chat template opens a turn of the assistant only after others; "
                    f"{self._remedy([])}"
                )
            yield len(before), len(after)

    def _begun(self, after: str) -> str:
        """Return the text of the first turns without a token that the template writes at the end of any chat."""
        if self.text.startswith(after):
            return after
        ends = (end for end in self.tokenizer.all_special_tokens if after.endswith(end) and self.text.endswith(end))
        begun = (after.removesuffix(end) for end in ends)
        return next((text for text in begun if self.text.startswith(text)), after)

    def _opening(self) -> str:
        """Return what opens a turn of the assistant after a user's; empty where that cannot be told."""
        asked: list[Message] = [{"role": "user", "content": "x"}]
        closed, opened = self.attempt(asked), self.attempt(asked, open_turn=True)
        return opened[len(closed) :] if closed and opened and opened.startswith(closed) else ""

    def _apply(self, messages: list[Message], **settings: Any) -> Any:
        return self.tokenizer.apply_chat_template([messages], chat_template=self.template, **settings)

    def _render(self, messages: list[Message], *, open_turn: bool = False, without: str = "") -> str:
        kept = {name: value for name, value in self.chat.variables.items() if name != without}
        (text,) = self._apply(messages, tokenize=False, add_generation_prompt=open_turn, **kept)
        return str(text)

    def _remedy(self, messages: list[Message]) -> str:
        if not messages:
            return "the chat begins with the assistant: give it a user's turn before, or mark that turn weight: 0"
        if len(messages) < len(self.messages):
            return f"these are its first {len(messages)} messages, as they stand before or after a turn; {OTHERWISE}"
        others = [message for message in messages if message["role"] != "system"]
        if len(others) < len(messages) and self.attempt(others) is not None:
            return "it takes no system message: move its text into the user's turn, or give prompt and response"
        return OTHERWISE
