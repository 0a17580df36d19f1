"""Whether a chat template writes everything that a conversation says: nothing is left out in silence."""

import re
from collections import Counter
from collections.abc import Sequence

from cfsd.data.chat import Rendering
from cfsd.data.conversation import MEANT, Message
from cfsd.data.tokenised import Span
from cfsd.errors import BadInput

MARKER = "Xqzcontentqzx"  # no template writes or changes it
SHORTENED = "parts of earlier turns are left out or changed by this chat template, as when the model answers"
UNWRITTEN = "the field {!r} of messages is not written by this chat template"


def check_written(
    rendering: Rendering, spans: Sequence[Span], roles: set[str], notes: Counter[str], meant: Sequence[str] = MEANT
) -> None:
    """Raise BadInput naming the row and the turn, message, field or variable that the template leaves out.

    `spans` are where the learned turns stand, if that is known. Fields that only describe a message, such as `name` or
    `id`, and shortened earlier turns are counted in `notes`. `roles` are those known to be written; it grows. `meant`
    are the fields that must be written.
    """
    _check_variables(rendering)
    learned = (m for m, said in zip(rendering.messages, rendering.chat.learned, strict=True) if said)
    for message, (begin, end) in zip(learned, spans, strict=False):
        if _squeezed(message.get("content", "")) not in _squeezed(rendering.text[begin:end]):
            raise BadInput(
                f"{rendering.chat.place}: this model's chat template leaves out a part of the assistant's turn "
                f"{message['content']!r:.60}; give prompt and response"
            )
    whole = _squeezed(rendering.text)
    if not all(_squeezed(message.get("content", "")) in whole for message in rendering.messages):
        notes[SHORTENED] += 1
    for message in rendering.messages:
        _check_content(rendering, message, roles)
    for name in sorted({name for message in rendering.messages for name in message} - {"role", "content"}):
        if _without(rendering, name) == rendering.text:
            if name in meant and any(message.get(name) for message in rendering.messages):
                raise BadInput(
                    f"{rendering.chat.place} has {name!r} in a message, but this model's chat template does not write "
                    "it; write it into the content, or remove it"
                )
            notes[UNWRITTEN.format(name)] += 1


def _check_variables(rendering: Rendering) -> None:
    for name in rendering.chat.variables:
        if name in ("tools", "documents"):
            left_out = rendering.attempt(rendering.messages, without=name) == rendering.text
        else:
            left_out = not re.search(rf"\b{re.escape(name)}\b", rendering.template)
        if left_out and rendering.chat.variables[name]:  # nothing is lost by a false or an empty one
            raise BadInput(
                f"{rendering.chat.place} gives {name!r}, but this model's chat template has no place for it; remove "
                "the column, write its text into a message, or take a model whose template takes it"
            )


def _check_content(rendering: Rendering, message: Message, roles: set[str]) -> None:
    role, content = message["role"], message.get("content", "").strip()
    if not content or (role in roles and content in rendering.text):
        return
    changed = [{**other, "content": MARKER} if other is message else other for other in rendering.messages]
    if rendering.attempt(changed) == rendering.text:
        raise BadInput(
            f"{rendering.chat.place}: this model's chat template leaves out the message of role {role!r} "
            f"({content!r:.40}); give it another role, such as user or system, or remove it"
        )
    roles.add(role)


def _squeezed(text: str) -> str:
    """Return `text` without spaces and line ends, of which templates add and strip some."""
    return "".join(text.split())


def _without(rendering: Rendering, name: str) -> str | None:
    return rendering.attempt(
        [{key: value for key, value in message.items() if key != name} for message in rendering.messages]
    )
