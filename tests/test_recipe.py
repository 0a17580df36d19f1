"""A recipe loads, names every mistake, and is known by what it computes rather than by what it is called."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from cfsd.comparison import Comparison
from cfsd.errors import BadInput
from cfsd.overrides import override, parse_overrides, read_yaml, validated
from cfsd.recipe import Recipe
from cfsd.spec import Spec
from cfsd.target_sequence import TargetSequence
from tests.conftest import write_rows

SEEDED = ("target", "probe", "generate", "mix", "train")


@pytest.fixture
def content(home: Path, tmp_path: Path) -> dict[str, Any]:
    return {"name": "mine", "base": "tiny", "target": {"path": str(write_rows(tmp_path / "rows.jsonl"))}}


def write(folder: Path, content: Any) -> Path:
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


def seeds(recipe: Recipe) -> list[int | None]:
    return [getattr(recipe, part).seed for part in SEEDED]


def test_a_file_of_three_lines_is_a_whole_recipe(content: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, content))
    assert recipe.base.kind == "tiny"
    assert recipe.generate.biases() == []
    recipe.check()


def test_the_seed_fills_what_is_left_empty(content: dict[str, Any]) -> None:
    recipe = validated(Recipe, content | {"seed": 7, "mix": {"seed": 3}, "train": {"epochs": 2}}, "here")
    assert seeds(recipe) == [7, 7, 7, 3, 7]
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


def test_overrides_reach_nested_fields_and_come_before_seeds_are_filled(
    content: dict[str, Any], tmp_path: Path
) -> None:
    texts = ["train.learning_rate=1e-4", "seed=5", "mix.seed=6", "name=other=name", "filter={duplicates: true}"]
    recipe = Recipe.load(write(tmp_path, content), texts)
    assert recipe.train.learning_rate == 1e-4
    assert seeds(recipe) == [5, 5, 5, 6, 5]
    assert recipe.name == "other=name"
    assert recipe.filter.duplicates


def test_overriding_leaves_the_original_alone() -> None:
    original = {"a": {"b": 1, "c": 2}}
    assert override(original, {"a.b": 3, "d.e": 4}) == {"a": {"b": 3, "c": 2}, "d": {"e": 4}}
    assert original == {"a": {"b": 1, "c": 2}}


def test_an_override_of_the_wrong_form_is_refused() -> None:
    for text in ("train.epochs", "=3"):
        with pytest.raises(BadInput, match=r"not of the form field\.name=value"):
            parse_overrides([text])


def test_an_override_may_empty_a_mapping_and_a_template_is_none() -> None:
    assert parse_overrides(["a={}", "b={answer}", "c={x: 1}"]) == {"a": {}, "b": "{answer}", "c": {"x": 1}}


def test_an_override_whose_value_is_no_yaml_is_refused() -> None:
    with pytest.raises(BadInput):
        parse_overrides(["name=[a"])


def test_an_override_below_a_plain_value_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"base\.start_token.*cannot be set.*'tiny'"):
        override(content, {"base.start_token": "a"})


def test_name_and_place_are_not_identity_but_settings_are(content: dict[str, Any], tmp_path: Path) -> None:
    copy = write_rows(tmp_path / "copy.jsonl")
    same: list[dict[str, Any]] = [{}, {"name": "other"}, {"target": {"path": str(copy)}}, {"seed": 0}, {"train": {}}]
    assert len({validated(Recipe, content | change, "here").digest() for change in same}) == 1
    changes: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"train": {"epochs": 2}}, {"train": {"seed": 1}}, {"mix": {"target_rows": 9}},
        {"merge": {"alpha": 0.5}}, {"base": "smollm2"}, {"evaluate": {"held_out_rows": 3}},
        {"target": content["target"] | {"held_out": 3}},
    ]  # fmt: skip
    assert len({validated(Recipe, content | change, "here").digest() for change in changes}) == len(changes)


def test_a_seed_that_fills_is_the_same_as_seeds_that_are_written(content: dict[str, Any]) -> None:
    parts = {part: {**content.get(part, {}), "seed": 4} for part in SEEDED}
    written = validated(Recipe, content | parts, "here")
    assert written.digest() == validated(Recipe, content | {"seed": 4}, "here").digest()


@pytest.mark.parametrize(
    ("change", "patterns"),
    [
        ({"trian": {}}, ["trian", "allowed: name, seed, base"]),
        ({"train": {"learnig_rate": 1}}, [r"train\.learnig_rate", "given 1", "allowed: learning_rate, epochs"]),
        ({"train": {"learning_rate": -1}}, [r"train\.learning_rate", "given -1"]),
        ({"base": "org/name@"}, ["base", "empty revision"]),
        ({"target": {}}, ["target", "needs `path`"]),
        ({"train": {"epochs": 0, "clip_norm": 0}}, [r"train\.epochs", r"train\.clip_norm"]),
    ],
)
def test_every_mistake_is_named_with_what_is_allowed(
    content: dict[str, Any], tmp_path: Path, change: dict[str, Any], patterns: list[str]
) -> None:
    for pattern in [*patterns, "recipe.yaml is not valid"]:
        with pytest.raises(BadInput, match=pattern):
            Recipe.load(write(tmp_path, content | change))


@pytest.mark.parametrize(
    ("text", "message"), [("a: [1", "not valid YAML"), ("- a", "not a mapping"), ("", "not a mapping")]
)
def test_what_is_no_recipe_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(BadInput, match=message):
        read_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(BadInput, match="does not exist"):
        read_yaml(tmp_path / "absent.yaml")


def test_a_character_that_json_wrote_in_two_halves_is_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(json.dumps({"name": "\U0001f600 one", "n": "caf\u00e9"}))
    assert "\\ud83d" in (tmp_path / "recipe.yaml").read_text()
    assert read_yaml(tmp_path / "recipe.yaml") == {"name": "\U0001f600 one", "n": "caf\u00e9"}
    assert parse_overrides(['name="\\ud83d\\ude00"']) == {"name": "\U0001f600"}
    (tmp_path / "recipe.yaml").write_text('a: 1\nname: "\\ud83d"')
    with pytest.raises(BadInput, match="half of a character stands alone in line 2"):
        read_yaml(tmp_path / "recipe.yaml")


def test_no_more_rows_are_selected_than_are_sampled(content: dict[str, Any]) -> None:
    changed = content | {"generate": {"rows": 8}, "select": {"corpus_rows": 9}}
    with pytest.raises(BadInput, match=r"select\.corpus_rows is 9, but generate.rows is 8; lower the first"):
        validated(Recipe, changed, "here")
    assert validated(Recipe, changed | {"generate": {"rows": 0}}, "here").select.corpus_rows == 9


def comparison(content: dict[str, Any], **changed: Any) -> Comparison:
    variants: dict[str, Any] = {"finetune": {"generate.rows": 0}, "rehearse": {}}
    return validated(Comparison, {"recipe": content, "variants": variants} | changed, "here")


def test_variants_are_the_recipe_with_their_overrides(content: dict[str, Any]) -> None:
    found = comparison(content | {"seed": 3}).recipes()
    assert list(found) == ["finetune", "rehearse"]
    plain = validated(Recipe, content | {"seed": 3}, "here")
    assert found["rehearse"].digest() == plain.digest()
    assert found["finetune"] == plain.model_copy(
        update={"name": "mine: finetune", "generate": plain.generate.model_copy(update={"rows": 0})}
    )


def test_repeats_vary_mix_and_train_and_share_what_is_measured_with(content: dict[str, Any]) -> None:
    found = comparison(content | {"seed": 3}, seeds=3).recipes()
    assert list(found) == [f"{name} seed={seed}" for name in ("finetune", "rehearse") for seed in (3, 4, 5)]
    assert [seeds(found[f"rehearse seed={seed}"]) for seed in (3, 4, 5)] == [[3, 3, 3, s, s] for s in (3, 4, 5)]


PARTS = ("probe", "corpus", "mix", "train")  # in the order of `seeds`, after the target's
EVERY = [chosen for size in range(1, 5) for chosen in combinations(PARTS, size)]


@pytest.mark.parametrize("varied", EVERY, ids=",".join)
def test_what_seeds_vary_differs_and_all_else_is_shared(content: dict[str, Any], varied: tuple[str, ...]) -> None:
    found = comparison(content | {"seed": 3}, seeds=2, seeds_vary=varied, variants={"rehearse": {}})
    first, second = (seeds(recipe) for recipe in found.recipes().values())
    assert first == [3] * 5
    assert second == [3, *(4 if part in varied else 3 for part in PARTS)]
    (note,) = found.notes()
    vary, same = note.split(" The same in all of them: ")
    words = {"probe": "the probe", "corpus": "the corpus", "mix": "the order of rows", "train": "the training"}
    for part, said in words.items():
        assert (said in vary) == (part in varied) != (said in same)


def test_one_seed_and_the_default_have_the_keys_they_had(content: dict[str, Any]) -> None:
    for count in (1, 3):
        old, spelled = (
            comparison(content, seeds=count, **given).recipes() for given in ({}, {"seeds_vary": ["mix", "train"]})
        )
        assert [r.digest() for r in old.values()] == [r.digest() for r in spelled.values()]
    assert comparison(content, seeds_vary=list(PARTS)).recipes() == comparison(content).recipes()


@pytest.mark.parametrize("changes", [{"generate.seed": 7}, {"generate": {"rows": 8, "seed": 7}}, {"probe.seed": 7}])
def test_a_variants_own_seed_for_what_varies_is_refused(content: dict[str, Any], changes: dict[str, Any]) -> None:
    made = comparison(content, seeds=2, seeds_vary=list(PARTS), variants={"one": {}, "two": changes})
    with pytest.raises(BadInput, match=r"'two' sets (generate|probe)\.seed to 7.*seeds_vary has (corpus|probe)"):
        made.recipes()
    assert len(comparison(content, seeds=2, variants={"one": {}, "two": changes}).recipes()) == 4  # it does not vary


def test_repeats_that_would_be_one_and_the_same_are_refused(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"varies in variant 'finetune' \(corpus: it samples none.*add mix"):
        comparison(content, seeds=2, seeds_vary=["corpus"]).recipes()
    still = content | {"train": {"dropout": 0}}
    with pytest.raises(BadInput, match=r"'finetune' \(train: its training draws nothing .* and corpus"):
        comparison(still, seeds=2, seeds_vary=["train", "corpus"]).recipes()
    low_rank = content | {"train": {"dropout": 0, "methods": {"lora": {"rank": 2}}}}  # its weights are drawn
    assert len(comparison(low_rank, seeds=2, seeds_vary=["train"]).recipes()) == 4
    with pytest.raises(
        BadInput, match=r"seeds_vary: repeats that vary nothing are equal: name one or more of train, mix"
    ):
        comparison(content, seeds=2, seeds_vary=[])
    with pytest.raises(BadInput, match=r"seeds_vary\.0: .*'train', 'mix', 'corpus' or 'probe'.*given 'order'"):
        comparison(content, seeds_vary=["order"])


def test_repeats_never_repeat_a_seed_that_was_written_out(content: dict[str, Any]) -> None:
    found = comparison(content | {"mix": {"seed": 1}, "train": {"seed": 1}}, seeds=3).recipes()
    assert len({recipe.digest() for label, recipe in found.items() if "rehearse" in label}) == 3


def test_a_variants_seed_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"variant 'two' sets seed.*train\.seed"):
        comparison(content, variants={"one": {}, "two": {"seed": 9}})
    with pytest.raises(BadInput, match="variant 'two' sets name, but its own name is 'two': leave it out"):
        comparison(content, variants={"one": {}, "two": {"name": "three"}})


def test_a_variant_with_the_name_of_a_repeat_is_refused(content: dict[str, Any]) -> None:
    """Reports would take it for a repeat of "a", and average over both."""
    with pytest.raises(ValueError, match="'a seed=3' has 'seed=' in its name"):
        Comparison.model_validate({"recipe": content, "variants": {"a": {}, "a seed=3": {"train.epochs": 3}}})


def test_a_wrong_variant_is_named(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"variant 'typo'.*\n.*generate\.row\b.*allowed: rows"):
        comparison(content, variants={"typo": {"generate.row": 0}}).recipes()


def test_a_comparison_loads_with_overrides_of_its_recipe(content: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {"recipe": content, "variants": {"all": {}, "none": {"generate.rows": 0}}})
    loaded = Comparison.load(path, ["generate.rows=5", "seed=2"], seeds=2, seeds_vary=["probe", "train"])
    assert loaded.seeds_vary == ("train", "probe")
    rows = {label: recipe.generate.rows for label, recipe in loaded.recipes().items()}
    assert rows == {"all seed=2": 5, "all seed=3": 5, "none seed=2": 0, "none seed=3": 0}


SWEPT = {"wise": {"merge.alpha": [0.25, 0.5, 0.75], "train.epochs": 2}}


LOADERS = {"mitigate": Recipe.load, "compare": Comparison.load, "continual": TargetSequence.load}


@pytest.mark.parametrize("given", LOADERS)
@pytest.mark.parametrize("asked", LOADERS)
def test_a_file_for_another_command_is_refused_with_the_command_that_takes_it(
    content: dict[str, Any], tmp_path: Path, given: str, asked: str
) -> None:
    held = {"mitigate": content, "compare": {"recipe": content, "variants": {"finetune": {"generate.rows": 0}}}}
    path = write(tmp_path, held.get(given, {"recipe": content, "targets": {"one": {}, "two": {}}}))
    if given == asked:
        LOADERS[asked](path)
        return
    with pytest.raises(BadInput, match=f"run `python -m flows.{given} {path}`"):
        LOADERS[asked](path)


def test_a_section_in_a_variant_changes_its_fields_and_keeps_the_rest(content: dict[str, Any]) -> None:
    """`train: {epochs: 2}` gave the learning rate and the loss their defaults, and said nothing."""
    plain = content | {"train": {"learning_rate": 1e-3, "rehearsal": {"weight": 3}}}
    nested: dict[str, Any] = {"train": {"epochs": 7, "rehearsal": {"final_weight": 1}}, "generate": {"rows": 9}}
    dotted: dict[str, Any] = {"train.epochs": 7, "train.rehearsal.final_weight": 1, "generate.rows": 9}
    recipes = comparison(plain, variants={"nested": nested, "dotted": dotted}).recipes()
    assert recipes["nested"].digest() == recipes["dotted"].digest()
    assert (recipes["nested"].train.learning_rate, recipes["nested"].train.rehearsal.weight) == (1e-3, 3)
    whole = comparison(plain, variants={"v": {"generate": {"source": "mixed", "fractions": {"context-free": 1.0}}}})
    assert whole.variants["v"]["generate.fractions"] == {"context-free": 1.0}  # a field, not a section
    swept = comparison(plain, sweeps={"rate": {"train": {"learning_rate": [1e-4, 1e-5]}}}).recipes()
    assert swept["rate learning_rate=0.0001"].train.rehearsal.weight == 3


def test_another_target_or_base_takes_the_place_of_the_recipes(content: dict[str, Any]) -> None:
    gym = {"kind": "gym", "name": "chain_sum", "rows": 90, "prompt": "{question}", "response": "{answer}"}
    whole = {"target": gym | {"path": None}, "base": {"kind": "folder", "path": "."}}
    assert comparison(content, variants={"v": whole}).variants["v"] == whole


def test_settings_that_turn_nothing_on_are_refused(content: dict[str, Any]) -> None:
    for changes, message in (
        ({"train": {"methods": {"lora": {"alpha": 32}}}}, "alpha has no effect without rank"),
        ({"target": content["target"] | {"name": "openai/gsm8k"}}, "name is for a target of kind hub or gym"),
        ({"target": content["target"] | {"config": {"a": 1}}}, "config is for a target of kind gym, and this is of"),
    ):
        with pytest.raises(BadInput, match=message):
            validated(Recipe, content | changes, "here")
    off = validated(Recipe, content | {"train": {"methods": {"lora": {"rank": 0, "alpha": 32}}}}, "here")  # of a sweep
    assert off.digest() == validated(Recipe, content, "here").digest()
    assert validated(Recipe, off.model_dump(mode="json"), "again").digest() == off.digest()


@pytest.mark.parametrize(
    "text",
    [
        "T {a} ### A:",
        "<u>\n{q}\n<a>\n",
        "#### {a}",
        "yes: {a} no",
        "[{a}]",
        "[{a}] {b}",
        "Question: {prompt}",
        "{prompt} is",
        " so {response}",
        " {response}",
        "Q {prompt} A ",
        "{response}",
        "a: b: {c}",
    ],
)
def test_a_template_on_the_command_line_is_as_it_is_written(text: str) -> None:
    assert parse_overrides([f"target.prompt={text}"]) == {"target.prompt": text}


def test_a_template_in_quotes_is_read_as_yaml() -> None:
    assert parse_overrides(['prompt="Q {q}\\nA"']) == {"prompt": "Q {q}\nA"}
    assert parse_overrides(["prompt=' {q}'", "b=[{name: a, text: '{q}'}]"]) == {
        "prompt": " {q}", "b": [{"name": "a", "text": "{q}"}],
    }  # fmt: skip


def test_an_empty_prompt_on_the_command_line_is_the_empty_text(content: dict[str, Any]) -> None:
    changed = override(content, parse_overrides(["target.prompt=", "target.response=text"]))
    assert validated(Recipe, changed, "here").target.prompt == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target": {"path": "a.jsonl", "response": {"answer": None}}}, "written in quotes, as '{answer}'"),
        ({"filter": None}, "leave the section out"),
        ({"evaluate": {"benchmarks": "facts"}}, r"a list is written as \[facts\]"),
    ],
)
def test_what_yaml_reads_as_another_thing_is_told_with_what_to_write(
    content: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        validated(Recipe, content | change, "here")


def test_what_is_no_template_is_read_as_yaml() -> None:
    given = ["a=[facts, {name: mine}]", "b={x: 1}", "c= 1e-3", "d={a: {b: 2}}", "e=null"]
    parsed = parse_overrides(given)
    assert parsed == {"a": ["facts", {"name": "mine"}], "b": {"x": 1}, "c": "1e-3", "d": {"a": {"b": 2}}, "e": None}
    with pytest.raises(BadInput, match="--machine 'threads' is not of the form"):
        parse_overrides(["threads"], "--machine")


def test_a_sweep_is_a_variant_per_value_with_its_plain_values_in_all(content: dict[str, Any]) -> None:
    found = comparison(content, sweeps=SWEPT).recipes()
    assert list(found) == ["finetune", "rehearse", "wise alpha=0.25", "wise alpha=0.5", "wise alpha=0.75"]
    assert [recipe.merge.alpha for recipe in found.values()] == [1, 1, 0.25, 0.5, 0.75]
    assert [recipe.train.epochs for recipe in found.values()] == [1, 1, 2, 2, 2]
    assert found["wise alpha=0.5"].name == "mine: wise alpha=0.5"


def test_a_sweep_of_what_comes_after_training_trains_once(content: dict[str, Any]) -> None:
    """No part of the recipe but merge differs, and merge is in no key of an earlier stage."""
    swept = list(comparison(content, variants={}, sweeps=SWEPT).recipes().values())
    assert len(swept) == 3
    for part in Recipe.model_fields:
        if isinstance(getattr(swept[0], part), Spec):
            digests = {getattr(recipe, part).digest() for recipe in swept}
            assert len(digests) == (3 if part == "merge" else 1), part


def test_of_several_lists_every_combination_and_names_that_tell_them_apart(content: dict[str, Any]) -> None:
    sweeps = {
        "both": {"merge.alpha": [0.5, 1], "train.learning_rate": [0.1, "1e-4"]},
        "seeds": {"mix.target_rows": [4], "generate.rows": [0], "probe.rows": [16, 32]},
    }
    found = comparison(content, variants={}, sweeps=sweeps, seeds=2).recipes()
    assert {(r.merge.alpha, r.train.learning_rate) for name, r in found.items() if name.startswith("both")} == {
        (0.5, 0.1), (0.5, 1e-4), (1, 0.1), (1, 1e-4),
    }  # fmt: skip
    assert list(found)[:3] == [
        "both alpha=0.5 learning_rate=0.1 seed=0", "both alpha=0.5 learning_rate=0.1 seed=1",
        "both alpha=0.5 learning_rate=1e-4 seed=0",
    ]  # fmt: skip
    assert found["seeds target_rows=4 generate.rows=0 probe.rows=16 seed=1"].probe.rows == 16
    assert seeds(found["seeds target_rows=4 generate.rows=0 probe.rows=32 seed=1"])[-2:] == [1, 1]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"variants": {}}, "nothing to compare: give `variants` or `sweeps`"),
        ({"sweeps": {"wise": {"merge.alpha": 0.5}}}, "'wise' has no field with a list.*put it under `variants`"),
        ({"sweeps": {"wise": {}}}, "'wise' has no field with a list"),
        ({"sweeps": {"wise": {"merge.alpha": []}}}, r"'wise' has no value for merge\.alpha"),
        ({"sweeps": {"wise": {"merge.alpha": [0.5, 0.5]}}}, "'wise' has a value twice"),
        ({"sweeps": {"wise": {"seed": [1, 2]}}}, r"'wise' sets seed.*train\.seed"),
        ({"sweeps": {"wise": {"train.seed": [1, 2]}}}, r"'wise' goes over train\.seed.*`seeds`"),
        ({"variants": {"a b=1": {}}, "sweeps": {"a": {"c.b": [1]}}}, "named twice: a b=1"),
    ],
)
def test_sweeps_that_cannot_be_are_refused(content: dict[str, Any], changed: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        comparison(content, **changed)


def test_a_wrong_value_of_a_sweep_is_named(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"variant 'wise alpha=2'.*\n.*merge\.alpha.*given 2"):
        comparison(content, sweeps={"wise": {"merge.alpha": [1, 2]}}).recipes()
