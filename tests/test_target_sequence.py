"""A sequence of targets: what each stage rehearses of the targets before it, and what its repeats vary."""

from typing import Any

import pytest
import yaml

from cfsd.errors import BadInput
from cfsd.recipe import Recipe
from cfsd.target_sequence import TargetSequence
from tests.conftest import ROOT

FILE = ROOT / "deployments" / "recipes" / "tiny-sequence.yaml"
CONTENT = yaml.safe_load(FILE.read_text())
ROWS = "deployments/recipes/tiny_target.jsonl"
THIRD = {"thrice": {"target.response": "{response}{response}{response}"}}


def sequence(changes: dict[str, Any] | None = None, **given: Any) -> TargetSequence:
    recipe = CONTENT["recipe"] | (changes or {})
    targets = CONTENT["targets"] | THIRD
    return TargetSequence.model_validate({"recipe": recipe, "targets": targets, **given})


@pytest.mark.parametrize("way", ["prompts", "rows"])
def test_each_stage_rehearses_all_targets_before_it_beside_what_the_recipe_rehearses(way: str) -> None:
    plain, held = sequence().recipes(), sequence(earlier=way, earlier_fraction=0.3).recipes()
    first, second, third = held.values()
    assert first == plain["rotate"]  # it has no earlier target
    shares = {"context-free": pytest.approx(0.7), f"earlier-{way}": 0.3}
    for recipe, before in ((second, ["rotate"]), (third, ["rotate", "twice"])):
        assert recipe.generate.source == "mixed" and recipe.generate.fractions == shares
        assert recipe.earlier == tuple(plain[name].target for name in before)  # with the seeds of their splits
    changed = {"earlier": (), "generate": plain["thrice"].generate}
    assert third.model_copy(update=changed) == plain["thrice"]  # nothing else differs


def test_unprompted_is_what_it_was() -> None:
    assert [recipe.earlier for recipe in sequence().recipes().values()] == [(), (), ()]
    recipe = sequence().recipes()["twice"]
    assert "earlier" not in recipe._identity() and recipe.generate.source == "auto"


def test_sources_that_the_recipe_mixes_keep_their_proportions() -> None:
    mixed = {"source": "mixed", "fractions": {"context-free": 0.8, "contextual": 0.2}}
    generate = CONTENT["recipe"]["generate"] | mixed
    fractions = sequence({"generate": generate}, earlier="prompts").recipes()["twice"].generate.fractions
    assert fractions == {"context-free": 0.4, "contextual": 0.1, "earlier-prompts": 0.5}


def train(**rehearsal: Any) -> dict[str, Any]:
    return {"train": CONTENT["recipe"]["train"] | {"rehearsal": rehearsal}}


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "all": ({}, {"earlier": "rows", "earlier_fraction": 1.0}, "less than 1"),
    "none": ({}, {"earlier": "rows", "earlier_fraction": 0}, "greater than 0"),
    "a way unknown": ({}, {"earlier": "text"}, "'unprompted', 'prompts' or 'rows'"),
    "a share of nothing": ({}, {"earlier_fraction": 0.3}, "0.3 belongs to `earlier: prompts` or `rows`"),
    "earlier twice": (
        {"earlier": [{"path": ROWS}], "generate": {"source": "earlier-rows", "top_logprobs": 8}}, {"earlier": "rows"},
        "the recipe has 1 `earlier` targets",
    ),
    "chats and then none": (
        {"base": "smollm2", "generate": {"top_logprobs": 8}} | train(loss="kl"), {"earlier": "rows"},
        "set it to template or context-free, so that all stages rehearse the same",
    ),
    "no corpus": ({"generate": {"rows": 0}}, {"earlier": "prompts"}, "rehearses nothing: generate.rows is 0"),
    "no weight": (train(weight=0), {"earlier": "prompts"}, "train.rehearsal.weight 0.0; set both above 0"),
    "a budget read off rows that the base did not write": (
        train(loss="kl", budget=0.1), {"earlier": "rows"}, "on source earlier-rows it is another one",
    ),
    "drawn tokens that the base did not draw": (
        {"generate": {"top_logprobs": 8, "tail_samples": 0}}, {"earlier": "rows"}, "source=mixed: set generate.tail",
    ),
    "seeds": ({}, {"seeds": 0}, "greater than 0"),
    "a base in the middle": (
        {}, {"targets": {"rotate": {"base": "tiny"}, "twice": {"base.start_token": "a"}}}, "'twice' sets base",
    ),
    "a seed that fills nothing": (
        {}, {"targets": {"rotate": {}, "twice": {"seed": 7}}}, "target 'twice' sets seed, which only fills seeds",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_refused_before_anything_runs(name: str) -> None:
    changes, given, message = WRONG[name]
    with pytest.raises((BadInput, ValueError), match=message):
        sequence(changes, **given).recipes()


def test_repeats_vary_corpus_order_and_training_and_nothing_else() -> None:
    repeats = sequence(earlier="rows", seeds=3).repeats()
    assert [one.recipe.name for one in repeats] == [f"tiny in turn seed={n}" for n in range(3)]
    for number, one in enumerate(repeats):
        for recipe in one.recipes().values():
            assert (recipe.generate.seed, recipe.mix.seed, recipe.train.seed) == (number,) * 3
            assert (recipe.target.seed, recipe.probe.seed) == (0, 0)
            assert all(target.seed == 0 for target in recipe.earlier)
    assert sequence().repeats() == [sequence()]
    assert repeats[0].recipes()["twice"].generate == sequence(earlier="rows").recipes()["twice"].generate
    with pytest.raises(ValueError, match=r"target 'thrice' sets train\.seed, which the 2 repeats vary"):
        TargetSequence.model_validate(CONTENT | {"seeds": 2, "targets": {"rotate": {}, "thrice": {"train.seed": 4}}})


def test_earlier_targets_of_a_recipe_go_with_a_source_that_rehearses_them() -> None:
    known = {"earlier": [{"path": ROWS}], "seed": 7}
    recipe = CONTENT["recipe"] | known
    with pytest.raises(ValueError, match="`earlier` has 1 targets, but nothing rehearses them"):
        Recipe.model_validate(recipe)
    with pytest.raises(ValueError, match=r"generate\.source earlier-prompts needs `earlier`"):
        Recipe.model_validate(CONTENT["recipe"] | {"generate": {"source": "earlier-prompts"}})
    made = Recipe.model_validate(recipe | {"generate": recipe["generate"] | {"source": "earlier-rows"}})
    assert made.earlier[0].seed == 7
    assert made.digest() != Recipe.model_validate(CONTENT["recipe"]).digest()
    with pytest.raises(BadInput, match=r"gone\.jsonl"):
        made.model_copy(update={"earlier": (made.earlier[0].model_copy(update={"path": "gone.jsonl"}),)}).check()
