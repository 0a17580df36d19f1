"""Prompts of the user's own: the base answers them, and a tuned model's divergence is measured along the answers."""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any, ClassVar, NamedTuple

from pydantic import NonNegativeInt, PositiveInt

from cfsd.data.conversation import Conversation, conversation_of
from cfsd.data.files import Files
from cfsd.data.records import NUMBERS, Located, Said, text_of
from cfsd.data.shapes import CONTEXT, HEAD, Shape, listed
from cfsd.errors import BadInput
from cfsd.spec import Spec

SETTING = "probe.modes"
TEXTS, CHATS = "prompt", ("messages", "conversations")  # the columns that are looked for
ANSWERED = "the assistant's last turns are left out: the base writes its own answer"
NO_TURN = "without a turn to be answered"
EMPTY = "without a text"
UNREAD = "beside {!r}, columns {} are not read"


class Prompt(NamedTuple):
    """A prompt and where it is: a text that is continued, or a chat whose next turn is the assistant's."""

    place: str
    content: str | Conversation


class Prompts(Spec):
    """Prompts of the user's own: what is sampled to be measured along is the base's answers, not free text."""

    setting: ClassVar[str] = SETTING  # where they are given, in messages

    name: str
    path: str
    column: str | None = None
    rows: PositiveInt = 256  # the first N prompts, or as many as there are
    length: PositiveInt = 128  # most tokens of an answer
    seed: NonNegativeInt | None = 0  # of the answers' random numbers, which no corpus uses

    def _identity(self) -> dict[str, Any]:
        settings = {k: v for k, v in super()._identity().items() if k not in ("name", "path")}
        return settings | {"content": self.files().content()}

    def files(self) -> Files:
        """Return the files."""
        return Files(self.path, f"prompts {self.name}", self.setting)

    def check(self) -> None:
        """Raise BadInput if there is no prompt to be had; reads all of small files, of others the first rows."""
        if self.files().first_of(self.read(Said(), Counter())) is None:
            raise BadInput(f"prompts {self.name}: {self.path!r} holds no prompt; fix {self.setting}")

    def lacks_template(self) -> BadInput:
        """Return the error of chats for a base without a chat template."""
        return BadInput(
            f"prompts {self.name} are chats, but the base has no chat template; give texts in a column {TEXTS!r}"
        )

    def are_chats(self) -> bool:
        """Return whether the base's chat template writes them."""
        head = list(islice(self._records(Said()), HEAD))
        return bool(head) and _holds_chats(head, self._column(head))

    def read(self, said: Said, dropped: Counter[str]) -> Iterator[Prompt]:
        """Yield the prompts in order; those that cannot be answered are counted in `dropped` by their reason.

        Raises BadInput naming the file and the place.
        """
        records = self._records(said)
        head = list(islice(records, HEAD))
        if not head:
            return
        column = self._column(head)
        of_chats = _holds_chats(head, column)
        for number, located in enumerate(chain(head, records)):
            if number == self.rows:
                said.add(f"the first {self.rows} prompts are taken, as {self.setting} rows says", repr(self.path))
                return
            row = Located(f"prompts {self.name} {located.place}", located.record)
            content = _chat(row, column, said) if of_chats else _text(row, column, said)
            if content is None:
                dropped[NO_TURN if of_chats else EMPTY] += 1
            else:
                yield Prompt(row.place, content)

    def _records(self, said: Said) -> Iterator[Located]:
        return islice(self.files().records(said), self.rows + 1)  # one more shows that there are more

    def _column(self, head: Sequence[Located]) -> str:
        known = dict.fromkeys(name for row in head for name in row.record)
        wanted = (self.column,) if self.column else (TEXTS, *CHATS)
        if column := next((name for name in wanted if name in known), None):
            return column
        needed = repr(self.column) if self.column else f"{TEXTS!r} or {CHATS[0]!r}"
        raise BadInput(
            f"prompts {self.name} {head[0].place} has no column {needed}; its columns are "
            f"{', '.join(map(repr, known)) or 'none'}; set `column` in {self.setting}"
        )


def _holds_chats(head: Sequence[Located], column: str) -> bool:
    """Say whether the first value of `column` is a list of messages, as such or written as text."""
    value = next((row.record[column] for row in head if row.record.get(column) is not None), None)
    return column in CHATS or isinstance(value, list) or any({"role", "from"} & m.keys() for m in listed(value) or [])


def _text(row: Located, column: str, said: Said) -> str | None:
    if beside := [name for name in CONTEXT if row.record.get(name) and name != column]:
        raise BadInput(
            f"{row.place} has a column {beside[0]!r}, for which a prompt of plain text has no place; write it into "
            f"{column!r}, or give the rows as `messages`"
        )
    _say_unread(row, column, said)
    value = row.record.get(column)
    text = text_of(value, row.place, column)
    if not isinstance(value, str | None):
        said.add(NUMBERS, row.place)
    return text or None


def _chat(row: Located, column: str, said: Said) -> Conversation | None:
    notes = Counter[str]()
    chat = conversation_of(Shape("messages", (column,)), row, notes)
    for note in notes:
        said.add(note, row.place)
    last = max((i for i, message in enumerate(chat.messages, 1) if message["role"] != "assistant"), default=0)
    if last < len(chat.messages):
        said.add(ANSWERED, row.place)
    return chat._replace(messages=chat.messages[:last], learned=chat.learned[:last]) if last else None


def _say_unread(row: Located, column: str, said: Said) -> None:
    if others := [name for name in row.record if name != column]:
        said.add(UNREAD.format(column, ", ".join(map(repr, others))), row.place)
