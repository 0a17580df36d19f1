"""Two people, two data folders, one shared store: the second person's run of the same recipe executes nothing."""

import json
import shutil
from pathlib import Path

import pytest

from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Artifact, Store
from tests.conftest import ROOT, Run, write_rows
from tests.store.conftest import S3Server

CPU = Machine(device="cpu", threads=1)
LESS = ["probe.rows=8", "generate.rows=8"]


def recipe_of(person: Path, model: Path) -> Recipe:
    """Return the same case as another person has it: the same model and rows, elsewhere."""
    shutil.copytree(model, person / "model")
    rows = write_rows(person / "rows.jsonl", count=20)
    (person / "recipe.yaml").write_text(
        f"name: mine\nbase: {person / 'model'}\ntarget: {{path: {rows}, held_out: 8}}\nprobe: {{length: 16}}\n"
        "generate: {length: 16}\nmix: {target_rows: 8}\ntrain: {learning_rate: 1.0e-3}\n"
    )
    return Recipe.load(person / "recipe.yaml", LESS)


def run_of(person: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> RunRecord:
    from flows.corpus import corpus

    person.mkdir()
    monkeypatch.setenv("CFSD_HOME", str(person / "data"))
    return corpus(recipe_of(person, model), CPU).only()


def has_weights(store: Store, artifact: Artifact) -> bool:
    return (store.place(artifact) / "model.safetensors").exists()


def test_the_second_person_executes_nothing_and_brings_no_weights(
    server: str, s3: S3Server, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.files().mkdir("flow")
    monkeypatch.setenv("CFSD_STORE", "s3://flow/team")
    first = run_of(tmp_path / "one", model_folder, monkeypatch)
    second = run_of(tmp_path / "two", model_folder, monkeypatch)
    assert {step.stage for step in first.steps if step.executed} >= {"fetch", "target", "generate", "filter"}
    assert [step.stage for step in second.steps if step.executed] == []
    assert second.artifacts == first.artifacts
    one, two = (Store(tmp_path / person / "data") for person in ("one", "two"))
    corpus = first.artifacts["corpus"]
    assert {"kind": "corpus", "key": corpus.key} in two.manifest(first.artifacts["filtered"])["inputs"]
    (page,) = two.home.glob("reports/*/corpus.html")
    assert page.read_text().count("<table") > 1
    assert has_weights(one, first.artifacts["base"]) and not has_weights(two, second.artifacts["base"])
    two.verify(second.artifacts["base"])
    assert has_weights(two, second.artifacts["base"])


@pytest.mark.slow
def test_commands_of_two_people_on_the_tiny_recipe(run: Run, s3: S3Server, tmp_path: Path) -> None:
    s3.files().mkdir("tiny")
    recipe, seen = ROOT / "deployments" / "recipes" / "tiny.yaml", []
    for person in ("one", "two"):
        done = run("mitigate", recipe, "--store", "s3://tiny/team", "--home", tmp_path / person)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / person / "reports").glob("*/run_records.json")
        (record,) = json.loads(file.read_text())["run_records"]
        seen.append([step["stage"] for step in record["steps"] if step["executed"]])
    assert "train" in seen[0] and seen[1] == []
    assert "cfsd store pull" in done.stdout


def test_a_shared_store_that_cannot_be_is_told_before_anything_runs(run: Run, home: Path, recipe_file: Path) -> None:
    done = run("mitigate", recipe_file, "--store", "s3://me:planted-secret@team/x")
    assert done.returncode == 2 and "no user, password or query" in done.stderr and "planted" not in done.stderr
    assert done.stderr.count("\n") == 1 and not (home / "store").exists()
