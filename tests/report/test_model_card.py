"""The model card: read by the hub's own parser, true to the measured figures, and without a path of this machine."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from cfsd.generate.spec import WRITTEN, Source
from cfsd.recipe import Recipe
from cfsd.report.model_card import _without_paths, has_card, model_card
from cfsd.report.run_record import RunRecord
from cfsd.report.summarise import summarise
from cfsd.report.table import shown
from tests.report.test_report import BENCHMARKS, World

PLACE = "/home/someone/private"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def variant(world: World, **changes: Any) -> RunRecord:
    """Return a variant with a whole recipe, as a flow would leave it."""
    content = {
        "name": "mine", "base": {"kind": "hub", "name": "org/model", "revision": "a" * 40},
        "target": {"path": f"{PLACE}/rows.jsonl", "held_out": 8}, "train": {"methods": {"lora": {"rank": 4}}},
    }  # fmt: skip
    recipe = Recipe.model_validate(content | changes)
    run_record = world.trained("rehearse", right=80, loss=0.6, kl=0.05)
    return run_record.model_copy(update={"recipe": recipe, "digest": "0123456789abcdef"})


def card_of(world: World, run_record: RunRecord) -> str:
    return model_card(world.store, run_record, summarise(world.store, run_record))


def test_the_hub_reads_the_front_matter(world: World) -> None:
    from huggingface_hub import ModelCard

    read = ModelCard(card_of(world, variant(world)))
    assert read.data.base_model == "org/model" and read.data.library_name == "transformers"
    results = {result.dataset_name: result for result in read.data.eval_results or []}
    assert list(results) == list(BENCHMARKS)
    assert results["cap"].metric_type == "accuracy" and results["cap"].metric_value == pytest.approx(0.8)
    assert results["cap"].metric_name == "acc (base: 0.9)"


@pytest.mark.parametrize("base, named", [("tiny", None), ({"kind": "smollm2"}, "HuggingFaceTB/SmolLM2-135M-Instruct")])
def test_a_base_without_a_name_on_the_hub_is_not_given_one(world: World, base: Any, named: str | None) -> None:
    front = card_of(world, variant(world, base=base)).split("---")[1]
    assert yaml.safe_load(front).get("base_model") == named


def test_it_states_what_was_measured_with_intervals_and_lineage(world: World) -> None:
    run_record = variant(world)
    summary, card = summarise(world.store, run_record), card_of(world, run_record)
    assert summary.target_gain and summary.mean_forgetting and summary.probe_kl
    wanted = [
        shown(summary.target_gain), shown(summary.mean_forgetting, 100), shown(summary.probe_kl),
        shown(summary.benchmarks["cap"]["forgetting"], 100) + " points: worse", "| lora | rank 4 |",
        "29 rows of text that the base model wrote without a prompt", "torch 2.9.1",
        *(a.key for a in run_record.artifacts.values()),
    ]  # fmt: skip
    assert [text for text in wanted if text not in card] == []
    assert not re.search(r"\b(None|nan)\b", card)
    unharmed = variant(world).model_copy(update={"after": run_record.before, "name": "same"})
    assert card_of(world, unharmed).count("no forgetting found (a drop of") == len(BENCHMARKS)


def test_its_recipe_can_be_run_and_no_path_is_told(world: World, tmp_path: Path) -> None:
    run_record = variant(world)
    card = card_of(world, run_record)
    assert PLACE not in card and "rows.jsonl" in card
    found = re.search(r"```yaml\n(.*?)```", card, re.DOTALL)
    assert found
    (tmp_path / "recipe.yaml").write_text(found[1])
    loaded = Recipe.load(tmp_path / "recipe.yaml")
    assert loaded.train.methods.lora.rank == 4
    assert run_record.recipe and loaded.base == run_record.recipe.base


def test_only_what_was_trained_has_a_card(world: World) -> None:
    run_record = variant(world)
    assert has_card(run_record)
    assert not has_card(run_record.model_copy(update={"artifacts": {"base": world.base, "final": world.base}}))


@pytest.mark.parametrize("source", [*get_args(Source), "mixed"])
def test_it_says_where_the_texts_are_from(world: World, source: str) -> None:
    """Of rows that a team had given it said that they were sampled, and of sampled ones that they were given."""
    fractions = {"template": 0.5, "earlier-rows": 0.5} if source == "mixed" else {}
    run_record = variant(world)
    assert run_record.recipe
    generate = run_record.recipe.generate.model_copy(update={"source": source, "fractions": fractions})
    recipe = run_record.recipe.model_copy(update={"generate": generate})
    corpus = run_record.artifacts["corpus"]
    named = corpus.model_copy(update={"metadata": corpus.metadata | {"source": source}})
    card = card_of(
        world,
        run_record.model_copy(update={"recipe": recipe, "artifacts": run_record.artifacts | {"corpus": named}}),
    )
    (said,) = re.findall(r"while rehearsing 29 rows of ([^,]*),", card)
    parts = fractions or {source: 1.0}
    assert ("the base model" in said) == any(part not in WRITTEN for part in parts)
    assert ("given" in said) == any(part in WRITTEN for part in parts)


def test_a_text_that_looks_like_a_path_is_in_the_recipe_as_it_is(world: World) -> None:
    said = {"rewrite_answer": r"/answer: (\S+)", "prompt": "/no_think {question}"}
    content = {"target": {"path": "/home/a/rows.jsonl"} | said, "modes": [{"prompts": "~/p"}]}
    cut = {"target": {"path": "rows.jsonl"} | said, "modes": [{"prompts": "p"}]}
    assert _without_paths(content) == cut


def test_rows_without_weight_were_not_rehearsed(world: World) -> None:
    unweighted = {"methods": {"lora": {"rank": 4}}, "rehearsal": {"weight": 0}}
    assert "while rehearsing" in card_of(world, variant(world))
    assert "while rehearsing" not in card_of(world, variant(world, train=unweighted))
