"""The documents that base and tuned scored differently, with both answers, for people to compare."""

from typing import Any, NamedTuple

from cfsd.report.run_record import RunRecord
from cfsd.report.scores import first_scores, table
from cfsd.report.table import number
from cfsd.store.artifact import Artifact, Store

MAX_ITEMS = 20  # per benchmark and direction
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
    shown = max(3, min(MAX_ITEMS, MAX_IN_ALL // max(1, groups)))
    return {
        run_record.name: [
            changed
            for name, before in run_record.before.benchmarks.items()
            if (changed := _changed(store, name, before, run_record.after.benchmarks[name], shown)).directions
        ]
        for run_record in run_records
    }


def _changed(store: Store, name: str, before: Artifact, after: Artifact, shown: int) -> Changed:
    metadata: Any = before.metadata
    base, tuned = first_scores(store, before), table(store, after, "scores")
    joined = base.merge(tuned, on=["filter", "doc_id"], suffixes=("_base", "_tuned"))
    sign = 1 if metadata["higher_is_better"] else -1
    joined["worse"] = sign * (joined["value_base"] - joined["value_tuned"]) / joined["count_base"]
    joined["per"] = metadata.get("per", "token")
    is_binary = metadata["kind"] == "binary" and joined[["value_base", "value_tuned"]].isin([0, 1]).to_numpy().all()
    right_value = metadata["higher_is_better"] if is_binary else None
    directions = []
    for way, turn, words in (("worse", 1, "right → wrong"), ("better", -1, "wrong → right")):
        rows = joined[turn * joined["worse"] > 0].sort_values("worse", ascending=turn < 0, kind="stable")
        if len(rows):
            items = [_item(row, way, right_value) for row in rows.head(shown).to_dict("records")]
            directions.append(Direction(way, words if right_value is not None else f"scored {way}", len(rows), items))
    return Changed(name, len(joined), directions)


def _item(row: dict[str, Any], way: str, right_value: bool | None) -> Item:
    """Return a changed document; `right_value`: whether right answers score 1, None for graded ones."""
    base, right = _answer(row, "base", "better" if way == "worse" else "worse", right_value)
    tuned, _ = _answer(row, "tuned", way, right_value)
    return Item(int(row["doc_id"]), str(row["prompt_base"]), base, tuned, right)


def _answer(row: dict[str, Any], role: str, sign: str, right_value: bool | None) -> tuple[Answer, str]:
    """Return what a model said, and the right answer; empty where the row names none."""
    answer, value, count = str(row[f"answer_{role}"]), row[f"value_{role}"], row[f"count_{role}"]
    said, mark, right = answer.rpartition(RIGHT)
    if not mark or not right.endswith("]"):
        said, right = answer, ""
    if right_value is not None:
        score = "right" if bool(value) == right_value else "wrong"
    else:
        score = number(value) if count == 1 else f"{number(value / count)} nats per {row['per']}"
    return Answer(said, score, sign), right.removesuffix("]")
