"""What is measured, and what it is keyed on: the model and what is measured, whatever the recipe."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from cfsd.errors import BadInput
from cfsd.evaluate.benchmark import Benchmark
from cfsd.evaluate.spec import EvaluateSpec
from cfsd.evaluate.stage import write_result
from cfsd.generate.spec import ProbeSpec
from cfsd.machine import Machine
from cfsd.overrides import override, validated
from cfsd.recipe import Recipe
from cfsd.store.artifact import Store, key_of
from flows._plan import walk
from flows.mitigate import pipeline
from tasks.evaluate import check_benchmarks
from tests.conftest import fetched
from tests.evaluate.test_score import CHOICE, WRITE, write

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
    assert steps[-6:] == [
        "evaluate",
        "evaluate-text",
        "evaluate-target",
        "show",
        "evaluate-target-divergence",
        "evaluate-probe",
    ]


def test_a_missing_chat_template_is_told_before_training(recipe: Recipe, store: Store, model_folder: Path) -> None:
    base = fetched(store, model_folder)
    recipe.evaluate.check_base(base)
    asking = EvaluateSpec.model_validate({"benchmarks": [{"name": "facts", "chat_template": True}]})
    with pytest.raises(BadInput, match="facts: chat_template is on, but the model's tokenizer has no chat template"):
        asking.check_base(base)
    with pytest.raises(BadInput, match=r"instructions: chat_template is on, .* take instructions_completion"):
        EvaluateSpec.model_validate({"benchmarks": ["instructions"]}).check_base(base)
    EvaluateSpec.model_validate({"benchmarks": ["questions_completion"]}).check_base(base)


def test_answers_without_room_in_the_context_are_told_before_sampling(store: Store, model_folder: Path) -> None:
    base = fetched(store, model_folder)
    context = base.metadata["context"]
    task = {**WRITE, "task": "write", "dataset_path": "json", "test_split": "test"}
    for length, own in ((context, {}), (4, {"max_gen_toks": context})):
        asked = {"task": {**task, "generation_kwargs": {"max_new_tokens": length}}, **own}
        with pytest.raises(BadInput, match=f"write: answers of {context} tokens leave no room"):
            EvaluateSpec.model_validate({"benchmarks": [asked]}).check_base(base)
    fits = {"task": {**task, "generation_kwargs": {"max_gen_toks": 4, "max_new_tokens": context}}}
    EvaluateSpec.model_validate({"benchmarks": [fits]}).check_base(base)


def test_documents_are_checked_in_a_plan_unless_they_are_scored_or_on_the_hub(
    recipe: Recipe, tmp_path: Path, store: Store, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine", CHOICE)
    with (path.parent / "data" / "rows.jsonl").open("a") as file:
        file.write('{"question": "a cab", "choices": ["a", "bed"]}')
    mine = {"name": "pick", "folder": str(path.parent)}
    with pytest.raises(BadInput, match=r"pick, document 8 .*no right answer"):
        walk(changed(recipe, evaluate__benchmarks=["facts", mine]), CPU, pipeline)
    with pytest.raises(BadInput, match="facts: num_fewshot 300 needs 300 documents"):
        walk(changed(recipe, evaluate__benchmarks=[{"name": "facts", "num_fewshot": 300}]), CPU, pipeline)
    walk(changed(recipe, evaluate__benchmarks=["hellaswag", {**mine, "limit": 8}]), CPU, pipeline)
    base, own = fetched(store, model_folder), Benchmark.model_validate(mine)
    key = key_of("evaluate", base, own, "base")
    made = store.make("scores", key, lambda draft: write_result(draft, "scores", pa.table({"value": [1.0]}), {}, {}))[0]
    assert made.key == key
    check_benchmarks(base, EvaluateSpec(benchmarks=(own,)), CPU)  # cached: not looked at again


def test_what_is_on_the_hub_is_asked_for_before_anything_is_sampled(
    store: Store, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("cfsd.evaluate.harness.check.check_documents", lambda benchmark: asked.append(benchmark.name))
    check_benchmarks(fetched(store, model_folder), EvaluateSpec.model_validate({"benchmarks": ["facts", "piqa"]}), CPU)
    assert asked == ["piqa"]  # and not the bundled one, which is whole


def test_an_empty_probe_is_refused() -> None:
    with pytest.raises(BadInput, match=r"(?s)probe.*rows.*greater than 0"):
        validated(ProbeSpec, {"rows": 0}, "probe")
