"""What the documents say of the code is true of it: fields, files, commands, links; actions are pinned."""

import importlib.util
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml
from pydantic import create_model

from cfsd.comparison import Comparison
from cfsd.data.target import Target
from cfsd.errors import BadInput
from cfsd.filter.rules import Rows as FilterRows
from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.target_sequence import TargetSequence
from cfsd.train.methods import Methods
from flows.fields import rows
from tests.conftest import ROOT

HISTORY = ROOT / "docs" / "LOG.md"  # names files as they were
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES = [*TOP, *sorted(page for page in (ROOT / "docs").rglob("*.md") if page != HISTORY)]
ACTIONS = [file for kind in ("workflows", "actions") for file in sorted((ROOT / ".github" / kind).rglob("*.yml"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FREE = {  # mappings with names of their own
    "generate.fractions.", "evaluate.benchmarks.task.", "target.config.", "train.rehearsal.budget.", "merge.budget.",
}  # fmt: skip
FILE = re.compile(
    r"(?<![\w./-])((?:cfsd|tasks|flows|tests|benchmarks|deployments|docs)/[\w./-]+\.(?:py|ya?ml|jsonl?|md|png|svg))\b"
)


def script(name: str) -> ModuleType:
    """Return the module of a script in docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_can_be_scanned() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


def test_the_reference_has_every_field_of_recipe_comparison_and_machine() -> None:
    page = script("reference_fields").page()
    for model in (Recipe, Comparison, TargetSequence, Machine):
        for field in rows(model):
            assert f"| `{field.name.removeprefix('recipe.')}` |" in page, field.name
            assert field.kind and field.description, field


@pytest.mark.parametrize("name", NAMES)
def test_files_that_a_page_names_are_there(name: str) -> None:
    text = (ROOT / name).read_text()
    to_add = set(re.findall(r"new file `([^`]+)`", text))
    assert {file for file in FILE.findall(text) if not (ROOT / file).exists()} <= to_add


@pytest.mark.parametrize("name", NAMES)
def test_commands_that_a_page_names_are_there(name: str) -> None:
    modules = set(re.findall(r"python -m ((?:flows|cfsd|benchmarks)(?:\.\w+)*)", (ROOT / name).read_text()))
    at = {module: ROOT / Path(*module.split(".")) for module in modules}
    assert {m for m, p in at.items() if not p.with_suffix(".py").exists() and not (p / "__main__.py").exists()} == set()
    targets = set(re.findall(r"`make ([a-z-]+)", (ROOT / name).read_text()))
    known = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= known


@pytest.mark.parametrize("page", TOP, ids=lambda page: page.name)
def test_links_outside_the_site_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    assert {link for link in links if "://" not in link and not (ROOT / link.partition("#")[0]).exists()} == set()


def known_fields() -> set[str]:
    names = {part for model in (Recipe, Comparison, Machine) for field in rows(model) for part in _parts(field.name)}
    return names | {"name", "seeds", "targets"} | {f"earlier.{name}" for name in Target.model_fields}


def _parts(name: str) -> list[str]:
    plain = name.replace("[]", "").removeprefix("recipe.").split(".")
    return [".".join(plain[: i + 1]) for i in range(len(plain))]


def dotted(value: Any, prefix: str = "") -> set[str]:
    """Return the names of the fields that a fragment of YAML sets; free mappings count by their own name."""
    if isinstance(value, list):
        return {name for item in value if isinstance(item, dict) for name in dotted(item, prefix)}
    if not isinstance(value, dict) or prefix in FREE:
        return {prefix.rstrip(".")}
    return {name for key, inner in value.items() if key != "…" for name in dotted(inner, f"{prefix}{key}.")}


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(ROOT / name, "yaml")])
def test_recipes_in_a_page_set_fields_that_exist(name: str) -> None:
    for block in blocks(ROOT / name, "yaml"):
        content = yaml.safe_load(block)
        for changes in [*(content.pop("variants", {}) or {}).values(), *(content.pop("sweeps", {}) or {}).values()]:
            assert set(changes) <= known_fields()
        assert dotted(content.pop("recipe", content)) <= known_fields(), block


def test_the_recipe_of_the_readme_is_one() -> None:
    (block,) = blocks(ROOT / "README.md", "yaml")
    recipe = Recipe.model_validate(yaml.safe_load(block))
    assert recipe.train.rehearsal.loss == "kl"
    assert len(block.splitlines()) <= 16


def test_the_picture_keeps_the_order_and_leaves_out_what_follows() -> None:
    architecture = script("architecture")
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert architecture.reduced(graph) == {"a": {"b"}, "b": {"c"}, "c": set(), "d": {"c"}}
    assert architecture.ranks(graph) == {"a": 0, "b": 1, "c": 2, "d": 0}
    packages = {f"cfsd.{path.name}" for path in (ROOT / "cfsd").iterdir() if (path / "__init__.py").exists()}
    assert packages | {"tasks", "flows"} <= set(architecture.imports())


@pytest.mark.parametrize("workflow", ACTIONS, ids=lambda file: file.name)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    uses = [use for use in re.findall(r"uses: *(\S+)(.*)", workflow.read_text()) if not use[0].startswith("./")]
    assert uses and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", action) and "# v" in said for action, said in uses)


def example(name: str) -> dict[str, Any]:
    """Return what the longest Python block of an extension page defines: the others are fragments."""
    names: dict[str, Any] = {"__name__": f"example_{name}"}
    exec(max(blocks(ROOT / "docs" / "extending" / f"{name}.md", "python"), key=len), names)
    return names


def test_the_example_of_a_method_is_one() -> None:
    half = example("method")["Half"]
    methods = create_model("Methods", __base__=Methods, half=(half, half()))
    on = methods.model_validate({"half": {"weight": 0.5}, "ewc": {"weight": 1}})
    assert {name: pull.scale for name, pull in on.pulls().items()} == {"ewc": 0.5, "half": 0.25}
    assert methods().digest() == Methods().digest()


def test_the_example_of_a_measure_is_one() -> None:
    entry = example("measure")["ENTRY"]
    responses = tuple(pd.DataFrame({"nll": nll}) for nll in ([3.0, 2.0, 1.0, 5.0], [1.0, 1.0, 2.0, 1.0]))
    figure = entry.compute(SimpleNamespace(responses=responses))
    assert figure.value == 0.5 and figure.low < 0.5 < figure.high
    assert entry.compute(SimpleNamespace(responses=None)) is None


def test_the_example_of_a_source_is_one() -> None:
    source = example("source")["ENTRY"]["paragraph"]
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: [7] if text == "\n\n" else [])
    rows_made = source.alike(None, SimpleNamespace(start=1, tokenizer=tokenizer, eos_ids=(2,)), [4, 5])
    assert (rows_made.prompts, rows_made.ids, rows_made.eos_ids) == ([[1, 7], [1, 7]], [4, 5], (2,))


def test_the_example_of_a_filter_rule_is_one() -> None:
    rule = example("filter-rule")["ENTRY"]["max_digits"](SimpleNamespace(max_digits=0.5), None)
    batch = pa.record_batch({"text": ["year 2024", "12345", None]})
    verdicts = list(rule(FilterRows(batch, 0, np.zeros(3, int), np.zeros(3)), np.arange(3)))
    assert [(verdict.place, verdict.reason) for verdict in verdicts] == [(1, "too many digits")]


def test_the_example_of_a_target_kind_is_one(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "rows.db")) as connection, connection:
        connection.execute("CREATE TABLE pairs (prompt, response)")
        connection.execute("INSERT INTO pairs VALUES ('a', 'b')")
    records = example("target-kind")["sqlite_records"]
    target = Target(path=str(tmp_path / "rows.db")).model_copy(update={"name": "pairs"})
    assert list(records(target)) == [("'pairs' row 1", {"prompt": "a", "response": "b"})]
    with pytest.raises(BadInput, match="no readable table 'others'"):
        list(records(target.model_copy(update={"name": "others"})))


def test_the_examples_of_the_library_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(ROOT / "docs" / "how-to" / "library.md", "python"):
        exec(block, {})
    assert re.match(r"0\.0003 \['context-free'\] [0-9a-f]{16}\nvalue=-0\.25 low=-", capsys.readouterr().out)


def test_the_command_prints_every_field_whole_in_a_narrow_terminal() -> None:
    words = [sys.executable, "-m", "flows.fields"]
    done = subprocess.run(
        words, cwd=ROOT, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True, check=True
    )
    printed = " ".join(done.stdout.split())
    for model in (Recipe, Machine):
        for field in rows(model):
            assert field.name in done.stdout
            assert " ".join(field.description.split()) in printed, field.name
    assert "seeds_vary" in printed and "earlier_fraction" in printed  # of comparisons and of sequences
