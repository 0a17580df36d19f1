"""Both servers over PostgreSQL, artifacts on object storage: the settings of compose.yaml on real servers."""

import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import yaml

from tests.conftest import ROOT, _answers, _free_port
from tests.served import ask

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
        self.ask("postgres", f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
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


class Composed:
    """The services of compose.yaml that run our image, as processes here: its commands and variables, on loopback."""

    def __init__(self, home: Path, database: Database, storage: str) -> None:
        self.services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
        self.given = {
            "POSTGRES_PASSWORD": database.password, "MINIO_ROOT_USER": ACCESS["aws_access_key_id"],
            "MINIO_ROOT_PASSWORD": ACCESS["aws_secret_access_key"], "PREFECT_LOGIN": f"team:{secrets.token_hex(8)}",
        }  # fmt: skip
        ports = {"4200": str(_free_port()), "5000": str(_free_port())}
        self.places = {
            "@postgres:5432": f"@127.0.0.1:{database.port}", "http://minio:9000": storage, "$$": "$",
            **{f"http://{name}:{port}": f"http://127.0.0.1:{ports[port]}" for name, port in
               (("prefect", "4200"), ("mlflow", "5000"))},
            "0.0.0.0": "127.0.0.1", "4200": ports["4200"], "5000": ports["5000"],
        }  # fmt: skip
        self.prefect, self.mlflow = (f"http://127.0.0.1:{port}" for port in ports.values())
        self.home = home
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str) -> "subprocess.Popen[bytes]":
        own = {k: self._here(v) for k, v in self.services[name]["environment"].items()}
        bare = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "CFSD_", "AWS_"))}
        path = f"{Path(sys.executable).parent}{os.pathsep}{bare['PATH']}"
        image = {"CFSD_HOME": str(self.home), "PYTHONPATH": str(ROOT), "PATH": path}
        own |= {"PREFECT_HOME": str(self.home / "prefect-server")} if "PREFECT_HOME" in own else {}
        command = [self._here(word) for word in self.services[name]["command"]]
        log = (self.home / f"{name}.log").open("wb")
        self.running.append(subprocess.Popen(
            command, cwd=ROOT, env=bare | image | own, stdout=log, stderr=log, start_new_session=True
        ))  # fmt: skip
        return self.running[-1]

    def _here(self, text: str) -> str:
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda m: self.given[m[1]], text)
        return re.sub("|".join(map(re.escape, self.places)), lambda m: self.places[m[0]], text)

    def wait(self, url: str) -> None:
        end = time.monotonic() + 400
        while not _answers(url):
            assert self.running[-1].poll() is None and time.monotonic() < end, self.logs()
            time.sleep(0.5)

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return ask(f"{self.prefect}/api/{path}", body, self.given["PREFECT_LOGIN"])

    def logs(self) -> str:
        return "\n".join(f"{log.name}\n{log.read_text()[-3000:]}" for log in self.home.glob("*.log"))

    def close(self) -> None:
        for process in reversed(self.running):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


def status(url: str, **headers: str) -> int:
    try:
        with urlopen(Request(url, headers=headers), timeout=60) as answer:
            return int(answer.status)
    except HTTPError as error:
        return error.code


def test_what_compose_runs_does_a_flow_from_prefects_page(database: Database, storage: str, tmp_path: Path) -> None:
    import boto3

    database.make("prefect")
    database.ask("postgres", "DROP DATABASE IF EXISTS mlflow WITH (FORCE)")
    configs = yaml.safe_load((ROOT / "compose.yaml").read_text())["configs"]
    database.ask("postgres", configs["databases"]["content"])
    composed = Composed(tmp_path, database, storage)
    try:
        assert composed.start("buckets").wait(120) == 0, composed.logs()
        composed.start("prefect")
        composed.wait(f"{composed.prefect}/api/health")
        composed.start("mlflow")
        composed.wait(f"{composed.mlflow}/health")
        assert status(f"{composed.prefect}/api/admin/version") == 401  # without the login
        page = f"{composed.mlflow}/api/2.0/mlflow/experiments/search?max_results=1"
        assert [status(page, Host=host) for host in ("mlflow:5000", "127.0.0.1:5000", "evil.org")] == [200, 200, 403]
        composed.start("worker")
        _soon(composed, lambda: database.ask("prefect", SCHEDULED) != "0")  # the nightly gate
        _completed(composed, {"recipe": "tiny", "overrides": LINES, "machine": {"threads": 1}})
        logs = composed.logs()
        assert not any(secret in logs for name, secret in composed.given.items() if name != "MINIO_ROOT_USER"), logs
    finally:
        composed.close()
    held = boto3.client("s3", endpoint_url=storage, region_name="us-east-1", **ACCESS)
    kinds = {entry["Key"].split("/")[1] for entry in held.list_objects_v2(Bucket="store", Prefix="cfsd/")["Contents"]}
    assert {"model", "corpus", "cfsd-store.json"} <= kinds
    assert database.ask("mlflow", "SELECT count(*) FROM runs WHERE status <> 'FINISHED'") == "0"
    run = database.ask("mlflow", "SELECT artifact_uri FROM runs WHERE name = 'in compose: corpus'")
    assert run.startswith("mlflow-artifacts:/")
    folder = run.removeprefix("mlflow-artifacts:/").strip("/")
    assert held.list_objects_v2(Bucket="mlflow", Prefix=f"artifacts/{folder}/")["KeyCount"] > 0


SCHEDULED = "SELECT count(*) FROM flow_run WHERE state_type = 'SCHEDULED' AND expected_start_time > now()"
LINES = """
name=in compose
probe={rows: 16, length: 16}
generate={rows: 16, length: 16}
evaluate.benchmarks=[]
"""


def _completed(composed: Composed, parameters: dict[str, Any]) -> None:
    """Start the deployment `corpus`, which the worker makes, and wait for its flow run to complete."""
    deployment = _soon(composed, lambda: composed.ask("deployments/name/corpus/corpus"))
    run = composed.ask(f"deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})

    def ended() -> Any:
        state = composed.ask(f"flow_runs/{run['id']}")["state"]
        assert state["type"] not in ("FAILED", "CRASHED"), f"{state}\n{composed.logs()}"
        return state["type"] == "COMPLETED"

    _soon(composed, ended)


def _soon(composed: Composed, found: Callable[[], Any]) -> Any:
    """Return what `found` returns as soon as it is something; a server that does not answer yet is asked again."""
    end = time.monotonic() + 600
    while time.monotonic() < end:
        with suppress(OSError):
            if what := found():
                return what
        assert composed.running[-1].poll() is None, composed.logs()
        time.sleep(1)
    raise AssertionError(composed.logs())


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

    ours = "parent_task_run_id IS NULL AND NOT auto_scheduled"
    states = database.ask("prefect", f"SELECT state_type FROM flow_run WHERE {ours}")
    assert states == "COMPLETED"
    run = database.ask("mlflow", "SELECT run_uuid FROM runs WHERE name = 'tiny' AND status = 'FINISHED'")
    assert len(run) == 32
    assert database.ask("mlflow", "SELECT count(*) FROM runs WHERE status <> 'FINISHED'") == "0"
    assert database.ask("mlflow", f"SELECT value FROM params WHERE run_uuid = '{run}' AND key = 'probe.rows'") == "32"
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
