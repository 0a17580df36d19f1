"""`make up`: real servers on loopback over one data folder; a run started through the API shows in MLflow."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest
import yaml

from flows._environment import is_alive
from tests.conftest import ROOT, save_model, write_rows

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A home with its own Prefect, worker and MLflow, up until the module is done."""
    home = tmp_path_factory.mktemp("served")
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_"))}
    command = [sys.executable, "-m", "flows.serve"]
    place = {"cwd": ROOT, "env": own, "capture_output": True, "text": True, "timeout": 400}
    ports = ["--prefect-port", "14200", "--mlflow-port", "15000"]
    up = subprocess.run([*command, "up", "--home", str(home), *ports], **place)
    assert up.returncode == 0, up.stdout + up.stderr
    servers = json.loads((home / "servers.json").read_text())
    urls = {"prefect": f"{servers['prefect']['url']}/api", "mlflow": servers["mlflow"]["url"]}
    yield {"home": home, "env": own, **urls}
    down = subprocess.run([*command, "down", "--home", str(home)], **place)
    assert down.returncode == 0 and "worker" in down.stdout
    assert not any(is_alive(entry) for entry in servers.values())


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=60) as answer:
        return json.loads(answer.read())


def mlflow_runs(pages: dict[str, Any], name: str) -> list[dict[str, Any]]:
    experiment = ask(f"{pages['mlflow']}/api/2.0/mlflow/experiments/get-by-name?experiment_name=cfsd")
    wanted = {
        "experiment_ids": [experiment["experiment"]["experiment_id"]],
        "filter": f"attributes.run_name = '{name}'",
    }
    return list(ask(f"{pages['mlflow']}/api/2.0/mlflow/runs/search", wanted).get("runs", []))


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "from the form",
        "base": {"kind": "folder", "path": str(save_model(tmp_path / "model"))},
        "target": {"path": str(write_rows(tmp_path / "rows.jsonl")), "held_out": 8},
        "probe": {"rows": 16, "length": 16},
        "generate": {"rows": 16, "length": 16},
        "train": {"learning_rate": 2e-3},
    }


def test_a_run_started_through_the_api_completes_and_shows_in_mlflow(
    pages: dict[str, Any], recipe: dict[str, Any]
) -> None:
    deployment = ask(f"{pages['prefect']}/deployments/name/mitigate/mitigate")
    url = f"{pages['prefect']}/deployments/{deployment['id']}/create_flow_run"
    run = ask(url, {"parameters": {"recipe": recipe, "machine": {"threads": 1}}})
    end = time.monotonic() + 240
    while (state := ask(f"{pages['prefect']}/flow_runs/{run['id']}")["state"])["type"] not in (
        "COMPLETED",
        "FAILED",
        "CRASHED",
    ):
        assert time.monotonic() < end, state
        time.sleep(1)
    assert state["type"] == "COMPLETED", state
    found = mlflow_runs(pages, "from the form")
    assert len(found) == 1 and found[0]["info"]["status"] == "FINISHED"
    params = {p["key"]: p["value"] for p in found[0]["data"]["params"]}
    assert params["train.learning_rate"] == "0.002" and params["train.seed"] == "0"
    metrics = {m["key"] for m in found[0]["data"]["metrics"]}
    assert {"target/gain", "forgetting/probe_kl", "forgetting/probe_kl_low"} <= metrics
    children = mlflow_runs_below(pages, found[0]["info"]["run_id"])
    stages = {tag["value"] for child in children for tag in child["data"]["tags"] if tag["key"] == "cfsd.stage"}
    assert stages == {"probe", "generate", "check", "train", "evaluate-target", "evaluate-target-divergence",
                      "evaluate-probe"}  # fmt: skip
    train = next(c for c in children if c["info"]["run_name"].startswith("train "))
    assert {"train/target_loss", "train/rehearsal_loss", "train/rehearsal_weight"} <= {
        m["key"] for m in train["data"]["metrics"]
    }
    tables = ask(f"{pages['prefect']}/artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    assert {table["type"] for table in tables} == {"table", "markdown"}


def mlflow_runs_below(pages: dict[str, Any], parent: str) -> list[dict[str, Any]]:
    experiment = ask(f"{pages['mlflow']}/api/2.0/mlflow/experiments/get-by-name?experiment_name=cfsd")
    wanted = {
        "experiment_ids": [experiment["experiment"]["experiment_id"]],
        "filter": f"tags.mlflow.parentRunId = '{parent}'",
    }
    return list(ask(f"{pages['mlflow']}/api/2.0/mlflow/runs/search", wanted)["runs"])


def test_the_form_refuses_a_bad_value_before_a_run_exists(pages: dict[str, Any], recipe: dict[str, Any]) -> None:
    from urllib.error import HTTPError

    deployment = ask(f"{pages['prefect']}/deployments/name/mitigate/mitigate")
    recipe["train"] = {"epochs": -1}
    with pytest.raises(HTTPError) as refused:
        ask(f"{pages['prefect']}/deployments/{deployment['id']}/create_flow_run", {"parameters": {"recipe": recipe}})
    assert refused.value.code in (409, 422)


def test_all_that_make_up_starts_listens_on_loopback_alone(pages: dict[str, Any]) -> None:
    servers = json.loads((pages["home"] / "servers.json").read_text())
    started = [psutil.Process(entry["pid"]) for entry in servers.values() if entry["pid"]]
    everyone = [one for process in started for one in (process, *process.children(recursive=True))]
    listening = [c for one in everyone for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"} and len(listening) >= 2


def test_the_command_line_uses_the_servers_of_its_home(pages: dict[str, Any], recipe_file: Path) -> None:
    command = [sys.executable, "-m", "flows.mitigate", str(recipe_file), "--home", str(pages["home"])]
    done = subprocess.run(
        [*command, "--set", "name=from-the-shell", "--machine", "threads=1"],
        cwd=ROOT, env=pages["env"], capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(mlflow_runs(pages, "from-the-shell")) == 1
    named = {"flow_runs": {"name": {"any_": ["from-the-shell"]}}}
    assert len(ask(f"{pages['prefect']}/flow_runs/filter", named)) == 1


def test_the_deployed_recipe_is_the_shipped_one() -> None:
    from cfsd.comparison import Comparison
    from cfsd.recipe import Recipe

    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    names = ("mitigate", "corpus", "compare")
    mitigate, corpus, compare = (next(d for d in deployments if d["name"] == name) for name in names)
    shipped = Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml")
    assert Recipe.model_validate(mitigate["parameters"]["recipe"]) == shipped
    assert Recipe.model_validate(corpus["parameters"]["recipe"]) == shipped
    assert Comparison.model_validate(compare["parameters"]["comparison"]).recipe == shipped
