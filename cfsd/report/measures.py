"""The table of measures. A new measure over the score tables is one function and one entry here.

`summary.json`, the tables of page and terminal, the data frame, the model card and MLflow go through the table.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from cfsd.report.run_record import RunRecord
from cfsd.report.scores import accuracy_gain, first_scores, metric_of, response_pair, table, target_gain
from cfsd.report.summary import Summary
from cfsd.statistics.discoveries import controlled, detectable_mean
from cfsd.statistics.figures import Figure, mean_per_token
from cfsd.statistics.forgetting import BenchmarkForgetting, benchmark_forgetting, mean_forgetting
from cfsd.store.artifact import Artifact, Store


class ScoreTables:
    """The score tables of one run record, each read when it is first asked for."""

    def __init__(self, store: Store, run_record: RunRecord) -> None:
        """Read nothing yet."""
        self.store, self.before, self.after = store, run_record.before, run_record.after

    @cached_property
    def benchmarks(self) -> list[BenchmarkForgetting]:
        """What each benchmark lost, under false-discovery control."""
        forgotten = []
        for name, before in self.before.benchmarks.items():
            scores = (first_scores(self.store, artifact) for artifact in (before, self.after.benchmarks[name]))
            forgotten.append(benchmark_forgetting(name, metric_of(before), *scores))
        return controlled(forgotten)

    @cached_property
    def responses(self) -> Any:
        """The held-out responses scored by base and tuned: two data frames; None where they were not measured."""
        if self.before.target is None or self.after.target is None:
            return None
        return response_pair(self.store, self.before.target, self.after.target)

    def divergence(self, artifact: Artifact | None, column: str) -> Figure | None:
        """Return the mean of a column of a divergence table, in nats per token; None without an artifact."""
        if artifact is None:
            return None
        rows = table(self.store, artifact, "divergence")
        return mean_per_token(rows[column].to_numpy(), rows["count"].to_numpy(float), seed=0)


class Measure(NamedTuple):
    """One figure of a variant: how it is computed, and how and where it is shown.

    `scores`: the row of base and tuned above its own in tables, and the name of both in `Summary.target`.
    `detectable` returns the smallest change that would have been found, shown where the figure is not apart from 0.
    """

    name: str  # in summary.json
    compute: Callable[[ScoreTables], Figure | None]
    mlflow: str = ""  # empty: not in MLflow
    label: str = ""  # its row in tables, with the unit; empty: in none
    better: int = 0  # 1 where more is better, -1 where less is; 0: the sign is not judged
    factor: float = 1  # from the unit of summary.json to that of tables
    scores: tuple[str, str] | None = None
    detectable: Callable[[Sequence[BenchmarkForgetting]], float | None] | None = None


def figure_of(summary: Summary, name: str) -> dict[str, Any] | None:
    """Return a measure of a summary, also of one made before the measure was; None where it was not measured."""
    return getattr(summary, name, None)


MEASURES = [
    Measure(
        "target_gain",
        lambda m: None if m.responses is None else target_gain(*m.responses),
        mlflow="target/gain",
        label="gain, nats/token",
        better=1,
        scores=("target loss, nats/token", "loss"),
    ),
    Measure(
        "target_accuracy_gain",
        lambda m: None if m.responses is None else accuracy_gain(*m.responses),
        mlflow="target/accuracy_gain",
        label="gain, points",
        better=1,
        factor=100,
        scores=("target exact, %", "accuracy"),
    ),
    Measure(
        "probe_kl",
        lambda m: m.divergence(m.after.probe, "kl"),
        mlflow="forgetting/probe_kl",
        label="probe_kl, nats/token",
    ),
    Measure("probe_kl_sampled", lambda m: m.divergence(m.after.probe, "sampled")),
    Measure(
        "target_divergence",
        lambda m: m.divergence(m.after.target_divergence, "kl"),
        mlflow="forgetting/target_divergence",
        label="target divergence, nats/token",
    ),
    Measure(
        "mean_forgetting",
        lambda m: mean_forgetting(m.benchmarks),
        mlflow="forgetting/mean",
        label="mean forgetting, points",
        better=-1,
        factor=100,
        detectable=detectable_mean,
    ),
]
