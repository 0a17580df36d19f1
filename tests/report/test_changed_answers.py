"""The documents that changed: counted in full, shown in part, worse ones first, with both answers."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest

from cfsd.report.changed_answers import MAX_ITEMS, Changed, changed_answers
from cfsd.report.run_record import RunRecord, Scores
from cfsd.report.summarise import summarise
from cfsd.report.table import lines_of
from tests.report.test_report import BENCHMARKS, World, report_of


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def changed(world: World, run_record: RunRecord) -> dict[str, Changed]:
    return {found.benchmark: found for found in changed_answers(world.store, [run_record])[run_record.name]}


def only(world: World, before: int, after: int, kind: str = "binary") -> RunRecord:
    """Return a variant with one benchmark: so many documents right before and after, or a loss of so much."""
    scores = [
        Scores(benchmarks={"cap": world.scores(model, "cap", n, kind)}) for model, n in (("base", before), ("t", after))
    ]
    return RunRecord(name="t", artifacts={"base": world.base}, before=scores[0], after=scores[1])


def test_all_are_counted_and_the_first_are_given_with_both_answers(world: World) -> None:
    run_record = world.trained("damaged", right=50, loss=0.5, kl=0.1)
    found = changed(world, run_record)
    assert list(found) == list(BENCHMARKS)
    (lost,) = found["cap"].directions
    assert (lost.name, lost.words, lost.total, len(lost.items)) == ("worse", "right → wrong", 40, MAX_ITEMS)
    assert [item.doc_id for item in lost.items] == list(range(50, 50 + MAX_ITEMS))
    first = lost.items[0]
    assert first.base == ("base says 1.0 (first)", "right", "better")
    assert first.tuned == ("damaged says 0.0 (first)", "wrong", "worse")
    assert first.right == "1" and "item 50" in first.prompt


def test_those_that_became_better_are_there_too_and_unchanged_ones_never(world: World) -> None:
    (gained,) = changed(world, only(world, 60, 63))["cap"].directions
    assert (gained.name, gained.total, [item.doc_id for item in gained.items]) == ("better", 3, [60, 61, 62])
    assert gained.items[0].tuned.sign == "better"
    assert changed(world, only(world, 60, 60)) == {}


def test_a_loss_is_worse_when_higher_and_shown_per_token(world: World) -> None:
    (lost,) = changed(world, only(world, 8, 12, "perplexity"))["cap"].directions
    assert (lost.name, lost.words) == ("worse", "scored worse")
    assert [lost.items[0].base.mark, lost.items[0].tuned.mark] == ["2.00 nats per token", "3.00 nats per token"]


def test_many_variants_show_fewer_items_each(world: World) -> None:
    run_record = world.trained("damaged", right=10, loss=0.5, kl=0.1)
    many = [run_record.model_copy(update={"name": f"v{i}"}) for i in range(20)]
    found = changed_answers(world.store, many)
    (lost,) = found["v0"][0].directions
    assert lost.total == 80 and 3 <= len(lost.items) < MAX_ITEMS


def test_the_page_counts_them_folds_most_and_puts_the_answers_side_by_side(world: World, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page = report_of(world, [world.trained("damaged", right=50, loss=0.5, kl=0.1)], path)
    items = page.part("Answers that changed", "The rehearsal corpus")
    assert items.count("Of 100 documents 40 right → wrong .") == 2 and "17 more right → wrong, of 37" in items
    assert "document 69" in items and "document 70" not in items and "(second)" not in items
    assert "right answer: 1" in items and "[right:" not in items
    html = path.read_text()
    (side,) = [part for part in html.split('<div class="sides">') if "damaged says 0.0 (first)" in part][:1]
    assert side.index("base says 1.0 (first)") < side.index("damaged says 0.0 (first)")
    assert html.count('<div class="sides">') == 2 * MAX_ITEMS


def test_of_errors_the_lower_is_right(world: World) -> None:
    run_record = only(world, 9, 13)
    metadata = {"higher_is_better": False}
    scores = [s.benchmarks["cap"] for s in (run_record.before, run_record.after)]
    turned = [Scores(benchmarks={"cap": a.model_copy(update={"metadata": a.metadata | metadata})}) for a in scores]
    (lost,) = changed(world, run_record.model_copy(update={"before": turned[0], "after": turned[1]}))["cap"].directions
    assert (lost.name, lost.words, lost.total) == ("worse", "right → wrong", 4)
    assert (lost.items[0].base.mark, lost.items[0].tuned.mark) == ("right", "wrong")
    lines = lines_of([summarise(world.store, run_record.model_copy(update={"before": turned[0], "after": turned[1]}))])
    assert "cap: acc, %, lower is better" in [line.label for line in lines]


def test_answers_that_are_right_in_part_are_not_called_wrong(world: World) -> None:
    run_record = only(world, 100, 60)
    graded = world.store.path(run_record.after.benchmarks["cap"])
    joined = pd.read_parquet(next(graded.glob("scores*.parquet")))
    joined["value"] = joined["value"].where(joined["value"] == 1, 0.5)
    tables = {"scores": pa.Table.from_pandas(joined, preserve_index=False)}
    half = world.artifact("scores", "graded", run_record.after.benchmarks["cap"].metadata, tables)
    after = run_record.after.model_copy(update={"benchmarks": {"cap": half}})
    (lost,) = changed(world, run_record.model_copy(update={"after": after}))["cap"].directions
    assert (lost.words, lost.items[0].base.mark, lost.items[0].tuned.mark) == ("scored worse", "1.00", "0.500")
