"""Recipe: all that decides a result. Comparison: one recipe and its named variants. Both load from YAML."""

import json
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    NonNegativeInt,
    ValidationError,
    field_validator,
    model_validator,
)

from cfsd.artifact import Artifact
from cfsd.checkpoint import Checkpoint, expanded
from cfsd.demands import check_rehearsal, check_supply
from cfsd.errors import BadInput
from cfsd.evaluate import EvaluateSpec
from cfsd.filter import FilterSpec
from cfsd.generate import GenerateSpec, ProbeSpec, check_context
from cfsd.merge import MergeSpec
from cfsd.mix import MixSpec
from cfsd.selection import SelectSpec
from cfsd.spec import Spec
from cfsd.target import Target
from cfsd.train import TrainSpec

M = TypeVar("M", bound=BaseModel)


class Recipe(Spec):
    """Base model, target, and how to get from one to the other without forgetting."""

    seeded: ClassVar[tuple[str, ...]] = ("target", "probe", "generate", "select", "mix", "train")

    name: str = Field(description="What you call it in Prefect and MLflow; not part of any key")
    seed: NonNegativeInt = Field(0, description="Fills every seed of the parts that is left empty")
    base: Checkpoint = Field(description="The model to fine-tune: `tiny`, `smollm2`, `./folder`, `org/name@commit`")
    target: Target = Field(description="What to fine-tune on")
    probe: ProbeSpec = Field(ProbeSpec(), description="Held-out sample of the base, for measuring only")
    generate: GenerateSpec = Field(GenerateSpec(), description="The rehearsal corpus")
    filter: FilterSpec = Field(FilterSpec(), description="Which rows of the corpus to reject; default none")
    select: SelectSpec = Field(SelectSpec(), description="Which rows of target and corpus to take; default all")
    mix: MixSpec = Field(MixSpec(), description="What one global batch holds")
    train: TrainSpec = Field(TrainSpec(), description="How the base is fine-tuned")
    merge: MergeSpec = Field(MergeSpec(), description="Interpolation of base and tuned after training")
    evaluate: EvaluateSpec = Field(EvaluateSpec(), description="What is measured before and after")

    @model_validator(mode="before")
    @classmethod
    def _fill_seeds(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        seed, filled = value.get("seed", 0), dict(value)
        for name in cls.seeded:
            part = filled.get(name, {})
            if isinstance(part, Spec) and getattr(part, "seed", 0) is None:
                filled[name] = part.model_copy(update={"seed": seed})
            elif isinstance(part, dict) and part.get("seed") is None and (part or name != "target"):
                filled[name] = {**part, "seed": seed}
        return filled

    @model_validator(mode="after")
    def _training_has_what_it_reads(self) -> Self:
        check_rehearsal(self.generate, self.train)
        known = {benchmark.name for benchmark in self.evaluate.benchmarks}
        if strange := sorted(set(self.train.watch.benchmarks) - known):
            raise ValueError(f"train.watch.benchmarks {strange} are not in evaluate.benchmarks {sorted(known)}")
        return self

    def _identity(self) -> dict[str, Any]:
        left_out = {"name", "seed"} | (set() if self.select.target_rows or self.select.corpus_rows else {"select"})
        return {k: v for k, v in super()._identity().items() if k not in left_out}

    def merging(self) -> MergeSpec:
        """Return `merge` with the budget that it keeps: its own, else that of training."""
        return self.merge.model_copy(update={"budget": self.merge.budget or self.train.rehearsal.budget})

    def check(self) -> None:
        """Raise BadInput for whatever can be told to be wrong without loading weights."""
        self.base.check()
        self.target.check()
        if self.generate.replay:
            self.generate.replay.check()
        self.evaluate.check()

    def check_base(self, base: Artifact) -> None:
        """Raise BadInput for what can be told once the base is known, before anything is sampled."""
        check_context(base, self.probe, "probe")
        check_context(base, self.generate, "generate")
        self.evaluate.check_base(base)

    def check_target(self, target: Artifact) -> None:
        """Raise BadInput for what can be told once the target's rows are known, before anything is sampled."""
        if isinstance(rows := target.facts.get("train_rows"), int):
            check_supply(self.generate, self.mix, self.train, rows)

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Return the recipe of a YAML file, with `a.b=c` overrides. Raises BadInput naming file and field."""
        return validated(cls, overridden(read_yaml(Path(path)), overrides or []), str(path))


class Comparison(BaseModel):
    """One recipe and named variants of it, each a set of overrides such as `{generate.rows: 0}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    variants: dict[str, dict[str, JsonValue]] = Field(
        {}, description="Name -> dotted field -> value, on top of the recipe"
    )
    sweeps: dict[str, dict[str, JsonValue]] = Field(
        {},
        description="As variants, but a field may have a list of values: a variant each, named `sweep alpha=0.5`; "
        "of several lists every combination. A value that is a list itself stands in a list",
    )
    seeds: int = Field(1, ge=1, description="Repeats per variant; mix and train vary, corpus and probe are shared")

    @field_validator("variants", "sweeps")
    @classmethod
    def _no_seed(cls, variants: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
        for name, changes in variants.items():
            if "seed" in changes:
                raise ValueError(
                    f"variant {name!r} sets seed, which only fills seeds that are empty, and none is any more; "
                    "set train.seed or mix.seed, or repeat every variant with `seeds`"
                )
        return variants

    @field_validator("sweeps")
    @classmethod
    def _lists(cls, sweeps: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
        for name, changes in sweeps.items():
            lists = {field: values for field, values in changes.items() if isinstance(values, list)}
            if not lists:
                raise ValueError(
                    f"sweep {name!r} has no field with a list of values, such as `merge.alpha: [0.25, 0.5]`; "
                    "without one it is a variant: put it under `variants`"
                )
            for field, values in lists.items():
                if not values:
                    raise ValueError(f"sweep {name!r} has no value for {field}; give at least one")
                if field.endswith(".seed"):
                    raise ValueError(f"sweep {name!r} goes over {field}; repeat every variant with `seeds` instead")
        return sweeps

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        swept = [label for name, changes in self.sweeps.items() for label in _swept(name, changes)]
        names = [*self.variants, *swept]
        if not names:
            raise ValueError("nothing to compare: give `variants` or `sweeps`, such as `variants: {rehearse: {}}`")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants named twice: {', '.join(twice)}; rename a variant or a sweep, or drop a value")
        return self

    def notes(self) -> list[str]:
        """Return what readers of the comparison must know."""
        if self.seeds == 1:
            return []
        return [
            f"{self.seeds} seeds per variant: they vary the order of rows and the training; "
            "corpus, probe and benchmark items are the same in all of them."
        ]

    def expanded_variants(self) -> dict[str, dict[str, JsonValue]]:
        """Return the overrides of every variant, those of sweeps after the others."""
        found = dict(self.variants)
        for name, changes in self.sweeps.items():
            found |= _swept(name, changes)
        return found

    def recipes(self) -> dict[str, Recipe]:
        """Return the variants in full, by name; repeats are named `variant seed=1`. Raises BadInput."""
        plain = self.recipe.model_dump(mode="json")
        found = {}
        for name, changes in self.expanded_variants().items():
            for repeat in range(self.seeds):
                parts = (self.recipe.mix.seed, self.recipe.train.seed)
                seeds = {f"{k}.seed": (v or 0) + repeat for k, v in zip(("mix", "train"), parts, strict=True)}
                label = f"{name} seed={self.recipe.seed + repeat}" if self.seeds > 1 else name
                changed = override(plain, {**seeds, **changes, "name": f"{self.recipe.name}: {label}"})
                found[label] = validated(Recipe, changed, f"variant {name!r}")
        return found

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None, seeds: int | None = None) -> Self:
        """Return the comparison of a YAML file; overrides apply to its recipe, before the variants'."""
        content = read_yaml(Path(path))
        if isinstance(content.get("recipe"), dict):
            content["recipe"] = overridden(content["recipe"], overrides or [])
        return validated(cls, content | ({"seeds": seeds} if seeds else {}), str(path))


def _swept(name: str, changes: dict[str, JsonValue]) -> dict[str, dict[str, JsonValue]]:
    """Return the variants of a sweep, by name: one per combination of its lists' values."""
    lists = {field: values for field, values in changes.items() if isinstance(values, list)}
    last = [field.rpartition(".")[2] for field in lists]
    words = [field if last.count(word) > 1 else word for field, word in zip(lists, last, strict=True)]
    found: list[tuple[str, dict[str, JsonValue]]] = []
    for values in product(*lists.values()):
        marks = (f"{word}={_short(value)}" for word, value in zip(words, values, strict=True))
        found.append((" ".join([name, *marks]), changes | dict(zip(lists, values, strict=True))))
    if len({label for label, _ in found}) < len(found):
        raise ValueError(f"sweep {name!r} has a value twice; every value makes a variant of its own")
    return dict(found)


def _short(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises BadInput."""
    if not path.is_file():
        raise BadInput(f"recipe {str(path)!r} does not exist (working directory {Path.cwd()})")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInput(f"recipe {str(path)!r} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise BadInput(f"recipe {str(path)!r} is not a mapping of fields such as `base: tiny`")
    return content


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """Return {"a.b": value} of `a.b=value` texts, values read as YAML. Raises BadInput."""
    parsed = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise BadInput(f"--set {text!r} is not of the form field.name=value")
        parsed[name] = _value(value)
    return parsed


def _value(text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadInput(f"--set value {text!r} is not valid YAML: {error}") from error
    if isinstance(value, dict) and all(inner is None for inner in value.values()):
        return text  # `{answer}` is a template, although YAML reads a mapping
    return value


def overridden(recipe: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a recipe's fields with `a.b=c` overrides applied, short forms of the base written out first."""
    if "base" in recipe:
        recipe = recipe | {"base": expanded(recipe["base"])}
    return override(recipe, parse_overrides(overrides))


def override(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with dotted fields replaced; what is missing on the way is made. Raises BadInput."""
    changed = dict(content)
    for name, value in changes.items():
        head, _, rest = name.partition(".")
        if not rest:
            changed[head] = value
            continue
        inner = changed.get(head) or {}
        if not isinstance(inner, dict):
            raise BadInput(f"{name!r} cannot be set: {head} is {inner!r} here, not a mapping")
        changed[head] = override(inner, {rest: value})
    return changed


def validated(model: type[M], content: Any, where: str) -> M:
    """Return `content` as `model`. Raises BadInput with one line per mistake."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        for mistake in error.errors(include_url=False):
            field = ".".join(str(part) for part in mistake["loc"]) or "recipe"
            secret = "base_url" in mistake["loc"] or isinstance(mistake["input"], dict)  # a URL may hold a password
            given = "" if mistake["type"] == "missing" or secret else f" (given {mistake['input']!r:.80})"
            known = _fields_near(model, mistake["loc"]) if mistake["type"] == "extra_forbidden" else ""
            lines.append(f"  {field}: {mistake['msg'].removeprefix('Value error, ')}{given}{known}")
        raise BadInput(f"{where} is not valid:\n" + "\n".join(lines)) from None


def _fields_near(model: type[BaseModel], place: tuple[Any, ...]) -> str:
    current: Any = model
    for name in place[:-1]:
        field = getattr(current, "model_fields", {}).get(name)
        current = field.annotation if field else None
    names = getattr(current, "model_fields", {})
    return f"; allowed: {', '.join(names)}" if names else ""
