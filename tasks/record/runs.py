"""MLflow's runs: opened, ended as the work within them ends, or by a later process if theirs was killed."""

import getpass
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from cfsd.machine import home
from cfsd.store.artifact import Store
from tasks.record.client import tracked
from tasks.record.pages import prefect_tags
from tasks.record.step_run import StepRun

if TYPE_CHECKING:
    from tasks.record.server import Server


def open_run(server: "Server", name: str, parent: str | None, tags: dict[str, str], start: float | None = None) -> str:
    """Return the id of a new run; `start` in seconds, now if it is left out."""
    parents = {"mlflow.parentRunId": parent} if parent else {}
    source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.user": _user()}
    every = {**tags, **prefect_tags(), **parents, **source}
    run = server.create_run(server.experiment, int(start * 1000) if start else None, every, name)
    return str(run.info.run_id)


def open_step(server: "Server", step: StepRun, parent: str, attempt: str, start: float | None = None) -> str:
    """Return the id of a new run for a step, which counts as its run from now on; `describe` it under its lock."""
    run_id = open_run(server, step.name(), parent, step.tags(attempt), start)
    server.know(step.key, run_id, {})
    return run_id


def describe(server: "Server", run_id: str, step: StepRun, store: Store) -> None:
    """Put a step's settings and inputs on its run."""
    server.log_all(run_id, parameters=step.settings())
    server.log_data_sets(run_id, step.data_sets(store))


@contextmanager
def ended(run_id: str | None, at: float | None = None) -> Iterator[None]:
    """Hold the run's lock and end the run as it ends here; `at` in seconds, now if it is left out."""
    with ExitStack() as held:
        status = "FINISHED"
        try:
            if run_id:
                held.enter_context(FileLock(_lock_of(run_id)))  # fails where the store cannot be written
            yield
        except Exception:
            status = "FAILED"
            raise
        except BaseException:
            status = "KILLED"
            raise
        finally:
            if run_id:
                tracked(lambda server: server.set_terminated(run_id, status, int(at * 1000) if at else None))


def end_dead_runs(server: "Server") -> None:
    """End as KILLED the runs that a killed process left RUNNING: those whose lock can be taken."""
    for run in server.search_runs([server.experiment], "attributes.status = 'RUNNING'"):
        path = _lock_of(run.info.run_id)
        if not path.exists():
            continue  # of another home or machine
        try:
            with FileLock(path, timeout=0):
                server.set_terminated(run.info.run_id, "KILLED")
        except Timeout:
            continue


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number without a name
        return str(os.getuid())


def _lock_of(run_id: str) -> Path:
    folder = home() / "store" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"run-{run_id}.lock"
