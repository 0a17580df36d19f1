"""What happened, for people to look at: MLflow runs, the Prefect log, the terminal. The only importer of mlflow.

Nothing here can lose work: artifacts hold their own metrics, from which a server that was away is filled later.
"""

import getpass
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from filelock import FileLock, Timeout
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger
from rich.console import Console

from cfsd.machine import home
from cfsd.recipe import Recipe
from cfsd.report.run_record import Step
from cfsd.report.summary import Summary
from cfsd.store.artifact import Artifact, Draft, Store
from cfsd.store.journal import read_metrics
from tasks._follow import Follower

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "cfsd"
PARAMETER_LENGTH = 6000  # MLflow refuses longer values
console = Console(highlight=False, soft_wrap=True)
T = TypeVar("T")


class Variant:
    """One way of training, as an MLflow parent run and a list of steps."""

    def __init__(self, name: str, run_id: str | None) -> None:
        """Start with no steps; `run_id` is None when MLflow is away."""
        self.name = name
        self.run_id = run_id
        self.steps: list[Step] = []


_variant: ContextVar[Variant | None] = ContextVar("variant", default=None)
_comparison: ContextVar[str | None] = ContextVar("comparison", default=None)
_away: list[str] = []  # why MLflow is not asked any more in this process


def say(line: str, style: str = "") -> None:
    """Print a line as it is and put it into the Prefect log of the run at hand."""
    console.print(line, style=style, markup=False)  # rich would swallow R[t, j]
    with suppress(MissingContextError):
        get_run_logger().info(line)


def tracked(action: "Callable[[MlflowClient], T]") -> T | None:
    """Do `action` with the MLflow client; a server that is away is said once and asked no more."""
    if _away:
        return None
    from mlflow.exceptions import MlflowException

    try:
        return action(_client())
    except (MlflowException, OSError) as error:
        _away.append(str(error))
        say(f"MLflow cannot be reached ({type(error).__name__}); the run goes on, and the next one fills it in")
        return None


@cache
def _client() -> "MlflowClient":
    from mlflow import MlflowClient

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return MlflowClient()


@cache
def _experiment() -> str:
    client = _client()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found:
        return str(found.experiment_id)
    return str(client.create_experiment(EXPERIMENT, artifact_location=(home() / "mlartifacts").as_uri()))


@contextmanager
def comparison(name: str) -> Iterator[str | None]:
    """Open the MLflow run above several variants."""
    run_id = tracked(lambda client: _open_run(client, name, None, {"cfsd.kind": "comparison"}))
    token = _comparison.set(run_id)
    with _ended(run_id):
        try:
            yield run_id
        finally:
            _comparison.reset(token)


@contextmanager
def variant(name: str, recipe: Recipe | None = None) -> Iterator[Variant]:
    """Open the MLflow parent run of one variant and collect the steps that are taken within."""
    tags = {"cfsd.kind": "variant"} | ({"cfsd.recipe": recipe.digest()} if recipe else {})
    run_id = tracked(lambda client: _open_run(client, name, _comparison.get(), tags))
    if recipe:
        tracked(lambda client: _log_recipe(client, run_id, recipe))
    say(name, style="bold")
    opened = Variant(name, run_id)
    token = _variant.set(opened)
    with _ended(run_id):
        try:
            yield opened
        finally:
            _variant.reset(token)


def _open_run(client: "MlflowClient", name: str, parent: str | None, tags: dict[str, str]) -> str:
    _end_dead_runs(client)
    parents = {"mlflow.parentRunId": parent} if parent else {}
    source = {"mlflow.source.name": Path(sys.argv[0]).name, "mlflow.user": _user()}
    run = client.create_run(_experiment(), run_name=name, tags={**tags, **parents, **source})
    return str(run.info.run_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container may run under a number without a name
        return str(os.getuid())


@contextmanager
def _ended(run_id: str | None) -> Iterator[None]:
    """Hold the run's lock and end the run as it ends here."""
    with FileLock(_lock_of(run_id)) if run_id else nullcontext():
        status = "FINISHED"
        try:
            yield
        except Exception:
            status = "FAILED"
            raise
        except BaseException:
            status = "KILLED"
            raise
        finally:
            if run_id:
                tracked(lambda client: client.set_terminated(run_id, status))


def _lock_of(run_id: str) -> Path:
    folder = home() / "store" / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"run-{run_id}.lock"


def _end_dead_runs(client: "MlflowClient") -> None:
    """End as KILLED the runs that a killed process left RUNNING: those whose lock can be taken."""
    for run in client.search_runs([_experiment()], "attributes.status = 'RUNNING'"):
        path = _lock_of(run.info.run_id)
        if not path.exists():
            continue  # of another home or machine
        try:
            with FileLock(path, timeout=0):
                client.set_terminated(run.info.run_id, "KILLED")
        except Timeout:
            continue


def _log_recipe(client: "MlflowClient", run_id: str | None, recipe: Recipe) -> None:
    from mlflow.entities import Param

    parameters = flattened(recipe.model_dump(mode="json"))
    client.log_batch(str(run_id), params=[Param(k, v[:PARAMETER_LENGTH]) for k, v in parameters.items()])
    client.log_dict(str(run_id), recipe.model_dump(mode="json"), "recipe.json")


def flattened(content: Mapping[str, Any]) -> dict[str, str]:
    """Return nested mappings as dotted names with text values."""
    from cfsd.report import recipe_text

    named = recipe_text.flattened(content)
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in named}


@contextmanager
def step(stage: str, key: str, draft: Draft, *, gpu: bool) -> Iterator[None]:
    """Follow a stage that really executes: progress for people and, for GPU steps, a live child run."""
    current = _variant.get()
    run_id = None
    if gpu and current and current.run_id:
        tags = {
            "cfsd.kind": "step",
            "cfsd.stage": stage,
            "cfsd.key": key,
            "attempt": "resumed" if draft.continued else "first",
        }
        run_id = tracked(lambda client: _open_run(client, f"{stage} {key}", current.run_id, tags))
    say(f"{stage} {key}" + (" continues" if draft.continued else ""))
    with _ended(run_id), _system_metrics(run_id), Follower(draft.folder, stage, console, _sender(run_id)):
        yield
    if run_id:
        tracked(lambda client: client.set_tag(run_id, "cfsd.recorded", "all"))


@contextmanager
def _system_metrics(run_id: str | None) -> Iterator[None]:
    if run_id is None:
        yield
        return
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _sender(run_id: str | None) -> Callable[[list[dict[str, Any]]], None]:
    def send(records: list[dict[str, Any]]) -> None:
        if run_id:
            tracked(lambda client: _log_metrics(client, run_id, records))

    return send


def _log_metrics(client: "MlflowClient", run_id: str, records: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    metrics = [Metric(r["name"], r["value"], int(r["time"] * 1000), r["step"]) for r in records]
    for first in range(0, len(metrics), 1000):
        client.log_batch(run_id, metrics=metrics[first : first + 1000])


def keep_step(stage: str, store: Store, artifact: Artifact, *, executed: bool, gpu: bool) -> None:
    """Note a step of the variant at hand; a GPU step that MLflow never saw is replayed from its artifact."""
    seconds = float(store.manifest(artifact)["seconds"])
    how = f"{seconds:.0f} s" if executed else "cached"
    say(f"{stage} {artifact.key} {how}{_in_brief(artifact.metadata)}")
    if (current := _variant.get()) is None:
        return
    current.steps.append(Step(stage=stage, artifact=artifact, executed=executed, seconds=seconds))
    if current.run_id:
        tracked(lambda client: _link_step(client, current, stage, store, artifact, replay=gpu and not executed))


def _in_brief(metadata: Mapping[str, Any]) -> str:
    named = ("rows", "tokens", "steps", "train_rows", "score", "loss", "accuracy", "probe_kl", "parameters")
    found = [f"{metadata['benchmark']}"] if "benchmark" in metadata else []
    for name in named:
        if isinstance(value := metadata.get(name), int | float):
            found.append(f"{value:,.4g} {name.replace('_', ' ')}" if isinstance(value, float) else f"{value:,} {name}")
    return ": " + ", ".join(found) if found else ""


def _link_step(
    client: "MlflowClient", current: Variant, stage: str, store: Store, artifact: Artifact, *, replay: bool
) -> None:
    run_id = str(current.run_id)
    name = artifact.metadata.get("benchmark")
    client.set_tag(run_id, f"cfsd.{stage}.{name}" if name else f"cfsd.{stage}", artifact.key)
    numbers = {f"{stage}/{k}": v for k, v in artifact.metadata.items() if isinstance(v, int | float)}
    now = time.time()
    for word in ("biased", "approximate"):  # in what the corpus is not an exact sample of the base
        if stage == "generate" and artifact.metadata.get(word):
            client.set_tag(run_id, f"cfsd.{word}", str(artifact.metadata[word]))
    if stage in ("generate", "filter", "select", "mix"):
        _log_metrics(client, run_id, [{"name": k, "value": v, "time": now, "step": 0} for k, v in numbers.items()])
    filters = f"tags.`cfsd.key` = '{artifact.key}' and tags.`cfsd.recorded` = 'all'"
    if replay and not client.search_runs([_experiment()], filters, max_results=1):
        tags = {
            "cfsd.kind": "step",
            "cfsd.stage": stage,
            "cfsd.key": artifact.key,
            "attempt": "replayed",
            "cfsd.recorded": "all",
        }
        child = _open_run(client, f"{stage} {artifact.key}", run_id, tags)
        _log_metrics(client, child, list(read_metrics(store.path(artifact))))
        client.set_terminated(child, "FINISHED")


def conclusion(run_id: str | None, summary: Summary | None, files: list[Path]) -> None:
    """Put the figures people compare, and the files people open, on a variant's or a comparison's run."""
    from cfsd.report.summarise import headline

    if run_id is None:
        return
    if summary:
        now = time.time()
        records = [{"name": k, "value": v, "time": now, "step": 0} for k, v in headline(summary).items()]
        tracked(lambda client: _log_metrics(client, run_id, records))
    for file in files:
        tracked(lambda client, file=file: client.log_artifact(run_id, str(file)))  # type: ignore[misc]
