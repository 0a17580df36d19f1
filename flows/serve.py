"""The pages for a team: a Prefect server with a worker and the deployments, and MLflow, over one data folder.

    python -m flows.serve up | down | status
    python -m flows.serve worker        a worker alone, for servers elsewhere: PREFECT_API_URL and MLFLOW_TRACKING_URI

They listen on 127.0.0.1 only. Their URLs and process numbers are in servers.json of the data folder. The command
lines find them there, so that their runs appear in the same pages.
"""

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import psutil
import typer

from cfsd.errors import BadEnvironment
from cfsd.machine import HOME_VARIABLE, home, without_password
from cfsd.store.digests import write_json
from cfsd.store.locks import held
from flows._addresses import BACKEND_VARIABLE
from flows._cli import Home, start
from flows._environment import SERVERS, is_alive, mlflow_database, recorded_servers
from flows._prefect_api import database_advice, prefect_lock
from flows._servers import HOST, answers, log_of, start_server
from tasks.record import mlflow_lock, unreachable

ROOT = Path(__file__).parent.parent
POOL = "gpu"
WORKER = ["prefect", "worker", "start", "--pool", POOL, "--type", "process"]


def up(prefect_port: int, mlflow_port: int) -> dict[str, dict[str, Any]]:
    """Start the servers that do not run yet and return the entries of all; where a port is taken, the next is tried."""
    with held(home() / ".serve.lock", f"waiting for another process that starts the servers of {home()}"):
        running = {name: entry for name, entry in recorded_servers().items() if is_alive(entry)}
        if "prefect" not in running:
            running["prefect"] = _start_prefect(free_port(prefect_port, "--prefect-port"))
            _keep(running)
        if "mlflow" not in running:
            running["mlflow"] = _start_mlflow(free_port(mlflow_port, "--mlflow-port"))
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
    with prefect_lock():
        return _started("prefect", command, url, f"{url}/api/health", _environment(), database_advice())


def _start_mlflow(port: int) -> dict[str, Any]:
    url, database = f"http://{HOST}:{port}", os.environ.get(BACKEND_VARIABLE) or mlflow_database()
    if problem := unreachable(database):
        raise BadEnvironment(
            f"{BACKEND_VARIABLE} is {without_password(database)}, but nothing can be reached there: {problem}"
        )
    environment = _environment() | {"MLFLOW_TRACKING_URI": database, BACKEND_VARIABLE: database}
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    if not os.environ.get("MLFLOW_ARTIFACTS_DESTINATION"):  # which the server then serves itself
        command += ["--default-artifact-root", (home() / "mlartifacts").as_uri()]
    with mlflow_lock(database):  # or its workers, and runs that begin now, race to create the tables
        _run(["mlflow", "db", "upgrade", database], environment)
        return _started("mlflow", command, url, f"{url}/health", environment)


def _start_worker(running: dict[str, dict[str, Any]]) -> dict[str, Any]:
    environment = _environment() | {
        "PREFECT_API_URL": f"{running['prefect']['url']}/api",
        "MLFLOW_TRACKING_URI": str(running["mlflow"]["url"]),
    }
    _deploy(environment)
    return _started("worker", WORKER, "", "", environment)


def become_worker() -> NoReturn:
    """Make the work pool and the deployments at PREFECT_API_URL, and let this process be their worker.

    Raises:
        BadEnvironment: PREFECT_API_URL is not set, or its server refuses.
    """
    if not (url := os.environ.get("PREFECT_API_URL")):
        raise BadEnvironment("a worker alone needs a server: set PREFECT_API_URL, or start both here: make up")
    environment = _environment() | {"PREFECT_API_URL": url, "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}
    _deploy(environment)
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-m", *WORKER], environment)


def _deploy(environment: dict[str, str]) -> None:
    _run(["prefect", "work-pool", "create", POOL, "--type", "process", "--overwrite"], environment)
    _run(
        ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
        environment,
    )


def _environment() -> dict[str, str]:
    """Return this process' environment without the variables that would point the servers at themselves."""
    own = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"
    return own | {"PATH": path, HOME_VARIABLE: str(home()), "CFSD_ROOT": str(ROOT), "PYTHONPATH": str(ROOT)}


def _started(
    name: str, command: list[str], url: str, health: str, environment: dict[str, str], advice: str = ""
) -> dict[str, Any]:
    process = start_server(name, command, health, advice=advice, env=environment, cwd=ROOT)
    started = psutil.Process(process.pid).create_time()
    return {"url": url, "pid": process.pid, "started": started, "log": str(log_of(name))}


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        shown, said = " ".join(map(without_password, command)), f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise BadEnvironment(f"{shown} failed with code {done.returncode}:\n{said}")


def free_port(first: int, option: str = "--prefect-port") -> int:
    """Return the first port from `first` on that nobody listens on, and say who listens on `first`."""
    for port in range(first, min(first + 50, 65536)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno == errno.EACCES:
                    raise BadEnvironment(f"port {port} needs rights that you do not have; give {option}") from error
                continue
        if port != first:
            print(f"port {first} is taken ({listener(first)}); {port} is used, or give another with {option}")
        return port
    raise BadEnvironment(f"no free port between {first} and {first + 49} on {HOST}; give another with {option}")


def listener(port: int) -> str:
    """Return who listens on a port of this machine, as far as this user may know."""
    try:
        listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
        number = next((c.pid for c in listening if c.laddr.port == port and c.pid), None)
        return f"by process {number}, {psutil.Process(number).name()}" if number else "by another user's process"
    except (psutil.Error, OSError):
        return "by another process"


def _end_group(entry: dict[str, Any]) -> None:
    for number, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(entry["pid"], number)
        except ProcessLookupError:
            return
        except PermissionError as error:
            raise BadEnvironment(f"process {entry['pid']} is another user's, who must end it: {entry}") from error
        end = time.monotonic() + seconds
        while is_alive(entry) and time.monotonic() < end:
            time.sleep(0.2)
        if not is_alive(entry):
            return


def _say_what_goes_elsewhere(running: dict[str, dict[str, Any]]) -> None:
    """Name the variables by which commands of this shell use other servers than these."""
    own = {"PREFECT_API_URL": f"{running['prefect']['url']}/api", "MLFLOW_TRACKING_URI": running["mlflow"]["url"]}
    for name, url in own.items():
        if (value := os.environ.get(name)) and value not in (url, mlflow_database()):
            print(f"{name} is {without_password(value)}: commands of this shell use that until it is unset")


def _state(entry: dict[str, Any]) -> str:
    if not is_alive(entry):
        return "dead"
    return (
        "runs"
        if not entry["url"] or answers(f"{entry['url']}/api/health") or answers(f"{entry['url']}/health")
        else "hangs"
    )


class Action(StrEnum):
    """What to do with the servers."""

    up = "up"
    down = "down"
    status = "status"
    worker = "worker"


def serve_command(
    action: Annotated[Action, typer.Argument(help="Start them, end them, say which run; or be a worker")],
    prefect_port: Annotated[int, typer.Option(min=1, max=65535)] = 4200,
    mlflow_port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
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
        _say_what_goes_elsewhere(running)
    elif action is Action.worker:
        become_worker()
    elif action is Action.down:
        print(f"ended: {', '.join(down()) or 'nothing ran'}")
    else:
        for name, entry in recorded_servers().items():
            print(f"{name:8} {_state(entry)} {entry['url']}")


if __name__ == "__main__":
    start(serve_command)
