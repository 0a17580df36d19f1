"""Both servers over PostgreSQL, artifacts on object storage: the settings of compose.yaml on real servers."""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

from tests.conftest import ROOT, _answers, _free_port

pytestmark = [pytest.mark.processes, pytest.mark.slow]
BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # where Debian has them
SMALL = [
    *("--set", "probe.rows=32", "--set", "generate.rows=32", "--set", "mix.rehearsal_tokens=64"),
    *("--set", "train.epochs=1", "--set", "evaluate.benchmarks=[]", "--machine", "threads=1"),
]


class Database:
    """A PostgreSQL server on loopback that wants a password; its programs refuse to run as root."""

    def __init__(self) -> None:
        self.port, self.password = _free_port(), secrets.token_hex(8)
        self.folder = Path(tempfile.mkdtemp(prefix="cfsd-postgresql-"))
        (self.folder / "password").write_text(self.password)
        if os.getuid() == 0:
            for path in (self.folder, self.folder / "password"):
                shutil.chown(path, "postgres")
        own = ("-U", "cfsd", "--auth=scram-sha-256", "--pwfile", str(self.folder / "password"), "--no-sync")
        self._run("initdb", "-D", str(self.folder / "data"), "-E", "UTF8", *own)
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        self._run(
            "pg_ctl", "-D", str(self.folder / "data"), "-w", "-l", str(self.folder / "log"), "-o", options, "start"
        )

    def make(self, name: str) -> None:
        self.ask("postgres", f"CREATE DATABASE {name}")

    def ask(self, database: str, statement: str) -> str:
        command = [BINARIES[-1] / "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "cfsd", "-Atc", statement]
        own = {**os.environ, "PGPASSWORD": self.password}
        return subprocess.run([*command, database], env=own, capture_output=True, text=True, check=True).stdout.strip()

    def url(self, driver: str, database: str) -> str:
        """Return a URL without a password, which is in PGPASSWORD: it is never on a command line."""
        return f"postgresql+{driver}://cfsd@127.0.0.1:{self.port}/{database}"

    def close(self) -> None:
        self._run("pg_ctl", "-D", str(self.folder / "data"), "-m", "immediate", "stop")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _run(self, program: str, *words: str) -> None:
        user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
        command = [*user, str(BINARIES[-1] / program), *words]
        subprocess.run(command, cwd=self.folder, stdout=subprocess.DEVNULL, check=True)


@pytest.fixture(scope="module")
def database() -> Iterator[Database]:
    if not BINARIES:
        pytest.skip("needs PostgreSQL's programs: apt-get install postgresql")
    server = Database()
    yield server
    server.close()


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """An S3 server with a bucket for artifacts; its URL."""
    import boto3

    url = f"http://127.0.0.1:{_free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not _answers(f"{url}/moto-api/"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.2)
    boto3.client("s3", endpoint_url=url, region_name="us-east-1", **ACCESS).create_bucket(Bucket="mlflow")
    yield url
    process.terminate()
    process.wait(20)


ACCESS = {"aws_access_key_id": "cfsd", "aws_secret_access_key": "not-a-secret"}


def bare(home: Path, database: Database, **more: str) -> dict[str, str]:
    """Return an environment in which only this test's servers are named."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_", "AWS_"))}
    return {**own, "CFSD_HOME": str(home), "PGPASSWORD": database.password, **more}


def test_a_run_over_postgresql_and_object_storage_is_read_back(
    database: Database, storage: str, tmp_path: Path
) -> None:
    for name in ("prefect", "mlflow"):
        database.make(name)
    home = tmp_path / "home"
    environment = bare(
        home, database,
        PREFECT_SERVER_DATABASE_CONNECTION_URL=database.url("asyncpg", "prefect"),
        MLFLOW_BACKEND_STORE_URI=database.url("psycopg2", "mlflow"),
        MLFLOW_ARTIFACTS_DESTINATION="s3://mlflow/artifacts",
        AWS_ENDPOINT_URL=storage, AWS_DEFAULT_REGION="us-east-1",
        **{name.upper(): value for name, value in ACCESS.items()},
    )  # fmt: skip
    place: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 400}
    serve = [sys.executable, "-m", "flows.serve"]
    ports = ["--prefect-port", str(_free_port()), "--mlflow-port", str(_free_port())]
    up = subprocess.run([*serve, "up", *ports], **place)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        flow = [sys.executable, "-m", "flows.mitigate", "deployments/recipes/tiny.yaml", *SMALL]
        place["env"] = {k: v for k, v in environment.items() if not k.startswith("AWS_")}  # the server has the keys
        done = subprocess.run(flow, **place)
        assert done.returncode == 0, done.stdout + done.stderr
        mlflow = json.loads((home / "servers.json").read_text())["mlflow"]["url"]
        assert not (home / "mlartifacts").exists()
        _is_recorded(database, mlflow, home, storage)
        written = "".join(log.read_text() for log in (home / "logs").glob("*.log")) + done.stdout + up.stdout
        assert database.password not in written and ACCESS["aws_secret_access_key"] not in written
    finally:
        subprocess.run([*serve, "down"], **place)


def _is_recorded(database: Database, mlflow: str, home: Path, storage: str) -> None:
    """Check the run in both databases, and its report through MLflow's server against the one on disk."""
    import boto3

    states = database.ask("prefect", "SELECT state_type FROM flow_run WHERE parent_task_run_id IS NULL")
    assert states == "COMPLETED"
    run = database.ask("mlflow", "SELECT run_uuid FROM runs WHERE name = 'tiny' AND status = 'FINISHED'")
    assert len(run) == 32
    assert database.ask("mlflow", "SELECT count(*) FROM runs WHERE status <> 'FINISHED'") == "0"
    assert database.ask("mlflow", f"SELECT value FROM params WHERE run_uuid = '{run}' AND key = 'train.epochs'") == "1"
    (report,) = (home / "reports").glob("tiny-*/report.html")
    held = boto3.client("s3", endpoint_url=storage, region_name="us-east-1", **ACCESS)
    keys = [entry["Key"] for entry in held.list_objects_v2(Bucket="mlflow")["Contents"]]
    (key,) = (key for key in keys if key.endswith("/report.html"))
    assert key.startswith("artifacts/") and run in key
    path = key.removeprefix("artifacts/")
    with urlopen(f"{mlflow}/api/2.0/mlflow-artifacts/artifacts/{path}", timeout=60) as answer:
        assert answer.read() == report.read_bytes()


@pytest.mark.parametrize("homes", [1, 2])
def test_flows_that_begin_at_once_on_fresh_databases_all_complete(
    database: Database, tmp_path: Path, homes: int
) -> None:
    names = [f"{name}{homes}" for name in ("prefect", "mlflow")]
    for name in names:
        database.make(name)
    flow = [sys.executable, "-m", "flows.mitigate", "deployments/recipes/tiny.yaml", *SMALL]
    processes = [
        subprocess.Popen(
            [*flow, "--set", f"name=run {number}", "--set", f"seed={number}"], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, env=bare(
                tmp_path / f"home{number % homes}", database,
                PREFECT_SERVER_DATABASE_CONNECTION_URL=database.url("asyncpg", names[0]),
                MLFLOW_TRACKING_URI=database.url("psycopg2", names[1]),
            ),
        )
        for number in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert not any("MLflow cannot be reached" in text for text in said), "\n".join(said)
    assert database.ask(names[0], "SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'") == "2"
    parents = database.ask(names[1], "SELECT name FROM runs WHERE status = 'FINISHED' AND name LIKE 'run %' ORDER BY 1")
    assert parents == "run 0\nrun 1"
    assert database.ask(names[1], "SELECT count(*) FROM experiments WHERE name = 'cfsd'") == "1"
