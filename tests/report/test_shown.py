"""Answers side by side: what the page, the card, the picture and summary.json make of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from cfsd.errors import BadInput
from cfsd.report.comparisons import comparisons_of
from cfsd.report.figures.shown import shown_figure
from cfsd.report.files import ReportSource, check_store, write_files
from cfsd.report.model_card import model_card
from cfsd.report.run_record import RunRecord
from cfsd.report.shown import ALIKE, AS_BASE, AS_EXPECTED, AT_ONCE, NO_ROOM, SHORTER, Answer, _answer, shown_answers
from cfsd.report.summarise import summarise
from cfsd.store.artifact import Artifact
from cfsd.store.tables import SHOWN, table_of
from tests.report.test_report import HOSTILE, World, report_of

BASE = ["one two three four", "a b c", "x y z", "right", "1 2 3", f"free {HOSTILE}"]
TUNED = ["one two  other word", "a b c", "", "wrong", "1 2", f"{HOSTILE} free"]
EXPECTED = ["", "", "", "wrong", "", ""]
KINDS = ["chat", "chat", "text", "target", "chat", "unprompted"]
REASONS = ["length", "eos", "eos", "eos", "eos", "length"]


def rows_of(answers: list[str]) -> Any:
    return table_of(SHOWN, [
        {
            "row_id": i, "kind": KINDS[i], "prompt": "" if KINDS[i] == "unprompted" else f"prompt {i} {HOSTILE}",
            "answer": answer, "expected": EXPECTED[i], "finish_reason": REASONS[i], "prompt_ids": [0],
            "temperature": float(KINDS[i] in ("text", "unprompted")), "answer_ids": list(answer.encode()),
        }
        for i, answer in enumerate(answers)
    ])  # fmt: skip


def shown(world: World, run_record: RunRecord, answers: list[str]) -> RunRecord:
    """Return the variant with answers of base and tuned."""
    sides = []
    for name, given in (("base", BASE), (f"tuned {run_record.name}", answers)):
        metadata = {"rows": len(given), "length": 7, "cut": 2, "said": ["a line of a file"]}
        sides.append(world.artifact("scores", f"shown {name}", metadata, {"answers": rows_of(given)}))
    before, after = (s.model_copy(update={"shown": a}) for s, a in zip((run_record.before, run_record.after), sides,
                                                                       strict=True))  # fmt: skip
    return run_record.model_copy(update={"before": before, "after": after})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def variants(world: World) -> list[RunRecord]:
    finetune, rehearse, more = world.variants()
    return [shown(world, finetune, TUNED), shown(world, rehearse, BASE), more]


def test_words_in_common_and_the_first_other_one(world: World, variants: list[RunRecord]) -> None:
    (section,) = shown_answers(world.store, variants)
    assert section.names == ["finetune", "rehearse"] and section.notes == ["a line of a file"]
    items = section.items
    assert [item.answers["finetune"] for item in items[:5]] == [
        Answer("one two  ", "other", " word", "cut at 7 tokens"), Answer("a b c", "", "", AS_BASE),
        Answer("", "", "", AT_ONCE), Answer("", "wrong", "", AS_EXPECTED), Answer("1 2", "", "", SHORTER),
    ]  # fmt: skip
    assert [item.answers["rehearse"].note.partition(";")[0] for item in items] == [AS_BASE] * 6
    assert [item.answers["rehearse"].text() for item in items] == BASE
    assert items[0].how == "the likeliest token each time" and items[5].how == "temperature 1"


def test_only_what_ends_before_the_base_does_is_said_to(world: World) -> None:
    def noted(own: str, base: str) -> str:
        rows = [
            {"answer": text, "answer_ids": [number], "finish_reason": "eos", "expected": ""}
            for number, text in enumerate((base, own))
        ]
        return _answer(rows[0], rows[1], Artifact(kind="scores", key="k", content="c", metadata={"length": 9})).note

    assert noted("Paris", "Paris is it.") == SHORTER
    assert noted("Paris is it.", "Paris is it.") == ALIKE  # by another end token
    assert noted("Paris is it.\n", "Paris is it.") == ALIKE


def test_the_report_opens_with_the_answers_and_they_are_text(
    world: World, variants: list[RunRecord], tmp_path: Path
) -> None:
    page = report_of(world, variants, tmp_path / "report.html")
    assert page.headings()[:2] == ["words", "table"]
    assert "script" not in {tag for tag, _ in page.elements}
    visible = HOSTILE.replace("\x00", "␀")
    said = page.part("In its own words The same prompts", "The figures")
    assert said.count(f"prompt 0 {visible}") == 1 and f"free {visible}" in said and f"expected: {EXPECTED[3]}" in said
    marked = re.findall(r"<mark>(.*?)</mark>", (tmp_path / "report.html").read_text())
    assert marked == ["marked", "other", "wrong", "&lt;bos&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;"]
    bare = report_of(world, world.variants(), tmp_path / "bare.html")
    assert "words" not in bare.headings() and "In its own words" not in bare.words


def test_of_repeats_the_first_is_shown_and_many_variants_are_folded(
    world: World, variants: list[RunRecord], tmp_path: Path
) -> None:
    named = [variants[0].model_copy(update={"name": f"{name} seed={seed}"}) for name in "abcd" for seed in (3, 4)]
    (section,) = shown_answers(world.store, named)
    assert section.names == [f"{name} seed=3" for name in "abcd"]
    page = report_of(world, named, tmp_path / "report.html")
    assert "3 more prompts" in page.words


def test_what_was_shown_to_other_prompts_is_a_section_of_its_own(world: World, variants: list[RunRecord]) -> None:
    metadata = {"rows": 1, "length": 7, "cut": 0}
    one = world.artifact("scores", "another", metadata, {"answers": rows_of(["other"])})
    alone = variants[0].model_copy(update={"name": "alone", **{
        side: getattr(variants[0], side).model_copy(update={"shown": one}) for side in ("before", "after")
    }})  # fmt: skip
    assert [section.names for section in shown_answers(world.store, [*variants, alone])] == [
        ["finetune", "rehearse"], ["alone"]
    ]  # fmt: skip


def test_no_room_for_an_answer_is_said(world: World, variants: list[RunRecord]) -> None:
    rows = rows_of(BASE).to_pylist()
    rows[0] |= {"answer": "", "answer_ids": [], "finish_reason": "context"}
    tuned = world.artifact("scores", "short", {"length": 7}, {"answers": table_of(SHOWN, rows)})
    after = variants[0].after.model_copy(update={"shown": tuned})
    (section,) = shown_answers(world.store, [variants[0].model_copy(update={"after": after})])
    assert section.items[0].answers["finetune"] == Answer("", "", "", NO_ROOM)


def test_card_summary_and_picture(world: World, variants: list[RunRecord], tmp_path: Path) -> None:
    kept = ReportSource(title="Shown", run_records=tuple(variants))
    _, files = write_files(tmp_path, world.store, kept)
    assert [file.name for file in files][:4] == ["report.html", "summary.json", "frontier.png", "answers.png"]
    assert (tmp_path / "answers.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "summary.json").read_text())["variants"]
    before, after = variants[0].before.shown, variants[0].after.shown
    assert before and after
    assert found["finetune"]["shown"] == {"rows": 6, "as_base": 1, "base": before.key, "tuned": after.key}
    assert found["rehearse"]["shown"]["as_base"] == 6 and found["rehearse more"]["shown"] is None
    card = model_card(world.store, variants[0], summarise(world.store, variants[0]), comparisons_of(world.store, []))
    table = card.split("## In its own words")[1].split("##")[0]
    assert "one two other word … (cut at 7 tokens) |" in table and "(expected: wrong) | right | wrong |" in table
    assert table.count("\n|") == 2 + 6 and "<script" not in table.replace("\\<", "")
    assert "In its own words" not in model_card(world.store, variants[2], summarise(world.store, variants[2]))


def test_the_picture_has_a_kind_of_each_and_draws_any_text(world: World, variants: list[RunRecord]) -> None:
    (section,) = shown_answers(world.store, variants)
    drawn = shown_figure(section)
    assert isinstance(drawn, Figure)
    texts = [text.get_text() for text in drawn.texts]
    assert {"base", "finetune", "rehearse", AS_BASE, "one two three four", "(nothing)"} <= set(texts)
    long = section.items[0]._replace(prompt="a word " * 40, answers={n: Answer("", "", "水 $x$ " * 200) for n in
                                                                    ("", *section.names)})  # fmt: skip
    texts = [
        t.get_text() for t in shown_figure(section._replace(items=[long._replace(how=str(i)) for i in range(9)])).texts
    ]
    assert max(text.count("\n") for text in texts) == 6 and len(texts) == (1 + 6) * 4
    assert "水" not in "".join(texts) and "\ufffd $x$" in texts[-1] and texts[-1].endswith("…")


def test_an_answer_that_is_gone_is_named(world: World, variants: list[RunRecord]) -> None:
    known = variants[0].after.shown
    assert known
    gone = variants[0].after.model_copy(update={"shown": known.model_copy(update={"key": "f" * 16})})
    kept = ReportSource(title="t", run_records=(variants[0].model_copy(update={"after": gone}),))
    with pytest.raises(BadInput, match=f"lacks scores {'f' * 16}"):
        check_store(world.store, kept)
