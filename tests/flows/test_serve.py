"""`make up`: real servers on loopback over one data folder; a run started through the API shows in MLflow."""

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil
import pytest
import yaml

from cfsd.comparison import Comparison
from cfsd.recipe import Recipe
from tests.conftest import ROOT, save_model, write_rows
from tests.served import Served, ask, served

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A home with a recipe of its own, and its Prefect, worker, MLflow and reports, up until the module is done."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "home" / "recipes").mkdir(parents=True)
    (folder / "home" / "recipes" / "mine.yaml").write_text(yaml.safe_dump(small(folder)))
    with served(folder / "home") as pages:
        yield pages


def small(folder: Path) -> dict[str, Any]:
    """Return a recipe on a random model that takes seconds."""
    return {
        "name": "from the form",
        "base": {"kind": "folder", "path": str(save_model(folder / "model"))},
        "target": {"path": str(write_rows(folder / "rows.jsonl")), "held_out": 8},
        "probe": {"rows": 16, "length": 16},
        "generate": {"rows": 16, "length": 16},
        "train": {"learning_rate": 1e-3},
    }


def mlflow_runs(pages: Served, name: str) -> list[dict[str, Any]]:
    experiment = ask(f"{pages.url('mlflow')}/api/2.0/mlflow/experiments/get-by-name?experiment_name=cfsd")
    wanted = {
        "experiment_ids": [experiment["experiment"]["experiment_id"]],
        "filter": f"attributes.run_name = '{name}'",
    }
    return list(ask(f"{pages.url('mlflow')}/api/2.0/mlflow/runs/search", wanted).get("runs", []))


def test_a_recipe_by_name_completes_and_shows_in_prefect_mlflow_and_the_reports(pages: Served) -> None:
    form = {"recipe": "mine", "training": {"learning_rate": 2e-3}, "machine": {"threads": 1}}
    run = pages.ended(pages.start("mitigate/mitigate", form))
    assert run["state"]["type"] == "COMPLETED", run["state"]
    assert run["state"]["message"].startswith("“from the form” ")
    assert run["name"] == "from the form (model on rows.jsonl)"
    assert {"cfsd", "model:model", "target:rows.jsonl"} <= set(run["tags"])
    tasks = pages.api("/task_runs/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    named = {task["name"].rpartition(" ")[0] for task in tasks}
    assert {"train", "probe", "evaluate target · base", "evaluate target · tuned"} <= named
    found = mlflow_runs(pages, "from the form")
    assert len(found) == 1 and found[0]["info"]["status"] == "FINISHED"
    params = {p["key"]: p["value"] for p in found[0]["data"]["params"]}
    assert params["train.learning_rate"] == "0.002" and "train.seed" not in params
    metrics = {m["key"] for m in found[0]["data"]["metrics"]}
    assert {"target_gain", "probe_kl", "probe_kl_low"} <= metrics
    children = mlflow_runs_below(pages, found[0]["info"]["run_id"])
    stages = {tag["value"] for child in children for tag in child["data"]["tags"] if tag["key"] == "cfsd.stage"}
    assert stages == {"probe", "generate", "check", "train", "evaluate-target", "show",
                      "evaluate-target-divergence", "evaluate-probe"}  # fmt: skip
    train = next(c for c in children if c["info"]["run_name"] == "train")
    assert {"train/target_loss", "train/rehearsal_loss", "train/rehearsal_weight"} <= {
        m["key"] for m in train["data"]["metrics"]
    }
    artifacts = pages.api("/artifacts/filter", {"flow_runs": {"id": {"any_": [run["id"]]}}})
    texts = {artifact["key"]: artifact["data"] for artifact in artifacts if artifact["type"] == "markdown"}
    [report] = (pages.home / "reports").iterdir()
    address = f"{pages.url('reports')}/reports/{report.name}/report.html"
    assert texts["from-the-form-report"] == f"[report]({address})"
    assert found[0]["info"]["run_id"] in texts["from-the-form-mlflow"]
    assert "| target loss, nats/token |" in texts["from-the-form-result"] and address in texts["from-the-form-result"]
    with urlopen(address, timeout=60) as page:
        assert page.read() == (report / "report.html").read_bytes()
        assert "default-src 'none'" in page.headers["Content-Security-Policy"]


def mlflow_runs_below(pages: Served, parent: str) -> list[dict[str, Any]]:
    experiment = ask(f"{pages.url('mlflow')}/api/2.0/mlflow/experiments/get-by-name?experiment_name=cfsd")
    wanted = {
        "experiment_ids": [experiment["experiment"]["experiment_id"]],
        "filter": f"tags.mlflow.parentRunId = '{parent}'",
    }
    return list(ask(f"{pages.url('mlflow')}/api/2.0/mlflow/runs/search", wanted)["runs"])


@pytest.mark.parametrize(
    ("deployment", "parameters"),
    [
        ("mitigate/mitigate", {"recipe": "nope"}),
        ("mitigate/mitigate", {"recipe": "mine", "training": {"epochs": -1}}),
        ("mitigate/mitigate", {"recipe": "mine", "overrides": "trian.epochs=2"}),
        ("mitigate/mitigate-full", {"recipe": {"name": "x", "base": {"kind": "tiny"}, "train": {"epochs": -1}}}),
    ],
)
def test_a_form_refuses_a_bad_value_before_a_run_exists(
    pages: Served, deployment: str, parameters: dict[str, Any]
) -> None:
    with pytest.raises(HTTPError) as refused:
        pages.start(deployment, parameters)
    assert refused.value.code == 409


def test_all_that_make_up_starts_listens_on_loopback_alone(pages: Served) -> None:
    started = [psutil.Process(entry["pid"]) for entry in pages.servers.values() if entry["pid"]]
    everyone = [one for process in started for one in (process, *process.children(recursive=True))]
    listening = [c for one in everyone for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"} and len(listening) >= 3


def test_what_a_form_cannot_check_ends_the_run_with_the_message_of_the_command_line(pages: Served) -> None:
    run = pages.ended(pages.start("mitigate/mitigate", {"recipe": "mine", "overrides": "train.bogus=3"}))
    assert run["state"]["type"] == "FAILED"
    assert run["state"]["message"].startswith(f"{pages.home / 'recipes' / 'mine.yaml'} is not valid:\n  train.bogus: ")


@pytest.mark.parametrize(
    "path", ["/reports/../servers.json", "/reports/%2e%2e/servers.json", "/servers.json", "//etc/passwd"]
)
def test_only_reports_are_served(pages: Served, path: str) -> None:
    host = pages.url("reports").removeprefix("http://")
    for name, code in ((host, 404), ("elsewhere.example", 400)):
        connection = http.client.HTTPConnection(host, timeout=60)
        connection.request("GET", path, headers={"Host": name})  # as it is: urllib would tidy the path up
        assert connection.getresponse().status == code


def test_the_command_line_uses_the_servers_of_its_home_and_shares_the_work_of_the_form(pages: Served) -> None:
    recipe = pages.home / "recipes" / "mine.yaml"
    command = [sys.executable, "-m", "flows.mitigate", str(recipe), "--home", str(pages.home)]
    changes = ["--set", "name=from-the-shell", "--set", "train.learning_rate=2e-3", "--machine", "threads=1"]
    done = subprocess.run([*command, *changes], cwd=ROOT, env=pages.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(Path(done.stdout.splitlines()[-1]).read_text())
    [variant] = summary["variants"].values()
    assert variant["executed"] == []
    assert f"{pages.url('reports')}/reports/from-the-shell-" in done.stdout
    assert len(mlflow_runs(pages, "from-the-shell")) == 1
    named = {"flow_runs": {"name": {"like_": "from-the-shell (model on rows.jsonl)"}}}
    assert len(pages.api("/flow_runs/filter", named)) == 1


def test_up_again_refreshes_the_menus_and_leaves_what_runs(pages: Served) -> None:
    before = pages.servers
    (pages.home / "recipes" / "later.yaml").write_text((pages.home / "recipes" / "mine.yaml").read_text())
    up = pages.up()
    assert up.returncode == 0 and pages.servers == before, up.stderr
    schema = pages.api("/deployments/name/mitigate/mitigate")["parameter_openapi_schema"]
    assert schema["properties"]["recipe"]["enum"][:2] == ["later", "mine"]
    automations = pages.api("/automations/filter", {})
    assert [automation["name"] for automation in automations] == ["zombies"] and automations[0]["enabled"]
    pools = {pool["name"] for pool in pages.api("/work_pools/filter", {})}
    assert {"cpu", "gpu"} <= pools


def test_the_deployed_recipe_is_the_shipped_one() -> None:
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    mitigate, compare = (
        next(d for d in deployments if d["name"] == name) for name in ("mitigate-full", "compare-full")
    )
    shipped = Recipe.load(ROOT / "deployments" / "recipes" / "tiny.yaml")
    assert Recipe.model_validate(mitigate["parameters"]["recipe"]) == shipped
    assert Comparison.model_validate(compare["parameters"]["comparison"]).recipe == shipped
