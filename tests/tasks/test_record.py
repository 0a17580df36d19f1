"""MLflow as people find it: live and replayed runs look alike, a dead server costs nothing, killed runs are ended."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.utils.validation import _validate_metric_name

from cfsd.recipe import Recipe
from tasks.record import flattened, run_url
from tasks.record.reach import unreachable
from tasks.record.server import accepted
from tests.conftest import ROOT, Run

ON = ["--machine", "threads=1"]


def client(database: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{database}")


def runs(database: Path) -> list[Any]:
    experiment = client(database).get_experiment_by_name("cfsd")
    return list(client(database).search_runs([experiment.experiment_id])) if experiment else []


def kinds(database: Path) -> dict[str, dict[str, Any]]:
    """Runs by stage, or by kind for those above."""
    return {run.data.tags.get("cfsd.stage", run.data.tags["cfsd.kind"]): run for run in runs(database)}


def elsewhere(database: Path) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}


def test_a_cached_run_is_replayed_into_a_server_that_never_saw_it(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.db", tmp_path / "second.db"
    assert run("mitigate", recipe_file, *ON, env=elsewhere(first)).returncode == 0
    assert run("mitigate", recipe_file, *ON, env=elsewhere(second)).returncode == 0
    live, replayed = kinds(first), kinds(second)
    assert set(live) == set(replayed) == {
        "variant", "probe", "generate", "check", "train",
        "evaluate-target", "evaluate-target-divergence", "evaluate-probe",
    }  # fmt: skip
    assert live["train"].data.tags["attempt"] == "first" and replayed["train"].data.tags["attempt"] == "replayed"
    for stage in set(live) - {"variant"}:
        ours = {k: v for k, v in live[stage].data.metrics.items() if not k.startswith("system/")}
        assert ours == replayed[stage].data.metrics != {}
    curves = [
        [(m.step, m.value) for m in client(db).get_metric_history(found["train"].info.run_id, "train/target_loss")]
        for db, found in ((first, live), (second, replayed))
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 8
    parent = live["variant"]
    flow_run = parent.data.tags["cfsd.prefect_flow_run"]
    assert {r.data.tags["cfsd.prefect_flow_run"] for r in live.values()} == {flow_run}
    assert parent.data.tags["cfsd.prefect_url"].endswith(f"/runs/flow-run/{flow_run}")
    assert parent.data.metrics == replayed["variant"].data.metrics
    assert live["train"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert parent.data.params["train.learning_rate"] == "0.001"
    assert {f.path for f in client(first).list_artifacts(parent.info.run_id)} >= {"report.html", "summary.json"}
    assert run("mitigate", recipe_file, *ON, env=elsewhere(second)).returncode == 0
    assert len([r for r in runs(second) if r.data.tags.get("cfsd.stage") == "train"]) == 1


def test_a_dead_mlflow_server_costs_nothing(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    dead = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = run("mitigate", recipe_file, *ON, env=dead)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("MLflow cannot be reached at http://127.0.0.1:9 (MLFLOW_TRACKING_URI); the run goes") == 1
    later = tmp_path / "later.db"
    assert run("mitigate", recipe_file, *ON, env=elsewhere(later)).returncode == 0
    assert kinds(later)["train"].data.metrics["train/target_loss"] > 0


def test_runs_of_a_killed_process_are_ended_by_the_next(
    run: Run, recipe_file: Path, home: Path, tmp_path: Path
) -> None:
    database = tmp_path / "mlflow.db"
    words = [sys.executable, "-m", "flows.mitigate", str(recipe_file), *ON, "--set", "generate.rows=4000"]
    process = subprocess.Popen(words, cwd=ROOT, env=elsewhere(database), stdout=subprocess.DEVNULL)
    end = time.monotonic() + 90
    while not list((home / "store" / "corpus").glob("*.draft/corpus-00001.parquet")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {r.info.status for r in runs(database) if "generate" in r.info.run_name} == {"RUNNING"}
    assert run("mitigate", recipe_file, *ON, env=elsewhere(database)).returncode == 0
    statuses = {r.info.run_name: r.info.status for r in runs(database)}
    assert "RUNNING" not in statuses.values()
    assert "KILLED" in statuses.values()


def test_parameters_are_the_recipe_field_by_field(recipe_file: Path) -> None:
    flat = flattened(Recipe.load(recipe_file).model_dump(mode="json"))
    assert flat["mix.target_rows"] == "8" and flat["train.schedule"] == "cosine"
    assert not any(isinstance(value, dict) for value in flat.values())


@given(st.text(max_size=12).map(lambda name: f"forgetting/{name}") | st.text(min_size=1, max_size=12))
def test_every_name_of_a_benchmark_is_one_that_mlflow_takes(name: str) -> None:
    _validate_metric_name(accepted(name))


@pytest.mark.parametrize("name", ["forgetting/tiny_rev", "train/target_loss", "a b.c-d:e/f", "größe"])
def test_a_name_that_mlflow_takes_stays(name: str) -> None:
    assert accepted(name) == name


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("http://127.0.0.1:9", "Connection refused"),
        ("https://me:secret@127.0.0.1:9/mlflow", "Connection refused"),
        ("postgresql+psycopg2://me:secret@127.0.0.1:9/db", "Connection refused"),
        ("http://no.such.host.invalid:5000", "Error"),
        ("sqlite:////tmp/mlflow.db", None),
        ("databricks", None),
    ],
)
def test_an_mlflow_that_is_away_is_known_at_once(uri: str, reason: str | None) -> None:
    found = unreachable(uri)
    assert found is None if reason is None else found and reason in found and "secret" not in found


def test_an_mlflow_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.record.reach.LIMIT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert unreachable(f"http://127.0.0.1:{silent.getsockname()[1]}") == "no answer within 0 s"


@pytest.mark.parametrize("name", ["forgetting/probe_kl", "target/gain"])
def test_figures_that_were_not_measured_are_left_out(name: str) -> None:
    from cfsd.report.summarise import headline
    from cfsd.report.summary import Summary

    nothing: dict[str, Any] = dict.fromkeys(Summary.model_fields)
    empty = Summary(**nothing | {"name": "x", "digest": "", "target": {}, "benchmarks": {}, "seconds": {},
                                 "executed": [], "cached": [], "corpus_warnings": [], "texts": {}, "answers": {},
                                 "evaluation_warnings": [], "prompts": {}})  # fmt: skip
    assert name not in headline(empty)


@pytest.mark.parametrize(
    ("uri", "page"),
    [
        ("sqlite:///mlflow.db", None),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/experiments/7/runs/abc"),
        ("https://me:secret@team.example/mlflow/", "https://team.example/mlflow/#/experiments/7/runs/abc"),
    ],
)
def test_the_page_of_a_run_is_known_where_a_server_shows_it(
    uri: str, page: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr("tasks.record.pages.tracked", lambda action: action(SimpleNamespace(experiment="7")))
    assert run_url("abc") == page
    assert run_url(None) is None
