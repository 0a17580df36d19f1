"""Twenty flow runs queued at once on one worker: all complete, nothing is made twice, nothing stays running."""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from flows._servers import answers
from tests.conftest import ROOT, _free_port
from tests.served import ask

RATES = [n * 1e-4 for n in range(1, 11)]
TWICE = 2
LIMIT = 4  # flow runs that the worker starts at once: more than the machine has cores, fewer than fill its memory
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
SECONDS = 5400
POOL = "queue"


@pytest.fixture
def mlflow_server(home: Path) -> Iterator[str]:
    """A real MLflow server over a database of its own."""
    home.mkdir(parents=True)
    url, log = f"http://127.0.0.1:{(port := _free_port())}", (home / "mlflow.log").open("w")
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
             "--backend-store-uri", f"sqlite:///{home / 'mlflow.db'}"]  # fmt: skip
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen(
        [sys.executable, "-m", *words], stdout=log, stderr=log, env=environment, start_new_session=True
    )
    end = time.monotonic() + 300
    while not answers(f"{url}/health"):
        assert process.poll() is None and time.monotonic() < end, (home / "mlflow.log").read_text()
        time.sleep(0.5)
    yield url
    os.killpg(process.pid, 15)
    process.wait(30)


def queued(server: str, recipe: dict[str, Any]) -> list[str]:
    """Deploy `mitigate` to the pool and return the ids of its flow runs."""
    from prefect.client.orchestration import get_client

    from flows.mitigate import mitigate

    machine = {"threads": 1}
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(mitigate), POOL, entrypoint="flows.mitigate.mitigate", work_pool_name=POOL,
            job_variables={"working_dir": str(ROOT)},
        )  # fmt: skip
        flow_runs = []
        for rate in RATES:
            own = recipe | {"name": f"rate {rate:g}", "train": recipe["train"] | {"learning_rate": rate}}
            for _ in range(TWICE):
                wanted = {"recipe": own, "machine": machine}
                flow_runs.append(client.create_flow_run_from_deployment(deployment, parameters=wanted).id)
    return [str(number) for number in flow_runs]


def wait_for(server: str, flow_runs: list[str]) -> Counter[str]:
    """Return how many of the flow runs ended in which state."""
    end = time.monotonic() + SECONDS
    while True:
        found = ask(f"{server}/api/flow_runs/filter", {"flow_runs": {"id": {"any_": flow_runs}}})
        states = Counter(run["state_type"] for run in found)
        if set(states) <= FINAL:
            return states
        assert time.monotonic() < end, states
        time.sleep(2)


def logged(server: str, flow_runs: list[str]) -> list[str]:
    """Return every line of the flow runs' logs."""
    lines: list[str] = []
    while True:
        wanted = {"logs": {"flow_run_id": {"any_": flow_runs}}, "limit": 200, "offset": len(lines)}
        part = [entry["message"] for entry in ask(f"{server}/api/logs/filter", wanted)]
        lines += part
        if not part:
            return lines


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 900)
def test_twenty_at_once_complete_and_make_nothing_twice(
    server: str, mlflow_server: str, home: Path, recipe_file: Path
) -> None:
    environment = os.environ | {
        "CFSD_HOME": str(home), "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": mlflow_server,
    }  # fmt: skip
    prefect = [sys.executable, "-m", "prefect"]
    create = [*prefect, "work-pool", "create", POOL, "--type", "process", "--overwrite"]
    subprocess.run(create, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    flow_runs = queued(server, yaml.safe_load(recipe_file.read_text()))
    started = time.monotonic()
    command = [*prefect, "worker", "start", "--pool", POOL, "--type", "process", "--limit", str(LIMIT)]
    with (home / "worker.log").open("w") as log:
        worker = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        assert wait_for(server, flow_runs) == {"COMPLETED": len(flow_runs)}, (home / "worker.log").read_text()[-5000:]
    finally:
        os.killpg(worker.pid, 15)
        worker.wait(60)
    print(f"{len(flow_runs)} flow runs, {LIMIT} at once: {time.monotonic() - started:.0f} s")

    steps = [re.match(r"(\S+) ([0-9a-f]{16}) (\d+ s|cached)", line) for line in logged(server, flow_runs)]
    made = Counter((step[1], step[2]) for step in steps if step and step[3] != "cached")
    stages = Counter(stage for stage, _ in made)
    print(f"executed: {dict(stages)}; found in the store: {sum(1 for s in steps if s and s[3] == 'cached')}")
    assert set(made.values()) == {1}, "a stage was executed twice for one key"
    shared = dict.fromkeys(("fetch", "target", "probe", "generate", "filter", "mix", "check"), 1)
    each = dict.fromkeys(("train", "evaluate-target-divergence", "evaluate-probe"), len(RATES))
    assert stages == shared | each | dict.fromkeys(("evaluate-target", "show"), 1 + len(RATES))

    tasks = ask(f"{server}/api/task_runs/filter", {"flow_runs": {"id": {"any_": flow_runs}}})
    assert {run["state_type"] for run in tasks} == {"COMPLETED"}
    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("cfsd")
    assert experiment
    runs = list(client.search_runs([experiment.experiment_id], max_results=1000))
    assert {run.info.status for run in runs} == {"FINISHED"}
    kinds = Counter(run.data.tags["cfsd.kind"] for run in runs)
    assert kinds["variant"] == len(flow_runs)
    keys = Counter(run.data.tags["cfsd.key"] for run in runs if run.data.tags["cfsd.kind"] == "step")
    assert set(keys.values()) == {1}, "a step has more than one run in MLflow"
