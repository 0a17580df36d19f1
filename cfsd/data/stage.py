"""Target: what to fine-tune on, as tokenised rows with a train and a held-out part."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cfsd.data.chat import Rendering
from cfsd.data.conversation import Conversation, Message, read_row
from cfsd.data.records import HALVES, Located, Said, whole_characters
from cfsd.data.shapes import Shape
from cfsd.data.target import Target, first_rows, records_of, shape_of_rows
from cfsd.data.tokenised import Span, added_in_front, special_tokens, tokenise
from cfsd.data.written import check_written
from cfsd.errors import BadInput
from cfsd.model.loading import Tokenization, load_tokenization
from cfsd.store.artifact import Artifact, Draft
from cfsd.store.tables import TARGET, table_of, write_shard

BLOCK = 1024  # rows that are Python's at once
SHARED = "a token across the border of what is learned counts where it holds only spaces of the other side"
SPECIAL = "special tokens of this model that are written in the text are taken as these tokens"
UNKNOWN = "characters that this tokenizer does not know become its unknown token"
LOST = "characters that this tokenizer has no token for are left out"
HELD_OUT_SEEN = (
    "{} of {} held-out rows have an answer that training has too, after the same words: what is learned looks like "
    "more than it is; keep the turns of a chat in one row, and near copies out of the target"
)
NO_RESPONSE = "with an empty response"
MERGED = "whose response has no token of its own"
LETTERS = 4  # of a token, on average at most: a text with more may be too long
ENDED = "the chat template closes a turn with no token: the model's end token is put after the last one of a chat"
OPEN_TURN = "the chat template closes turns with no token: those before a chat's last one teach no end"
TURNS = "turns is of no effect: it is for chats, and these rows are prompt and response"
NO_TURN = "without a turn of the assistant that is learned"


class Row(NamedTuple):
    """One tokenised row; `supervised[t]` says whether token t counts in the loss."""

    token_ids: list[int]
    supervised: list[bool]
    prompt: str
    response: str


def prepare(base: Artifact, target: Target, draft: Draft) -> None:
    """Write `train` and `held_out` tables. Raises BadInput naming why when too few rows are left.

    `said` of the metadata has a sentence for what was recognised, and one for what is read in one of several ways.
    """
    tokens, context = load_tokenization(draft.store.path(base)), base.metadata["context"]
    if isinstance(context, int) and context < target.max_length:
        target = target.model_copy(update={"max_length": context})

    reading = _Reading(target, tokens)
    usable = _table(reading.rows())
    _check_number(target, usable.num_rows, reading.dropped)
    places = list(range(usable.num_rows))
    random.Random(f"split {target.seed}").shuffle(places)
    order, held_out = pa.array(places, pa.int64()), len(places) if target.measure_only else target.held_out
    parts = {"held_out": usable.take(order[:held_out]), "train": usable.take(order[held_out:])}
    seen = _count_seen(parts["held_out"], parts["train"])
    for name, rows in parts.items():
        write_shard(draft.folder, name, 0, _numbered(rows))
        tokens_of = pc.list_value_length(rows["token_ids"])
        draft.metadata |= {f"{name}_rows": rows.num_rows, f"{name}_tokens": _sum(tokens_of)}
    draft.metadata |= {
        "supervised_tokens": _sum(pc.list_flatten(parts["train"]["supervised"])),
        "dropped": dict(reading.dropped),
        "said": [*reading.said(), *([HELD_OUT_SEEN.format(seen, parts["held_out"].num_rows)] if seen else [])],
        **({"held_out_seen": seen} if seen else {}),
    }


def _read(rows: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in rows.to_batches(max_chunksize=BLOCK):
        yield from batch.to_pylist()


def _count_seen(held_out: pa.Table, train: pa.Table) -> int:
    """Return how many held-out rows have an answer that training has; what is kept grows with the held-out rows."""
    answers = [{*_answers_of(row)} for row in _read(held_out)]
    wanted = set().union(*answers)
    found = {answer for row in _read(train) for answer in _answers_of(row) if answer in wanted}
    return sum(not own.isdisjoint(found) for own in answers)


def _answers_of(row: dict[str, Any]) -> Iterator[bytes]:
    """Yield what tells an answer of a row, and all that comes before it, from others: of a chat each turn's.

    The last one is told by its words alone, whatever their case and spaces.
    """
    ends_T = np.diff(np.append(row["supervised"], False).astype(np.int8)) == -1  # at the last token of each span
    for last in np.flatnonzero(ends_T).tolist():
        yield _digest(row["token_ids"][: last + 1])
    words = "\0".join(" ".join(row[side].casefold().split()) for side in ("prompt", "response"))
    yield blake2b(words.encode(errors="surrogatepass"), digest_size=16).digest()


def _table(rows: Iterator[Row]) -> pa.Table:
    """Return the rows as columns: some five bytes a token, of which lists of Python take fifty."""
    schema, parts = pa.schema([TARGET.field(name) for name in Row._fields]), []
    while block := [row._asdict() for row in islice(rows, BLOCK)]:
        parts.append(table_of(schema, block))
    return pa.concat_tables(parts) if parts else schema.empty_table()


def _numbered(rows: pa.Table) -> pa.Table:
    count = rows.num_rows
    known = {"row_id": pa.array(np.arange(count)), "source": pa.array(["target"] * count, pa.string())}
    columns = known | {name: rows[name] for name in rows.column_names}
    return pa.table({name: columns[name] for name in TARGET.names}).cast(TARGET)


def _sum(values: Any) -> int:
    return int(pc.sum(values).as_py() or 0)


def _check_number(target: Target, usable: int, dropped: Counter[str]) -> None:
    if usable > (0 if target.measure_only else target.held_out):
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "none dropped"
    raise BadInput(
        f"the target has {usable} usable rows ({reasons}), but held_out={target.held_out} of them are kept "
        "from training; give more rows, a smaller target.held_out or a larger target.max_length"
    )


class _Reading:
    """One reading of a target's rows: how they are read, how many were dropped and why, and what is to be said."""

    def __init__(self, target: Target, tokens: Tokenization) -> None:
        self.target, self.tokens, self.tokenizer = target, tokens, tokens.tokenizer
        self.front: list[int] | None = None  # what the tokenizer puts before every text
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.of_files = Said()
        self.written_roles: set[str] = set()
        self.too_long = f"longer than max_length={target.max_length}"
        self.recognised, self.turns_unread = "", False
        added = {token for token, known in self.tokenizer.added_tokens_decoder.items() if known.special}
        self.ends = added & {*tokens.eos_ids, *tokens.end()}
        self.special = special_tokens(self.tokenizer)
        known_ids = {*self.tokenizer.all_special_ids, *tokens.eos_ids}
        self.marks = known_ids | {i for i, known in self.tokenizer.added_tokens_decoder.items() if known.special}

    def said(self) -> Iterator[str]:
        if self.recognised:
            yield self.recognised
        if self.turns_unread:
            yield TURNS
        yield from self.of_files.sentences()
        yield from (f"{note}; rows: {count}" for note, count in self.notes.items())
        yield from (f"rows left out: {count} {reason}" for reason, count in self.dropped.items())

    def rows(self) -> Iterator[Row]:
        records = islice(records_of(self.target, self.of_files), self.target.rows)
        head = first_rows(self.target, records)
        shape = shape_of_rows(self.target, head)
        self.recognised = shape.recognised
        self.turns_unread = self.target.turns == "last" and shape.kind == "texts"
        seen: set[bytes] = set()
        for located in chain(head, records):
            notes: Counter[str] = Counter()
            row, lacking = self._row(shape, located, notes)
            self.notes.update(dict.fromkeys(notes, 1))
            if not any(row.supervised):
                self.dropped[lacking] += 1
            elif len(row.token_ids) > self.target.max_length:
                self.dropped[self.too_long] += 1
            elif (digest := _digest(row.token_ids)) in seen:  # a copy in the held-out part would be no evidence
                self.dropped["seen before"] += 1
            else:
                seen.add(digest)
                yield row

    def _row(self, shape: Shape, located: Located, notes: Counter[str]) -> tuple[Row, str]:
        """Return the row, and why it is dropped if nothing of it is learned."""
        try:
            located = Located(located.place, _whole(located.record, notes))
        except RecursionError:
            raise BadInput(f"target {located.place} is nested too deeply to be read") from None
        read = read_row(shape, located, notes)
        if isinstance(read, Conversation):
            return self._chat_row(read, notes)
        return self._text_row(f"target {located.place}", *read, notes)

    def _text_row(self, place: str, prompt: str, response: str, notes: Counter[str]) -> tuple[Row, str]:
        if self.special.search(prompt) or self.special.search(response):
            notes[SPECIAL] += 1
        text = prompt + response
        ids, supervised = self._tokens(place, text, [(len(prompt), len(text))], notes)
        if not any(supervised):
            return Row(ids, supervised, prompt, response), MERGED if response else NO_RESPONSE
        if self.front is None:
            self.front = added_in_front(self.tokenizer, text)
        front = self.front[:-1] if self.front[-1:] == ids[:1] else self.front  # the text may have its own
        end = [] if ids[-1] in self.ends else self.tokens.end()
        supervised = [False] * len(front) + supervised + [True] * len(end)
        return Row(front + ids + end, _predicted(supervised), prompt, response), NO_RESPONSE

    def _chat_row(self, chat: Conversation, notes: Counter[str]) -> tuple[Row, str]:
        if self.target.turns == "last":
            last = max((i for i, learned in enumerate(chat.learned) if learned), default=None)
            chat = chat._replace(learned=[i == last for i in range(len(chat.learned))])
        contents = [message.get("content", "") for message in chat.messages]
        said = "\n".join(content for content, learned in zip(contents, chat.learned, strict=True) if learned)
        first = _asked(chat.messages)
        if not any(chat.learned):
            return Row([], [], first, said), NO_TURN
        if any(map(self.special.search, contents)):
            notes[SPECIAL] += 1
        rendering = Rendering(self.tokenizer, chat)
        if self._is_too_long(chat.place, rendering.text):
            return Row([], [], first, said), self.too_long
        spans = rendering.spans(notes)
        check_written(rendering, spans or (), self.written_roles, notes)
        ids, supervised = rendering.mask() if spans is None else self._tokens(chat.place, rendering.text, spans, notes)
        ids, supervised = self._closed(ids, supervised, notes)
        return Row(ids, _predicted(supervised), first, said), NO_TURN

    def _closed(self, ids: list[int], supervised: list[bool], notes: Counter[str]) -> tuple[list[int], list[bool]]:
        """Return a chat's tokens with an end after each learned turn, where the template closes it with no token.

        The next token counts if the model ends texts at it, as GLM's `<|user|>`; after the last turn comes the model's
        end token. A turn in between that nothing ends is said.
        """
        learned = list(supervised)
        for last in (t for t, own in enumerate(supervised) if own and not any(supervised[t + 1 : t + 2])):
            if self._ends_turn(ids, supervised, last):
                continue
            end = self.tokens.end()
            if end and last + 1 == len(ids):
                notes[ENDED] += 1
                return ids + end, [*learned, True]
            if last + 1 < len(ids) and ids[last + 1] in self.tokens.eos_ids:
                learned[last + 1] = True
            else:
                notes[OPEN_TURN] += 1
        return ids, learned

    def _ends_turn(self, ids: list[int], supervised: list[bool], last: int) -> bool:
        """Say whether a learned turn ends with a special token, before spaces if there are any."""
        while last and supervised[last] and not str(self.tokenizer.decode([ids[last]])).strip():
            last -= 1
        return ids[last] in self.marks

    def _is_too_long(self, place: str, text: str) -> bool:
        """Say whether a chat has too many tokens, before its turns are looked for: that takes the square of them."""
        most = self.target.max_length
        return len(text) > LETTERS * most and len(self._tokens(place, text, [], Counter())[0]) > most

    def _tokens(self, place: str, text: str, spans: list[Span], notes: Counter[str]) -> tuple[list[int], list[bool]]:
        try:
            made = tokenise(self.tokenizer, text, spans)
        except Exception as error:  # tokenizers raise plain exceptions
            raise BadInput(f"{place} cannot be turned into tokens: {error}") from error
        if made.shared:
            notes[SHARED] += 1
        if made.lost:
            notes[LOST] += 1
        unknown = self.tokenizer.unk_token_id
        if unknown is not None and unknown in made.ids and str(self.tokenizer.unk_token) not in text:
            notes[UNKNOWN] += 1
        return made.ids, made.supervised


def _digest(token_ids: Sequence[int]) -> bytes:
    return blake2b(np.array(token_ids, np.int64).tobytes(), digest_size=16).digest()


def _asked(messages: Sequence[Message]) -> str:
    """Return the user's first words, not those of a system message before them."""
    first = next((m for m in messages if m["role"] == "user"), messages[0] if messages else {})
    return str(first.get("content", ""))


def _predicted(supervised: list[bool]) -> list[bool]:
    """Leave the first token of a row out: nothing comes before it, so nothing predicts it."""
    return [False, *supervised[1:]] if supervised else []


def _whole(value: Any, notes: Counter[str]) -> Any:
    """Return `value` with whole characters in all of its texts, however deep."""
    if isinstance(value, str):
        if (whole := whole_characters(value)) != value:
            notes[HALVES] += 1
        return whole
    if isinstance(value, list):
        return [_whole(item, notes) for item in value]
    if isinstance(value, dict):
        return {_whole(name, notes): _whole(item, notes) for name, item in value.items()}
    return value
