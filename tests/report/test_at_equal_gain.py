"""Swept variants at equal gain, from a comparison's tables to its page and summary.json."""

import json
from typing import Any

import numpy as np
import pytest

from cfsd.report.comparisons import comparisons_of
from cfsd.report.files import ReportSource, write_files
from cfsd.report.matched_gain import matched_gains, methods_of
from cfsd.report.run_record import RunRecord
from cfsd.statistics.units import Units
from tests.report.test_report import Page, World

SWEPT = {  # strength -> right documents, loss after, probe_kl; the base has 90 right and a loss of 2
    "wise alpha": {0.25: (88, 1.5, 0.02), 0.5: (80, 1.0, 0.08), 1.0: (50, 0.5, 0.32)},
    "rehearse weight": {1.0: (86, 0.4, 0.08), 4.0: (89, 0.8, 0.02)},
}


def variants(world: World) -> list[RunRecord]:
    records = [world.trained("plain", right=60, loss=0.75, kl=0.5)]
    for family, strengths in SWEPT.items():
        for strength, (right, loss, kl) in strengths.items():
            records.append(world.trained(f"{family}={strength:g}", right=right, loss=loss, kl=kl))
    return records


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, dict[str, Any], str]:
    """Return the page of two sweeps and two variants beside them, its summary.json and the page's source."""
    folder, far = tmp_path_factory.mktemp("report"), world.trained("far", right=40, loss=0.2, kl=0.9)
    write_files(folder, world.store, ReportSource(title="sweeps", run_records=(far, *variants(world))))
    source = (folder / "report.html").read_text()
    return Page(source), json.loads((folder / "summary.json").read_text()), source


def test_each_cost_is_interpolated_at_gains_in_common(world: World) -> None:
    moved, lost = comparisons_of(world.store, variants(world)).matched
    assert (moved.measure, moved.logarithmic, lost.measure, lost.logarithmic) == (
        "probe_kl", True, "mean_forgetting", False,
    )  # fmt: skip
    assert moved.methods() == ["wise (alpha)", "rehearse (weight)", "plain"] and (moved.seeds, moved.covers) == (
        1,
        "documents",
    )
    at_most, plain = moved.gains[0], moved.gains[-1]
    assert at_most.gain.value == pytest.approx(1.5) and at_most.at == "the largest gain that all sweeps reach"
    assert plain.at == "the gain of plain" and plain.gain.value == pytest.approx(1.25)
    wise, rehearse, own = (entry.cost for entry in plain.methods)
    scale = own.value / 0.5 if own else 0.0  # the tables' noise, the same in every row
    assert own and wise and wise.value / scale == pytest.approx((0.08 * 0.32) ** 0.5)  # half-way in logarithms
    assert rehearse and rehearse.value / scale == pytest.approx(0.02 * 4**0.125)
    drops = {entry.method: entry.cost.value for entry in lost.gains[-1].methods if entry.cost}
    assert drops["wise (alpha)"] == pytest.approx(
        (0.1 + 0.4) / 2 * (1 + 1 / 0.75) / 2
    )  # two benchmarks, of which one has chance
    assert drops["wise (alpha)"] > drops["rehearse (weight)"] > 0


def test_seeds_count_together() -> None:
    def figures(gain: float, kl: float) -> dict[str, list[Units]]:
        return {
            name: [Units(tuple(f"{name}{i}" for i in range(20)), np.full(20, value), np.ones(20))]
            for name, value in (("target_gain", gain), ("probe_kl", kl))
        }

    points = {"a x=1": (1.0, 0.1), "a x=2": (2.0, 0.4), "b": (1.5, 0.3)}
    measured = {
        f"{name} seed={i}": figures(gain, kl + i / 100) for name, (gain, kl) in points.items() for i in range(5)
    }
    (moved,) = matched_gains(measured, dict.fromkeys(points, "the same"))  # mean forgetting was not measured
    assert (moved.seeds, moved.covers, moved.methods()) == (5, "documents and seeds", ["a (x)", "b"])
    cost = moved.gains[0].methods[0].cost
    assert cost and cost.value == pytest.approx((0.12 * 0.42) ** 0.5)


def test_a_variant_keeps_its_name_beside_a_sweep_of_that_name() -> None:
    names = ["r", "r w=1 seed=0", "r w=2 seed=0", "q w=3", "r lr=1e-5 w=1", "r lr=1e-5 w=2", "r (w)"]
    assert methods_of(names) == {
        "r": ("r", None), "r w=1 seed=0": ("r (w)", 1.0), "r w=2 seed=0": ("r (w)", 2.0), "q w=3": ("q w=3", None),
        "r lr=1e-5 w=1": ("r lr=1e-5 (w)", 1.0), "r lr=1e-5 w=2": ("r lr=1e-5 (w)", 2.0),
        "r (w)": ("r (w) (single)", None),
    }  # fmt: skip


def test_without_a_sweep_there_is_nothing(world: World) -> None:
    assert comparisons_of(world.store, world.variants()).matched == ()
    assert comparisons_of(world.store, [r for r in variants(world) if r.name.startswith("wise")]).matched == ()


def test_a_sweep_on_another_target_is_left_out(world: World) -> None:
    records = variants(world)
    other = world.artifact("target", "another", {"train_rows": 1, "held_out_rows": 20})
    moved = [
        r.model_copy(update={"artifacts": r.artifacts | {"target": other}}) if r.name.startswith("rehearse") else r
        for r in records
    ]
    found, _ = comparisons_of(world.store, moved).matched
    assert found.methods() == ["wise (alpha)", "plain"] and [match.at for match in found.gains] == ["the gain of plain"]


def test_page_and_summary_say_it(made: tuple[Page, dict[str, Any], str]) -> None:
    page, summary, source = made
    assert (
        "matched" in page.headings() and "What each way of training lost where all have learned the same" in page.words
    )
    assert (
        "not adjusted for the number of pairs" in page.words
        and "they hold for the seeds that were trained" in page.words
    )
    moved = summary["matched_gain"][0]
    assert set(moved) == {"measure", "logarithmic", "seeds", "covers", "variants", "gains"}
    assert moved["variants"]["rehearse (weight)"] == ["rehearse weight=1", "rehearse weight=4"]
    match = moved["gains"][-1]
    assert set(match) == {"at", "gain", "methods", "differences"} and match["at"] == "the gain of plain"
    assert match["methods"][0]["strengths"] == [0.5, 1.0] and match["methods"][0]["crossings"] == 1
    ratio = next(d for d in match["differences"] if (d["one"], d["other"]) == ("wise (alpha)", "plain"))["ratio"]
    assert (
        ratio["value"] == pytest.approx((0.08 * 0.32) ** 0.5 / 0.5) and ratio["low"] <= ratio["value"] <= ratio["high"]
    )
    assert "matched: probe_kl" in source and "None" not in page.part("At equal gain", "Benchmark by benchmark")
    assert page.words.count("not reached") == 2 * 2  # both sweeps at the gain of "far", for both costs
