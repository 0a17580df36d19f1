"""Comparison: one recipe and its named variants."""

import json
from itertools import chain, product
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from cfsd.errors import BadInput
from cfsd.overrides import flattened, override, read_with_recipe, validated
from cfsd.recipe import Recipe
from cfsd.spec import REPEAT, seed_of

Varied = Literal["train", "mix", "corpus", "probe"]
SECTIONS: dict[Varied, str] = {"train": "train", "mix": "mix", "corpus": "generate", "probe": "probe"}
WORDS: dict[Varied, str] = {  # as a reader is told
    "mix": "the order of rows",
    "train": "the training",
    "corpus": "the corpus",
    "probe": "the probe",
}


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
    seeds: int = Field(1, ge=1, description="Repeats per variant, with seeds of their own for what `seeds_vary` names")
    seeds_vary: tuple[Varied, ...] = Field(
        ("train", "mix"),
        description="What differs between repeats, and so what intervals over seeds cover: the training, the order of "
        "rows (mix), the corpus (generate.seed), the probe. What is not named is shared. Target rows and benchmark "
        "items always are",
    )

    @field_validator("variants", "sweeps")
    @classmethod
    def _field_by_field(cls, variants: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
        return {name: flattened(Recipe, changes) for name, changes in variants.items()}

    @field_validator("variants", "sweeps")
    @classmethod
    def _no_seed(cls, variants: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
        for name, changes in variants.items():
            if "seed" in changes:
                raise ValueError(
                    f"variant {name!r} sets seed, which only fills seeds that are empty, and none is any more; "
                    "set train.seed or mix.seed, or repeat every variant with `seeds`"
                )
            if "name" in changes:
                raise ValueError(f"variant {name!r} sets name, but its own name is {name!r}: leave it out")
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

    @field_validator("seeds_vary")
    @classmethod
    def _in_one_order(cls, parts: tuple[Varied, ...]) -> tuple[Varied, ...]:
        if not parts:
            raise ValueError(f"repeats that vary nothing are equal: name one or more of {', '.join(SECTIONS)}")
        return tuple(part for part in SECTIONS if part in parts)

    @model_validator(mode="after")
    def _named_apart(self) -> Self:
        names = [name for name, _ in self.expanded_variants()]
        if repeats := [name for name in names if REPEAT in name]:
            raise ValueError(
                f"variant {repeats[0]!r} has {REPEAT.strip()!r} in its name, by which repeats are known: "
                "rename it, or repeat every variant with `seeds`"
            )
        if not names:
            raise ValueError("nothing to compare: give `variants` or `sweeps`, such as `variants: {rehearse: {}}`")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"variants named twice: {', '.join(twice)}; rename a variant or a sweep, or drop a value")
        return self

    def notes(self) -> list[str]:
        """Return what a reader of the comparison must know."""
        if self.seeds == 1:
            return []
        varied = [words for part, words in WORDS.items() if part in self.seeds_vary]
        shared = [words for part, words in WORDS.items() if part not in self.seeds_vary]
        return [
            f"{self.seeds} seeds per variant. What they vary, and an interval over seeds covers: {', '.join(varied)}. "
            f"The same in all of them: {', '.join([*shared, 'target rows', 'benchmark items'])}."
        ]

    def expanded_variants(self) -> list[tuple[str, dict[str, JsonValue]]]:
        """Return name and overrides of every variant, those of sweeps last."""
        swept = (_swept(name, changes).items() for name, changes in self.sweeps.items())
        return [*self.variants.items(), *chain.from_iterable(swept)]

    def recipes(self) -> dict[str, Recipe]:
        """Return the variants in full, by name; repeats are named `variant seed=1`. Raises BadInput."""
        plain = self.recipe.model_dump(mode="json")
        recipes = {}
        for name, changes in self.expanded_variants():
            for repeat in range(self.seeds):
                seeds = self._seeds(repeat)
                label = f"{name}{REPEAT}{self.recipe.seed + repeat}" if self.seeds > 1 else name
                changed = override(plain, {**seeds, **changes, "name": f"{self.recipe.name}: {label}"})
                recipes[label] = validated(Recipe, changed, f"variant {name!r}")
                if self.seeds > 1:
                    self._check_varied(name, recipes[label], seeds)
        return recipes

    def _seeds(self, repeat: int) -> dict[str, int]:
        """Return the seed of a repeat for each part that varies, by dotted field."""
        return {
            f"{section}.seed": seed_of(getattr(self.recipe, section), repeat)
            for part, section in SECTIONS.items()
            if part in self.seeds_vary
        }

    def _check_varied(self, name: str, recipe: Recipe, seeds: dict[str, int]) -> None:
        """Raise BadInput where a variant has a seed of its own for what varies, or its repeats would be equal."""
        for part, section in SECTIONS.items():
            seed = getattr(recipe, section).seed
            if part in self.seeds_vary and seed != seeds[f"{section}.seed"]:
                raise BadInput(
                    f"variant {name!r} sets {section}.seed to {seed}, but {section}.seed is what the {self.seeds} "
                    f"repeats vary (seeds_vary has {part}); leave it out of the variant, or {part} out of seeds_vary"
                )
        why = {"corpus": not recipe.generate.rows and "it samples none (generate.rows is 0)"}
        why["train"] = _draws_nothing(recipe) and "its training draws nothing (train.dropout is 0, no LoRA)"
        if all(why.get(part) for part in self.seeds_vary):
            reasons = " and ".join(f"{part}: {why[part]}" for part in self.seeds_vary)
            raise BadInput(
                f"seeds_vary names nothing that varies in variant {name!r} ({reasons}): its {self.seeds} repeats would "
                "be one and the same; add mix to seeds_vary"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        overrides: list[str] | None = None,
        seeds: int | None = None,
        seeds_vary: list[str] | None = None,
    ) -> Self:
        """Return the comparison of a YAML file; overrides apply to its recipe, before the variants'.

        Raises BadInput, also where `seeds_vary` is given and nothing is repeated.
        """
        content = read_with_recipe(Path(path), overrides or [], "compare")
        given = {"seeds": seeds, "seeds_vary": seeds_vary}
        found = validated(cls, content | {name: value for name, value in given.items() if value}, str(path))
        if seeds_vary and found.seeds == 1:
            raise BadInput(
                f"seeds_vary ({', '.join(seeds_vary)}) is about repeats, and every variant runs once: give seeds, too, "
                "such as 3"
            )
        return found


def _draws_nothing(recipe: Recipe) -> bool:
    """Say whether another seed of the training gives the same model, as far as a recipe tells."""
    return recipe.train.dropout == 0 and not recipe.train.methods.lora.is_on()


def _swept(name: str, changes: dict[str, JsonValue]) -> dict[str, dict[str, JsonValue]]:
    """Return the variants of a sweep, by name: one per combination of its lists' values."""
    lists = {field: values for field, values in changes.items() if isinstance(values, list)}
    last = [field.rpartition(".")[2] for field in lists]
    words = [field if last.count(word) > 1 else word for field, word in zip(lists, last, strict=True)]
    variants: list[tuple[str, dict[str, JsonValue]]] = []
    for values in product(*lists.values()):
        marks = (f"{word}={_short(value)}" for word, value in zip(words, values, strict=True))
        variants.append((" ".join([name, *marks]), changes | dict(zip(lists, values, strict=True))))
    if len({label for label, _ in variants}) < len(variants):
        raise ValueError(f"sweep {name!r} has a value twice; every value makes a variant of its own")
    return dict(variants)


def _short(value: JsonValue) -> str:
    return value if isinstance(value, str) else json.dumps(value)
