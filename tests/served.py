"""The servers of `make up` over a data folder of their own, on free ports, for as long as a test needs them."""

import base64
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from flows._environment import is_alive
from tests.conftest import ROOT

ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


class Served:
    """Addresses of the servers, and the environment in which commands find them."""

    def __init__(self, home: Path, env: dict[str, str]) -> None:
        self.home, self.env = home, env

    def up(self) -> "subprocess.CompletedProcess[str]":
        ports = (word for name in ("prefect", "mlflow", "reports") for word in (f"--{name}-port", str(_free_port())))
        return self.command("up", *ports)

    def command(self, *words: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "flows.serve", *words, "--home", str(self.home)]
        return subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=600)

    @property
    def servers(self) -> dict[str, Any]:
        return dict(json.loads((self.home / "servers.json").read_text()))

    def url(self, name: str) -> str:
        return str(self.servers[name]["url"])

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """Ask Prefect."""
        return ask(f"{self.url('prefect')}/api{path}", body)

    def start(self, deployment: str, parameters: dict[str, Any]) -> str:
        """Start a flow run, as the form does, and return its id."""
        found = self.api(f"/deployments/name/{deployment}")
        return str(self.api(f"/deployments/{found['id']}/create_flow_run", {"parameters": parameters})["id"])

    def ended(self, flow_run: str, seconds: float = 300) -> dict[str, Any]:
        """Wait until a flow run has ended and return it."""
        end = time.monotonic() + seconds
        while (run := self.api(f"/flow_runs/{flow_run}"))["state"]["type"] not in ENDED:
            assert time.monotonic() < end, run["state"]
            time.sleep(1)
        return dict(run)


@contextmanager
def served(home: Path, **variables: str) -> Iterator[Served]:
    """Start everything over `home`, and end it."""
    own = bare_environment()
    pages = Served(home, own | variables)
    up = pages.up()
    assert up.returncode == 0, up.stdout + up.stderr
    servers = pages.servers
    try:
        yield pages
    finally:
        servers |= pages.servers
        down = pages.command("down")
    assert down.returncode == 0 and {"prefect", "mlflow", "reports", "worker"} <= set(servers), down.stderr
    assert not any(is_alive(entry) for entry in servers.values())


def bare_environment() -> dict[str, str]:
    """Return this process' environment without what points at the servers and the data folder of the tests."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_"))}


def ask(url: str, body: dict[str, Any] | None = None, login: str = "") -> Any:
    """Return an answer of a server, which is asked again, as Prefect's own client does, while it is too busy (503)."""
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"} if login else {}
    data = None if body is None else json.dumps(body).encode()
    for wait in (2.0, 2.0, 5.0, 10.0, 20.0, 0.0):
        try:
            with urlopen(Request(url, data, headers), timeout=300) as answer:
                return json.loads(answer.read() or b"null")
        except HTTPError as error:
            if error.code != 503 or not wait:
                raise
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
