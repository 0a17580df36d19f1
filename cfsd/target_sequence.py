"""Several targets in turn: each training starts from the model of the one before."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, PositiveInt, field_validator, model_validator

from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.model.checkpoint import Checkpoint
from cfsd.overrides import flattened, override, read_with_recipe, validated
from cfsd.recipe import Recipe
from cfsd.spec import REPEAT, seed_of

Earlier = Literal["unprompted", "prompts", "rows"]
SHARE = 0.5
VARIED = ("generate", "mix", "train")  # whose seeds differ between the repeats of a sequence
WAYS: dict[Earlier, str] = {  # as a reader is told
    "unprompted": "Earlier targets have no share of the rehearsal: it is what the recipe rehearses alone.",
    "prompts": "Of the rehearsal's tokens {share:.0%} are what the model before each stage answers to the prompts of "
    "the earlier targets' training rows, as many tokens for each target; the others are what the recipe rehearses.",
    "rows": "Of the rehearsal's tokens {share:.0%} are responses of the earlier targets' own training rows, as many "
    "tokens for each target; the others are what the recipe rehearses.",
}


class TargetSequence(BaseModel):
    """A recipe and the changes of each target, in order, such as `{math: {target.path: math.jsonl}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    targets: dict[str, dict[str, JsonValue]] = Field(
        min_length=2, description="Name -> dotted field -> value, on top of the recipe; trained in this order"
    )
    earlier: Earlier = Field(
        "unprompted",
        description="What holds the earlier targets. unprompted: nothing of theirs, only what the recipe rehearses; "
        "prompts: the model before answers the prompts of their training rows; rows: these rows themselves",
    )
    earlier_fraction: float = Field(
        SHARE, gt=0, lt=1, description="prompts, rows: share of the rehearsal's tokens, equal for all earlier targets"
    )
    seeds: PositiveInt = Field(
        1, description="Repeats of the whole sequence, with seeds of their own for corpus, order of rows and training"
    )

    @field_validator("targets")
    @classmethod
    def _field_by_field(cls, targets: dict[str, dict[str, JsonValue]]) -> dict[str, dict[str, JsonValue]]:
        return {name: flattened(Recipe, changes) for name, changes in targets.items()}

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.earlier == "unprompted" and self.earlier_fraction != SHARE:
            raise ValueError(
                f"earlier_fraction {self.earlier_fraction} belongs to `earlier: prompts` or `rows`; with unprompted "
                "the earlier targets have no share: set `earlier`, or leave earlier_fraction out"
            )
        if self.earlier != "unprompted" and self.recipe.earlier:
            raise ValueError(
                f"the recipe has {len(self.recipe.earlier)} `earlier` targets, and the sequence's `earlier: "
                f"{self.earlier}` would set others at each stage: leave one of the two out"
            )
        seeds = {"seed", *(f"{part}.seed" for part in VARIED)}
        for name, changes in self.targets.items():
            if "seed" in changes:
                raise ValueError(
                    f"target {name!r} sets seed, which only fills seeds that are empty, and none is any more; set "
                    "train.seed, mix.seed or generate.seed"
                )
            if name != next(iter(self.targets)) and any(field.partition(".")[0] == "base" for field in changes):
                raise ValueError(
                    f"target {name!r} sets base, but starts from the model of the target before it: leave it out, or "
                    "set it in the recipe or the first target"
                )
            if self.seeds > 1 and (fixed := sorted(seeds & changes.keys())):
                raise ValueError(f"target {name!r} sets {fixed[0]}, which the {self.seeds} repeats vary: leave it out")
        return self

    def way(self) -> str:
        """Return what holds the earlier targets, in words."""
        return WAYS[self.earlier].format(share=self.earlier_fraction)

    def recipes(self) -> dict[str, Recipe]:
        """Return the recipe of each target, by name; all have the first base. Raises BadInput."""
        plain = self.recipe.model_dump(mode="json")
        recipes: dict[str, Recipe] = {}
        for name, changes in self.targets.items():
            changed = override(plain, {"name": f"{self.recipe.name}: {name}", **changes})
            recipe = validated(Recipe, changed, f"target {name!r}")
            recipes[name] = self._holding(name, recipe, [known.target for known in recipes.values()])
        return recipes

    def _holding(self, name: str, recipe: Recipe, earlier: list[Target]) -> Recipe:
        """Return `recipe` with a share of its rehearsal for the targets before it."""
        if self.earlier == "unprompted" or not earlier:
            return recipe
        where, generate = f"target {name!r} with `earlier: {self.earlier}`", recipe.generate
        if not (generate.rows and recipe.train.rehearsal.weight):
            raise BadInput(
                f"{where} rehearses nothing: generate.rows is {generate.rows}, train.rehearsal.weight "
                f"{recipe.train.rehearsal.weight}; set both above 0, or `earlier` to unprompted"
            )
        if recipe.chooses_source() and recipe.base.has_chat_template() is not False:
            raise BadInput(
                f"{where}: generate.source auto is chats where the base has a chat template (of a hub's model that is "
                "not known here), and has no share beside earlier targets: set it to template or context-free, so that "
                "all stages rehearse the same"
            )
        shares: dict[Any, float] = {**generate.fractions} or dict.fromkeys(generate.sources(), 1.0)
        fractions = {source: share * (1 - self.earlier_fraction) for source, share in shares.items()}
        changes = {
            "generate.source": "mixed",
            "generate.fractions": {**fractions, f"earlier-{self.earlier}": self.earlier_fraction},
            "earlier": [target.model_dump(mode="json") for target in earlier],
        }
        return validated(Recipe, override(recipe.model_dump(mode="json"), changes), where)

    def repeats(self) -> list[Self]:
        """Return the sequence once for each of its seeds, as `name seed=1`; where there is one, itself."""
        return [self._repeat(number) for number in range(self.seeds)] if self.seeds > 1 else [self]

    def _repeat(self, number: int) -> Self:
        parts = {part: getattr(self.recipe, part) for part in VARIED}
        seeded = {part: spec.model_copy(update={"seed": seed_of(spec, number)}) for part, spec in parts.items()}
        named = {"name": f"{self.recipe.name}{REPEAT}{self.recipe.seed + number}"}
        return self.model_copy(update={"recipe": self.recipe.model_copy(update=named | seeded), "seeds": 1})

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None, **given: Any) -> Self:
        """Return the sequence of a YAML file; overrides apply to its recipe, before the targets'.

        `given` fields take the place of the file's, but for those that are None.
        """
        content = read_with_recipe(Path(path), overrides or [], "continual")
        changes = {name: value for name, value in given.items() if value is not None}
        return validated(cls, content | changes, str(path))


def trained_on(recipe: Recipe, model: Path) -> Recipe:
    """Return `recipe` with the model in the folder `model` as its base, and with the same start token."""
    start = Checkpoint(kind="folder", path=str(model), start_token=recipe.base.start_token)
    return recipe.model_copy(update={"base": start})
