"""The pages for a team: Prefect with a worker and the deployments, MLflow, and the reports, over one data folder.

    python -m flows.serve up | down | status
    python -m flows.serve worker        a worker alone, for servers elsewhere: PREFECT_API_URL and MLFLOW_TRACKING_URI

They listen on 127.0.0.1 only. Their URLs and process numbers are in servers.json of the data folder. The command
lines find them there, so that their runs appear in the same pages.
"""

import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
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
from flows._deployed import POOL_VARIABLE, deploy, make_pools, pool, run
from flows._environment import (
    BEAT,
    HEARTBEAT_SECONDS,
    SERVERS,
    is_alive,
    mlflow_database,
    recorded_servers,
    started_at,
)
from flows._menu import own_recipes, unreadable
from flows._prefect_api import database_advice, prefect_lock
from flows._servers import HOST, answers, log_of, start_server
from tasks.record import mlflow_lock, unreachable

ROOT = Path(__file__).parent.parent


def up(ports: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Start the servers that do not run yet and return the entries of all; where a port is taken, the next is tried.

    `ports` are those of prefect, mlflow and reports. What runs is told the deployments and menus of now.
    """
    with held(home() / ".serve.lock", f"waiting for another process that starts the servers of {home()}"):
        running = {name: entry for name, entry in recorded_servers().items() if is_alive(entry)}
        _start_pages(running, ports)
        environment = _environment() | {
            "PREFECT_API_URL": f"{running['prefect']['url']}/api",
            "MLFLOW_TRACKING_URI": str(running["mlflow"]["url"]),
        }
        make_pools(environment["PREFECT_API_URL"])
        if "worker" not in running:
            running["worker"] = _start_worker(environment)
            _keep(running)
        deploy(environment)
        return running


def down() -> list[str]:
    """End the servers that this home started and return their names."""
    ended = []
    with held(home() / ".serve.lock", f"waiting for another process that starts the servers of {home()}"):
        for name, entry in reversed(recorded_servers().items()):
            if is_alive(entry):
                _end_group(entry)
                ended.append(name)
        (home() / SERVERS).unlink(missing_ok=True)
    return ended


def _keep(running: dict[str, dict[str, Any]]) -> None:
    write_json(home() / SERVERS, running)


def _start_pages(running: dict[str, dict[str, Any]], ports: dict[str, int]) -> None:
    """Start what has pages and does not run, all at once, and keep what has started also where another one fails."""
    starts = {"prefect": _start_prefect, "mlflow": _start_mlflow, "reports": _start_reports}
    missing: dict[str, int] = {}
    for name in (name for name in starts if name not in running):
        missing[name] = free_port(ports[name], f"--{name}-port", missing.values())
    writing = threading.Lock()

    def begin(name: str) -> None:
        entry = starts[name](missing[name])
        with writing:  # at once: `down` must know of it also where the others are interrupted
            running[name] = entry
            _keep(running)

    with ThreadPoolExecutor() as threads:
        begun = [threads.submit(begin, name) for name in missing]
    for each in begun:
        each.result()


def _start_prefect(port: int) -> dict[str, Any]:
    url = f"http://{HOST}:{port}"
    command = ["prefect", "server", "start", "--host", HOST, "--port", str(port)]
    pages = {
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",  # or its pages ask port 4200
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    with prefect_lock():
        return _started("prefect", command, url, f"{url}/api/health", _environment() | pages, database_advice())


def _start_mlflow(port: int) -> dict[str, Any]:
    url, database = f"http://{HOST}:{port}", os.environ.get(BACKEND_VARIABLE) or mlflow_database()
    if problem := unreachable(database):
        raise BadEnvironment(
            f"{BACKEND_VARIABLE} is {without_password(database)}, but nothing can be reached there: {problem}"
        )
    environment = _environment() | {
        "MLFLOW_TRACKING_URI": database,
        BACKEND_VARIABLE: database,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for jobs that nothing here has
    }
    command = ["mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    if not os.environ.get("MLFLOW_ARTIFACTS_DESTINATION"):  # which the server then serves itself
        command += ["--default-artifact-root", (home() / "mlartifacts").as_uri()]
    with mlflow_lock(database):  # or its workers, and runs that begin now, race to create the tables
        run(["mlflow", "db", "upgrade", database], environment)
        return _started("mlflow", command, url, f"{url}/health", environment)


def _start_reports(port: int) -> dict[str, Any]:
    url = f"http://{HOST}:{port}"
    return _started("reports", ["flows._report_server", str(port)], url, f"{url}/health", _environment())


def _start_worker(environment: dict[str, str]) -> dict[str, Any]:
    return _started("worker", _worker(), "", "", environment | {BEAT: HEARTBEAT_SECONDS})


def _worker() -> list[str]:
    return ["prefect", "worker", "start", "--pool", pool(), "--type", "process"]


def become_worker() -> NoReturn:
    """Make the work pools and the deployments at PREFECT_API_URL, and let this process be their worker.

    Raises:
        BadEnvironment: PREFECT_API_URL is not set, or its server refuses.
    """
    if not (url := os.environ.get("PREFECT_API_URL")):
        raise BadEnvironment("a worker alone needs a server: set PREFECT_API_URL, or start both here: make up")
    environment = _environment() | {"PREFECT_API_URL": url, "MLFLOW_TRACKING_URI": os.environ["MLFLOW_TRACKING_URI"]}
    make_pools(url)
    deploy(environment)
    os.chdir(ROOT)
    os.execve(sys.executable, [sys.executable, "-m", *_worker()], environment | {BEAT: HEARTBEAT_SECONDS})


def _environment() -> dict[str, str]:
    """Return this process' environment without the variables that would point the servers at themselves."""
    own = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}"
    return own | {"PATH": path, HOME_VARIABLE: str(home()), "CFSD_ROOT": str(ROOT), "PYTHONPATH": str(ROOT),
                  POOL_VARIABLE: pool()}  # fmt: skip


def _started(
    name: str, command: list[str], url: str, health: str, environment: dict[str, str], advice: str = ""
) -> dict[str, Any]:
    process = start_server(name, command, health, advice=advice, env=environment, cwd=ROOT)
    return {"url": url, "pid": process.pid, "started": started_at(process.pid), "log": str(log_of(name))}


def free_port(first: int, option: str = "--prefect-port", promised: Collection[int] = ()) -> int:
    """Return the first port from `first` on that nobody listens on, nor is going to, and say who listens on `first`."""
    for port in range(first, min(first + 50, 65536)):
        if port in promised:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError as error:
                if error.errno == errno.EACCES:
                    raise BadEnvironment(f"port {port} needs rights that you do not have; give {option}") from error
                continue
        if port != first:
            whose = "by another server of these" if first in promised else listener(first)
            print(f"port {first} is taken ({whose}); {port} is used, or give another with {option}")
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
    reports_port: Annotated[int, typer.Option(min=1, max=65535)] = 5100,
    home: Home = None,
) -> None:
    """Start or end the Prefect server, its worker, MLflow and the reports' pages for a data folder."""
    if action is Action.up:
        running = up({"prefect": prefect_port, "mlflow": mlflow_port, "reports": reports_port})
        print(f"Prefect  {running['prefect']['url']}  Deployments > mitigate > Run > Custom run: choose a recipe")
        print("         regress runs every night at 03:17 UTC; its verdict is the flow run's message")
        print(f"MLflow   {running['mlflow']['url']}  experiment cfsd")
        print(f"reports  {running['reports']['url']}")
        print(f"recipes of yours in the forms: {own_recipes()}/*.yaml, then make up again")
        print("\n".join(unreadable()), end="")
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
