"""A real S3 server on this machine, and what a test needs to reach it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from cfsd.store import remote, sharing
from tests.conftest import _answers, _free_port

SECRET = "planted-secret-4711"


class S3Server:
    """moto's server in a process of its own, which can be killed and started again, empty, on the same port."""

    def __init__(self) -> None:
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> "S3Server":
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not _answers(f"{self.url}/moto-api/data.json"):
            assert self.process.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def files(self) -> s3fs.S3FileSystem:
        """Return a client that others would use, which keeps no listing."""
        return s3fs.S3FileSystem(endpoint_url=self.url, use_listings_cache=False, skip_instance_cache=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server().start()
    yield server
    server.kill()


def reach(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the environment as a user of object storage does."""
    values = {"AWS_ENDPOINT_URL_S3": server.url, "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": SECRET}
    for name, value in (values | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3Server:
    """The session's server, reached by the environment."""
    reach(s3_server, monkeypatch)
    return s3_server


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    """Nothing is told, nobody is away, and no client knows its address, from one test to the next."""
    s3fs.S3FileSystem.clear_instance_cache()
    remote._away_until.clear()
    sharing._told.clear()
    yield
    os.environ.pop("CFSD_STORE", None)
