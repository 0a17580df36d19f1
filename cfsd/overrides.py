"""Recipes in YAML: reading, overrides of dotted fields, and validation errors that name file and field."""

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from cfsd.errors import BadInput
from cfsd.model.checkpoint import expanded

M = TypeVar("M", bound=BaseModel)


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
    """Return a recipe's fields with `a.b=c` overrides, after its short form of the base is written out."""
    if "base" in recipe:
        recipe = recipe | {"base": expanded(recipe["base"])}
    return override(recipe, parse_overrides(overrides))


def read_with_recipe(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the mapping in a YAML file whose field `recipe` takes the overrides. Raises BadInput."""
    content = read_yaml(path)
    if isinstance(content.get("recipe"), dict):
        content["recipe"] = overridden(content["recipe"], overrides)
    return content


def override(content: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return `content` with dotted fields replaced; missing mappings on the way are made. Raises BadInput."""
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
