"""Servers and workers that are killed in the middle of a run: real ones, as `make up` starts them. Two minutes each."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient

from flows._environment import is_alive
from tasks.record.contents import ALL
from tests.conftest import ROOT, save_model, write_rows
from tests.faults.runs import Case, case_in, wait_for
from tests.faults.test_faults import running
from tests.faults.test_secrets import PLANTED, leaks
from tests.served import ask, bare_environment

pytestmark = [pytest.mark.processes, pytest.mark.slow]

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
LONG = {"generate": {"rows": 16, "length": 16}, "probe": {"rows": 16, "length": 16}, "mix": {"target_rows": 1}}


class Served:
    """A data folder with Prefect, a worker and MLflow running over it."""

    def __init__(self, folder: Path) -> None:
        """Choose free ports."""
        self.folder, self.home = folder, folder / "data"
        self.environment = bare_environment() | PLANTED | {"CFSD_HOME": str(self.home)}
        self.ports = ["--prefect-port", str(free()), "--mlflow-port", str(free())]

    def serve(self, *words: str) -> None:
        """Run `python -m flows.serve`."""
        done = subprocess.run(
            [sys.executable, "-m", "flows.serve", *words], cwd=ROOT, env=self.environment, capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr

    def entries(self) -> dict[str, dict[str, Any]]:
        """Return what runs, by name."""
        entries: dict[str, dict[str, Any]] = json.loads((self.home / "servers.json").read_text())
        return entries

    def kill(self, name: str) -> None:
        """End a server and all that it started at once."""
        process = psutil.Process(self.entries()[name]["pid"])
        for one in (*process.children(recursive=True), process):
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs([process], 20)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect's API."""
        url = f"{self.entries()['prefect']['url']}/api/{path}"
        return ask(url, body, PLANTED["PREFECT_SERVER_API_AUTH_STRING"])

    def begin(self, recipe: dict[str, Any]) -> str:
        """Start a flow run as a form does, and return its id."""
        names = {entry["name"]: entry["id"] for entry in self.ask("deployments/filter", {})}
        deployment = names.get("mitigate-full") or names["mitigate"]
        parameters = {"recipe": recipe, "machine": {"threads": 1, "device": "cpu", "checkpoint_steps": 10}}
        return str(self.ask(f"deployments/{deployment}/create_flow_run", {"parameters": parameters})["id"])

    def state(self, run: str) -> str:
        """Return the type of a flow run's state."""
        return str(self.ask(f"flow_runs/{run}")["state"]["type"])

    def end(self, run: str) -> str:
        """Wait for the end of a flow run and return how it ended."""
        wait_for(lambda: self.state(run) in ENDED, 300)
        return self.state(run)

    def in_training(self, run: str) -> Path:
        """Wait until a flow run has a checkpoint of its training, and return the draft."""
        found: list[Path] = []

        def looked() -> bool:
            assert self.state(run) not in ENDED, self.ask(f"flow_runs/{run}")["state"]
            found[:] = self.home.glob("store/model/*.draft/checkpoints/*/trainer_state.json")
            return bool(found)

        wait_for(looked, 240)
        return found[0].parents[2]

    def made(self) -> dict[str, int]:
        """Return when each complete artifact was made."""
        return {str(m): m.stat().st_mtime_ns for m in self.home.glob("store/*/*/manifest.json")}


def free() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Servers for all tests of this file."""
    place = Served(tmp_path_factory.mktemp("served"))
    try:
        place.serve("up", *place.ports)
        yield place
        entries = place.entries()
    finally:
        place.serve("down")
    assert not any(is_alive(entry) for entry in entries.values())


@pytest.fixture
def recipe(served: Served, tmp_path: Path) -> dict[str, Any]:
    """A recipe whose training takes some seconds; each test's is another one."""
    model, rows = served.folder / "model", served.folder / "rows.jsonl"
    if not model.exists():
        save_model(model)
        write_rows(rows)
    epochs = 8 + len(list(served.home.glob("reports/*")))  # not yet trained by another test
    return {"name": tmp_path.name, "base": {"kind": "folder", "path": str(model)},
            "target": {"path": str(rows), "held_out": 8}, "train": {"epochs": epochs}, **LONG}  # fmt: skip


def completes(served: Served, recipe: dict[str, Any], before: dict[str, int], draft: Path) -> None:
    """Run the recipe again: it completes, continues the draft and makes nothing that was finished."""
    assert served.end(served.begin(recipe)) == "COMPLETED"
    after = served.made()
    assert {name: after[name] for name in before} == before
    manifest = json.loads((draft.with_name(draft.stem) / "manifest.json").read_text())
    assert manifest["metadata"]["continued_from_step"] >= 10
    assert not list(served.home.glob("store/*/*.draft"))
    assert not running_in(served)


def running_in(served: Served) -> list[str]:
    client = MlflowClient(served.entries()["mlflow"]["url"])
    experiment = client.get_experiment_by_name("cfsd")
    assert experiment
    found = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    return [str(run.info.run_name) for run in found]


def test_a_cancelled_run_ends_its_children_and_keeps_its_draft(served: Served, recipe: dict[str, Any]) -> None:
    run = served.begin(recipe)
    draft = served.in_training(run)
    before = served.made()
    served.ask(f"flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
    assert served.end(run) == "CANCELLED"
    wait_for(lambda: not processes_over(served.home), 60)
    assert draft.exists()
    completes(served, recipe, before, draft)


def processes_over(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if "cfsd.train" in line and str(home) in line:
            found.append(line)
    return found


def test_a_worker_that_is_killed_loses_nothing(served: Served, recipe: dict[str, Any]) -> None:
    run = served.begin(recipe)
    draft = served.in_training(run)
    before = served.made()
    served.kill("worker")
    wait_for(lambda: not processes_over(served.home), 60)
    assert draft.exists()
    served.serve("up", *served.ports)
    completes(served, recipe, before, draft)


def test_a_prefect_server_that_is_killed_and_comes_back_loses_nothing(served: Served, recipe: dict[str, Any]) -> None:
    run = served.begin(recipe)
    served.in_training(run)
    before = served.made()
    served.kill("prefect")
    served.serve("up", *served.ports)
    again = served.begin(recipe)
    assert served.end(again) == "COMPLETED"
    after = served.made()
    assert {name: after[name] for name in before} == before
    wait_for(lambda: not processes_over(served.home) and served.state(run) in ENDED, 120)
    assert not list(served.home.glob("store/*/*.draft"))
    assert not running_in(served)


def test_no_secret_of_the_environment_is_in_what_the_servers_wrote(served: Served, recipe: dict[str, Any]) -> None:
    assert served.end(served.begin(recipe)) == "COMPLETED"
    assert leaks(served.home) == []


# MLflow behind a door that a test can shut


class Door:
    """A way to a server on loopback that can be shut: then nobody answers, as when the server is down."""

    def __init__(self, port: int) -> None:
        """Open it before a server's port."""
        self.to, self.here, self.listener = port, free(), None
        self.links: list[socket.socket] = []
        self.open()

    def open(self) -> None:
        """Let connections through."""
        self.listener = socket.create_server(("127.0.0.1", self.here))
        threading.Thread(target=self._accept, args=(self.listener,), daemon=True).start()

    def shut(self) -> None:
        """Refuse connections and end those there are."""
        assert self.listener
        for one in (self.listener, *self.links):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self.links.clear()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                inside, _ = listener.accept()
                outside = socket.create_connection(("127.0.0.1", self.to))
                self.links += [inside, outside]
                for one, other in ((inside, outside), (outside, inside)):
                    threading.Thread(target=_pump, args=(one, other), daemon=True).start()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(1 << 16):
            other.sendall(data)
    with suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def client_of(case: Case) -> MlflowClient:
    return MlflowClient(case.environment["MLFLOW_TRACKING_URI"])


@pytest.mark.parametrize("when", ["start", "middle", "end"])
def test_an_mlflow_that_is_down_is_filled_by_the_next_run(
    when: str, served: Served, server: str, tmp_path: Path
) -> None:
    door = Door(int(served.entries()["mlflow"]["url"].rpartition(":")[2]))
    url = f"http://127.0.0.1:{door.here}"
    place = {"MLFLOW_TRACKING_URI": url, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "5"}
    case = case_in(tmp_path, place)
    if when == "start":
        door.shut()
        ended = case.run()
    else:
        with case.paused_in({"middle": "probe", "end": "evaluate-probe"}[when]) as run:
            door.shut()
        ended = run.wait()
    assert ended.code == 0, ended.out
    assert ended.out.count("MLflow cannot be reached") == 1
    made = case.state()
    door.open()
    ended = case.run()
    assert ended.code == 0 and "MLflow cannot be reached" not in ended.out, ended.out
    assert case.state() == made
    assert not running(case), ended.out
    client = client_of(case)
    experiment = client.get_experiment_by_name("cfsd")
    assert experiment
    found = client.search_runs([experiment.experiment_id], f"tags.`cfsd.recorded` = '{ALL}'")
    recorded = [run.data.tags for run in found]
    keys = {tags["cfsd.key"] for tags in recorded}
    for stage in ("probe", "generate", "train", "evaluate-target", "evaluate-probe"):
        assert case.place(stage).name in keys, stage
    door.shut()


HOLD = """
import sys, time
from flows.mitigate import mitigate  # settles the environment
from flows._temporary_server import prefect_server
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.concurrency.sync import concurrency

with prefect_server():
    if sys.argv[1] == "first":
        with get_client(sync_client=True) as client:
            client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name="gpu", limit=1))
    with concurrency("gpu", occupy=1, strict=True, lease_duration=60, timeout_seconds=300):
        print("held", flush=True)
        time.sleep(600 if sys.argv[1] == "first" else 0)
"""


def test_a_killed_command_gives_its_gpu_slot_back(tmp_path: Path) -> None:
    """Its lease was in the memory of its server: the slot stayed taken, and every later run of the folder waited."""
    own = {**bare_environment(), "CFSD_HOME": str(tmp_path / "data"), "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", HOLD]
    first = subprocess.Popen([*words, "first"], env=own, stdout=subprocess.PIPE, text=True)
    assert first.stdout and first.stdout.readline() == "held\n"
    first.kill()
    first.wait()
    began = time.monotonic()
    assert subprocess.run([*words, "next"], env=own, capture_output=True, text=True, timeout=400).stdout == "held\n"
    assert time.monotonic() - began > 30, "the lease was not waited for"
