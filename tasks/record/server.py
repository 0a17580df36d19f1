"""Our use of MLflow's client: one experiment, metrics in batches."""

import json
import logging
import re
import time
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModel,
    LoggedModelOutput,
    LoggedModelStatus,
    Metric,
    Param,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from cfsd.machine import home
from cfsd.store.artifact import Artifact
from tasks.record.description import NOTE, TEXT_LENGTH
from tasks.record.step_run import DataSet, StepRun

EXPERIMENT = "cfsd"
PAGES = "?workflowType=machine_learning"  # without it MLflow's pages are those for agents, whatever the experiment is
VIEW_KEY = "variants"
COLUMNS = ["metrics.`target_gain`", "metrics.`probe_kl`", "metrics.`mean_forgetting`", "tags.`budget_outcome`",
           "metrics.`minutes`"]  # fmt: skip
VIEW = {"searchFilter": "tags.`cfsd.kind` != 'step'", "selectedColumns": COLUMNS}
VIEW_TAG = f"mlflow.sharedViewState.{VIEW_KEY}"  # what the pages show under VIEW_KEY
TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    VIEW_TAG: json.dumps(VIEW),
    NOTE: "Each run is a variant of a recipe, and the runs below it are its steps.",
}
RECORDED = "cfsd.recorded"  # the tag of a step's run that holds everything
CONTEXT = "mlflow.data.context"
BATCH_NAMES = 100  # parameters or tags in one request
BATCH = 1000  # metrics in one request
PARAMETER_LENGTH = 6000  # MLflow refuses longer values
DATABASE_ATTEMPTS = 4  # a second in all; MLflow's own ten take two minutes for a database that is away
REFUSED = re.compile(r"[^/\w.\- :]")  # characters that a name of a metric or a parameter may not have
FAILURES = (MlflowException, SQLAlchemyError, OSError)
NOT_ALLOWED = (401, 403, 429)  # HTTP statuses of a server that would take nothing else either


def is_refusal(error: Exception) -> bool:
    """Say whether MLflow answered that it does not take this one thing; what comes next it may take."""
    status = error.get_http_status_code() if isinstance(error, MlflowException) else 0
    return 400 <= status < 500 and status not in NOT_ALLOWED


class Known(NamedTuple):
    """A run of a step, and its tags."""

    run_id: str
    tags: Mapping[str, str]


@cache
def server() -> "Server":
    """Return the client of this process."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is said by tracked
    made = Server()
    if not made.tracking_uri.startswith("http"):  # a database of our own
        from mlflow.store.db import utils  # half a second, which a run that asks a server need not take

        utils.MAX_RETRY_COUNT = DATABASE_ATTEMPTS
    return made


def accepted(name: str) -> str:
    """Return a name of a metric or a parameter as MLflow takes it; others, as benchmarks may have, get an _."""
    parts = (REFUSED.sub("_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)


def _memory() -> Path:
    return home() / "store" / ".runs"


def _remembered() -> dict[str, str]:
    """Return the run that each step had last, by key."""
    try:
        lines = _memory().read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split() for line in lines if line.count(" ") == 1 and line.replace(" ", "").isalnum())


class Server(MlflowClient):
    """A client of the tracking server that the environment names."""

    restored = False  # whether our experiment had been deleted

    @cached_property
    def experiment(self) -> str:
        """Return the id of our experiment, which is made if it is missing; another machine may make it just then.

        A server decides where its artifacts are; a database without one leaves them in the data folder.
        """
        if known := self.get_experiment_by_name(EXPERIMENT):
            number = str(known.experiment_id)
            if known.lifecycle_stage == "deleted":  # its name is taken all the same, and it takes no run
                self.restore_experiment(number)
                self.restored = True
            for name, value in TAGS.items():
                if name not in known.tags or (name == VIEW_TAG and known.tags[name] != value):  # by an earlier version
                    self.set_experiment_tag(number, name, value)
            return number
        own = None if self.tracking_uri.startswith("http") else (home() / "mlartifacts").as_uri()
        try:
            return str(self.create_experiment(EXPERIMENT, own, TAGS))
        except MlflowException:
            if known := self.get_experiment_by_name(EXPERIMENT):
                return str(known.experiment_id)
            raise

    @cached_property
    def steps(self) -> dict[str, "Known"]:
        """The runs of steps that this process has seen, by key."""
        return {}

    def step(self, key: str) -> "Known | None":
        """Return the run of a step that ended well, of several the newest with everything in it."""
        if key not in self.steps:
            found = self.search_runs([self.experiment], f"tags.`cfsd.key` = '{key}' and attributes.status = 'FINISHED'")
            for run in sorted(found, key=lambda run: (RECORDED in run.data.tags, run.info.start_time))[-1:]:
                self.know(key, run.info.run_id, run.data.tags)
        return self.steps.get(key)

    def look_up(self, keys: Iterable[str]) -> None:
        """Ask in one request for the runs that the data folder remembers of these steps.

        The memory is only a hint: a run that is gone, or of another MLflow, is not found so, and `step` searches it.
        """
        remembered = {key: run for key, run in _remembered().items() if key in set(keys) - set(self.steps)}
        if not remembered:
            return
        listed = ", ".join(f"'{run}'" for run in remembered.values())
        for run in self.search_runs([self.experiment], f"attributes.run_id IN ({listed})"):
            key = run.data.tags.get("cfsd.key")  # a tag that somebody may have deleted
            if key and run.info.status == "FINISHED":
                self.steps[key] = Known(run.info.run_id, run.data.tags)

    def know(self, key: str, run_id: str, tags: Mapping[str, str]) -> None:
        """Remember a step's run, in place of an earlier one, and what was put on it just now."""
        known = self.steps.get(key)
        same = known is not None and known.run_id == run_id
        self.steps[key] = Known(run_id, {**known.tags, **tags} if known and same else tags)
        if not same:
            with _memory().open("a") as file:  # short lines are appended whole, by several processes too
                file.write(f"{key} {run_id}\n")

    def page(self, run_id: str = "", place: str = "") -> str:
        """Return the page of a run, a place in it, or that of all variants, as MLflow's own pages link to it."""
        pages = f"#/experiments/{self.experiment}/runs"
        return f"{pages}/{run_id}{place}{PAGES}" if run_id else f"{pages}{PAGES}&viewStateShareKey={VIEW_KEY}"

    def log_metrics(self, run_id: str, records: Iterable[dict[str, Any]]) -> None:
        """Send records of a journal: `name`, `value`, `time` in seconds, `step`."""
        metrics = [Metric(accepted(r["name"]), r["value"], int(r["time"] * 1000), r["step"]) for r in records]
        for first in range(0, len(metrics), BATCH):
            self.log_batch(run_id, metrics=metrics[first : first + BATCH])

    def log_all(
        self,
        run_id: str,
        *,
        figures: Mapping[str, float] | None = None,
        parameters: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        model: str | None = None,
    ) -> None:
        """Send figures without a history, parameters and tags, cut to what MLflow takes, in as few requests as may be.

        The figures are also those of the logged model called `model`.
        """
        now = int(time.time() * 1000)
        metrics = [Metric(accepted(k), v, now, 0, model_id=model) for k, v in (figures or {}).items()]
        params = [Param(accepted(k), text[:PARAMETER_LENGTH]) for k, text in (parameters or {}).items()]
        named = [RunTag(accepted(k), text[:TEXT_LENGTH]) for k, text in (tags or {}).items()]
        for i in range(0, max(1, len(params), len(named)), BATCH_NAMES):
            part = slice(i, i + BATCH_NAMES)
            self.log_batch(run_id, metrics if i == 0 else (), params[part], named[part])

    def log_data_sets(self, run_id: str, data_sets: Iterable[DataSet]) -> None:
        """Send the inputs of a run."""
        inputs = [
            DatasetInput(
                Dataset(d.name, d.digest, "local", json.dumps({"uri": d.address}), profile=json.dumps(d.numbers)),
                [InputTag(CONTEXT, d.context)],
            )
            for d in data_sets
        ]
        if inputs:
            self.log_inputs(run_id, inputs)

    def log_model(
        self, run_id: str, step: StepRun, model: Artifact, address: str, figures: Mapping[str, float]
    ) -> None:
        """Name the model that a run made: its settings and where it is. Weights stay where they are."""
        if known := self.model_of(model):
            self.link_model(run_id, known)
            return
        tags = {"cfsd.key": model.key, "cfsd.content": model.content, "cfsd.address": address,
                "mlflow.model.isExternal": "true"}  # fmt: skip
        made = self.create_logged_model(
            self.experiment, f"{model.kind}-{model.key}", run_id, tags, step.settings(), "causal language model"
        )
        self._keep_files(made)
        self.finalize_logged_model(made.model_id, LoggedModelStatus.READY)
        self.link_model(run_id, made.model_id)
        self.log_all(run_id, figures=figures, model=made.model_id)

    def _keep_files(self, model: LoggedModel) -> None:
        """Give a model the one file without which it cannot be registered: it says that its weights are elsewhere."""
        from mlflow.models.utils import get_external_mlflow_model_spec  # takes a second to import

        with TemporaryDirectory() as folder:
            get_external_mlflow_model_spec(model).save(f"{folder}/MLmodel")
            self.log_model_artifacts(model.model_id, folder)

    def link_model(self, run_id: str, model: str) -> None:
        """Show a logged model as what came of a run, once: MLflow fails at a second link of the two."""
        outputs = self.get_run(run_id).outputs
        if model not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            self.log_outputs(run_id, [LoggedModelOutput(model, 0)])

    def model_of(self, artifact: Artifact) -> str | None:
        """Return the id of the logged model that stands for an artifact."""
        own = f"tags.`cfsd.key` = '{artifact.key}' and tags.`cfsd.content` = '{artifact.content}'"
        found = self.search_logged_models([self.experiment], own, max_results=1)
        return found[0].model_id if found else None

    def monitor(self, run_id: str) -> SystemMetricsMonitor:
        """Return what sends the machine's load to a run between its `start` and `finish`."""
        return SystemMetricsMonitor(run_id)
