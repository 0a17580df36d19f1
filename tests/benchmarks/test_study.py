"""The study: its parts are recipes that can run, what is made is not made again, and its page is what was found."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import _study_choice, _study_cost, orders, study, study_results
from benchmarks._study_prediction import block, picture, runs_of
from benchmarks.study import PARTS, Part, study_command
from cfsd.errors import BadInput
from cfsd.model.tiny import shipped
from cfsd.report.compared import Compared
from cfsd.statistics.matched_gain import MatchedGain, matched
from tests.conftest import ROOT, write_rows
from tests.statistics.test_matched_gain import LINES, models_of


@pytest.fixture
def small(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """A part of two trainings on a model that one training teaches first."""
    target = {"path": str(write_rows(tmp_path / "rows.jsonl", count=24)), "held_out": 8}
    recipe = {
        "name": "small", "base": "tiny", "target": target, "probe": {"rows": 4, "length": 8},
        "generate": {"rows": 8, "length": 8}, "mix": {"target_rows": 8, "rehearsal_tokens": 32},
        "train": {"learning_rate": 1e-3, "epochs": 1}, "evaluate": {"benchmarks": [], "show": "none"},
    }  # fmt: skip
    (tmp_path / "teach.yaml").write_text(yaml.safe_dump(recipe | {"name": "teach"}))
    variants: dict[str, Any] = {
        "finetune": {"generate.rows": 0},
        "rehearse": {},
        "chats": {"generate.source": "template"},
    }
    comparison = {"recipe": recipe, "variants": variants}
    (tmp_path / "comparison.yaml").write_text(yaml.safe_dump(comparison, sort_keys=False))
    monkeypatch.setattr(study, "FOUND", tmp_path / "found")
    part = Part("Does it?", str(tmp_path / "comparison.yaml"), 1, str(tmp_path / "teach.yaml"))
    monkeypatch.setattr(study, "PARTS", {"small": part})
    return part


@pytest.mark.parametrize("name", PARTS)
def test_every_training_of_a_part_is_a_recipe_of_its_own(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(ROOT)
    recipes = PARTS[name].comparison().recipes()
    assert len({recipe.digest() for recipe in recipes.values()}) == len(recipes) >= 2 * PARTS[name].seeds
    assert any("finetune" in variant for variant in recipes)


@pytest.mark.processes
def test_what_is_made_is_listed_as_done_and_not_made_again(
    server: str, small: Part, capsys: pytest.CaptureFixture[str]
) -> None:
    study_command([], plan=True)
    assert "small: Does it? 0 of 3 points are done" in capsys.readouterr().out
    study_command(["small"])
    assert "small: without chats: the base has no chat template" in capsys.readouterr().out
    found = json.loads((study.FOUND / "small.json").read_text())
    assert list(found["variants"]) == ["finetune", "rehearse"] and found["comparisons"]
    keys = found["variants"]["rehearse"]["keys"]
    kind, key = keys["model"].split()
    taught = str(small.comparison().recipe.base.path)
    assert Path(taught).is_dir() and Path(taught).name != key and (Path(taught).parents[1] / kind / key).is_dir()
    capsys.readouterr()
    study_command([], plan=True)
    assert "3 of 3 points are done, the rest takes about 0.0 hours" in capsys.readouterr().out
    study_command(["small"])
    again = json.loads((study.FOUND / "small.json").read_text())
    assert again == found
    assert " s: " not in capsys.readouterr().out, "a stage was executed"


@pytest.mark.processes
@pytest.mark.slow
def test_a_part_on_a_base_of_the_users_own_lies_beside_the_studys(
    server: str, small: Part, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shipped(own := tmp_path / "own-model")
    monkeypatch.setattr(study, "PARTS", {"small": small._replace(taught_by="")})
    study_command(["small"], base=str(own))
    (file,) = study.FOUND.iterdir()
    found = json.loads(file.read_text())
    assert file.name == "small@own-model.json" and found["command"].endswith(f"small --base {own}")
    assert [*found["variants"]] == ["finetune", "rehearse"]
    capsys.readouterr()
    study_command(["small"], base=str(own), seeds=3, plan=True)
    assert "small@own-model: Does it? 2 of 6 points are done" in capsys.readouterr().out
    monkeypatch.setattr(study_results, "FOUND", study.FOUND)
    study_results.write_page_of(study_results.Made(file.stem, found))
    page = (study.FOUND / "small@own-model.md").read_text()
    assert page.startswith("# small@own-model: Does it?") and "| rehearse |" in page
    (picture_file,) = (study.FOUND / "pictures").iterdir()
    assert f"(pictures/{picture_file.name})" in page


def test_a_base_without_a_chat_template_is_asked_in_another_form(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    own, theirs = PARTS["frontier"], PARTS["frontier"]._replace(base="tiny")
    names = [benchmark.name for benchmark in theirs.comparison().recipe.evaluate.benchmarks]
    assert names == ["instructions_completion", "technical_english"]
    assert {*own.comparison().sweeps} - {*theirs.comparison().sweeps} == {"chats"} and own.notes() == []
    assert theirs.notes() == [
        "without chats: the base has no chat template", "instructions_completion in place of instructions"
    ]  # fmt: skip


def test_a_part_that_does_not_exist_is_refused(home: Path) -> None:
    with pytest.raises(BadInput, match="ablation: no such part of the study; allowed: sources"):
        study_command(["ablation"], plan=True)


def test_the_page_shows_what_was_found() -> None:
    page = study_results.PAGE.read_text()
    made = {name: study.FOUND / f"{name}.json" for name in PARTS if (study.FOUND / f"{name}.json").exists()}
    for name, file in made.items():
        content: dict[str, Any] = json.loads(file.read_text())
        lines = study_results.block_of(study_results.Made(name, content))
        assert "\n".join(lines) in page, f"run python -m benchmarks.study_results: {name} is older than what was found"

    if set(_study_choice.PARTS) <= set(made):
        assert "\n".join(_study_choice.block(study_results.found_parts())) in page
    if made:
        assert "\n".join(_study_cost.block(study_results.found_parts())) in page
    if runs := runs_of(study_results.found_parts()):
        assert "\n".join(block(runs)) in page, "run python -m benchmarks.study_results: the prediction is older"


def test_what_orders_the_losses_is_told_from_what_does_not() -> None:
    def made(variant: int, seed: int) -> dict[str, Any]:
        chat_kl, other = 0.01 * 2.0**variant * (1 + seed / 10), (0.3, 0.1, 0.2, 0.25, 0.15)[(variant + seed) % 5]
        lost = {"forgetting": {"value": 0.3 + 0.05 * np.log(chat_kl)}}
        divergences = {"probe_kl": {"value": other}, "target_divergence": {"value": other}, "weight_distance": other}
        return {"chat_kl": {"value": chat_kl}, **divergences, "benchmarks": {"instructions": lost, "questions": lost}}

    variants = {f"v{variant} seed={seed}": made(variant, seed) for variant in range(5) for seed in range(3)}
    runs = runs_of({"one": {"variants": variants}, "of tiny": {"variants": {"w": {"benchmarks": {}}}}})
    assert len(runs) == 15 and {run.variant for run in runs} == {f"v{variant}" for variant in range(5)}
    (row,) = [line for line in "\n".join(block(runs)).splitlines() if "instructions, points | 15 | chat_kl" in line]
    assert row.split(" | ")[3:7] == ["1.00", "1.00", "1.00", "0.0"] and float(row.split(" | ")[7].rstrip(" |")) > 3
    (other,) = [line for line in "\n".join(block(runs)).splitlines() if "instructions, points | 15 | probe_kl" in line]
    assert abs(float(other.split(" | ")[3])) < 0.5 and float(other.split(" | ")[6]) > 3
    assert len(picture(runs).axes) == 12


def test_a_loss_is_predicted_over_the_trainings_that_were_scored_on_it() -> None:
    def made(chat_kl: float, **lost: float) -> dict[str, Any]:
        divergences = {key: {"value": chat_kl} for key in ("probe_kl", "chat_kl", "target_divergence")}
        scored = {name: {"forgetting": {"value": value}} for name, value in lost.items()}
        return {**divergences, "weight_distance": chat_kl, "benchmarks": scored}

    both = {f"v{i}": made(0.1 * 2**i, instructions=0.1 * i, technical_english=0.2 * i) for i in range(4)}
    one = {f"w{i}": made(0.1 * 2**i + 1e-9, instructions=0.1 * i + 1e-9) for i in range(4)}
    lines = "\n".join(block(runs_of({"both": {"variants": both}, "one": {"variants": one}}))).splitlines()
    assert "| instructions, points | 8 | chat_kl | 1.00 | 1.00 | 1.00 | 0.0 | 11.4 |" in lines
    assert "| technical_english, nats | 4 | chat_kl | 1.00 | 1.00 | 1.00 | 0.000 | 0.267 |" in lines
    assert not any("questions" in line for line in lines), "no training was scored on them"

    again = {f"x rate={i} seed=0": made(0.1 * 2**i, instructions=0.1 * i, questions=0.3) for i in range(3)}
    runs = runs_of({"both": {"variants": both}, "again": {"variants": again}})
    assert [run.variant for run in runs] == ["v0", "v1", "v2", "v3"], "one that two parts have was counted twice"
    assert [set(run.lost) for run in runs[2:]] == [
        {"instructions", "technical_english", "questions"}, {"instructions", "technical_english"},
    ]  # fmt: skip


def test_swept_methods_are_shown_where_they_learned_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table per cost in place of pairs of variants, which differ in what they learned."""
    monkeypatch.setattr(study_results, "PICTURES", tmp_path / "results")
    gains = tuple(matched(models_of(LINES), log=False))
    entry = MatchedGain(
        measure="probe_kl", logarithmic=False, seeds=2, covers="documents", variants={}, gains=gains
    ).model_dump(mode="json")
    content = json.loads((study.FOUND / "order.json").read_text()) | {"matched": [entry]}
    text = "\n".join(study_results.block_of(study_results.Made("swept", content)))
    rows = {line.split(" | ")[0]: line for line in text.splitlines() if line.startswith(("| wise", "| rate"))}
    assert rows["| wise"].startswith("| wise | 8.00 [8.00, 8.00] | 6.50") and "(+3 of wise)" in rows["| rate"]
    assert "Paired differences" not in text and (tmp_path / "results" / "swept-gain.png").stat().st_size > 10_000


def test_many_variants_are_compared_with_the_first_alone() -> None:
    def pair(one: str, other: str, measure: str) -> Compared:
        known = {"unit": "nats per token", "value": 0.5, "low": 0.4, "high": 0.6, "seeds": 5, "paired": True}
        return Compared(one=one, other=other, measure=measure, p_value=0.001, adjusted_p=0.001, **known)

    names = [f"v{place}" for place in range(study_results.MANY + 1)]
    entries = [pair(*sides, m) for sides in combinations(names, 2) for m in ("probe_kl", "reverse_kl")]
    lines = list(study_results._pairs(entries, *names))
    assert lines[1] == "* v1: probe_kl -0.500 [-0.600, -0.400]" and len(lines) == len(names) + 1
    few = list(study_results._pairs(entries, *names[:3]))
    assert [line for line in few if line.startswith("* v2")] == [
        "* v2: probe_kl -0.500 [-0.600, -0.400]; reverse_kl -0.500 [-0.600, -0.400]"
    ] * 2  # less v0, and less v1


def test_the_default_source_is_chosen_by_the_pairs_of_seeds() -> None:
    def made(probe_kl: float, chat_kl: float) -> dict[str, Any]:
        return {"probe_kl": {"value": probe_kl}, "chat_kl": {"value": chat_kl}}

    seeds = {f"{_study_choice.PAPER} seed={seed}": made(0.1 * 2**seed, 0.2) for seed in range(3)}
    closer = {f"closer seed={seed}": made(0.1 * 2**seed * np.exp(-0.2), 0.2) for seed in range(3)}
    worse = {f"worse seed={seed}": made(0.1 * 2**seed, 0.2 * np.exp(0.2 * (seed - 1))) for seed in range(3)}
    part = {"variants": seeds | closer | worse | {"finetune seed=0": made(1, 1)}}
    text = "".join(_study_choice.block(dict.fromkeys(_study_choice.PARTS, part)))
    assert "-0.100 [-0.100, -0.100]" in text  # exactly, by every seed: half of the logarithm
    assert "0.000 [-0.248, +0.248]" in text and "finetune" not in text  # 4.303 * 0.1 / sqrt(3)


def test_what_a_point_saved_costs_is_counted_in_passes() -> None:
    def made(tokens: int, corpus: int, rehearsed: int = 100) -> dict[str, Any]:
        training = {"tokens": tokens, "corpus_tokens": corpus, "rehearsal_tokens": rehearsed}
        return {"training": training, "benchmarks": {"instructions": {}}}

    def saved(variant: str, value: float, low: float, high: float) -> dict[str, Any]:
        ends = {"one": "finetune", "other": variant, "value": value, "low": low, "high": high}
        p = 0.001 if low > 0 else 0.4
        known = {"measure": "benchmarks/instructions", "unit": "fraction", "seeds": 2, "paired": True}
        return ends | known | {"p_value": p, "adjusted_p": p}

    variants = {"finetune seed=0": made(1000, 0, 0), "finetune seed=1": made(1000, 0, 0)}
    variants |= {"kl seed=0": made(2000, 900), "kl seed=1": made(2000, 1100), "unsure seed=0": made(2000, 10)}
    variants |= {"EWC seed=0": made(1000, 5000, 0)}  # a corpus that is not rehearsed
    comparisons = [saved("kl", 0.2, 0.1, 0.3), saved("unsure", 0.05, -0.1, 0.2)]
    lines = "".join(_study_cost.block({"part": {"variants": variants, "comparisons": comparisons}})).splitlines()
    # 3 * 1000 passes of training and 1000 of the corpus more than 3 * 1000, for 20 points
    assert "| part: kl | 1,000 | 2,000 | 2.33 | 20.0 [10.0, 30.0] | 0.2 |" in lines
    assert "| part: unsure | 10 | 2,000 | 2.00 | 5.00 [-10.0, 20.0] | - |" in lines
    assert not any("EWC" in line for line in lines)


def test_no_order_is_both_taught_and_asked() -> None:
    taught = [json.loads(line) for line in (orders.FOLDER / "taught.jsonl").read_text().splitlines()]
    asked = [json.loads(line) for line in (orders.FOLDER / "orders.jsonl").read_text().splitlines()]
    lines = {row["messages"][1]["content"] for row in taught} | {row["line"] for row in asked}
    assert len(lines) == len(taught) + len(asked) == orders.TAUGHT + orders.ASKED
    assert [*orders.orders(orders.TAUGHT + orders.ASKED, orders.SEED)][-1] == (asked[-1]["order"], asked[-1]["line"])
