"""Recipes in YAML: reading, overrides of dotted fields, and validation errors that name file and field."""

import re
import reprlib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cfsd.errors import BadInput
from cfsd.model.checkpoint import expanded

M = TypeVar("M", bound=BaseModel)

PLACEHOLDER = re.compile(r"\{\w+\}")  # of a template
# what a YAML reader raises for a month 13, a number of 5000 digits, brackets in brackets without end
NO_YAML = (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, OverflowError, RecursionError)


class _Shown(reprlib.Repr):
    """The beginning of a value: it may hold itself, or a billion parts by references."""

    def __init__(self) -> None:
        """Show about as much as fits on a line."""
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_int(self, x: int, level: int) -> str:
        """Return a number; Python refuses to write one of more than 4300 digits."""
        return super().repr_int(x, level) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"


shown = _Shown().repr


class _Loader(yaml.SafeLoader):
    """Refuses a field that is there twice, of which YAML takes the last in silence."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                continue
            line = key.start_mark.line + 1
            if key.value in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"the field {key.value!r} is there twice, in lines {lines[key.value]} and {line}"
                )
            lines[key.value] = line
        return node


def _whole(loader: _Loader, node: yaml.ScalarNode) -> str:
    """Return a text, of which JSON may have written a character in two halves."""
    try:
        return str(loader.construct_scalar(node)).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
    except UnicodeDecodeError as error:
        line = node.start_mark.line + 1
        raise yaml.MarkedYAMLError(problem=f"half of a character stands alone in line {line}") from error


_Loader.add_constructor("tag:yaml.org,2002:str", _whole)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises BadInput."""
    if path.is_dir() or not path.exists():  # a pipe, as of <(sed …), can be read
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BadInput(f"recipe {str(path)!r} {what} (working directory {Path.cwd()})")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except UnicodeDecodeError as error:
        raise BadInput(
            f"recipe {str(path)!r} is not text in UTF-8 (byte {error.start}: {error.reason}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise BadInput(f"recipe {str(path)!r} cannot be read: {error.strerror}") from error
    except NO_YAML as error:
        raise BadInput(f"recipe {str(path)!r} is not valid YAML: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise BadInput(f"recipe {str(path)!r} is not a mapping of fields such as `base: tiny`")
    if odd := [key for key in content if not isinstance(key, str)]:
        raise BadInput(f"recipe {str(path)!r} has a field named {shown(odd[0])}; names of fields are text")
    return content


def _reason(error: BaseException) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def parse_overrides(texts: list[str], option: str = "--set") -> dict[str, Any]:
    """Return {"a.b": value} of `a.b=value` texts. Raises BadInput.

    Values are read as YAML. A template such as `Question: {question} ###` stays as it stands, unless it is quoted.
    """
    parsed = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise BadInput(f"{option} {text!r} is not of the form field.name=value")
        parsed[name] = _value(value, option)
    return parsed


def _value(text: str, option: str) -> Any:
    is_template = bool(PLACEHOLDER.search(text))
    try:
        value = yaml.load(text, _Loader)
    except NO_YAML as error:
        if is_template:
            return text
        raise BadInput(f"{option} value {text[:80]!r} is not valid YAML: {_reason(error)}") from error
    return value if not is_template or _is_meant_as_yaml(value, text.strip()) else text


def _is_meant_as_yaml(value: Any, text: str) -> bool:
    """Say whether a text with a placeholder is written as YAML: all of it in quotes, or a list or mapping of values.

    Of others YAML would take a comment away after ` #`, and spaces and ends of lines; `{answer}` would be a mapping.
    """
    if isinstance(value, str):
        return text[0] == text[-1] and text[0] in "\"'"
    return text[0] in "[{" and _has_values(value)


def _has_values(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_values, value.values() if isinstance(value, dict) else value))
    return value is not None


def overridden(recipe: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a recipe's fields with `a.b=c` overrides, after its short form of the base is written out."""
    if "base" in recipe:
        recipe = recipe | {"base": expanded(recipe["base"])}
    return override(recipe, parse_overrides(overrides))


def read_recipe(path: Path, overrides: list[str]) -> dict[str, Any]:
    """Return the fields of a recipe in a YAML file, with `a.b=c` overrides. Raises BadInput."""
    return overridden(_read_for("mitigate", path), overrides)


def read_with_recipe(path: Path, overrides: list[str], command: str) -> dict[str, Any]:
    """Return the mapping in a YAML file for `command`, whose field `recipe` takes the overrides. Raises BadInput."""
    content = _read_for(command, path)
    if isinstance(content.get("recipe"), dict):
        content["recipe"] = overridden(content["recipe"], overrides)
    return content


DESCRIBED = {"mitigate": "one run", "compare": "a comparison of variants", "continual": "targets one after the other"}


def _read_for(command: str, path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises BadInput where another command is the one that takes it."""
    content = read_yaml(path)
    takes = _command(content)
    if takes and takes != command:
        raise BadInput(
            f"{str(path)!r} describes {DESCRIBED[takes]}; run `python -m flows.{takes} {path}`, "
            f"or give a file that describes {DESCRIBED[command]}"
        )
    return content


def _command(content: dict[str, Any]) -> str | None:
    """Return the command that a file is for, None where its fields do not tell."""
    if "recipe" in content:
        return "continual" if "targets" in content else "compare"
    return "mitigate" if "base" in content and "target" in content else None


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


def flattened(model: type[BaseModel], changes: dict[str, Any]) -> dict[str, Any]:
    """Return changes of `model` with the fields of a section one by one: {train: {epochs: 2}} is {train.epochs: 2}.

    So the rest of the section stays as it is. A mapping with `kind` is another one in place of it, as is a `base`.
    """
    flat: dict[str, Any] = {}
    for name, value in changes.items():
        if isinstance(value, dict) and value and "kind" not in value and name != "base" and _is_section(model, name):
            flat |= flattened(model, {f"{name}.{inner}": given for inner, given in value.items()})
        else:
            flat[name] = value
    return flat


def _is_section(model: type[BaseModel] | None, name: str) -> bool:
    for part in name.split("."):
        field = model.model_fields.get(part) if model else None
        kinds = [field.annotation, *get_args(field.annotation)] if field else []
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return model is not None


def validated(model: type[M], content: Any, where: str) -> M:
    """Return `content` as `model`. Raises BadInput with one line per mistake."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = []
        for mistake in error.errors(include_url=False):
            field = ".".join(str(part) for part in mistake["loc"]) or "recipe"
            secret = "base_url" in mistake["loc"] or isinstance(mistake["input"], dict)  # a URL may hold a password
            given = "" if mistake["type"] == "missing" or secret else f" (given {shown(mistake['input'])})"
            known = _fields_near(model, mistake["loc"]) if mistake["type"] == "extra_forbidden" else ""
            lines.append(f"  {field}: {mistake['msg'].removeprefix('Value error, ')}{given}{known}{_remedy(mistake)}")
        raise BadInput(f"{where} is not valid:\n" + "\n".join(lines)) from None


def _remedy(mistake: Any) -> str:
    """Return what to write where YAML reads another thing than is meant."""
    kind, given = mistake["type"], mistake["input"]
    if kind == "string_type" and isinstance(given, dict) and not _has_values(given):
        return "; a template in braces is written in quotes, as '{answer}'"
    if kind in ("model_type", "dict_type") and given is None:
        return "; leave the section out, or give its fields"
    if kind in ("tuple_type", "list_type") and isinstance(given, str):
        return f"; a list is written as [{given}]"
    return ""


def _fields_near(model: type[BaseModel], place: tuple[Any, ...]) -> str:
    current: Any = model
    for name in place[:-1]:
        field = getattr(current, "model_fields", {}).get(name)
        current = field.annotation if field else None
    names = getattr(current, "model_fields", {})
    return f"; allowed: {', '.join(names)}" if names else ""
