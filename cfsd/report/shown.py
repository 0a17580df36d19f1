"""What base and variants answered to the same prompts, side by side, for people to read."""

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from cfsd.report.run_record import RunRecord, Scores
from cfsd.report.scores import table
from cfsd.report.table import variant_of
from cfsd.store.artifact import Artifact, Store

WORD = re.compile(r"\s*\S+")
KINDS = {
    "chat": "asked", "text": "to be continued", "target": "held-out row of the target", "unprompted": "unprompted",
}  # fmt: skip
AS_BASE, AS_EXPECTED = "as the base, word for word", "as expected"
SHORTER, AT_ONCE, NO_ROOM = "ends here, where the base goes on", "ends at once", "no room for an answer"
ALIKE = "the base's words, which end otherwise"


class Answer(NamedTuple):
    """What one model wrote: the first words that are the base's too, the first other word, the rest; how it ended."""

    same: str
    first: str
    rest: str
    note: str = ""

    def text(self) -> str:
        """Return the whole answer."""
        return self.same + self.first + self.rest


class Item(NamedTuple):
    """One prompt: of which kind, how it was answered, what was expected, and the answers, the base's under ""."""

    kind: str
    how: str
    prompt: str
    expected: str
    answers: dict[str, Answer]

    def label(self) -> str:
        """Return its kind in words."""
        return KINDS[self.kind]


class Section(NamedTuple):
    """The answers of models that were given the same prompts."""

    names: list[str]  # of the variants
    items: list[Item]
    notes: list[str]


def shown_answers(store: Store, run_records: Sequence[RunRecord]) -> list[Section]:
    """Return a section per set of prompts; of repeats with several seeds the first one is shown."""
    groups: dict[str, dict[str, RunRecord]] = {}
    for run_record in run_records:
        if pair_of(run_record):
            own = groups.setdefault(pair_of(run_record)[0].key, {})
            own.setdefault(variant_of(run_record.name), run_record)
    return [_section(store, list(group.values())) for group in groups.values()]


def pair_of(run_record: RunRecord) -> tuple[Artifact, ...]:
    """Return the answers of base and tuned; nothing where one of them is absent."""
    before, after = run_record.before.shown, run_record.after.shown
    return (before, after) if before and after and before.metadata.get("rows") else ()


def counted(store: Store, before: Scores, after: Scores) -> dict[str, Any] | None:
    """Return for `summary.json` where the answers are, how many there are, and how many are exactly the base's."""
    if not (before.shown and after.shown):
        return None
    base, tuned = (_rows(store, scores) for scores in (before.shown, after.shown))
    same = sum(list(one["answer_ids"]) == list(other["answer_ids"]) for one, other in zip(base, tuned, strict=True))
    return {"rows": len(base), "as_base": same, "base": before.shown.key, "tuned": after.shown.key}


def _section(store: Store, run_records: list[RunRecord]) -> Section:
    base, _ = pair_of(run_records[0])
    tuned = {r.name: _rows(store, r.after.shown) for r in run_records if r.after.shown}
    items = []
    for place, row in enumerate(_rows(store, base)):
        answers = {"": _answer(None, row, base)}
        answers |= {r.name: _answer(row, tuned[r.name][place], base) for r in run_records}
        how = "the likeliest token each time" if not row["temperature"] else f"temperature {row['temperature']:g}"
        items.append(Item(row["kind"], how, row["prompt"], row["expected"], answers))
    said: Any = [base.metadata.get("no_words"), *_list(base.metadata.get("said"))]
    return Section(list(tuned), items, [str(note) for note in said if note])


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _rows(store: Store, scores: Artifact) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table(store, scores, "answers").to_dict("records")
    return rows


def _answer(base: dict[str, Any] | None, own: dict[str, Any], artifact: Artifact) -> Answer:
    cut = f"cut at {artifact.metadata['length']} tokens"
    note = {"length": cut, "context": NO_ROOM}.get(own["finish_reason"], "")
    if own["expected"] and own["answer"].strip() == own["expected"].strip():
        note = AS_EXPECTED
    if base is None:
        return Answer("", "", own["answer"], note)
    if list(own["answer_ids"]) == list(base["answer_ids"]):
        return Answer(own["answer"], "", "", f"{AS_BASE}; {note}" if note else AS_BASE)
    words, known = WORD.findall(own["answer"]), WORD.findall(base["answer"])
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(words, known, strict=False))))
    same, other = "".join(words[:shared]), "".join(words[shared : shared + 1])
    first = other.lstrip()
    if not first:
        note = note or (SHORTER if same and shared < len(known) else ALIKE if same else AT_ONCE)
    return Answer(same + other.removesuffix(first), first, own["answer"][len(same) + len(other) :], note)
