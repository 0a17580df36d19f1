"""The section that says where models moved: its bins add up, its texts are escaped, and older artifacts have none."""

import random
from pathlib import Path
from typing import Any

import pytest

from cfsd.evaluate.divergence import DECILES
from cfsd.report.comparisons import comparisons_of
from cfsd.report.model_card import model_card
from cfsd.report.run_record import RunRecord, role_of
from cfsd.report.summarise import headline, summarise
from cfsd.report.table import number, shown, summary_frame
from cfsd.statistics.bins import quantile_edges
from cfsd.store.artifact import Artifact
from cfsd.store.tables import DIVERGENCE, MOVED_POSITIONS, MOVED_TOKENS, table_of
from tests.report.test_report import HOSTILE, World, report_of

LENGTHS = [5, 9, 16, 30] * 6


def moved(world: World, name: str, scale: float = 1.0, widest: float = 4.0) -> Artifact:
    """Return what is measured along rows of `LENGTHS`; the divergence grows with the entropy."""
    noise, records = random.Random(3), []
    for i, length in enumerate(LENGTHS):
        entropy = [noise.uniform(0, widest) for _ in range(length)]
        kl = [scale * (e + 1) * noise.uniform(0.9, 1.1) for e in entropy]
        sums = {"kl": sum(kl), "sampled": sum(kl), "reverse_kl": 2 * sum(kl), "base_nll": 9.0, "tuned_nll": 9.0}
        records.append({"row_id": i, **sums, "count": length, "token_kl": kl, "token_entropy": entropy})
    edges = quantile_edges([e for record in records for e in record["token_entropy"]], DECILES)
    sides = {"base": [HOSTILE, " the"], "base_p": [0.5, 0.25], "tuned": ["\n", "x"], "tuned_p": [0.75, 0.125]}
    position = {"row_id": 1, "place": 4, "kl": 3.25, "context": f"before {HOSTILE}", "next": HOSTILE}
    probs = {"next_base_p": 0.5, "next_tuned_p": 0.0625}
    tokens = [{"token_id": 5, "text": HOSTILE, "base_p": 0.1, "tuned_p": 0.4, "kl": -0.5},
              {"token_id": 6, "text": " a", "base_p": 0.4, "tuned_p": 0.1, "kl": 1.5}]  # fmt: skip
    tables = {
        "divergence": table_of(DIVERGENCE, records),
        "moved_positions": table_of(MOVED_POSITIONS, [position | probs | sides]),
        "moved_tokens": table_of(MOVED_TOKENS, tokens),
    }
    metadata = {"rows": len(LENGTHS), "tokens": sum(LENGTHS), "entropy_edges": edges.tolist()}
    return world.artifact("scores", f"moved {name} {scale} {widest}", metadata, tables)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def records(world: World) -> list[RunRecord]:
    answers = {role_of("support"): world.artifact("corpus", "answers", {"rows": 16})}
    made = []
    for run_record, scale in zip(world.variants()[:2], (1.0, 0.25), strict=True):
        scores = {"probe": moved(world, "probe", scale), "prompts": {"support": moved(world, "support", scale)}}
        after = run_record.after.model_copy(update=scores)
        artifacts = run_record.artifacts | answers
        made.append(run_record.model_copy(update={"after": after, "artifacts": artifacts}))
    return made


def test_bins_by_position_and_by_entropy_add_up_to_the_divergence(world: World, records: list[RunRecord]) -> None:
    summary = summarise(world.store, records[0])
    assert summary.moved and summary.probe_kl
    for bins in summary.moved.values():
        assert sum(part["tokens"] for part in bins) == sum(LENGTHS)
        assert sum(part["share"] for part in bins) == pytest.approx(1)
        whole = sum(part["tokens"] * part["kl"]["value"] for part in bins) / sum(LENGTHS)
        assert whole == pytest.approx(summary.probe_kl["value"], rel=1e-6)
        assert all(part["kl"]["low"] < part["kl"]["value"] < part["kl"]["high"] for part in bins)
    assert [(b["low"], b["high"]) for b in summary.moved["by_position"]] == [
        (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 30),
    ]  # fmt: skip
    by_entropy = [part["kl"]["value"] for part in summary.moved["by_entropy"]]
    assert len(by_entropy) == DECILES and by_entropy == sorted(by_entropy)


def test_prompts_and_the_reverse_are_figures_like_others(world: World, records: list[RunRecord]) -> None:
    summary = summarise(world.store, records[0])
    own = summary.prompts["support"]
    extra: Any = summary.model_extra
    assert summary.probe_kl and own["kl"]["value"] == pytest.approx(summary.probe_kl["value"])
    assert own["reverse_kl"]["value"] == pytest.approx(2 * own["kl"]["value"])
    assert extra["reverse_kl"]["value"] == pytest.approx(own["reverse_kl"]["value"])
    figures = headline(summary)
    assert figures["forgetting/support/prompts_kl"] == own["kl"]["value"]
    assert figures["forgetting/support/prompts_kl_low"] == own["kl"]["low"]
    assert figures["reverse_kl"] == extra["reverse_kl"]["value"]
    frame = summary_frame([summary]).set_index("figure")
    assert frame.loc["support: divergence, nats/token", summary.name] == shown(own["kl"])


def test_the_section_shows_pictures_and_what_moved_most_as_text(
    world: World, records: list[RunRecord], tmp_path: Path
) -> None:
    page = report_of(world, records, tmp_path / "report.html")
    assert "moved" in page.headings() and "script" not in {tag for tag, _ in page.elements}
    section = page.part("Where it moved", "Training")
    visible = HOSTILE.replace("\x00", "␀")
    marked = visible.replace(" ", "␣")
    summary = summarise(world.store, records[0])
    assert summary.moved
    wanted = [
        "On the prompts “support”", f"before {visible}", f"{marked} 0.500", "␣the 0.250", "⏎ 0.750", "3.25",
        shown(summary.moved["by_entropy"][9]["kl"]), "became likelier",
        f"{marked} 10.0 40.0 30.0 -0.500", "a 40.0 10.0 -30.0",
    ]  # fmt: skip
    words = section.replace("\xa0", " ")
    assert [text for text in wanted if text not in words] == []
    drawn = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert len(drawn) >= 4 and all(attrs.get("role") for attrs in drawn)


def test_tenths_of_variants_with_probes_of_their_own_have_ranges_of_their_own(
    world: World, records: list[RunRecord], tmp_path: Path
) -> None:
    one, other = records
    after = other.after.model_copy(update={"probe": moved(world, "another probe", widest=8.0), "prompts": {}})
    page = report_of(world, [one, other.model_copy(update={"after": after})], tmp_path / "report.html")
    section = page.part("On the probe", "What moved most")
    bins = summarise(world.store, one).moved
    assert bins and "bin 10" in section
    low, high = (bins["by_entropy"][9][end] for end in ("low", "high"))
    assert f"at {number(low)} to {number(high)}" in section and f"at {number(2 * low)} to {number(2 * high)}" in section


def test_what_an_older_version_measured_has_no_such_section(world: World, tmp_path: Path) -> None:
    run_record = world.variants()[0]
    summary = summarise(world.store, run_record)
    assert summary.moved is None and summary.probe_kl and (summary.model_extra or {})["reverse_kl"] is None
    page = report_of(world, [run_record], tmp_path / "report.html")
    assert "moved" not in page.headings() and "reverse KL" not in page.words


def test_variants_are_compared_on_prompts_and_on_the_reverse_answer_by_answer(
    world: World, records: list[RunRecord]
) -> None:
    comparisons = comparisons_of(world.store, records)
    for measure, factor in (("prompts/support", 1), ("reverse_kl", 2), ("probe_kl", 1)):
        found = comparisons.of("finetune", "rehearse", measure)
        figure = summarise(world.store, records[0]).prompts["support"]["kl"]["value"]
        assert found and found.paired and found.sign() == 1
        assert found.value == pytest.approx(factor * 0.75 * figure)


def test_the_model_card_has_the_divergence_on_prompts(world: World, records: list[RunRecord]) -> None:
    summary = summarise(world.store, records[0])
    card = model_card(world.store, records[0], summary)
    assert f"| divergence on prompts support |  |  | {shown(summary.prompts['support']['kl'])} nats/token |" in card
