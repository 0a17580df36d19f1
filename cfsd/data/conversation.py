"""Conversations: chats as people's files have them, brought to the one form that chat templates take."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, NoReturn

from cfsd.data.records import Located, Record, text_of
from cfsd.data.shapes import Shape, check_shape, listed, texts_of
from cfsd.errors import BadInput

ROLES = {  # as ShareGPT and others call them
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "ai": "assistant", "function_call": "assistant", "observation": "tool", "function_response": "tool",
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
}  # fmt: skip
MARKS = ("weight", "train", "training", "train_on_turn")  # whether a turn is learned
FINER = ("train_detail", "training_detail", "loss", "loss_mask", "mask")  # of less or more than a whole turn
MEDIA = ("image", "images", "video", "videos", "audio", "audios", "function_call")
BESIDE = ("functions", "images", "videos", "audios", "image", "video", "audio", "history")  # columns
SYSTEM = ("system", "system_prompt")  # columns
RESERVED = ("messages", "tools", "documents", "chat_template", "add_generation_prompt", "tokenize")
NOT_ASSISTANT = "turns that are marked to be learned are not, unless they are the assistant's"
UNREAD = "beside the chats, columns {} are not read"
MEANT = ("tool_calls", "reasoning_content", "reasoning", "thinking", "refusal")  # fields that are part of the text
# of exports that give every message the field: templates ask whether it is there
NO_CALLS: tuple[str, list[Any]] = ("tool_calls", [])
NOT_JSON = "arguments of tool calls that are no JSON of a mapping are written as they stand"
EMPTY_TURN = "an assistant turn without text is not learned"
KNOWN = {*ROLES.values(), "developer"}
UNKNOWN = "the role {!r} is no user, assistant, system or tool; the chat template writes it as it stands"
RENAMED = "roles such as 'human' and 'gpt' are taken as user, assistant, system or tool"

Message = dict[str, Any]


class Conversation(NamedTuple):
    """A chat: messages with `role`, a text as `content` and what else the row gives; which of them are learned.

    Only a message with `tool_calls` may lack `content`. `variables` is what else the template gets, such as `tools`.
    """

    place: str
    messages: list[Message]
    learned: list[bool]
    variables: dict[str, Any]


def read_row(shape: Shape, located: Located, notes: Counter[str]) -> tuple[str, str] | Conversation:
    """Return prompt and response of a target's row, or its chat; `notes` counts what is read in one of several ways.

    Raises BadInput naming the row and what cannot be read.
    """
    row = Located(f"target {located.place}", located.record)
    check_shape(shape, row)
    try:
        return texts_of(shape, row, notes) if shape.kind == "texts" else conversation_of(shape, row, notes)
    except RecursionError:
        raise BadInput(f"{row.place} is nested too deeply to be read; give texts, or messages of texts") from None


def conversation_of(shape: Shape, row: Located, notes: Counter[str]) -> Conversation:
    """Return the chat of a row of shape `turns` or `messages`; without messages where the cell is empty.

    Raises BadInput naming the row and what is no message, or what a chat template has no place for.
    """
    parts = [_listed(row, column, "messages") for column in shape.columns]
    reader = _Reader(row.place, notes)
    read = [[reader.message(message) for message in part] for part in parts]
    messages = [message for part in read for message, _ in part]
    context = len(read[0]) if shape.kind == "turns" else 0  # the prompt's own turns are no response
    learned = [wanted and i >= context for i, (_, wanted) in enumerate(turn for part in read for turn in part)]
    if (system := _system(row, shape.columns)) and messages:
        if messages[0]["role"] == "system" and messages[0]["content"] != system[1]:
            raise BadInput(f"{row.place} has a system message and a column {system[0]!r} beside it; keep one of them")
        if messages[0]["role"] != "system":
            messages, learned = [{"role": "system", "content": system[1]}, *messages], [False, *learned]
    known = {*shape.columns, *SYSTEM, *BESIDE, "tools", "documents", "chat_template_kwargs"}
    if unread := [column for column in row.record if column not in known]:
        notes[UNREAD.format(", ".join(map(repr, unread)))] += 1
    return Conversation(row.place, messages, learned, _variables(row, shape.columns))


def _listed(row: Located, column: str, what: str) -> list[Any]:
    """Return a list of mappings that a cell holds; empty where there is none."""
    value = row.record.get(column)
    if value is None or value == {} or (isinstance(value, str) and not value.strip()):
        return []
    found = listed(value)
    if found is None:
        raise BadInput(
            f"column {column!r} is not a list of {what} ({row.place}): {value!r:.60}; a list of mappings is needed, or "
            "the JSON text of one"
        )
    return found


def _system(row: Located, columns: tuple[str, ...]) -> tuple[str, str] | None:
    """Return the column that holds the system message, and its text."""
    for column in SYSTEM:
        if column not in columns and (text := text_of(row.record.get(column), row.place, column)):
            return column, text
    return None


def _variables(row: Located, columns: tuple[str, ...]) -> dict[str, Any]:
    record: Record = {name: value for name, value in row.record.items() if name not in columns}
    if beside := [name for name in BESIDE if record.get(name)]:
        raise BadInput(
            f"{row.place} has a column {beside[0]!r} beside its messages, which no chat template of a text model "
            "takes; remove the column (functions are written as `tools`), or give prompt and response"
        )
    lists = {name: _listed(row, name, name) for name in ("tools", "documents") if name not in columns}
    settings = record.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict) or set(settings) & set(RESERVED):
        raise BadInput(
            f"column 'chat_template_kwargs' of {row.place} holds {settings!r:.60}; a mapping without "
            f"{', '.join(RESERVED)} is needed"
        )
    return {name: value for name, value in (lists | settings).items() if value not in ([], None)}


def readings(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield the messages as templates may take them, the usual way first.

    Arguments of tool calls are mappings, or JSON text; a message of tool calls lacks `content`, or it is empty.
    """
    for change in (_as_mapping, _as_text):
        for filled in (False, True):
            yield [({"content": ""} if filled else {}) | message for message in with_arguments(messages, change)]


def with_arguments(messages: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    """Return the messages with what `change` makes of the arguments of each tool call."""
    return [
        message | {"tool_calls": [_called(call, change) for call in message["tool_calls"]]}
        if isinstance(message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _called(call: Any, change: Callable[[Any], Any]) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or "arguments" not in function:
        return call
    return call | {"function": function | {"arguments": change(function["arguments"])}}


def _as_mapping(given: Any) -> Any:
    try:
        fields = _arguments(given) if isinstance(given, str) else given
    except ValueError:
        return given
    return fields if isinstance(fields, dict) else given


def _as_text(given: Any) -> Any:
    return json.dumps(given, ensure_ascii=False) if isinstance(given, dict) else given


def _function_with_text(call: Any) -> dict[str, Any] | None:
    """Return the function of a call whose arguments are text; None of any other."""
    function = call.get("function") if isinstance(call, dict) else None
    return function if isinstance(function, dict) and isinstance(function.get("arguments"), str) else None


def _arguments(text: str) -> Any:
    """Return what the JSON text of arguments says, nothing where it is empty. Raises ValueError, of any depth too."""
    try:
        return json.loads(text) if text.strip() else {}
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Reader:
    """Reads messages of one row; `notes` counts what is read in one of several ways."""

    def __init__(self, place: str, notes: Counter[str]) -> None:
        self.place, self.notes = place, notes

    def message(self, given: Message) -> tuple[Message, bool]:
        """Return a message as templates take it, and whether it is learned."""
        fields = {name: value for name, value in given.items() if value is not None and (name, value) != NO_CALLS}
        said = "from" if "from" in fields and "role" not in fields else "role"
        role = self._role(fields.pop(said, None), given)
        content = fields.pop("value" if said == "from" and "value" in fields else "content", None)
        if content is None and "content" not in given and "value" not in given and "tool_calls" not in fields:
            self._refuse(given, "needs `role` and `content` (or `from` and `value`)")
        wanted = self._marked(fields, role, given)
        if bad := [name for name in MEDIA if fields.get(name)]:
            self._refuse(given, f"has the field {bad[0]!r}, which is not text; remove it, or write text or tool_calls")
        if said == "from" and given["from"] == "function_call":
            fields, content = fields | {"tool_calls": self._calls(content, given)}, None
        if "tool_calls" in fields and (calls := listed(fields["tool_calls"])) is None:
            self._refuse(given, "has tool_calls that are no list of mappings, nor the JSON text of one")
        elif "tool_calls" in fields:
            fields["tool_calls"] = calls
        self._say_arguments(fields.get("tool_calls"))
        message = {"role": role, **fields}
        if content is not None or not fields.get("tool_calls"):
            message["content"] = self._content(content, given)
        empty = not any(str(message.get(name) or "").strip() for name in ("content", *MEANT))
        if role == "assistant" and empty:
            self.notes[EMPTY_TURN] += 1
        return message, role == "assistant" and wanted and not empty

    def _role(self, role: Any, given: Message) -> str:
        if not isinstance(role, str) or not role.strip():
            self._refuse(given, "needs a `role` (or `from`), a text such as user or assistant")
        known = ROLES.get(role.strip().lower(), role)
        if known != role:
            self.notes[RENAMED] += 1
        if known not in KNOWN:
            self.notes[UNKNOWN.format(known)] += 1
        return known

    def _content(self, content: Any, given: Message) -> str:
        if not isinstance(content, list):
            return text_of(content, self.place, "content")
        for part in content:
            if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else part
                self._refuse(given, f"has content that is not text ({kind!r:.30}); keep parts of type text")
        return "".join(part["text"] for part in content)

    def _say_arguments(self, calls: Any) -> None:
        for call in calls if isinstance(calls, list) else []:
            if (function := _function_with_text(call)) is None:
                continue
            try:
                known = isinstance(_arguments(function["arguments"]), dict)
            except ValueError:
                known = False
            if not known:
                self.notes[NOT_JSON] += 1

    def _calls(self, content: Any, given: Message) -> list[dict[str, Any]]:
        try:
            calls = json.loads(content) if isinstance(content, str) else content
            called = calls if isinstance(calls, list) else [calls]
            return [{"type": "function", "function": {"name": c["name"], "arguments": c["arguments"]}} for c in called]
        except (ValueError, KeyError, TypeError):
            self._refuse(given, "is a function call that is no JSON with `name` and `arguments`")

    def _marked(self, fields: Message, role: str, given: Message) -> bool:
        """Take the marks out of `fields` and return whether the message may be learned."""
        if bad := [name for name in FINER if name in fields]:
            self._refuse(given, f"has the field {bad[0]!r}; whole turns are learned or not: use `weight`, 0 or 1")
        marks = {name: fields.pop(name) for name in MARKS if name in fields}
        for name, value in marks.items():
            if value not in (0, 1):  # true and false are these
                self._refuse(given, f"has {name} {value!r}; 0 or false (context only), 1 or true (learned) are allowed")
            if value and role != "assistant":
                self.notes[NOT_ASSISTANT] += 1
        return all(marks.values())

    def _refuse(self, given: Message, why: str) -> NoReturn:
        raise BadInput(f"a message of {self.place} {why}; it is {given!r:.100}")
