"""Secrets of the environment are planted, runs complete and fail in several ways; then every byte is searched."""

import base64
import http.server
import threading
from functools import partial
from pathlib import Path

import pytest

from tests.conftest import WORLD
from tests.faults.runs import Case, both, fail, use_login

pytestmark = pytest.mark.processes

PLANTED = {
    "HF_TOKEN": "hf_planted0token0of0a0hub",
    "OPENAI_API_KEY": "sk-planted-key-of-a-completions-server",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDPLANTED00",
    "AWS_SECRET_ACCESS_KEY": "planted/secret+of/object0storage00000000",
    "AWS_SESSION_TOKEN": "planted-session-of-object-storage",
    "MLFLOW_TRACKING_PASSWORD": "planted-password-of-mlflow",
    "MLFLOW_TRACKING_TOKEN": "planted-token-of-mlflow",
    "PREFECT_API_AUTH_STRING": "admin:planted-login-of-prefect",
    "PREFECT_SERVER_API_AUTH_STRING": "admin:planted-login-of-prefect",
    "PREFECT_API_KEY": "pnu_plantedkeyofprefectcloud",
}
PASSWORD = "planted-password-in-an-address"


def leaks(*places: Path) -> list[str]:
    """Return which planted secrets are in which files, as they are or in base64, as a login is sent."""
    words = {name: value.encode() for name, value in (PLANTED | {"PASSWORD": PASSWORD}).items()}
    words |= {f"{name} in base64": base64.b64encode(value) for name, value in words.items()}
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    assert len(files) > 20
    return [f"{name} in {file}" for file in files for name, value in words.items() if value in file.read_bytes()]


class OneAnswer(http.server.BaseHTTPRequestHandler):
    """Answers the first request and is gone."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()
        threading.Thread(target=self.server.shutdown).start()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def server_that_dies() -> int:
    """Return the port of a server that answers once."""
    server = http.server.HTTPServer(("127.0.0.1", 0), OneAnswer)

    def serve() -> None:
        server.serve_forever(0.01)
        server.server_close()

    threading.Thread(target=serve, daemon=True).start()
    return server.server_port


def test_no_secret_is_written_anywhere(undisturbed: Case, tmp_path: Path) -> None:
    case = undisturbed.copy(tmp_path, "probe", "train")
    login = partial(use_login, PLANTED["PREFECT_API_AUTH_STRING"])
    database = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"}
    out = [case.run(before=login, **PLANTED, **database)]
    assert out[0].code == 0, out[0].out
    address = {"MLFLOW_TRACKING_URI": f"http://me:{PASSWORD}@127.0.0.1:{server_that_dies()}",
               "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}  # fmt: skip
    out.append(
        case.run("--set", "probe.rows=8", before=partial(both, login, partial(fail, "probe")), **PLANTED, **address)
    )
    assert out[1].code == 1 and "planted failure" in out[1].out
    assert out[1].out.count("MLflow cannot be reached at http://***@127.0.0.1") == 1
    server = ["--machine", "engine=server", "--machine", f"base_url=http://me:{PASSWORD}@127.0.0.1:9/v1"]
    out.append(case.run(*server, before=login, **PLANTED, **database))
    assert out[2].code == 2 and "without user or query" in out[2].out
    assert leaks(tmp_path, WORLD / "prefect") == []
