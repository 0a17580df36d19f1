"""The recipes that a form offers by name: those of deployments/recipes/ and those of recipes/ in the data folder.

A form is deployed with the menu of that moment. `make up` deploys again, also where everything runs already.
"""

from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from cfsd.errors import BadInput
from cfsd.machine import home
from cfsd.overrides import read_yaml

SHIPPED = Path(__file__).parent.parent / "deployments" / "recipes"
SUFFIXES = (".yaml", ".yml")
OWN = "recipes"  # the folder of the data folder
Kind = Literal["recipe", "comparison", "sequence"]
MARKS: dict[str, Kind] = {"targets": "sequence", "variants": "comparison", "sweeps": "comparison"}


def own_recipes() -> Path:
    """Return the folder whose YAML files the forms offer besides the shipped ones."""
    return home() / OWN


def menu(kind: Kind) -> dict[str, Path]:
    """Return the files of a kind by the name that a form offers; one's own has `own/` before a name that is taken."""
    shipped = {file.stem: file for file in _of_kind(SHIPPED, kind)}
    own = {f"own/{file.stem}" if file.stem in shipped else file.stem: file for file in _of_kind(own_recipes(), kind)}
    return dict(sorted(own.items())) | shipped


def _of_kind(folder: Path, kind: Kind) -> list[Path]:
    return [file for file in _files(folder) if kind_of(file) == kind and file not in _hidden(folder)]


def _files(folder: Path) -> list[Path]:
    return sorted(file for suffix in SUFFIXES for file in folder.glob(f"*{suffix}"))


def _hidden(folder: Path) -> list[Path]:
    """Return the files whose name another one has with the first of SUFFIXES."""
    first, *others = SUFFIXES
    return [file for file in _files(folder) if file.suffix in others and file.with_suffix(first).exists()]


def kind_of(file: Path) -> Kind | None:
    """Return what a YAML file describes; None where it cannot be read, which a command that is given it explains."""
    try:
        content = read_yaml(file)
    except BadInput:
        return None
    if "recipe" not in content:
        return "recipe"
    return next((kind for mark, kind in MARKS.items() if mark in content), None)


def unreadable() -> list[str]:
    """Return a line for each file of the own recipes that no menu offers."""
    own = own_recipes()
    why = {file: "it is not a recipe, a comparison or a sequence" for file in _files(own) if not kind_of(file)}
    why |= {file: f"{file.with_suffix(SUFFIXES[0]).name} has its name" for file in _hidden(own)}
    return [f"{file} is in no menu: {reason}" for file, reason in why.items()]


class Chosen(NamedTuple):
    """The annotation of a text that must be a name of a menu, which its schema lists."""

    kind: Kind

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Refuse other names with the list."""
        return core_schema.no_info_after_validator_function(partial(_listed, self.kind), handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Make the field a menu of what is there now."""
        return {**handler(schema), "enum": list(menu(self.kind))}


def _listed(kind: Kind, name: str) -> str:
    if name not in (known := menu(kind)):
        raise ValueError(
            f"there is no {kind} {name!r}; there are: {', '.join(known)}. Others go into {own_recipes()}; then: make up"
        )
    return name
