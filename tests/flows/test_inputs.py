"""Every input that people bring and that the page of refusals lists ends as the page says."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.inputs import INPUTS, Input, make


def _page() -> Any:
    spec = importlib.util.spec_from_file_location("refusals", ROOT / "docs" / "refusals.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


refusals = _page()
ALL = [brought for inputs in INPUTS.values() for brought in inputs]


@pytest.mark.processes
@pytest.mark.parametrize("brought", ALL, ids=lambda brought: brought.what)
def test_an_input_ends_as_the_page_says(brought: Input, tmp_path: Path, server: str) -> None:
    message = refusals.outcome(brought, make(tmp_path / "case"), {"PREFECT_API_URL": f"{server}/api"})
    assert f"| {brought.what} | {refusals._cell(message)} |" in (ROOT / "docs/reference/refusals.md").read_text()
