"""The page of targets in turn: the R matrix and what is left of the first base, made again from artifacts alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cfsd.errors import BadInput
from cfsd.report.files import RUN_RECORDS, ReportSource, read_kept
from cfsd.report.run_record import Measured, RunRecord
from cfsd.report.scores import table
from cfsd.report.sequence.files import SEQUENCE, read_measured, write_sequence_files, write_sequence_page
from cfsd.report.sequence.repeats import over_repeats, read_repeats, write_repeats_files
from cfsd.report.sequence.retention import WHOLE, Retention, gaps_of, retention_of
from cfsd.report.sequence.verdict import learned_and_lost
from cfsd.report.summarise import summarise
from cfsd.statistics.figures import FRACTION, Figure
from tests.report.test_report import Page, World, summary

TARGETS = ("sums", "maps", "poems")
LOSSES = [[2.0, 2.1, 2.2], [0.5, 1.9, 2.3], [0.9, 0.4, 2.4], [1.5, 0.6, 0.3]]  # stages 0 to 3 by targets
EXACT = [[1, 0, 0], [18, 1, 0], [12, 17, 1], [3, 15, 19]]  # of 20 rows
RIGHT = [88, 70, 60]  # of 100 documents after each stage; the first base has 90
WATCHED = [[0.9, 0.2, 0.8], [0.8, 0.5, 0.7], [0.7, 0.6, 0.65]]  # per stage: start, on the way, end


def sequence(world: World, losses: Any = LOSSES, *, watched: bool = True) -> tuple[ReportSource, Measured]:
    """Return three stages on one another, as flows.continual leaves them."""
    scored = [[world.responses(f"{t}{TARGETS[j]}", losses[t][j], EXACT[t][j]) for j in range(3)] for t in range(4)]
    run_records: list[RunRecord] = []
    for t, name in enumerate(TARGETS):
        plain = world.trained(name, right=RIGHT[t], loss=losses[t + 1][t], kl=0.01)
        curve = [{"watch/cap/acc": value} if watched else {"train/loss": 1.0} for value in WATCHED[t]]
        tuned = world.artifact("model", f"{name} {watched}", {"steps": 3, "tokens": 9}, metrics=curve)
        base, before = (
            (run_records[-1].artifacts["final"], run_records[-1].after) if run_records else (world.base, plain.before)
        )
        artifacts = plain.artifacts | {"base": base, "tuned": tuned, "final": tuned, "selected_target": world.target}
        before = before.model_copy(update={"target": scored[t][t], "probe": None})
        after = plain.after.model_copy(update={"target": scored[t + 1][t]})
        run_records.append(plain.model_copy(update={"artifacts": artifacts, "before": before, "after": after}))
    probes = tuple(world.divergence(f"since {name}", 0.1 * t) for t, name in enumerate(TARGETS, 1))
    return ReportSource(title="In turn", run_records=tuple(run_records)), Measured(
        scored=tuple(map(tuple, scored)), probes=probes
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Retention, Path]:
    folder = tmp_path_factory.mktemp("report")
    return write_sequence_files(folder, world.store, *sequence(world))[0], folder


@pytest.fixture(scope="module")
def page(made: tuple[Retention, Path]) -> Page:
    return Page((made[1] / "report.html").read_text())


def test_every_cell_of_the_matrix_stands_in_picture_and_table(page: Page) -> None:
    table = page.part("model sums maps poems", "Held-out loss in nats per token (lower")
    picture = page.part("Every model on every target: the R matrix", "A row is a model")
    for t, row in enumerate(LOSSES):
        for j, loss in enumerate(row):
            share = f"{5 * EXACT[t][j]:.3g}"
            assert f"{loss:.3g}" in picture and share in picture
            assert f"{loss:.2f}".rstrip("0") in table and f"{share}" in table
    assert "1 after sums" in picture and "0 first base" in picture
    own = [attrs for tag, attrs in page.elements if tag == "td" and attrs.get("class") == "own"]
    assert len(own) == len(TARGETS)


def test_the_two_sentences_say_what_was_learned_and_lost(made: tuple[Retention, Path], page: Page) -> None:
    learned, lost = learned_and_lost(made[0])
    assert learned == (
        "3 of 3 targets were learned, each at its own stage: held-out loss of “sums” 2.00 → 0.500, “maps” 1.90 → 0.400 "
        "and “poems” 2.40 → 0.300 nats per token."
    )
    assert lost.startswith("The earlier targets became worse: backward transfer -0.600 [")
    assert "(held-out loss of “sums” 0.500 → 1.50 and “maps” 0.400 → 0.600)" in lost
    assert (
        "; against the first base, the last model moved 0.3" in lost and "nats per token from the base; it lost" in lost
    )
    assert lost.endswith("over 2 benchmarks and became worse at cap (90.0 → 60.0 %) and choice (90.0 → 60.0 %).")
    assert f"{learned} {lost}" in page.words


def test_figures_have_their_definitions_and_signs(made: tuple[Retention, Path], page: Page) -> None:
    retention, _ = made
    assert retention.losses.backward_transfer and retention.exact.average_forgetting
    assert retention.losses.backward_transfer.value == pytest.approx(-(1.0 + 0.2) / 2)
    assert retention.exact.average_forgetting.value == pytest.approx((15 + 2) / 20 / 2)
    assert [figure.value for figure in retention.changed] == pytest.approx([-1.0, -0.2])
    read = page.part("What is read from it", "What is left of the first base, stage by stage")
    for part in ("-0.600 [", "1/(T-1) * sum over j < T of (R[T, j] - R[j, j])", "Chaudhry et al. 2018", "worse"):
        assert part in read


def test_every_stage_is_compared_with_the_first_base_and_not_with_the_one_before(made: tuple[Retention, Path]) -> None:
    since = made[0].since_base
    assert [s.name for s in since] == ["after sums", "after maps", "after poems"]
    assert [s.benchmarks["cap"]["base"] for s in since] == [0.9] * 3
    assert [s.benchmarks["cap"]["tuned"] for s in since] == [right / 100 for right in RIGHT]
    assert [s.probe_kl["value"] for s in since if s.probe_kl] == pytest.approx([0.1, 0.2, 0.3], rel=0.1)


def test_the_page_loads_nothing_and_every_reference_leads_to_one_place(page: Page) -> None:
    ids = [attrs["id"] for _, attrs in page.elements if attrs.get("id")]
    links = [link for _, attrs in page.elements if (link := attrs.get("href") or attrs.get("xlink:href"))]
    assert links and [ids.count(link[1:]) for link in links if link.startswith("#")] == [1] * len(links)
    assert not {tag for tag, _ in page.elements} & {"script", "link", "img", "iframe"}


def test_made_again_from_what_lies_in_the_folder(made: tuple[Retention, Path], world: World, tmp_path: Path) -> None:
    folder = made[1]
    measured = read_measured(folder)
    assert measured
    write_sequence_files(tmp_path, world.store, read_kept(folder), measured)
    names = {path.name for path in folder.iterdir()} - {"frontier.png"}
    assert {"report.html", "continual.json", "continual.md", SEQUENCE, RUN_RECORDS, "summary.json"} <= names
    assert {n: (tmp_path / n).read_bytes() for n in names} == {n: (folder / n).read_bytes() for n in names}


def test_what_is_gone_or_wrong_is_named(tmp_path: Path) -> None:
    world = World(tmp_path / "data")
    kept, measured = sequence(world)
    shutil.rmtree(world.store.path(measured.scored[3][0]))
    with pytest.raises(BadInput, match=f"lacks responses {measured.scored[3][0].key}"):
        write_sequence_files(tmp_path / "out", world.store, kept, measured)
    assert read_measured(tmp_path) is None
    (tmp_path / SEQUENCE).write_text('{"schema": 9}')
    with pytest.raises(BadInput, match="schema is another"):
        read_measured(tmp_path)


def test_the_gap_is_the_worst_moment_of_a_stage_and_of_all(made: tuple[Retention, Path], page: Page) -> None:
    *stages, whole = made[0].gaps
    assert [gap.gap for gap in stages] == pytest.approx([0.6, 0.2, 0.05])
    assert (whole.stage, whole.start, whole.worst, whole.worst_stage, whole.final) == (WHOLE, 0.9, 0.2, 1, 0.65)
    assert whole.gap == pytest.approx(0.65 - 0.2)
    found = json.loads((made[1] / "continual.json").read_text())["stability_gap"]
    assert len(found["found"]) == 4 and found["definition"].startswith("stability gap: by how much the worst moment")
    assert found["definition"] in page.words


def test_what_differs_from_stage_to_stage_is_not_joined() -> None:
    watched = {"start": 0.0, "worst": 0.4, "worst_step": 2, "final": 0.3, "gap": 0.1, "unit": "nats/token",
               "higher_is_better": False}  # fmt: skip
    stages = [summary(name, 0.1).model_copy(update={"stability_gap": {"probe_kl": watched}}) for name in TARGETS]
    assert [gap.stage for gap in gaps_of(stages)] == list(TARGETS)
    assert gaps_of([summary("sums", 0.1)]) == []


def test_without_watching_the_page_says_so(world: World, tmp_path: Path) -> None:
    kept, measured = sequence(world, watched=False)
    run_records = list(kept.run_records)
    stages = [summarise(world.store, run_record) for run_record in run_records]
    retention, path = retention_of(world.store, run_records, stages, measured), tmp_path / "report.html"
    assert retention.gaps == ()
    write_sequence_page(path, world.store, kept, stages, measured, retention)
    assert "Not measured: nothing was watched while training." in Page(path.read_text()).words


def test_nothing_is_claimed_that_was_not_found(made: tuple[Retention, Path], world: World) -> None:
    kept, measured = sequence(world, [[2.0] * 3] * 4, watched=False)
    retention = retention_of(world.store, kept.run_records, [], measured)
    learned, lost = learned_and_lost(retention)
    assert learned == "None of the 3 targets was found to have been learned at its own stage."
    assert lost.startswith("No change of the earlier targets was found on the whole: backward transfer 0 [0, 0]")
    some = made[0].model_copy(update={"learned": (*made[0].learned[:2], retention.learned[2])})
    learned, _ = learned_and_lost(some)
    assert learned.startswith("2 of 3 targets were learned, each at its own stage: held-out loss of “sums” 2.00")
    assert "“poems” was not found to be" in learned


def repeats_of(world: World, seeds: int) -> list[tuple[ReportSource, Measured]]:
    """Repeats whose last loss of the first target differs; the other figures are the same in each."""
    made = []
    for seed in range(seeds):
        losses = [*LOSSES[:3], [1.0 + 0.2 * seed, *LOSSES[3][1:]]]
        kept, measured = sequence(world, losses)
        made.append((kept.model_copy(update={"title": f"In turn seed={seed}"}), measured))
    return made


def test_figures_over_seeds_have_intervals_of_rows_and_seeds(world: World) -> None:
    repeats, retained = repeats_of(world, 5), []
    for kept, measured in repeats:
        stages = [summarise(world.store, run_record) for run_record in kept.run_records]
        retained.append(retention_of(world.store, kept.run_records, stages, measured))
    found = over_repeats(world.store, [measured for _, measured in repeats], retained)
    last, figures = found.losses[3][0], found.figures
    tables = [table(world.store, measured.scored[3][0], "responses") for _, measured in repeats]
    losses = np.array([rows["nll"].sum() / rows["count"].sum() for rows in tables])
    between = 2.776 * losses.std(ddof=1) / 5**0.5  # t of 4 degrees of freedom times the standard error
    assert found.seeds == 5 and last.value == pytest.approx(losses.mean(), rel=1e-4)
    assert last.low and last.high and between < last.value - last.low < 1.5 * between > last.high - last.value > between
    assert figures["final_exact"].value == pytest.approx((3 + 15 + 19) / 60)
    transfers = [retention.losses.backward_transfer for retention in retained]
    assert figures["backward_transfer"].value == pytest.approx(np.mean([t.value for t in transfers if t]))
    assert figures["backward_transfer_exact"].value == pytest.approx(-(15 + 2) / 20 / 2)
    assert figures["probe_kl"].value == pytest.approx(0.3, rel=0.1)


def test_an_interval_over_seeds_ends_where_shares_do(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of both earlier targets are lost, in every seed but for a few: [-101, -95] points was printed."""
    wide = Figure(value=-0.98, low=-1.01, high=-0.9, unit=FRACTION)
    monkeypatch.setattr("cfsd.report.sequence.repeats.over_seeds", lambda seeds: wide)
    kept, measured = repeats_of(world, 1)[0]
    stages = [summarise(world.store, run_record) for run_record in kept.run_records]
    retention = retention_of(world.store, kept.run_records, stages, measured)
    found = over_repeats(world.store, [measured], [retention])
    assert found.figures["backward_transfer_exact"].low == -1.0 and found.figures["probe_kl"].low == -1.01
    assert found.exact[3][0].low == 0.0 and found.losses[3][0].low == -1.01


def test_the_page_over_seeds_says_the_way_and_is_made_again_from_its_folder(world: World, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    notes = ["Held by their prompts & rows."]
    write_repeats_files(first, world.store, "In turn", notes, repeats_of(world, 2))
    page = Page((first / "report.html").read_text())
    assert notes[0] in page.words and "repeated with 2 seeds" in page.words
    assert notes[0] in (first / "continual.md").read_text()
    links = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert links == ["in-turn-seed-0/report.html", "in-turn-seed-1/report.html"]
    assert all((first / str(link)).is_file() for link in links)
    assert "95.0 % exact" in page.part("Every model on every target", "Seed by seed")  # 19 of 20; no interval of two
    known = read_repeats(first)
    assert known and read_repeats(first / "in-turn-seed-0") is None
    write_repeats_files(second, world.store, known[0].title, known[0].notes, known[1])
    names = {str(path.relative_to(first)) for path in first.rglob("*") if path.is_file()}
    assert {n: (second / n).read_bytes() for n in names} == {n: (first / n).read_bytes() for n in names}
