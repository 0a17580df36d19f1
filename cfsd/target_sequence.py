"""Several targets in turn: each training starts from the model of the one before."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cfsd.model.checkpoint import Checkpoint
from cfsd.overrides import override, read_with_recipe, validated
from cfsd.recipe import Recipe


class TargetSequence(BaseModel):
    """A recipe and the changes of each target, in order, such as `{math: {target.path: math.jsonl}}`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: Recipe
    targets: dict[str, dict[str, JsonValue]] = Field(
        min_length=2, description="Name -> dotted field -> value, on top of the recipe; trained in this order"
    )

    def recipes(self) -> dict[str, Recipe]:
        """Return the recipe of each target, by name; all have the first base. Raises BadInput."""
        plain = self.recipe.model_dump(mode="json")
        named = {name: {"name": f"{self.recipe.name}: {name}", **changes} for name, changes in self.targets.items()}
        return {n: validated(Recipe, override(plain, changes), f"target {n!r}") for n, changes in named.items()}

    @classmethod
    def load(cls, path: str | Path, overrides: list[str] | None = None) -> Self:
        """Return the sequence of a YAML file; overrides apply to its recipe, before the targets'."""
        return validated(cls, read_with_recipe(Path(path), overrides or []), str(path))


def trained_on(recipe: Recipe, model: Path) -> Recipe:
    """Return `recipe` with the model in the folder `model` as its base, and with the same start token."""
    start = Checkpoint(kind="folder", path=str(model), start_token=recipe.base.start_token)
    return recipe.model_copy(update={"base": start})
