"""The study of methods: its grid, its halves, the choice of strengths, intervals over seeds, the table."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from benchmarks._methods_grid import PLAIN, Study, study_of, technical_documents, tiny_documents, write_documents
from benchmarks._methods_rates import picture as picture_at_equal_gain
from benchmarks._methods_table import (
    EVEN,
    ODD,
    Result,
    Tables,
    against,
    choose,
    compared_results,
    figures_of,
    half,
    markdown,
    over_seeds,
    picture,
    units_of,
)  # fmt: skip
from benchmarks._result import RESULTS
from cfsd.evaluate.benchmark_files import BUNDLED
from cfsd.statistics.forgetting import Measure
from cfsd.statistics.matched_gain import Match
from cfsd.statistics.seeds import FEWEST

DOCUMENTS = 20
EXACT = Measure(metric="exact_match", higher_is_better=True, chance=0.0, kind="binary")
LOSS = Measure(metric="word_perplexity", higher_is_better=False, chance=None, kind="perplexity")


def planted(right: NDArray[np.bool_], nll: float = 1.0, kl: float = 0.1, loss: float = 30.0, seed: int = 0) -> Tables:
    """A model that was right throughout before and is `right` now; its losses scatter a little."""
    rows, rng = len(right), np.random.default_rng(seed)

    def per_token(column: str, value: float, key: str = "row_id") -> pd.DataFrame:
        values = value * 10 * (1 + 0.1 * rng.standard_normal(rows))
        return pd.DataFrame({key: range(rows), column: values, "count": 10})

    def scores(values: NDArray[np.float64], count: int) -> pd.DataFrame:
        made = pd.DataFrame({"doc_id": range(rows), "value": values, "count": count, "filter": "none"})
        return made.assign(doc_hash=made["doc_id"].astype(str))

    exact = scores(np.ones(rows), 1), scores(right.astype(float), 1)
    text = scores(np.full(rows, 20.0), 10), scores(np.full(rows, loss), 10)
    benchmarks = {"skill": (EXACT, *exact), "text": (LOSS, *text)}
    return Tables((per_token("nll", 3.0), per_token("nll", nll)), per_token("kl", kl), benchmarks)


def tried(gain: float, forgotten: int, kl: float) -> Tables:
    """What a strength gave: that gain, the first `forgotten` documents lost, that divergence."""
    found = planted(np.arange(DOCUMENTS) >= forgotten, kl=kl)
    base, _ = found.target
    return found._replace(target=(base, base.assign(nll=base["nll"] - gain * base["count"])))


@pytest.fixture(params=["tiny", "demo"])
def study(request: pytest.FixtureRequest, tmp_path: Path) -> Study:
    return study_of(request.param, tmp_path)


def test_every_strength_is_a_recipe_of_its_own_and_every_method_has_as_many(study: Study) -> None:
    write_documents(iter(["real text"]), Path(study.methods["replay"].changes["generate.replay"]["path"]))
    recipes = {
        (method, strength): study.recipe(study.changes(method, strength), 3, method)
        for method, found in study.methods.items()
        for strength in found.strengths
    }
    assert len({recipe.digest() for recipe in recipes.values()}) == len(recipes)
    assert all(recipe.train.seed == recipe.mix.seed == 3 and recipe.generate.seed == 0 for recipe in recipes.values())
    assert len({len(found.strengths) for found in study.methods.values()}) == 1
    assert min(len(found.strengths) for found in study.methods.values()) >= 3
    assert 0 not in study.seeds, "the seed that chooses is not reported"
    plain = {repr(recipe.train) for (method, _), recipe in recipes.items() if method == PLAIN}
    wise = {repr(recipe.train) for (method, _), recipe in recipes.items() if method == "WiSE-FT"}
    assert len(wise) == 1 and wise < plain, "WiSE-FT merges what plain fine-tuning trained"


def test_quick_is_part_of_the_study(study: Study, tmp_path: Path) -> None:
    quick = study.quick(tmp_path)
    assert quick.results == quick.pictures == tmp_path and quick.name != study.name
    assert PLAIN in quick.methods and len(quick.methods) == 2
    assert all(set(m.strengths) <= set(study.methods[n].strengths) for n, m in quick.methods.items())


def test_real_text_of_the_demo_holds_nothing_that_is_measured_on() -> None:
    measured = [json.loads(line)["text"] for line in (BUNDLED / "technical_english.jsonl").read_text().splitlines()]
    text = " ".join(" ".join(technical_documents()).split())
    assert len(text) > 300_000
    assert not [paragraph for paragraph in measured if " ".join(paragraph.split()) in text]


def test_real_text_is_written_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "replay.jsonl"
    write_documents(tiny_documents(), path)
    first = path.read_text()
    assert all("=" in json.loads(line)["text"] for line in first.splitlines())
    write_documents(iter(["something else"]), path)
    assert path.read_text() == first and len(list(path.parent.iterdir())) == 1


def test_one_half_chooses_and_the_other_half_is_reported() -> None:
    documents = np.arange(2 * DOCUMENTS)
    keeps_even, keeps_most = planted(documents % 2 == 0), planted(documents % 4 != 0)
    tables = {"even": keeps_even, "most": keeps_most}
    assert figures_of(half(keeps_even, EVEN))["mean_forgetting"].value == 0
    assert figures_of(half(keeps_even, ODD))["mean_forgetting"].value == 1
    seen = {name: half(found, EVEN) for name, found in tables.items()}
    assert choose(seen, plain_gain=2.0) == "even", "odd documents must not be looked at"
    for parity in (EVEN, ODD):
        parts = half(keeps_even, parity)
        lengths = [len(parts.target[0]), len(parts.target[1]), len(parts.probe), len(parts.benchmarks["skill"][1])]
        assert lengths == [DOCUMENTS] * 4


@pytest.mark.parametrize(
    ("strengths", "expected"),
    [
        ({"weak": tried(1.0, 10, 0.9), "good": tried(0.951, 2, 0.3), "strong": tried(0.94, 0, 0.1)}, "good"),
        ({"weak": tried(0.8, 10, 0.9), "strong": tried(0.7, 0, 0.1)}, "weak"),
        ({"far": tried(1.0, 2, 0.9), "near": tried(1.0, 5, 0.1)}, "near"),  # 3 of 20 documents, all one way: p 0.25
        ({"far": tried(1.0, 2, 0.9), "near": tried(1.0, 8, 0.1)}, "far"),  # 6 of 20: p 0.03, though intervals overlap
    ],
    ids=["least that learned enough", "none learned enough", "tied", "not tied"],
)
def test_the_rule(strengths: dict[str, Tables], expected: str) -> None:
    assert choose(strengths, plain_gain=1.0) == expected


def test_without_scores_the_divergence_chooses() -> None:
    strengths = {name: tried(1.0, 0, kl)._replace(benchmarks={}) for name, kl in (("a", 0.2), ("b", 0.1))}
    assert choose(strengths, plain_gain=1.0) == "b"


def repeats(values: Sequence[float]) -> list[Tables]:
    """One repeat per divergence, alike but for it."""
    return [planted(np.arange(DOCUMENTS) >= 2, kl=value) for value in values]


def test_from_five_seeds_on_the_interval_speaks_for_other_seeds() -> None:
    alike, apart = [0.1] * FEWEST, list(np.linspace(0.05, 0.15, FEWEST))
    over_documents = figures_of(repeats([0.1])[0])
    spread = over_seeds(repeats(apart))
    same, wide = over_seeds(repeats(alike))["probe_kl"], spread["probe_kl"]
    few = over_seeds(repeats(apart[1:]))["probe_kl"]
    assert same.low == pytest.approx(over_documents["probe_kl"].low)
    ends = [(found.high or 0) - (found.low or 0) for found in (same, few, wide)]
    assert ends[1] < 1.3 * ends[0] < 3 * ends[0] < ends[2]
    assert wide.value == pytest.approx(same.value)
    assert spread["mean_forgetting"].value == pytest.approx(2 / DOCUMENTS)


def test_the_mean_over_seeds_is_the_mean_of_the_seeds() -> None:
    found = [
        planted(np.random.default_rng(seed).random(DOCUMENTS) > 0.3, nll=1 + seed / 4, seed=seed) for seed in (0, 1)
    ]
    each = [figures_of(tables) for tables in found]
    for name, mean in over_seeds(found).items():
        if name != "target_gain":  # whose rows before scatter with the seed here
            assert mean.value == pytest.approx(np.mean([figures[name].value for figures in each]))


def results() -> list[Result]:
    made = []
    for i, (method, reached) in enumerate({"finetune": True, "kl [stored]": True, "EWC": False}.items()):
        found = [planted(np.arange(DOCUMENTS) >= 5 - i, kl=0.5 / (i + 1), seed=seed) for seed in (1, 2)]
        seeds = {seed: figures_of(tables) for seed, tables in enumerate(found)}
        units = {seed: units_of(tables) for seed, tables in enumerate(found)}
        made.append(Result(method, "weight=1", reached, over_seeds(found), seeds, units, 12.3, 900_000_000))
    return made


def test_the_table_has_a_line_per_method_and_marks_those_that_learned_less() -> None:
    lines = markdown(results(), ["text"]).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 3
    assert [line.split(" | ")[1] for line in lines[2:]] == ["weight=1", "weight=1", "weight=1*"]
    assert "25.0 [" in lines[2] and "1.00" in lines[2], "forgetting in points; the loss of text rose by 1 nat per token"
    assert lines[2].endswith("| 12 | 900 |")


def test_every_method_stands_against_plain_fine_tuning_paired_by_document_and_seed() -> None:
    made = results()
    comparisons = compared_results(made)
    assert {(c.one, c.other) for c in comparisons.entries} == {
        ("finetune", "kl [stored]"), ("finetune", "EWC"), ("kl [stored]", "EWC"),
    }  # fmt: skip
    assert {c.measure for c in comparisons.entries} == {"target_gain", "probe_kl", "mean_forgetting", "text"}
    lines = against(PLAIN, made, comparisons).splitlines()
    assert len(lines) == 2 + 2 and lines[2].startswith("| kl [stored] | ")
    cells = [line.strip("| ").split(" | ")[2] for line in lines[2:]]
    found = [comparisons.of(method, PLAIN, "probe_kl") for method in ("kl [stored]", "EWC")]
    assert [cell.endswith("*") for cell in cells] == [True, True] and all(c and c.seeds == 2 for c in found)
    lost = [line.strip("| ").split(" | ")[3] for line in lines[2:]]
    assert lost[0].startswith("-5.00 [") and not any(cell.endswith("*") for cell in lost)


def test_the_picture_has_both_costs_and_every_seed() -> None:
    axes = picture(results()).axes
    assert len(axes) == 2
    for panel in axes:
        dots = [line for line in panel.lines if line.get_marker() == "." and len(line.get_xdata()) == 2]
        assert len(dots) == 3
        assert {"finetune", "kl [stored]", "EWC"} <= {text.get_text() for text in panel.texts}


def test_the_picture_at_equal_gain_has_every_method_the_one_that_lost_least_first() -> None:
    found = json.loads((RESULTS / "methods-tiny-rates.json").read_text())["matches"]
    matches = {cost: [Match.model_validate(match) for match in of_cost] for cost, of_cost in found.items()}
    divergence, forgetting = picture_at_equal_gain(matches).axes
    names = [label.get_text() for label in divergence.get_yticklabels()]
    costs = {entry.method: entry.cost for entry in matches["mean_forgetting"][0].methods}
    assert sorted(names) == sorted(costs) and len(names) == 19
    values = [cost.value for name in names if (cost := costs[name])]
    assert values == sorted(values) and divergence.get_xscale() == "log" != forgetting.get_xscale()
