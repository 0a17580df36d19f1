"""MLflow as people find it: live and replayed runs look alike, a dead server costs nothing, killed runs are ended."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import mlflow
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_metric_name

from cfsd.machine import Machine
from cfsd.recipe import Recipe
from cfsd.report.compared import NOTHING
from cfsd.report.run_record import RunRecord
from cfsd.store.artifact import Draft, Store
from tasks import record
from tasks.record import client as record_client
from tasks.record import flattened, run_url
from tasks.record.description import NOTE, described
from tasks.record.reach import unreachable
from tasks.record.server import Server, accepted
from tasks.record.server import server as record_server
from tasks.report import Report
from tests.conftest import ROOT, Run, write_recipe

ON = ["--machine", "threads=1"]


def client(database: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{database}")


def runs(database: Path) -> list[Any]:
    experiment = client(database).get_experiment_by_name("cfsd")
    return list(client(database).search_runs([experiment.experiment_id])) if experiment else []


def named(database: Path) -> dict[str, Any]:
    """Runs by name; what is above the steps by kind."""
    tags = {run.info.run_id: run.data.tags for run in runs(database)}
    is_step = {number: "cfsd.stage" in own for number, own in tags.items()}
    return {
        run.info.run_name if is_step[run.info.run_id] else run.data.tags["cfsd.kind"]: run for run in runs(database)
    }


def files_of(database: Path, run: Any) -> set[str]:
    return {file.path for file in client(database).list_artifacts(run.info.run_id)}


def table_of(database: Path, run: Any, name: str, folder: Path) -> Any:
    return pd.read_json(client(database).download_artifacts(run.info.run_id, name, str(folder)), orient="split")


def elsewhere(database: Path) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{database}"}


STEPS = {
    "probe", "generate", "check", "train", "evaluate tiny_rev · base", "evaluate tiny_rev · tuned",
    "evaluate target · base", "evaluate target · tuned", "evaluate target divergence · tuned",
    "evaluate probe · tuned", "show · base", "show · tuned",
}  # fmt: skip
SCORED = ["evaluate.benchmarks=[{name: tiny_rev, limit: 12}]"]


@contextmanager
def recording_into(database: Path, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process use another MLflow."""
    before = mlflow.get_tracking_uri()
    patch.setattr(record_client, "_asked", [])
    patch.setattr(record_client, "_away", [])
    patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    mlflow.set_tracking_uri(f"sqlite:///{database}")
    record_server.cache_clear()
    yield
    mlflow.set_tracking_uri(before)
    record_server.cache_clear()


@pytest.fixture(scope="module")
def twice(server: str, tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[dict[str, Any]]:
    """One recipe run into two MLflow databases: live into the first, cached into the second, there twice."""
    from flows.mitigate import mitigate

    folder = tmp_path_factory.mktemp("twice")
    recipe = Recipe.load(write_recipe(folder, model_folder), SCORED)
    first, second = folder / "first.db", folder / "second.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CFSD_HOME", str(folder / "data"))
        for database in (first, second, second):
            with recording_into(database, patch):
                mitigate(recipe, Machine(device="cpu", threads=1))
        yield {"first": first, "second": second, "home": folder / "data"}


def test_a_cached_run_is_replayed_into_a_server_that_never_saw_it(twice: dict[str, Any]) -> None:
    first, second = twice["first"], twice["second"]
    live, replayed = named(first), named(second)
    assert set(live) == set(replayed) == STEPS | {"variant"}
    assert live["train"].data.tags["attempt"] == "first" and replayed["train"].data.tags["attempt"] == "replayed"
    for step in STEPS:
        ours = {k: v for k, v in live[step].data.metrics.items() if not k.startswith("system/")}
        assert ours == replayed[step].data.metrics != {}
        assert live[step].data.params == replayed[step].data.params
        assert inputs_of(live[step]) == inputs_of(replayed[step]) != {}
        assert files_of(first, live[step]) == files_of(second, replayed[step]) >= {"manifest.json", "settings.json"}
    curves = [
        [(m.step, m.value) for m in client(db).get_metric_history(found["train"].info.run_id, "train/target_loss")]
        for db, found in ((first, live), (second, replayed))
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 8
    parent = live["variant"]
    assert parent.data.metrics == replayed["variant"].data.metrics
    flow_run = parent.data.tags["cfsd.prefect_flow_run"]
    assert {r.data.tags["cfsd.prefect_flow_run"] for r in live.values()} == {flow_run}
    assert parent.data.tags["cfsd.prefect_url"].endswith(f"/runs/flow-run/{flow_run}")
    assert live["train"].data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert files_of(first, parent) >= {"report.html", "summary.json", "recipe.yaml"}


def inputs_of(run: Any) -> dict[str, tuple[str, str]]:
    """What a run read by context: kind and digest."""
    return {i.tags[0].value: (i.dataset.name, i.dataset.digest) for i in run.inputs.dataset_inputs}


def test_each_step_is_one_run_and_every_variant_links_to_it(twice: dict[str, Any]) -> None:
    found = runs(twice["second"])
    assert {r.info.status for r in found} == {"FINISHED"}
    steps = [r for r in found if "cfsd.stage" in r.data.tags]
    assert len(steps) == len(STEPS) == len({r.data.tags["cfsd.key"] for r in steps})
    parents = [r for r in found if r.data.tags["cfsd.kind"] == "variant"]
    assert len(parents) == 2
    for parent in parents:
        described = parent.data.tags["mlflow.note.content"]
        assert "nats per token" in described and "|  | base | mine |" in described
        for step in steps:
            page = f"#/experiments/{step.info.experiment_id}/runs/{step.info.run_id}?workflowType=machine_learning"
            assert f"[{step.info.run_name}]({page}) `{step.data.tags['cfsd.key']}`, cached" in described


def test_a_step_shows_what_it_was_given_and_what_it_made(twice: dict[str, Any], tmp_path: Path) -> None:
    database = twice["first"]
    found = named(database)
    train = found["train"]
    assert train.data.params["learning_rate"] == "0.001" and train.data.params["rehearsal.weight"] == "1.0"
    manifest = json.loads(Path(client(database).download_artifacts(train.info.run_id, "manifest.json")).read_text())
    assert manifest["key"] == train.data.tags["cfsd.key"]
    assert files_of(database, train) >= {"metrics.jsonl", "log.txt", "curve-target.png", "curve-rehearsal-nll.png"}
    (base,) = [i.dataset for i in train.inputs.dataset_inputs if i.tags[0].value == "base"]
    place = Path(urlsplit(json.loads(base.source)["uri"]).path)
    assert (
        place.parent == Store(twice["home"]).root / "model"
        and json.loads((place / "manifest.json").read_text())["content"] == base.digest
    )

    sampled = table_of(database, found["generate"], "table-corpus.json", tmp_path)
    assert len(sampled) == 20 and {"text", "finish_reason"} <= set(sampled) and "token_ids" not in sampled
    assert sampled["text"].str.len().max() > 1
    assert "corpus.html" in files_of(database, found["generate"])
    shown = json.loads(found["generate"].data.tags["mlflow.loggedArtifacts"])
    assert shown == [{"path": "table-corpus.json", "type": "table"}]
    assert found["evaluate tiny_rev · tuned"].data.params["benchmark.limit"] == "12"
    assert len(table_of(database, found["evaluate tiny_rev · tuned"], "table-scores.json", tmp_path)) == 12


def test_answers_are_tables_of_their_steps_and_side_by_side_of_the_variant(
    twice: dict[str, Any], tmp_path: Path
) -> None:  # fmt: skip
    for database in (twice["first"], twice["second"]):
        found = named(database)
        known = [{"path": "table-answers.json", "type": "table"}]
        runs_of = [found[name] for name in ("show · base", "show · tuned", "variant")]
        assert [json.loads(run.data.tags["mlflow.loggedArtifacts"]) for run in runs_of] == [known] * 3
        base, tuned, both = (table_of(database, run, "table-answers.json", tmp_path) for run in runs_of)
        assert list(both) == ["prompt", "expected", "base", "mine"] and len(both) == 8
        assert both["base"].tolist() == base["answer"].tolist() != tuned["answer"].tolist() == both["mine"].tolist()


def test_scores_of_a_tuned_model_say_what_was_lost_against_the_base(twice: dict[str, Any], tmp_path: Path) -> None:
    (file,) = (twice["home"] / "reports").glob("*/summary.json")
    summary = json.loads(file.read_text())["variants"]["mine"]
    lost = summary["benchmarks"]["tiny_rev"]
    for database in (twice["first"], twice["second"]):
        found = named(database)
        scores = found["evaluate tiny_rev · tuned"].data
        bounds = [scores.metrics[f"forgetting{end}"] for end in ("", "_low", "_high")]
        assert bounds == [lost["forgetting"][end] for end in ("value", "low", "high")]
        assert (scores.metrics["base"], scores.metrics["tuned"]) == (lost["base"], lost["tuned"])
        base = found["evaluate tiny_rev · base"].data.tags["cfsd.key"]
        manifest = json.loads((twice["home"] / "store" / "scores" / base / "manifest.json").read_text())
        assert scores.tags["cfsd.against"] == manifest["content"]
        assert "forgetting" not in found["evaluate tiny_rev · base"].data.metrics
        gain = found["evaluate target · tuned"].data.metrics
        assert [gain["target_gain_low"], gain["target_gain_high"]] == [
            summary["target_gain"][e] for e in ("low", "high")
        ]
        probe = found["evaluate probe · tuned"].data.metrics
        assert probe["probe_kl_high"] == summary["probe_kl"]["high"]


def test_the_model_is_a_logged_model_that_leads_to_the_store_and_holds_the_figures(twice: dict[str, Any]) -> None:
    database = twice["second"]
    found = named(database)
    experiment = found["train"].info.experiment_id
    (model,) = client(database).search_logged_models([experiment])
    assert model.source_run_id == found["train"].info.run_id and str(model.status) == "READY"
    assert [m.model_id for m in found["train"].outputs.model_outputs] == [model.model_id]
    assert model.params["learning_rate"] == "0.001"
    weights = Path(urlsplit(model.tags["cfsd.address"]).path)
    assert (weights / "model.safetensors").is_file()
    files = [file.path for file in client(database).list_logged_model_artifacts(model.model_id)]
    assert files == ["MLmodel"]
    gain = found["variant"].data.metrics["target_gain"]
    assert gain in {metric.value for metric in model.metrics if metric.key == "target_gain"}


def test_two_variants_differ_in_what_was_set(twice: dict[str, Any]) -> None:
    parent = named(twice["first"])["variant"]
    assert parent.data.params["base"] and parent.data.params["target"] == "rows.jsonl"
    assert parent.data.params["train.learning_rate"] == "0.001" and parent.data.params["name"] == "mine"
    assert "train.schedule" not in parent.data.params and "train.seed" not in parent.data.params
    text = Path(client(twice["first"]).download_artifacts(parent.info.run_id, "recipe.yaml")).read_text()
    assert Recipe.model_validate(yaml.safe_load(text)).digest() == parent.data.tags["cfsd.recipe"]
    assert {"target_gain", "probe_kl", "mean_forgetting", "minutes"} <= set(parent.data.metrics)


def test_a_description_too_long_for_mlflow_loses_its_table_and_no_link() -> None:
    table, steps = "\n".join(["| a | b |"] * 1000), "* [train](#/experiments/1/runs/2)"
    assert described("A verdict.", table, steps) == f"The table is in the report.\n\nA verdict.\n\n\n{steps}"
    assert described("A verdict.", "", "| a | b |", steps) == f"A verdict.\n\n| a | b |\n\n{steps}"


def test_the_lines_of_the_documentation_find_the_variants(
    twice: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "how-to" / "compare-in-mlflow.md").read_text()
    (lines,) = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    with recording_into(twice["second"], monkeypatch):
        exec(lines, {})
    printed = capsys.readouterr().out.splitlines()
    gain = named(twice["second"])["variant"].data.metrics["target_gain"]
    assert len(printed) == 3 and all(f"{gain:.6f}"[:6] in line and "mine" in line for line in printed[1:])


def test_the_experiment_opens_on_training_runs(twice: dict[str, Any]) -> None:
    experiment = client(twice["first"]).get_experiment_by_name("cfsd")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    view = json.loads(experiment.tags["mlflow.sharedViewState.variants"])
    figures = {c.split("`")[1] for c in view["selectedColumns"] if c.startswith("metrics.")}
    parents = client(twice["first"]).search_runs([experiment.experiment_id], view["searchFilter"])
    assert [p.data.tags["cfsd.kind"] for p in parents] == ["variant"] and figures <= set(parents[0].data.metrics)


def test_a_dead_mlflow_server_costs_nothing(run: Run, recipe_file: Path, tmp_path: Path) -> None:
    dead = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    done = run("mitigate", recipe_file, *ON, env=dead)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("MLflow cannot be reached at http://127.0.0.1:9 (MLFLOW_TRACKING_URI); the run goes") == 1
    later = tmp_path / "later.db"
    assert run("mitigate", recipe_file, *ON, env=elsewhere(later)).returncode == 0
    assert named(later)["train"].data.metrics["train/target_loss"] > 0


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


def test_a_step_that_is_executed_again_is_told_on_the_run_of_then(
    home: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after its artifact was deleted; another machine may have made another one."""
    key, database, contents = "0" * 16, tmp_path / "mlflow.db", []
    for text in ("first", "again"):

        def work(draft: Draft, text: str = text) -> None:
            with record.step("probe", key, draft, {"spec": 1}, gpu=True):
                (draft.folder / "a.txt").write_text(text)

        with recording_into(database, monkeypatch), record.variant(text):
            made, _ = store.make("corpus", key, work)
            record.keep_step("probe", store, made, {"spec": 1}, executed=True, gpu=True)
        contents.append(made.content)
        shutil.rmtree(store.place(made))
    newest, oldest = (run for run in runs(database) if run.data.tags["cfsd.kind"] == "step")
    for run, content in zip((oldest, newest), contents, strict=True):
        manifest = client(database).download_artifacts(run.info.run_id, "manifest.json", str(tmp_path))
        assert json.loads(Path(manifest).read_text())["content"] == content
    parents = {run.info.run_name: run.data.tags[NOTE] for run in runs(database)}
    assert oldest.info.run_id in parents["first"] and newest.info.run_id in parents["again"]
    with recording_into(database, monkeypatch):
        found = record_client.tracked(lambda server: server.step(key))
        assert found and found.run_id == newest.info.run_id


@pytest.mark.parametrize("method", ["log_inputs", "log_batch"])
def test_a_run_that_mlflow_refuses_half_of_is_ended_all_the_same(
    home: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Live, and replayed from the store."""

    def refuse(*_: Any, **__: Any) -> None:
        raise MlflowException("refused")

    made, _ = store.make("corpus", "0" * 16, lambda draft: draft.metadata.update(rows=1))
    given = {"spec": 1, "target": made}
    for executed in (True, False):
        database = tmp_path / f"{executed}.db"
        with recording_into(database, monkeypatch), record.variant("first"), monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, refuse)
            if executed:
                with record.step("probe", made.key, Draft(store, tmp_path, False), given, gpu=True):
                    pass
            else:
                record.keep_step("probe", store, made, given, executed=True, gpu=True)
        with recording_into(database, monkeypatch):
            record_client.tracked(record.end_dead_runs)
        assert len(runs(database)) == 2 and "RUNNING" not in {run.info.status for run in runs(database)}


def test_an_mlflow_that_failed_is_asked_again_after_a_while(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise OSError("broken pipe")

    with recording_into(tmp_path / "mlflow.db", monkeypatch):
        assert record_client.tracked(fail) is None and record_client.tracked(lambda _: "answer") is None
        monkeypatch.setattr(record_client, "AWAY_SECONDS", 0)
        assert record_client.tracked(fail) is None and record_client.tracked(lambda _: "answer") == "answer"
        said = capsys.readouterr().out
        assert said.count("MLflow cannot be reached") == 1 and said.count("MLflow answers again") == 1


def test_what_mlflow_refuses_stops_nothing_that_it_takes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with recording_into(tmp_path / "mlflow.db", monkeypatch), record.variant("first") as variant:
        run_id = str(variant.run_id)
        for value in ("1", "2"):  # a parameter has one value
            record_client.tracked(lambda server, value=value: server.log_param(run_id, "rows", value))  # type: ignore[misc]
        record_client.tracked(lambda server: server.log_param(run_id, "seed", "0"))
    assert capsys.readouterr().out.count("MLflow refuses a part of what is recorded") == 1
    assert runs(tmp_path / "mlflow.db")[0].data.params == {"rows": "1", "seed": "0"}


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


@pytest.mark.parametrize("name", ["probe_kl", "target_gain", "minutes"])
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
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/experiments/7/runs/abc?workflowType=machine_learning"),
        (
            "https://me:secret@team.example/mlflow/",
            "https://team.example/mlflow/#/experiments/7/runs/abc?workflowType=machine_learning",
        ),
    ],
)
def test_the_page_of_a_run_is_known_where_a_server_shows_it(
    uri: str, page: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    ours: Any = SimpleNamespace(experiment="7")
    monkeypatch.setattr(
        "tasks.record.pages.tracked", lambda action: action(SimpleNamespace(page=lambda run: Server.page(ours, run)))
    )
    assert run_url("abc") == page
    assert run_url(None) is None


def test_a_merged_model_is_linked_to_its_variant_once_and_figures_follow(
    home: Path, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A merge is no run of its own, so that its model is named on the variant's; MLflow fails at a second link."""
    made, _ = store.make("model", "0" * 16, lambda draft: draft.metadata.update(parameters=1))
    base, _ = store.make("model", "1" * 16, lambda draft: draft.metadata.update(parameters=2))
    merged = RunRecord(name="half", artifacts={"base": base, "tuned": base, "final": made})
    report = Report([], NOTHING, {}, [], "half\n\nverdict", run_records=[merged])
    monkeypatch.setattr("tasks.record.against_base.note_scores", lambda *_: None)  # there are none
    with recording_into(tmp_path / "mlflow.db", monkeypatch), record.variant("half") as variant:
        for _ in range(2):
            record.conclusion(variant.run_id, {"probe_kl": 0.1}, [], report=report)
    assert "MLflow refuses" not in capsys.readouterr().out
    (found,) = runs(tmp_path / "mlflow.db")
    assert len(found.outputs.model_outputs) == 1 and found.data.metrics["probe_kl"] == 0.1
