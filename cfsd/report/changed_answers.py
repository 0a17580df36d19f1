"""The documents that base and tuned scored differently, with both answers, for people to read side by side."""

from typing import Any, NamedTuple

from cfsd.report.run_record import RunRecord
from cfsd.report.scores import first_scores, table
from cfsd.report.table import number
from cfsd.store.artifact import Artifact, Store

MOST = 20  # items per benchmark and direction
MAX_IN_ALL = 1200  # items on one page; an item takes about 2 KB
RIGHT = " [right: "  # between a model's answer and the right one, see `cfsd.evaluate.harness.rows`


class Answer(NamedTuple):
    """What one model said; `mark` is its score in words, "right", "wrong" or a number."""

    text: str
    mark: str
    sign: str  # "better" or "worse" than the other model's


class Item(NamedTuple):
    """One document; `right` is empty where the benchmark names no right answer."""

    doc_id: int
    prompt: str
    base: Answer
    tuned: Answer
    right: str


class Direction(NamedTuple):
    """All documents that changed one way: how many, and the first of them."""

    name: str  # worse or better
    words: str
    total: int
    items: list[Item]


class Changed(NamedTuple):
    """What changed on one benchmark, of so many documents."""

    benchmark: str
    documents: int
    directions: list[Direction]


def changed_answers(store: Store, run_records: list[RunRecord]) -> dict[str, list[Changed]]:
    """Return per variant the benchmarks with changed documents: worse ones first, most changed first.

    As in the figures, an answer counts as the benchmark's first filter reads it. Of many variants fewer items
    each are shown; the counts are always of all documents.
    """
    groups = sum(2 * len(run_record.before.benchmarks) for run_record in run_records)
    most = max(3, min(MOST, MAX_IN_ALL // max(1, groups)))
    found = {}
    for run_record in run_records:
        pairs = [
            (name, before, run_record.after.benchmarks[name]) for name, before in run_record.before.benchmarks.items()
        ]
        changed = [_changed(store, name, before, after, most) for name, before, after in pairs]
        found[run_record.name] = [one for one in changed if one.directions]
    return found


def _changed(store: Store, name: str, before: Artifact, after: Artifact, most: int) -> Changed:
    metadata: dict[str, Any] = before.metadata
    base, tuned = first_scores(store, before), table(store, after, "scores")
    joined = base.merge(tuned, on=["filter", "doc_id"], suffixes=("_base", "_tuned"))
    sign = 1 if metadata["higher_is_better"] else -1
    joined["worse"] = sign * (joined["value_base"] - joined["value_tuned"]) / joined["count_base"]
    binary = metadata["kind"] == "binary"
    right = sign > 0 if binary else None  # the value, as a truth, of a right answer
    directions = []
    for way, turn in (("worse", 1), ("better", -1)):
        rows = joined[turn * joined["worse"] > 0].sort_values("worse", ascending=turn < 0, kind="stable")
        if len(rows):
            items = [_item(row, right, way) for row in rows.head(most).to_dict("records")]
            directions.append(Direction(way, _words(way, binary), len(rows), items))
    return Changed(name, len(joined), directions)


def _words(way: str, binary: bool) -> str:
    if not binary:
        return f"scored {way}"
    return {"worse": "right → wrong", "better": "wrong → right"}[way]


def _item(row: dict[str, Any], right: bool | None, way: str) -> Item:
    signs = ("better", "worse") if way == "worse" else ("worse", "better")
    said, rights = zip(*(_split(str(row[f"answer_{role}"])) for role in ("base", "tuned")), strict=True)
    marks = [_mark(row[f"value_{role}"], row[f"count_{role}"], right) for role in ("base", "tuned")]
    base, tuned = (Answer(*parts) for parts in zip(said, marks, signs, strict=True))
    return Item(int(row["doc_id"]), str(row["prompt_base"]), base, tuned, rights[0])


def _split(answer: str) -> tuple[str, str]:
    """Return what the model said and the right answer; empty where the row names none."""
    said, mark, right = answer.rpartition(RIGHT)
    return (said, right[:-1]) if mark and right.endswith("]") else (answer, "")


def _mark(value: float, count: float, right: bool | None) -> str:
    if right is not None:
        return "right" if bool(value) == right else "wrong"
    return number(value) if count == 1 else f"{number(value / count)} nats per token"
