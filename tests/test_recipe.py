"""A recipe loads, names every mistake, and is known by what it computes rather than by what it is called."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from cfsd.errors import BadInput
from cfsd.recipe import Comparison, Recipe, override, parse_overrides, read_yaml, validated
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
        ({"base": "org/name@main"}, ["base", "40 hex digits"]),
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


def test_repeats_never_repeat_a_seed_that_was_written_out(content: dict[str, Any]) -> None:
    found = comparison(content | {"mix": {"seed": 1}, "train": {"seed": 1}}, seeds=3).recipes()
    assert len({recipe.digest() for label, recipe in found.items() if "rehearse" in label}) == 3


def test_a_variants_seed_is_refused(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"variant 'two' sets seed.*train\.seed"):
        comparison(content, variants={"one": {}, "two": {"seed": 9}})


def test_a_wrong_variant_is_named(content: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=r"variant 'typo'.*\n.*generate\.row\b.*allowed: rows"):
        comparison(content, variants={"typo": {"generate.row": 0}}).recipes()


def test_a_comparison_loads_with_overrides_of_its_recipe(content: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, {"recipe": content, "variants": {"all": {}, "none": {"generate.rows": 0}}})
    loaded = Comparison.load(path, ["generate.rows=5", "seed=2"], seeds=2)
    rows = {label: recipe.generate.rows for label, recipe in loaded.recipes().items()}
    assert rows == {"all seed=2": 5, "all seed=3": 5, "none seed=2": 0, "none seed=3": 0}


@pytest.mark.parametrize("file", sorted((Path(__file__).parent.parent / "deployments" / "recipes").glob("*.yaml")))
def test_every_recipe_that_comes_with_the_project_is_valid(file: Path, home: Path) -> None:
    cls = Comparison if "variants" in read_yaml(file) else Recipe
    assert cls.load(file)
