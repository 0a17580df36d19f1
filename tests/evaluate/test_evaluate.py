"""What is measured, and what it is keyed on: the model and what is measured, whatever the recipe."""

from pathlib import Path
from typing import Any

import pytest

from cfsd.errors import BadInput
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.generate.spec import ProbeSpec
from cfsd.machine import Machine
from cfsd.overrides import override, validated
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store
from flows._plan import walk
from flows.mitigate import pipeline
from tests.conftest import fetched

CPU = Machine(device="cpu", threads=1)
BASE_ONLY = ("evaluate", "evaluate-text", "evaluate-target")


@pytest.fixture
def recipe(recipe_file: Path, model_folder: Path, tmp_path: Path, store: Store) -> Recipe:
    """A recipe with a benchmark and a text, whose base is in the store."""
    fetched(store, model_folder)
    (tmp_path / "book.txt").write_text("once upon a time")
    text = f'{{"name": "book", "path": "{tmp_path / "book.txt"}"}}'
    return Recipe.load(recipe_file, ["evaluate.benchmarks=[facts]", f"evaluate.texts=[{text}]"])


def changed(recipe: Recipe, **changes: Any) -> Recipe:
    dotted = {name.replace("__", "."): value for name, value in changes.items()}
    return validated(Recipe, override(recipe.model_dump(mode="json"), dotted), "test")


def keys(recipe: Recipe) -> dict[str, str]:
    """Return the keys, of stages that measure, that are known before anything has run: the base's."""
    steps = walk(recipe, CPU, pipeline).steps
    return {step.stage: step.key for step in steps if step.stage in BASE_ONLY and step.key}


def test_the_base_is_measured_once_whatever_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    first = keys(recipe)
    assert set(first) == {"evaluate", "evaluate-text"}
    for change in ({"train__learning_rate": 1e-2}, {"generate__rows": 64}, {"seed": 7}, {"target__held_out": 4}):
        assert keys(changed(recipe, **change)) == first
    (tmp_path / "book.txt").write_text("twice")
    assert {name for name, key in keys(recipe).items() if first[name] != key} == {"evaluate-text"}
    limited = keys(changed(recipe, evaluate__benchmarks=[{"name": "facts", "limit": 3}]))
    assert limited["evaluate"] != first["evaluate"]


def test_the_tuned_model_is_compared_on_target_and_probe(recipe: Recipe) -> None:
    steps = [step.stage for step in walk(recipe, CPU, pipeline).steps]
    assert steps[-5:] == [
        "evaluate",
        "evaluate-text",
        "evaluate-target",
        "evaluate-target-divergence",
        "evaluate-probe",
    ]


def test_a_missing_chat_template_is_told_before_training(recipe: Recipe, store: Store, model_folder: Path) -> None:
    base = fetched(store, model_folder)
    recipe.evaluate.check_base(base)
    asking = EvaluateSpec.model_validate({"benchmarks": [{"name": "facts", "chat_template": True}]})
    with pytest.raises(BadInput, match="facts: chat_template is on, but the model's tokenizer has no chat template"):
        asking.check_base(base)


def test_an_empty_probe_is_refused() -> None:
    with pytest.raises(BadInput, match=r"(?s)probe.*rows.*greater than 0"):
        validated(ProbeSpec, {"rows": 0}, "probe")
