"""The forms of the browser: a recipe by name and what people change, in place of a recipe's hundred fields.

A form makes the same `FIELD=VALUE` texts as the command line takes and loads the recipe with them, so that both give
the same recipe, the same keys and the same messages.
"""

import json
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from cfsd.comparison import Comparison, Varied
from cfsd.machine import Machine
from cfsd.overrides import read_yaml
from cfsd.recipe import Recipe
from cfsd.target_sequence import TargetSequence
from flows._cli import machine_of
from flows._conclude import Result
from flows._explained import explained
from flows._known_baseline import CHAMPION
from flows._menu import Chosen, menu
from flows.approve import check_asked
from flows.compare import compare
from flows.continual import continual
from flows.corpus import corpus
from flows.measure import asked_of, measure
from flows.mitigate import mitigate
from flows.regress import regress


def _lines_of(field: str) -> str:
    """Return the pattern of a text whose lines are FIELD=VALUE or empty."""
    return rf"^([ \t]*({field}[ \t]*=[^\n]*)?(\n|$))*$"


Settings = Annotated[str, Field(pattern=_lines_of(r"[\w.-]+"))]
Overrides = Annotated[str, Field(pattern=_lines_of(f"({'|'.join(Recipe.model_fields)})[\\w.-]*"))]
AS_IN_RECIPE: Literal["as in the recipe"] = "as in the recipe"
RecipeName = Annotated[str, Chosen("recipe")]
ComparisonName = Annotated[str, Chosen("comparison")]
SequenceName = Annotated[str, Chosen("sequence")]


def _without_null(schema: dict[str, Any]) -> None:
    """Make an optional field one of its own type, which may be left empty, in place of a choice between two."""
    for field in schema["properties"].values():
        options = [option for option in field.get("anyOf", ()) if option != {"type": "null"}]
        if len(options) == 1:
            del field["anyOf"], field["default"]
            field |= options[0]


class Group(BaseModel):
    """A group of a form's fields. What is left empty stays as in the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_without_null)
    sets: ClassVar[dict[str, str]] = {}  # field of the form -> dotted field of the recipe

    @model_serializer(mode="wrap")
    def _filled(self, content: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is empty: the form would send it back as null."""
        return {name: value for name, value in content(self).items() if value is not None}

    def overrides(self) -> list[str]:
        """Return what is filled in, as FIELD=VALUE."""
        given = {name: getattr(self, name) for name in self.sets}
        return [_override(self.sets[name], value) for name, value in given.items() if value not in (None, "")]


class Data(Group):
    """Empty: as in the recipe."""

    model_config = ConfigDict(title="Model and data")
    sets: ClassVar[dict[str, str]] = {
        "base": "base", "prompt": "target.prompt", "response": "target.response", "held_out": "target.held_out"
    }  # fmt: skip

    base: str | None = Field(
        None, title="Base model", description="tiny, smollm2, a folder (./models/mine) or org/name@revision"
    )
    target: str | None = Field(
        None,
        title="Target",
        description="What to fine-tune on: the path of a file, the name of a hub data set or of a reasoning-gym task",
    )
    target_kind: Literal["as in the recipe", "file", "hub", "gym"] = Field(
        AS_IN_RECIPE, title="Kind of target", description="What Target names"
    )
    prompt: str | None = Field(None, title="Prompt", description="A column of the target, or a template: Q: {question}")
    response: str | None = Field(None, title="Response", description="A column of the target, or a template: {answer}")
    held_out: PositiveInt | None = Field(
        None, title="Held-out rows", description="Rows left out of training, to measure what was learned"
    )

    def target_overrides(self, recipe: dict[str, Any]) -> list[str]:
        """Return how the target's place changes; `recipe` is the one in the file."""
        given = None if self.target_kind == AS_IN_RECIPE else self.target_kind
        if not self.target:
            return [f"target.kind={given}"] if given else []
        kind = given or (recipe.get("target") or {}).get("kind", "file")
        place, other = ("path", "name") if kind == "file" else ("name", "path")
        return [f"target.kind={kind}", _override(f"target.{place}", self.target), f"target.{other}=null"]


class Training(Group):
    """Empty: as in the recipe."""

    model_config = ConfigDict(title="Training")
    sets: ClassVar[dict[str, str]] = {
        "learning_rate": "train.learning_rate", "epochs": "train.epochs", "budget": "train.rehearsal.budget",
        "seed": "seed",
    }  # fmt: skip

    learning_rate: PositiveFloat | None = Field(
        None, title="Learning rate", description="The peak of AdamW's, such as 1e-5 for a large model, 1e-3 for tiny"
    )
    epochs: PositiveInt | None = Field(None, title="Epochs", description="Passes over the target's training rows")
    budget: PositiveFloat | None = Field(
        None,
        title="Budget of divergence",
        description="How far the model may move from the base on the base's own text, in nats per token, such as 0.1",
    )
    seed: NonNegativeInt | None = Field(
        None, title="Seed", description="Fills every seed that the recipe leaves empty; another one is another run"
    )


class On(Group):
    """Where it runs; nothing here changes what is estimated."""

    model_config = ConfigDict(title="Machine")

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", title="Device", description="auto takes CUDA if there is one"
    )
    threads: PositiveInt | None = Field(None, title="Threads", description="CPU threads per process; empty: all cores")
    other: Settings = Field("", title="Other settings", description="One FIELD=VALUE a line, such as sampling_rows=64")

    def machine(self) -> Machine:
        """Return the machine that is described. Raises BadInput."""
        threads = [f"threads={self.threads}"] if self.threads else []
        return machine_of([f"device={self.device}", *threads, *_lines(self.other)])


class Repeats(Group):
    """Empty: as in the file."""

    model_config = ConfigDict(title="Repeats")

    seeds: PositiveInt | None = Field(None, title="Seeds", description="Trainings per variant, each with its own seeds")
    seeds_vary: list[Varied] = Field(
        [], title="What the seeds vary", description="Empty: as in the file, usually train and mix"
    )


def _override(field: str, value: Any) -> str:
    return f"{field}={json.dumps(value, ensure_ascii=False)}"  # JSON is YAML


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def changes(content: dict[str, Any], name: str, data: Data, training: Training, overrides: str) -> list[str]:
    """Return what a form changes of the recipe `content`, as the command line takes it; free overrides come last."""
    named = [_override("name", name)] if name else []
    return [*named, *data.overrides(), *data.target_overrides(content), *training.overrides(), *_lines(overrides)]


def told(work: Callable[[], Result | State[Any]]) -> State[Any]:
    """Do the work of a form. A mistake that a person can mend ends the run as Failed with its one message."""
    try:
        result = work()
    except Exception as error:
        if (known := explained(error)) is None:
            raise
        return Failed(message=str(known), data=known)
    return Completed(message=result.verdict or f"report: {result.folder}") if isinstance(result, Result) else result


@flow(name="mitigate", flow_run_name="{recipe}")
def mitigate_form(
    recipe: RecipeName,
    name: str = "",
    data: Data = Data(),  # noqa: B008
    training: Training = Training(),  # noqa: B008
    overrides: Overrides = "",
    machine: On = On(),  # noqa: B008
) -> State[Any]:
    """Fine-tune on a target, rehearsing the base's own text, and measure what was learned and forgotten.

    Args:
        recipe: Where to start from: a file of deployments/recipes/ or of the data folder's recipes/
        name: What you call the run; empty: as the recipe
        data: What is trained, on what
        training: How it is trained
        overrides: Any other field of the recipe, one FIELD=VALUE a line, such as generate.rows=500
        machine: Where it runs
    """
    file = menu("recipe")[recipe]
    return told(
        lambda: mitigate.fn(
            Recipe.load(file, changes(read_yaml(file), name, data, training, overrides)), machine.machine()
        )
    )


@flow(name="corpus", flow_run_name="{recipe}")
def corpus_form(
    recipe: RecipeName,
    data: Data = Data(),  # noqa: B008
    overrides: Overrides = "",
    machine: On = On(),  # noqa: B008
) -> State[Any]:
    """Make the rehearsal corpus of a recipe and a page that shows it; train nothing.

    Args:
        recipe: Where to start from: a file of deployments/recipes/ or of the data folder's recipes/
        data: The model that writes, and the target
        overrides: Any other field of the recipe, one FIELD=VALUE a line, such as generate.rows=500
        machine: Where it runs
    """
    file = menu("recipe")[recipe]
    return told(
        lambda: corpus.fn(
            Recipe.load(file, changes(read_yaml(file), "", data, Training(), overrides)), machine.machine()
        )
    )


@flow(name="compare", flow_run_name="{recipe}")
def compare_form(
    recipe: ComparisonName,
    data: Data = Data(),  # noqa: B008
    training: Training = Training(),  # noqa: B008
    repeats: Repeats = Repeats(),  # noqa: B008
    overrides: Overrides = "",
    machine: On = On(),  # noqa: B008
) -> State[Any]:
    """One recipe, several ways of training, one table and one figure.

    Args:
        recipe: A recipe and its variants: a file of deployments/recipes/ or of the data folder's recipes/
        data: What is trained, on what; the same in all variants
        training: How it is trained; where a variant says otherwise, the variant counts
        repeats: How often each variant is trained
        overrides: Any other field of the recipe, one FIELD=VALUE a line, such as generate.rows=500
        machine: Where it runs
    """
    file = menu("comparison")[recipe]

    def work() -> Result:
        changed = changes(read_yaml(file)["recipe"], "", data, training, overrides)
        varied: list[str] = [*repeats.seeds_vary]
        return compare.fn(Comparison.load(file, changed, repeats.seeds, varied), machine.machine())

    return told(work)


@flow(name="continual", flow_run_name="{recipe}")
def continual_form(
    recipe: SequenceName,
    training: Training = Training(),  # noqa: B008
    overrides: Overrides = "",
    machine: On = On(),  # noqa: B008
) -> State[Any]:
    """Train on one target after another, and score every model on every target.

    Args:
        recipe: A recipe and its targets: a file of deployments/recipes/ or of the data folder's recipes/
        training: How each of them is trained
        overrides: Any other field of the recipe, one FIELD=VALUE a line, such as generate.rows=500
        machine: Where it runs
    """
    file = menu("sequence")[recipe]

    def work() -> Result:
        changed = changes(read_yaml(file)["recipe"], "", Data(), training, overrides)
        return continual.fn(TargetSequence.load(file, changed), machine.machine())

    return told(work)


@flow(name="regress", flow_run_name="{recipe}")
def regress_form(
    recipe: RecipeName,
    baseline: str = "",
    seeds: NonNegativeInt = 0,
    update_baseline: bool = False,
    approval: bool = False,
    overrides: Overrides = "",
    machine: On = On(),  # noqa: B008
) -> State[Any]:
    """Does the recipe forget more, or learn less, than its baseline? The run's message is the verdict.

    Args:
        recipe: A file of deployments/recipes/ or of the data folder's recipes/
        baseline: A baseline's JSON, or champion; empty: deployments/baselines/ has one with the recipe's name
        seeds: Runs with seeds of their own; 0: 2, for a baseline or a champion 5
        update_baseline: Make the recipe's present figures the new baseline, and judge nothing
        approval: With baseline champion: what passes becomes the champion once a person says so in these pages
        overrides: Any other field of the recipe, one FIELD=VALUE a line
        machine: Where it runs
    """
    file = menu("recipe")[recipe]

    def work() -> State[Any]:
        if approval:
            check_asked(is_champion=baseline == CHAMPION)
        loaded = Recipe.load(file, _lines(overrides))
        return regress.fn(loaded, baseline or None, seeds or None, update_baseline, machine.machine(), approval)

    return told(work)


@flow(name="measure")
def measure_form(
    base: str,
    tuned: str,
    benchmarks: str = "",
    target: str = "",
    overrides: Settings = "",
    machine: On = On(),  # noqa: B008
) -> State[Any]:
    """What was lost between two models that exist already; trains nothing.

    Args:
        base: The model before: tiny, smollm2, a folder or org/name@revision
        tuned: The model after, or the folder of an adapter, which is merged into base
        benchmarks: Bundled or lm-eval tasks, one a line
        target: A file with rows that tuned was not trained on; columns prompt and response
        overrides: Fields of probe, evaluate and target, one FIELD=VALUE a line, such as probe.rows=64
        machine: Where it runs
    """

    def work() -> Result:
        asked = asked_of((base, tuned), _lines(benchmarks), target or None, (), _lines(overrides))
        on = machine.machine()
        asked.check(on)
        return measure.fn(*asked, on)

    return told(work)
