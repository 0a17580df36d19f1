"""Inputs that people bring end as the page of refusals says: here those that are refused before a server starts.

`make docs-refusals` brings all of them, and `make slow` too.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.inputs import INPUTS, Input, make


def _page_maker() -> Any:
    spec = importlib.util.spec_from_file_location("refusals", ROOT / "docs" / "refusals.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refusals = _page_maker()
PAGE = (ROOT / "docs" / "reference" / "refusals.md").read_text()
ALL = [brought for inputs in INPUTS.values() for brought in inputs]
LONG = [brought for brought in ALL if not brought.refused]


@pytest.mark.processes
@pytest.mark.parametrize(
    "brought",
    [pytest.param(brought, id=brought.what, marks=[pytest.mark.slow] if brought in LONG else []) for brought in ALL],
)
def test_an_input_ends_as_the_page_says(brought: Input, tmp_path: Path) -> None:
    assert refusals.row(brought, make(tmp_path / "case")) in PAGE.splitlines()


def test_the_page_has_a_row_for_each_input() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in PAGE.splitlines() if line.startswith("| ")] == [
        entry for inputs in INPUTS.values() for entry in ("what you bring", *(brought.what for brought in inputs))
    ]
