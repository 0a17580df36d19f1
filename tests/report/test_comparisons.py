"""Variants against each other, from real score tables to summary.json, page, terminal, card and metrics."""

import io
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from cfsd.report.compared import Comparisons
from cfsd.report.comparisons import Repeats, compared, comparisons_of
from cfsd.report.differences import MAX_LINES, differences_of, lines_against, metrics_of
from cfsd.report.files import ReportSource, write_files, write_numbers
from cfsd.report.run_record import RunRecord
from cfsd.report.scores import table
from cfsd.report.summarise import summarise
from cfsd.report.terminal import print_summary
from cfsd.report.verdict import remarks, verdict
from cfsd.statistics.discoveries import false_discovery
from cfsd.statistics.figures import FRACTION
from cfsd.statistics.multiplicity import holm
from cfsd.statistics.units import Units
from tests.report.test_report import Page, World, summary

FIELDS = ("one", "other", "measure", "unit", "value", "low", "high", "p_value", "adjusted_p", "seeds", "paired")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def three(world: World) -> Comparisons:
    return comparisons_of(world.store, world.variants())


def console_of(width: int = 400) -> Console:
    return Console(width=width, file=io.StringIO())


def test_every_measure_of_every_pair_is_an_entry(three: Comparisons) -> None:
    measures = {
        "target_gain",
        "target_accuracy_gain",
        "probe_kl",
        "mean_forgetting",
        "benchmarks/cap",
        "benchmarks/choice",
    }
    assert {c.measure for c in three.entries} == measures
    assert len(three.entries) == 3 * len(measures)
    assert all(entry.paired and entry.seeds == 1 for entry in three.entries)


def test_a_difference_is_that_of_the_figures_and_turns_with_the_order(world: World, three: Comparisons) -> None:
    one, other, _ = (summarise(world.store, run_record) for run_record in world.variants())
    for measure in ("target_gain", "probe_kl", "mean_forgetting"):
        values = [getattr(s, measure)["value"] for s in (one, other)]
        found, turned = three.of("finetune", "rehearse", measure), three.of("rehearse", "finetune", measure)
        assert found and turned and found.value == pytest.approx(values[0] - values[1])
        assert [turned.value, turned.low, turned.high] == [-found.value, -(found.high or 0), -(found.low or 0)]
        assert [found.sign(), turned.sign()] == [1, -1]
    assert three.sign("rehearse", "rehearse more", "mean_forgetting") == 0
    assert three.of("finetune", "nobody", "probe_kl") is None


def test_pairs_are_adjusted_by_holm_and_benchmarks_together(three: Comparisons) -> None:
    gains = [c for c in three.entries if c.measure == "target_gain"]
    benchmarks = [c for c in three.entries if c.measure.startswith("benchmarks/")]
    for entries, control in ((gains, holm), (benchmarks, false_discovery)):
        p_values = [c.p_value for c in entries if c.p_value is not None]
        assert [c.adjusted_p for c in entries] == control(p_values) and len(p_values) == len(entries)


def test_summary_json_of_schema_2_has_them_and_twice_the_verdict_is_the_same(world: World, tmp_path: Path) -> None:
    kept = ReportSource(title="t", run_records=tuple(world.variants()))
    first, again = (write_numbers(tmp_path / name, world.store, kept) for name in ("first", "again"))
    written = [[file.read_bytes() for file in files] for _, files in (first, again)]
    assert written[0] == written[1] and verdict(*first[0]) == verdict(*again[0])
    content = json.loads((tmp_path / "first" / "summary.json").read_text())
    assert content["schema"] == 2 and list(content) == ["schema", "variants", "comparisons"]
    assert all(list(entry)[: len(FIELDS)] == list(FIELDS) for entry in content["comparisons"])
    assert len(content["comparisons"]) == len(first[0].comparisons.entries)


def test_another_base_or_target_is_not_compared_and_another_probe_not_paired(world: World) -> None:
    one, other, third = world.variants()
    target = world.artifact("target", "another", {"train_rows": 5})
    apart = other.model_copy(update={"artifacts": {**other.artifacts, "target": target}})
    pairs = {(c.one, c.other) for c in comparisons_of(world.store, [one, apart, third]).entries}
    assert pairs == {("finetune", "rehearse more")}
    probe = world.artifact("corpus", "another probe", {"rows": 20})
    elsewhere = other.model_copy(update={"artifacts": {**other.artifacts, "probe": probe}})
    found = comparisons_of(world.store, [one, elsewhere])
    assert {c.measure for c in found.entries if not c.paired} == {"probe_kl"}
    paired, unpaired = (
        c.of("finetune", "rehearse", "probe_kl") for c in (comparisons_of(world.store, [one, other]), found)
    )
    assert paired and unpaired and paired.value == pytest.approx(unpaired.value)
    assert comparisons_of(world.store, [one]).entries == ()


def lost(benchmark: str, wrong: int) -> Units:
    """What a model lost on a benchmark of 100 documents."""
    names = tuple(f"{benchmark}:{i}" for i in range(100))
    return Units(names, (np.arange(100) < wrong) * 1.0, np.ones(100), FRACTION, 1.0, part_of=benchmark)


def test_mean_forgetting_over_other_benchmarks_is_not_compared_and_their_order_does_not_matter(world: World) -> None:
    def of(*parts: Units) -> Repeats:
        return {"": {"mean_forgetting": list(parts)}}

    variants = {"a": of(lost("x", 10), lost("y", 50)), "b": of(lost("x", 10)), "c": of(lost("x", 10), lost("z", 9))}
    assert compared(variants, combinations(variants, 2)).entries == ()
    other_unit = of(lost("x", 10)._replace(unit="f1"))
    assert compared({"b": variants["b"], "d": other_unit}, [("b", "d")]).entries == ()
    one, other, third = world.variants()
    scores = (side.model_copy(update={"benchmarks": dict(reversed(side.benchmarks.items()))})
              for side in (other.before, other.after))  # fmt: skip
    turned = other.model_copy(update=dict(zip(("before", "after"), scores, strict=True)))
    found = comparisons_of(world.store, [one, turned]).of("finetune", "rehearse", "mean_forgetting")
    known = comparisons_of(world.store, [one, other]).of("finetune", "rehearse", "mean_forgetting")
    assert found and known and found.paired and found.value == known.value
    fewer = (side.model_copy(update={"benchmarks": {"cap": side.benchmarks["cap"]}})
             for side in (third.before, third.after))  # fmt: skip
    less = third.model_copy(update=dict(zip(("before", "after"), fewer, strict=True)))
    two = [one, less]
    comparisons = comparisons_of(world.store, two)
    assert {c.measure for c in comparisons.entries} >= {"probe_kl", "benchmarks/cap"}
    assert comparisons.of("finetune", "rehearse more", "mean_forgetting") is None
    said = remarks([summarise(world.store, record) for record in two], comparisons)
    assert any(line.startswith("Variants with other benchmarks are not compared in mean forgetting") for line in said)


def repeats(world: World, name: str, values: list[float]) -> list[RunRecord]:
    return [world.trained(f"{name} seed={i}", right=88, loss=0.5, kl=kl) for i, kl in enumerate(values)]


def test_repeats_are_paired_by_seed(world: World) -> None:
    records = [*repeats(world, "a", [0.2, 0.3, 0.4]), *repeats(world, "b", [0.1, 0.1, 0.1])[::-1]]
    found = comparisons_of(world.store, records).of("a", "b", "probe_kl")
    assert found and found.seeds == 3 and [each.seed for each in found.each] == ["seed=0", "seed=1", "seed=2"]
    figures = [table(world.store, r.after.probe, "divergence") for r in records if r.after.probe]
    values = [rows["kl"].sum() / rows["count"].sum() for rows in figures]
    expected = [one - other for one, other in zip(values[:3], values[:2:-1], strict=True)]
    assert [each.value for each in found.each] == pytest.approx(expected)
    assert found.value == pytest.approx(np.mean(expected)) and found.low is None
    shown = found.figure()
    assert shown["low"] == min(each.low or 0 for each in found.each) and found.sign() == 1
    mixed = [*repeats(world, "a", [0.2, 0.1, 0.4]), *repeats(world, "b", [0.1, 0.2, 0.1])]
    assert comparisons_of(world.store, mixed).sign("a", "b", "probe_kl") == 0


def test_page_terminal_card_and_metrics_show_the_same_differences(world: World, tmp_path: Path) -> None:
    kept = ReportSource(title="t", run_records=tuple(world.variants()))
    (summaries, comparisons), (page, _, _, *cards) = write_files(tmp_path, world.store, kept)
    read = Page(page.read_text())
    assert "differences" in read.headings()
    part = read.part("Variants against each other What", "Learned against forgotten")
    differences = differences_of(summaries, comparisons)
    assert differences and len(differences.matrices) == 3 and differences.best == "finetune"
    for matrix in differences.matrices:
        for row, name in enumerate(matrix.columns):
            assert matrix.rows[name][row] is None, "no variant against itself"
        for found in (cell for cells in matrix.rows.values() for cell in cells if cell):
            assert found.text.partition(" [")[0] in part
    assert part.count("moved further") == 2 * 2 + 1 and part.count("moved less") == 3
    lines = lines_against("finetune", comparisons, only_found=True)
    console = console_of()
    print_summary(summaries, console, comparisons)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert (
        lines[0] in printed
        and "moved further" in lines[0]
        and "“finetune” less “rehearse”: target gain 0.1" in lines[0]
    )
    assert all(
        f"“{name}” less “" in card.read_text() for name, card in zip(("finetune", "rehearse"), cards, strict=False)
    )
    metrics, found = metrics_of(comparisons), comparisons.of("finetune", "rehearse", "probe_kl")
    name = "comparison/finetune - rehearse/probe_kl"
    assert found and [metrics[name + end] for end in ("", "_low", "_high", "_p")] == [
        found.value, found.low, found.high, found.adjusted_p,
    ]  # fmt: skip


def test_of_many_variants_the_terminal_has_only_lines_that_matter() -> None:
    rng = np.random.default_rng(0)
    rows, names = rng.lognormal(-3, 0.8, 64), tuple(map(str, range(64)))
    factors = {f"v{i:02}": 1 + (i > 3) for i in range(20)}
    units = {n: Units(names, f * rows * rng.lognormal(0, 0.1, 64), np.ones(64)) for n, f in factors.items()}
    variants = {name: {"": {"probe_kl": [part]}} for name, part in units.items()}
    comparisons = compared(variants, combinations(variants, 2))
    found = lines_against("v00", comparisons, only_found=True)
    assert len(found) == MAX_LINES + 1 and all("moved less" in line for line in found[:-1])
    assert found[-1] == f"{16 - MAX_LINES} more differences are in the report."
    assert len(lines_against("v00", comparisons, only_found=False)) == MAX_LINES + 1
    nine = compared({n: variants[n] for n in list(variants)[3:13]}, combinations(list(variants)[3:13], 2))
    assert lines_against("v03", nine, only_found=True)[-1] == "1 more difference is in the report."
    summaries = [summary(name, 0.1, kl=0.1 * factor, gain=None) for name, factor in factors.items()]
    differences = differences_of(summaries, comparisons)
    assert differences and not differences.is_open and len(differences.against.rows) == 19
    assert len(comparisons.entries) == 190
    apart = {c.sign() for c in comparisons.entries if factors[c.one] != factors[c.other]}
    alike = [c.sign() for c in comparisons.entries if factors[c.one] == factors[c.other]]
    assert apart == {-1} and not any(alike)
