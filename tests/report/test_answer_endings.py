"""How answers ended reaches the summary, the table and the warnings on the page."""

from pathlib import Path
from typing import Any

import pytest

from cfsd.report.run_record import RunRecord, Scores
from cfsd.report.summarise import answers_of, summarise
from cfsd.report.table import lines_of
from cfsd.report.verdict import warnings
from tests.report.test_report import World

CUT = {"max_gen_toks": 256, "at_limit": 0.3, "unfinished": 0.02}


@pytest.fixture
def run_record(tmp_path: Path) -> tuple[World, RunRecord]:
    world = World(tmp_path)
    found: list[Scores] = []
    for model, metadata in (
        ("base", CUT | {"at_limit": 0.0}),
        ("t", CUT | {"left_out": 3, "warnings": ["it is long"]}),
    ):
        scores = world.scores(model, "cap", 60)
        found.append(Scores(benchmarks={"cap": scores.model_copy(update={"metadata": scores.metadata | metadata})}))
    return world, RunRecord(name="t", artifacts={"base": world.base}, before=found[0], after=found[1])


def test_shares_are_in_the_table_and_large_ones_are_warned_of(run_record: tuple[World, RunRecord]) -> None:
    summary = summarise(run_record[0].store, run_record[1])
    assert summary.answers["cap"]["tuned"] == CUT | {"left_out": 3}
    lines = {line.label: (line.base, line.cells) for line in lines_of([summary])}
    assert lines["answers at the length limit, %"] == ("0", ["30.0"])
    assert lines["reasoning unfinished, %"] == ("2.00", ["2.00"])
    assert warnings([summary]) == [
        "Warning: cap: 30% of the tuned model's answers were cut off at 256 tokens (raise the benchmark's "
        "max_gen_toks).",
        "Warning: cap: the metric does not apply to 3 of the tuned model's answers, which are left out.",
        "Warning: cap: lm-eval: it is long.",
    ]


def test_a_limit_that_is_part_of_the_benchmark_is_no_reason_to_doubt_it(tmp_path: Path) -> None:
    scores = World(tmp_path).scores("base", "cap", 60)
    meant = scores.model_copy(update={"metadata": scores.metadata | CUT | {"limit_is_meant": True}})
    found = answers_of({"cap": meant}, {"cap": meant})
    assert found["evaluation_warnings"] == [] and found["answers"]["cap"]["tuned"]["at_limit"] == 0.3


def test_what_was_cut_for_one_model_alone_is_said(tmp_path: Path) -> None:
    scores = World(tmp_path).scores("base", "cap", 60)
    sides = [
        scores.model_copy(update={"metadata": scores.metadata | {"remarks": ["as filter x reads them", *cut]}})
        for cut in ([], ["3 of 60 documents were cut"])
    ]
    found = answers_of({"cap": sides[0]}, {"cap": sides[1]})
    assert found["evaluation_warnings"] == ["cap: of the tuned model alone: 3 of 60 documents were cut"]
    found = answers_of({"cap": sides[1]}, {"cap": sides[0]})
    assert found["evaluation_warnings"] == ["cap: of the base model alone: 3 of 60 documents were cut"]


def test_benchmarks_of_choices_say_nothing_of_it(tmp_path: Path) -> None:
    found: Any = {"cap": World(tmp_path).scores("base", "cap", 60)}
    assert answers_of(found, found) == {"answers": {}, "evaluation_warnings": []}
