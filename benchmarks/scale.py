"""What gets slow first when runs pile up: the store, Prefect's database or MLflow's.

make bench PART=scale        about 20 minutes, 6 GiB of disk

One real run of `tiny` with its servers is copied within the databases and the store until there are 10,000 runs and
100,000 artifacts; after each size the same questions are asked. Prefect keeps events for a week, which at 100 runs a
night is those of KEPT_RUNS.
"""

import json
import shutil
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks._own_servers import own_servers
from benchmarks._result import row, tell
from tests.conftest import ROOT

TINY = "deployments/recipes/tiny.yaml"
RUNS, ARTIFACTS = (100, 1_000, 10_000), (1_000, 10_000, 100_000)
KEPT_RUNS, EVENTS_OF_A_RUN = 700, 60  # of which Prefect has events
MARK = "c0de"  # of the identity of a copy
ROUNDS = 5
RUN_TABLES = {  # table -> columns that hold an identity of MLflow's run
    "runs": ["run_uuid"], "params": ["run_uuid"], "metrics": ["run_uuid"], "latest_metrics": ["run_uuid"],
    "tags": ["run_uuid"], "inputs": ["input_uuid", "source_id", "destination_id"],
}  # fmt: skip
FLOW_TABLES = {
    "flow_run": ["id", "state_id", "idempotency_key"], "flow_run_state": ["id", "flow_run_id"],
    "task_run": ["id", "flow_run_id", "state_id"], "task_run_state": ["id", "task_run_id"],
    "log": ["id", "flow_run_id", "task_run_id"], "artifact": ["id", "flow_run_id", "task_run_id"],
}  # fmt: skip
EVENT_TABLES = {"events": ["id"], "event_resources": ["id", "event_id"]}


def main() -> None:
    """Measure on servers and a data folder of its own."""
    with own_servers("scale", 14700, 15700) as place:
        _run(place.env)
        found = {size: _measured(*place, *size) for size in zip((0, *RUNS), (0, *ARTIFACTS), strict=True)}
    shutil.rmtree(place.data.parent)
    first = found[0, 0]
    rows = [
        row(f"{what}, {runs:,} runs and {artifacts:,} artifacts against one run", seconds, first[what], "-")
        for (runs, artifacts), measured in list(found.items())[1:]
        for what, seconds in measured.items()
    ]
    tell("scale", rows)


def _run(env: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "flows.mitigate", TINY], cwd=ROOT, env=env, check=True, capture_output=True)


def _measured(data: Path, env: dict[str, str], runs: int, artifacts: int) -> dict[str, list[float]]:
    """Grow the databases and the store to a size, and return the seconds of each question there; bytes as gigabytes."""
    mlflow, prefect = data / "mlflow.db", data / "prefect" / "prefect.db"
    _grow(mlflow, RUN_TABLES, runs)
    _grow(prefect, FLOW_TABLES, runs)
    _grow(prefect, EVENT_TABLES, EVENTS_OF_A_RUN * min(runs, KEPT_RUNS))
    _grow_store(data / "store", artifacts)
    servers = json.loads((data / "servers.json").read_text())
    found = {what: _seconds(ask) for what, ask in _questions(servers, env).items()}
    sizes = {"MLflow's database, GB": _size(mlflow), "Prefect's database, GB": _size(prefect)}
    print(runs, artifacts, {what: round(median(seconds), 3) for what, seconds in found.items()}, sizes, flush=True)
    return found | {what: [size] * ROUNDS for what, size in sizes.items()}


def _size(file: Path) -> float:
    return sum(part.stat().st_size for part in file.parent.glob(f"{file.name}*")) / 1e9


def _seconds(ask: Callable[[], object]) -> list[float]:
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        ask()
        taken.append(time.perf_counter() - started)
    return taken


def _questions(servers: dict[str, Any], env: dict[str, str]) -> dict[str, Callable[[], object]]:
    """Return what people and cfsd ask, by name."""
    prefect, mlflow = f"{servers['prefect']['url']}/api", f"{servers['mlflow']['url']}/api/2.0/mlflow"
    search = {"experiment_ids": ["1"], "max_results": 100}
    cfsd = [sys.executable, "-m", "cfsd", "store"]
    return {
        "cached run of tiny, s": lambda: _run(env),
        "MLflow's first page, s": lambda: _post(f"{mlflow}/runs/search", search),
        "MLflow's runs by a metric, s": lambda: _post(
            f"{mlflow}/runs/search", search | {"order_by": ["metrics.target_gain DESC"]}
        ),
        "MLflow's run of one key, s": lambda: _post(
            f"{mlflow}/runs/search", search | {"filter": "tags.`cfsd.key` = '0123456789abcdef'"}
        ),
        "Prefect's first page, s": lambda: _post(
            f"{prefect}/flow_runs/filter", {"limit": 50, "sort": "EXPECTED_START_TIME_DESC"}
        ),
        "Prefect's count of runs, s": lambda: _post(f"{prefect}/flow_runs/count", {}),
        "Prefect's tasks of a run, s": lambda: _post(f"{prefect}/task_runs/filter", {"limit": 50}),
        "cfsd store ls, s": lambda: subprocess.run([*cfsd, "ls"], cwd=ROOT, env=env, check=True, capture_output=True),
        "cfsd store gc, s": lambda: subprocess.run([*cfsd, "gc"], cwd=ROOT, env=env, check=True, capture_output=True),
    }


def _post(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        content: bytes = answer.read()
    return content


def _grow(file: Path, tables: dict[str, list[str]], runs: int) -> None:
    """Copy the rows that the real run left, with identities of their own, until the first table has `runs` rows."""
    with sqlite3.connect(file, timeout=60) as database:
        counted, (identity, *_) = next(iter(tables.items()))
        each, all_there, last = (
            database.execute(f"SELECT {what} FROM {counted} WHERE {condition}").fetchone()[0]
            for what, condition in (
                ("count(*)", _real(identity)), ("count(*)", "1"),
                (f"max(substr({identity}, {len(MARK) + 1}, 4))", f"NOT {_real(identity)}"),
            )
        )  # fmt: skip
        first = int(last, 16) + 1 if last else 0  # not by counting: the questions leave real runs, too
        for table, identities in tables.items():
            columns = [name for _, name, *_ in database.execute(f"PRAGMA table_info({table})")]
            real = f"CREATE TEMP TABLE real_{table} AS SELECT * FROM {table} WHERE {_real(identities[0])}"
            database.execute(real)
            for number in range(first, first + max(0, runs - all_there) // each):
                values = ", ".join(_copied(column, column in identities, number) for column in columns)
                database.execute(f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM real_{table}")


def _real(identity: str) -> str:
    return f"substr({identity}, 1, {len(MARK)}) != '{MARK}'"


def _copied(column: str, is_identity: bool, number: int) -> str:
    return f"'{MARK}{number:04x}' || substr({column}, 9)" if is_identity else column


def _grow_store(store: Path, artifacts: int) -> None:
    """Copy one artifact, with its manifest and a file, until there are `artifacts`."""
    for number in range(len(list(store.glob("scores/*"))), artifacts):
        (folder := store / "scores" / f"{number:016x}").mkdir(parents=True, exist_ok=True)
        for file in _sample(store).iterdir():
            content = file.read_bytes()
            (folder / file.name).write_bytes(content.replace(_sample(store).name.encode(), folder.name.encode()))


@cache
def _sample(store: Path) -> Path:
    """Return the smallest table of scores that the real run made."""
    return min(store.glob("scores/*"), key=lambda folder: sum(file.stat().st_size for file in folder.iterdir()))


if __name__ == "__main__":
    main()
