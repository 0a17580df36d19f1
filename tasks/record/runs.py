"""MLflow's runs: opened, ended as the work within them ends, or by a later process if theirs was killed."""

import getpass
import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout

from cfsd.machine import home
from cfsd.recipe import Recipe
from cfsd.report import recipe_text
from cfsd.report.run_record import Step
from tasks.record.client import say, tracked

if TYPE_CHECKING:
    from tasks.record.server import Server

T = TypeVar("T")
RECORDED = "cfsd.recorded"  # the tag of a step's run that has all of its metrics


class Variant:
    """One way of training, as an MLflow parent run and a list of steps."""

    def __init__(self, name: str, run_id: str | None) -> None:
        """Start with no steps; `run_id` is None when MLflow is away."""
        self.name = name
        self.run_id = run_id
        self.steps: list[Step] = []


current_variant: ContextVar[Variant | None] = ContextVar("variant", default=None)
_comparison: ContextVar[str | None] = ContextVar("comparison", default=None)


@contextmanager
def comparison(name: str) -> Iterator[str | None]:
    """Open the MLflow run above several variants."""
    run_id = tracked(lambda server: open_run(server, name, None, {"cfsd.kind": "comparison"}))
    with ended(run_id), _as_current(_comparison, run_id):
        yield run_id


@contextmanager
def variant(name: str, recipe: Recipe | None = None) -> Iterator[Variant]:
    """Open the MLflow parent run of one variant and collect the steps that are taken within."""
    tags = {"cfsd.kind": "variant"} | ({"cfsd.recipe": recipe.digest()} if recipe else {})
    run_id = tracked(lambda server: open_run(server, name, _comparison.get(), tags))
    if recipe:
        tracked(lambda server: _log_recipe(server, str(run_id), recipe.model_dump(mode="json")))
    say(name, style="bold")
    opened = Variant(name, run_id)
    with ended(run_id), _as_current(current_variant, opened):
        yield opened


@contextmanager
def _as_current(variable: ContextVar[T], value: T) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def open_run(server: "Server", name: str, parent: str | None, tags: dict[str, str]) -> str:
    """Return the id of a new run; the runs of killed processes are ended first."""
    _end_dead_runs(server)
    parents = {"mlflow.parentRunId": parent} if parent else {}
    source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.user": _user()}
    run = server.create_run(server.experiment, run_name=name, tags={**tags, **parents, **source})
    return str(run.info.run_id)


def step_tags(stage: str, key: str, attempt: str) -> dict[str, str]:
    """Return the tags that identify the run of a step; `attempt` is first, resumed or replayed."""
    return {"cfsd.kind": "step", "cfsd.stage": stage, "cfsd.key": key, "attempt": attempt}


@contextmanager
def ended(run_id: str | None) -> Iterator[None]:
    """Hold the run's lock and end the run as it ends here."""
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
                tracked(lambda server: server.set_terminated(run_id, status))


def flattened(content: Mapping[str, Any]) -> dict[str, str]:
    """Return nested mappings as dotted names with text values."""
    named = recipe_text.flattened(content)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in named}


def _log_recipe(server: "Server", run_id: str, content: dict[str, Any]) -> None:
    server.log_parameters(run_id, flattened(content))
    server.log_dict(run_id, content, "recipe.json")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number without a name
        return str(os.getuid())


def _lock_of(run_id: str) -> Path:
    folder = home() / "store" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"run-{run_id}.lock"


def _end_dead_runs(server: "Server") -> None:
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
