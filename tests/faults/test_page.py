"""docs/reliability.md says what its table says, and every test that it names is there."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.faults.table import CLAIMED, PAGE, TABLE, page
from tests.inputs import INPUTS

ROWS = [row for rows in TABLE.values() for row in rows]


def test_the_page_is_the_table() -> None:
    assert PAGE.read_text() == page(), "python -m tests.faults.table"


def test_no_fault_is_counted_twice_and_there_are_as_many_as_claimed() -> None:
    assert len({row.fault for row in ROWS}) == len(ROWS) >= CLAIMED
    refused = [brought for inputs in INPUTS.values() for brought in inputs if brought.refused]
    assert PAGE.read_text().count("\n| ") == len(ROWS) + len(refused) + len(TABLE) + 1


@pytest.mark.parametrize("file", sorted({row.test.partition("::")[0] for row in ROWS}))
def test_every_test_that_is_named_is_there(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    named = {re.sub(r"\[.*", "", row.test.partition("::")[2]) for row in ROWS if row.test.startswith(f"{file}::")}
    assert named <= there


@pytest.mark.slow
def test_every_case_that_is_named_is_collected() -> None:
    files = sorted({row.test.partition("::")[0] for row in ROWS})
    words = [sys.executable, "-m", "pytest", "--collect-only", "-m", "", "-p", "no:cacheprovider", *files]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    plain = {re.sub(r"\[.*", "", name) for name in found}
    assert {row.test for row in ROWS} - set(found) - plain == set()
    assert {row.test for row in ROWS if "[" in row.test} <= set(found)
