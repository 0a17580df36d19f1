"""The pages for a team: a Prefect server with a worker and the deployments, and MLflow, over one data folder.

    python -m flows.serve up | down | status

They listen on 127.0.0.1 only. Their URLs and process numbers are in servers.json of the data folder. The command
lines find them there, so that their runs appear in the same pages.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer

from cfsd.errors import CfsdError
from cfsd.machine import HOME_VARIABLE, home
from cfsd.store.digests import write_json
from flows._cli import Home, start
from flows._environment import SERVERS, is_alive, recorded_servers
from flows._servers import HOST, answers, wait_until

ROOT = Path(__file__).parent.parent
POOL = "gpu"


def up(prefect_port: int, mlflow_port: int) -> dict[str, dict[str, Any]]:
    """Start the servers that do not run yet and return the entries of all; where a port is taken, the next is tried."""
    running = {name: entry for name, entry in recorded_servers().items() if is_alive(entry)}
    if "prefect" not in running:
        running["prefect"] = _start_prefect(free_port(prefect_port))
        _keep(running)
    if "mlflow" not in running:
        running["mlflow"] = _start_mlflow(free_port(mlflow_port))
        _keep(running)
    if "worker" not in running:
        running["worker"] = _start_worker(running)
        _keep(running)
    return running


def down() -> list[str]:
    """End the servers that this home started and return their names."""
    ended = []
    for name, entry in reversed(recorded_servers().items()):
        if is_alive(entry):
            _end_group(entry)
            ended.append(name)
    (home() / SERVERS).unlink(missing_ok=True)
    return ended


def _keep(running: dict[str, dict[str, Any]]) -> None:
    write_json(home() / SERVERS, running)


def _start_prefect(port: int) -> dict[str, Any]:
    url = f"http://{HOST}:{port}"
    command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    return _started("prefect", command, url, f"{url}/api/health", _environment())


def _start_mlflow(port: int) -> dict[str, Any]:
    url, database = f"http://{HOST}:{port}", f"sqlite:///{home() / 'mlflow.db'}"
    environment = _environment() | {"MLFLOW_TRACKING_URI": database}
    _run(["mlflow", "db", "upgrade", database], environment)  # or its workers race to create the tables
    artifacts = (home() / "mlartifacts").as_uri()
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1",
               "--backend-store-uri", database, "--default-artifact-root", artifacts]  # fmt: skip
    return _started("mlflow", command, url, f"{url}/health", environment)


def _start_worker(running: dict[str, dict[str, Any]]) -> dict[str, Any]:
    environment = _environment() | {
        "PREFECT_API_URL": f"{running['prefect']['url']}/api",
        "MLFLOW_TRACKING_URI": str(running["mlflow"]["url"]),
    }
    _run(["prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite"], environment)
    _run(
        ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
        environment,
    )
    command = ["prefect", "worker", "start", "--pool", POOL, "--type", "process"]
    return _started("worker", command, "", "", environment)


def _environment() -> dict[str, str]:
    """Return this process' environment without the variables that would point the servers at themselves."""
    own = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"
    return own | {"PATH": path, HOME_VARIABLE: str(home()), "CFSD_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}


def _started(name: str, command: list[str], url: str, health: str, environment: dict[str, str]) -> dict[str, Any]:
    log = home() / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], stdout=out, stderr=out, stdin=subprocess.DEVNULL,
            env=environment, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
    if health:
        wait_until(lambda: answers(health), process, log)
    started = psutil.Process(process.pid).create_time()
    return {"url": url, "pid": process.pid, "started": started, "log": str(log)}


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise CfsdError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def free_port(first: int) -> int:
    """Return the first port from `first` on that nobody listens on."""
    for port in range(first, first + 50):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex((HOST, port)) != 0:
                return port
    raise CfsdError(f"no free port between {first} and {first + 49} on {HOST}; give another with --prefect-port")


def _end_group(entry: dict[str, Any]) -> None:
    for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(entry["pid"], number)
        except ProcessLookupError:
            return
        end = time.monotonic() + seconds
        while is_alive(entry) and time.monotonic() < end:
            time.sleep(0.2)
        if not is_alive(entry):
            return


class Action(StrEnum):
    """What to do with the servers."""

    up = "up"
    down = "down"
    status = "status"


def serve_command(
    action: Annotated[Action, typer.Argument(help="Start them, end them, or say which of them run")],
    prefect_port: int = 4200,
    mlflow_port: int = 5000,
    home: Home = None,
) -> None:
    """Start or end the Prefect server, its worker and MLflow for a data folder."""
    if action is Action.up:
        running = up(prefect_port, mlflow_port)
        print(
            f"Prefect  {running['prefect']['url']}  deployments mitigate, corpus, compare; form under Run > Custom run"
        )
        print("         regress runs every night at 03:17 UTC; its verdict is the flow run's message")
        print(f"MLflow   {running['mlflow']['url']}  experiment cfsd")
        print("end them with: make down")
    elif action is Action.down:
        print(f"ended: {', '.join(down()) or 'nothing ran'}")
    else:
        for name, entry in recorded_servers().items():
            print(f"{name:8} {'runs' if is_alive(entry) else 'dead'} {entry['url']}")


if __name__ == "__main__":
    start(serve_command)
