"""Our use of MLflow's client: one experiment, metrics in batches."""

import logging
import re
import time
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from typing import Any

import mlflow.store.db.utils
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from sqlalchemy.exc import SQLAlchemyError

from cfsd.machine import home

EXPERIMENT = "cfsd"
BATCH = 1000  # metrics in one request
PARAMETER_LENGTH = 6000  # MLflow refuses longer values
DATABASE_ATTEMPTS = 4  # a second in all; MLflow's own ten take two minutes for a database that is away
REFUSED = re.compile(r"[^/\w.\- :]")  # characters that a name of a metric or a parameter may not have
FAILURES = (MlflowException, SQLAlchemyError, OSError)


@cache
def server() -> "Server":
    """Return the client of this process."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what fails is said by tracked
    mlflow.store.db.utils.MAX_RETRY_COUNT = DATABASE_ATTEMPTS
    return Server()


def accepted(name: str) -> str:
    """Return a name of a metric or a parameter as MLflow takes it; others, as benchmarks may have, get an _."""
    parts = (REFUSED.sub("_", part) for part in name.split("/"))
    return "/".join(part if part.strip(".") else "_" for part in parts)


class Server(MlflowClient):
    """A client of the tracking server that the environment names."""

    @cached_property
    def experiment(self) -> str:
        """Return the id of our experiment, which is made if it is missing; another machine may make it just then.

        A server decides where its artifacts are; a database without one leaves them in the data folder.
        """
        own = None if self.tracking_uri.startswith("http") else (home() / "mlartifacts").as_uri()
        if known := self.get_experiment_by_name(EXPERIMENT):
            return str(known.experiment_id)
        try:
            return str(self.create_experiment(EXPERIMENT, artifact_location=own))
        except MlflowException:
            if known := self.get_experiment_by_name(EXPERIMENT):
                return str(known.experiment_id)
            raise

    def log_metrics(self, run_id: str, records: Iterable[dict[str, Any]]) -> None:
        """Send records of a journal: `name`, `value`, `time` in seconds, `step`."""
        metrics = [Metric(accepted(r["name"]), r["value"], int(r["time"] * 1000), r["step"]) for r in records]
        for first in range(0, len(metrics), BATCH):
            self.log_batch(run_id, metrics=metrics[first : first + BATCH])

    def log_figures(self, run_id: str, figures: Mapping[str, float]) -> None:
        """Send figures without a history."""
        now = time.time()
        self.log_metrics(run_id, ({"name": k, "value": v, "time": now, "step": 0} for k, v in figures.items()))

    def log_parameters(self, run_id: str, parameters: Mapping[str, str]) -> None:
        """Send parameters, cut to what MLflow takes."""
        named = {accepted(name): text[:PARAMETER_LENGTH] for name, text in parameters.items()}
        self.log_batch(run_id, params=[Param(name, text) for name, text in named.items()])

    def monitor(self, run_id: str) -> SystemMetricsMonitor:
        """Return what sends the machine's load to a run between its `start` and `finish`."""
        return SystemMetricsMonitor(run_id)
