"""A killed flow run becomes Crashed, and the next one in the queue runs; with its worker killed, too."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import yaml

from flows._deployed import FILES
from tests.conftest import save_model, write_rows
from tests.served import Served, served

pytestmark = [pytest.mark.slow, pytest.mark.processes]
LONG = {"variants": {"slow": {"train.epochs": 5000}}}
SHORT = {"variants": {"quick": {"generate.rows": 0}}}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A home with two comparisons, which run one at a time: one for hours, one for seconds."""
    folder = tmp_path_factory.mktemp("zombies")
    recipe = {
        "name": "mine",
        "base": {"kind": "folder", "path": str(save_model(folder / "model"))},
        "target": {"path": str(write_rows(folder / "rows.jsonl")), "held_out": 8},
        "probe": {"rows": 16, "length": 16},
        "generate": {"rows": 16, "length": 16},
    }
    own = folder / "home" / "recipes"
    own.mkdir(parents=True)
    for name, variants in (("long", LONG), ("short", SHORT)):
        (own / f"{name}.yaml").write_text(yaml.safe_dump({"recipe": recipe | {"name": name}} | variants))
    with served(folder / "home") as pages:
        yield pages


def compare(pages: Served, recipe: str) -> str:
    return pages.start("compare/compare", {"recipe": recipe, "machine": {"threads": 1}})


def processes(flow_run: str) -> list[psutil.Process]:
    """Return the processes of a flow run, children included: all have its id in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PREFECT__FLOW_RUN_ID") == flow_run:
                found.append(process)
        except psutil.Error:
            continue
    return found


def killed(flow_run: str) -> None:
    for process in processes(flow_run):
        os.kill(process.pid, signal.SIGKILL)


def below(pages: Served, flow_run: str) -> list[str]:
    """Return the ids of the flow runs that a comparison has started."""
    wanted = {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}}
    return [run["id"] for run in pages.api("/flow_runs/filter", wanted)]


def started(pages: Served, flow_run: str) -> str:
    """Wait until the comparison's training sends heartbeats; return the id of its own flow run."""
    end = time.monotonic() + 400
    while not (children := below(pages, flow_run)) or not any(
        (pages.home / "store" / "model").glob("*.draft/metrics.jsonl")
    ):
        assert time.monotonic() < end, pages.api(f"/flow_runs/{flow_run}")["state"]
        time.sleep(1)
    return children[0]


def test_a_killed_run_crashes_and_the_next_one_runs(pages: Served) -> None:
    first, second = compare(pages, "long"), compare(pages, "short")
    child = started(pages, first)
    assert pages.api(f"/flow_runs/{second}")["state"]["type"] in ("SCHEDULED", "PENDING")
    killed(first)
    assert pages.ended(first)["state"]["type"] == "CRASHED"
    assert pages.ended(second)["state"]["type"] == "COMPLETED"
    orphan = pages.ended(child)["state"]  # of which no worker knows
    assert orphan["type"] == "CRASHED" and "no heartbeat" in orphan["message"]


def test_a_run_that_died_with_its_worker_crashes_and_the_next_one_runs(pages: Served) -> None:
    first, second = compare(pages, "long"), compare(pages, "short")
    started(pages, first)
    os.kill(pages.servers["worker"]["pid"], signal.SIGKILL)
    killed(first)
    state = pages.ended(first)["state"]
    assert state["type"] == "CRASHED" and "no heartbeat" in state["message"]
    assert pages.up().returncode == 0  # starts the worker anew
    assert pages.ended(second)["state"]["type"] == "COMPLETED"


def test_the_example_of_a_notification_is_an_automation_that_is_off(pages: Served) -> None:
    file = FILES / "automations" / "failed-gate.yaml"
    environment = pages.env | {"PREFECT_API_URL": f"{pages.url('prefect')}/api"}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "automation", "create", "--from-file", str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    enabled = {automation["name"]: automation["enabled"] for automation in pages.api("/automations/filter", {})}
    assert enabled == {"zombies": True, "failed gate": False}
