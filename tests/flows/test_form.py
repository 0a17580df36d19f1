"""The forms of the browser: the same recipes, keys and messages as the command line, and what Prefect checks itself."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import Flow
from prefect.exceptions import ParameterTypeError
from prefect.utilities.schema_tools.validation import ValidationError, validate

from cfsd.errors import BadInput
from cfsd.recipe import Recipe
from flows._form import (
    Data,
    On,
    Training,
    changes,
    compare_form,
    continual_form,
    corpus_form,
    measure_form,
    mitigate_form,
    regress_form,
    told,
)
from flows._menu import SHIPPED, menu, unreadable
from tests.conftest import ROOT

FORMS: list[Flow[Any, Any]] = [mitigate_form, corpus_form, compare_form, continual_form, regress_form, measure_form]
TINY = SHIPPED / "tiny.yaml"


def schema_of(form: Flow[Any, Any]) -> dict[str, Any]:
    """Return what `prefect deploy` sends: the module may have been imported when the menu was another one."""
    return Flow(form.fn).parameters.model_dump(mode="json")


def checked(parameters: dict[str, Any], form: Flow[Any, Any] = mitigate_form) -> None:
    """Check parameters as the server does before a run exists."""
    validate(parameters, schema_of(form), raise_on_error=True, ignore_required=False)


def fields_in(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for part in (schema, *schema.get("definitions", {}).values()):
        yield from part.get("properties", {}).items()


def test_what_the_form_changes_is_what_the_command_line_changes() -> None:
    data = Data(base="smollm2", prompt="{prompt}\n", held_out=20)
    training = Training(learning_rate=1e-5, epochs=2, budget=0.1, seed=7)
    by_form = Recipe.load(TINY, changes(yaml.safe_load(TINY.read_text()), "mine", data, training, "mix.target_rows=8"))
    by_command = Recipe.load(TINY, [
        "base=smollm2", 'target.prompt="{prompt}\\n"', "target.held_out=20", "train.learning_rate=1e-5",
        "train.epochs=2", "train.rehearsal.budget=0.1", "seed=7", "mix.target_rows=8", "name=mine",
    ])  # fmt: skip
    assert by_form == by_command and by_form.target.prompt == "{prompt}\n"


def test_an_empty_form_is_the_recipe_of_the_file() -> None:
    given = Recipe.load(TINY, changes({}, "", Data(), Training(), "\n"))
    assert given == Recipe.load(TINY) and given.digest() == Recipe.load(TINY).digest()


@pytest.mark.parametrize(
    ("data", "kind", "path", "name"),
    [
        ({"target": "rows.jsonl"}, "file", "rows.jsonl", None),
        ({"target": "gsm_symbolic", "target_kind": "gym"}, "gym", None, "gsm_symbolic"),
        ({"target_kind": "file"}, "file", "deployments/recipes/tiny_target.jsonl", None),
    ],
)
def test_another_target_takes_the_place_of_the_recipes(
    data: dict[str, Any], kind: str, path: str | None, name: str | None
) -> None:
    content = yaml.safe_load(TINY.read_text())
    target = Recipe.load(TINY, changes(content, "", Data(**data), Training(), "target.rows=50")).target
    assert (target.kind, target.path, target.name) == (kind, path, name)


def test_free_overrides_come_last_and_may_have_empty_lines() -> None:
    texts = changes({}, "", Data(), Training(epochs=3), "\n train.epochs=5\n\ngenerate.rows=0 ")
    assert texts == ["train.epochs=3", "train.epochs=5", "generate.rows=0"]


def test_the_machine_of_the_form() -> None:
    machine = On(device="cpu", threads=2, other="sampling_rows=8").machine()
    assert (machine.device, machine.threads, machine.sampling_rows) == ("cpu", 2, 8)


def test_a_mistake_ends_a_run_with_its_one_message() -> None:
    def refuse() -> Any:
        raise BadInput("generate.rows is -1; give 0 or more")

    state = told(refuse)
    assert state.is_failed() and state.message == "generate.rows is -1; give 0 or more"
    with pytest.raises(ZeroDivisionError):
        told(lambda: 1 / 0)  # type: ignore[arg-type,return-value]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_every_field_has_a_title_and_says_what_it_is(form: Flow[Any, Any]) -> None:
    for name, field in fields_in(schema_of(form)):
        assert field["title"] and len(field["description"]) > 5, name
        assert "anyOf" not in field, f"{name}: the page would show a choice between types"


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_what_the_page_sends_when_nothing_is_filled_in_is_valid(form: Flow[Any, Any]) -> None:
    schema = schema_of(form)
    required = {
        name: field.get("enum", ["tiny"])[0] for name, field in schema["properties"].items() if "default" not in field
    }
    defaults = {name: field["default"] for name, field in schema["properties"].items() if name not in required}
    assert "null" not in json.dumps(defaults)
    cleared = {"training": {"learning_rate": None, "epochs": None}} if "training" in defaults else {}
    for sent in (defaults, defaults | cleared):
        parameters = sent | required
        checked(parameters, form)
        form.validate_parameters(parameters)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"recipe": "nope"}, "'nope' is not one of"),
        ({"recipe": "tiny", "training": {"learning_rate": -1}}, "training.learning_rate"),
        ({"recipe": "tiny", "training": {"epochs": 1.5}}, "training.epochs"),
        ({"recipe": "tiny", "training": {"epoch": 2}}, "epoch"),
        ({"recipe": "tiny", "overrides": "trian.epochs=2"}, "does not match"),
        ({"recipe": "tiny", "overrides": "train.epochs=2\ntrain.epochs"}, "does not match"),
        ({"recipe": "tiny", "machine": {"device": "tpu"}}, "machine.device"),
    ],
)
def test_prefect_refuses_before_a_run_exists(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        checked(wrong)


def test_a_recipe_of_ones_own_is_in_the_menu_after_the_next_deployment(home: Path) -> None:
    own = home / "recipes"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(TINY.read_text())
    (own / "tiny.yaml").write_text(TINY.read_text())
    (own / "broken.yaml").write_text("name: [")
    assert menu("recipe")["mine"] == own / "mine.yaml" and menu("recipe")["own/tiny"] == own / "tiny.yaml"
    assert menu("recipe")["tiny"] == TINY
    (own / "zero.yml").write_bytes(TINY.read_bytes())
    assert menu("recipe")["zero"] == own / "zero.yml"
    (own / "mine.yml").write_bytes(TINY.read_bytes())
    assert menu("recipe")["mine"] == own / "mine.yaml"
    assert schema_of(mitigate_form)["properties"]["recipe"]["enum"][:2] == ["mine", "own/tiny"]
    first, second = unreadable()
    assert first.startswith(str(own / "broken.yaml"))
    assert second == f"{own / 'mine.yml'} is in no menu: mine.yaml has its name"


def test_a_name_that_is_in_no_menu_is_refused_with_the_list(home: Path) -> None:
    with pytest.raises(ParameterTypeError, match=r"there is no recipe 'nope'; there are: .*tiny.*make up"):
        mitigate_form.validate_parameters({"recipe": "nope"})


def test_every_shipped_file_is_in_one_menu_and_loads() -> None:
    named = {file for kind in ("recipe", "comparison", "sequence") for file in menu(kind).values()}  # type: ignore[arg-type]
    assert named == set((ROOT / "deployments" / "recipes").glob("*.yaml"))
