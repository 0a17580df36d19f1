"""Whatever stands in a recipe's file: a recipe, or one message that names the file; nothing else."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cfsd.comparison import Comparison
from cfsd.errors import BadInput
from cfsd.overrides import parse_overrides
from cfsd.recipe import Recipe
from cfsd.target_sequence import TargetSequence

WHOLE: dict[str, Any] = {"name": "mine", "base": "tiny", "target": {"path": "rows.jsonl"}}
FIELDS = {
    name: list(getattr(field.annotation, "model_fields", {}) or ["kind", "path"])
    for name, field in Recipe.model_fields.items()
}
FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.dates(), st.datetimes(),
    st.binary(max_size=4), st.sampled_from(["1e-3", "~", ".nan", "-.inf", "0x" + "f" * 5000, "2001-99-99", "null"]),
)  # fmt: skip
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3), max_leaves=6
)
SIGNS = "ab:-[]{}&*<|>!%@`\"'#?,~ \t\n\r\x00\u2028"
names = st.sampled_from([f"{part}.{name}" for part, inner in FIELDS.items() for name in inner] + list(FIELDS))


def loads_or_says(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_bytes(text)
        for kind in (Recipe, Comparison, TargetSequence):
            try:
                kind.load(file)  # type: ignore[attr-defined]
            except BadInput as error:
                assert "recipe.yaml" in str(error)
                assert len(str(error)) < 20_000


@FEW
@given(st.dictionaries(names, values, max_size=4))
def test_fields_of_any_type(changes: dict[str, Any]) -> None:
    content: dict[str, Any] = {**WHOLE}
    for name, value in changes.items():
        part, _, field = name.partition(".")
        if not field:
            content[part] = value
        elif isinstance(content.setdefault(part, {}), dict):
            content[part] = {**content[part], field: value}
    loads_or_says(yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass"))


@FEW
@given(values)
def test_a_document_of_any_shape(value: Any) -> None:
    loads_or_says(yaml.safe_dump(value, allow_unicode=True).encode("utf-8", "surrogatepass"))


@FEW
@given(
    st.binary(max_size=40) | st.text(alphabet="ab:-[]{}&*<|>!%@`\"'#?,~ \t\n\r\x00\u2028", max_size=40).map(str.encode)
)
def test_any_bytes(text: bytes) -> None:
    loads_or_says(text)
    loads_or_says(yaml.safe_dump(WHOLE).encode() + text)


@FEW
@given(names | st.text(max_size=9), st.text(max_size=12) | scalars.map(str))
def test_overrides_of_any_text(name: str, value: str) -> None:
    try:
        parse_overrides([f"{name}={value}"])
    except BadInput as error:
        assert "--set" in str(error)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"name: a\nbase: tiny\nname: b\n", "'name' is there twice, in lines 1 and 3"),
        (b"name: a\ntrain: {epochs: 1, epochs: 2}\n", "'epochs' is there twice"),
        (b"\xff\xfen\x00a\x00m\x00e\x00", "not text in UTF-8"),
        ("name: für\n".encode("latin-1"), "not text in UTF-8"),
        (b"", "is not a mapping"),
        (b"- a\n", "is not a mapping"),
        (b"1: a\n", "a field named 1"),
        (b"name: a\n\tbase: tiny\n", "not valid YAML"),
        (b"name: 2001-13-01\n", "not valid YAML: month must be in 1..12"),
        (b"name: " + b"1" * 5000, "not valid YAML"),
        (b"name: " + b"[" * 5000, "nested too deeply"),
        (b"name: &a [*a]\nbase: tiny\n", "name: Input should be a valid string"),
        (f"{BOMB}name: *i\n".encode(), "name: Input should be a valid string"),
        (yaml.safe_dump(WHOLE | {"train": {"learning_rate": float("inf")}}).encode(), "should be a finite number"),
        (b"a: b\n---\nc: d\n", "not valid YAML"),
        (b"name: !!python/object/apply:os.getcwd []\n", "not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text)
    with pytest.raises(BadInput) as refused:
        Recipe.load(tmp_path / "recipe.yaml")
    assert message in str(refused.value) and "recipe.yaml" in str(refused.value)


def test_a_mark_at_the_beginning_and_references_are_read(tmp_path: Path) -> None:
    text = "﻿name: für\nbase: tiny\ntarget: {path: rows.jsonl}\nprobe: &p {rows: 8}\ngenerate:\n  <<: *p\n  length: 4\n"
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = Recipe.load(tmp_path / "recipe.yaml")
    assert (recipe.name, recipe.generate.rows, recipe.generate.length) == ("für", 8, 4)


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is a folder"):
        Recipe.load(tmp_path)
