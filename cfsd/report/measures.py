"""The table of measures. A new measure over the score tables is one function and one entry here.

`summary.json`, the tables of page and terminal, the data frame, the model card and MLflow go through the table.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from cfsd.report.run_record import RunRecord, role_of
from cfsd.report.scores import accuracy_units, first_scores, gain_units, metric_of, response_pair, table
from cfsd.report.summary import Summary
from cfsd.stages import CHAT
from cfsd.statistics.discoveries import controlled, detectable_mean
from cfsd.statistics.figures import Figure
from cfsd.statistics.forgetting import (
    BenchmarkForgetting,
    benchmark_forgetting,
    benchmark_units,
    chance_corrected_units,
    mean_forgetting,
)
from cfsd.statistics.texts import text_units
from cfsd.statistics.units import Units, figure_of_units
from cfsd.store.artifact import Artifact, Store


class ScoreTables:
    """The score tables of one run record, each read when it is first asked for."""

    def __init__(self, store: Store, run_record: RunRecord) -> None:
        """Read nothing yet."""
        self.store, self.before, self.after = store, run_record.before, run_record.after
        self.artifacts = run_record.artifacts

    @cached_property
    def benchmarks(self) -> list[BenchmarkForgetting]:
        """What each benchmark lost, under false-discovery control."""
        return controlled([benchmark_forgetting(name, *scores) for name, scores in self._scores.items()])

    @cached_property
    def _scores(self) -> dict[str, Any]:
        """Metric and the documents' scores before and after of each benchmark, as its first filter reads them."""
        scored = {}
        for name, before in self.before.benchmarks.items():
            sides = (first_scores(self.store, artifact) for artifact in (before, self.after.benchmarks[name]))
            scored[name] = (metric_of(before, self.after.benchmarks[name]), *sides)
        return scored

    @cached_property
    def responses(self) -> Any:
        """The held-out responses scored by base and tuned: two data frames; None where they were not measured."""
        if self.before.target is None or self.after.target is None:
            return None
        return response_pair(self.store, self.before.target, self.after.target)

    @cached_property
    def texts(self) -> dict[str, Any]:
        """The documents of each of the user's texts scored by base and tuned: two data frames."""
        sides = (self.before, self.after)
        return {name: [table(self.store, side.texts[name], "texts") for side in sides] for name in self.before.texts}

    def on_benchmarks(self) -> dict[str, Units]:
        """Return what each benchmark lost, document by document, in its own unit; positive is worse."""
        return {name: benchmark_units(name, *scores) for name, scores in self._scores.items()}

    def on_texts(self) -> dict[str, Units]:
        """Return by how much the loss of each text rose, document by document."""
        return {name: text_units(*sides) for name, sides in self.texts.items()}

    def on_prompts(self, column: str = "kl") -> dict[str, Units]:
        """Return the divergence along the base's answers to each set of the user's prompts, answer by answer."""
        measured = self.after.prompts.items()
        return {name: self.per_row(scores, column, role_of(name))[0] for name, scores in measured}

    def chance_corrected(self) -> list[Units]:
        """Return what benchmarks lost that have a chance-corrected figure, as fractions."""
        units = [chance_corrected_units(name, *scores) for name, scores in self._scores.items()]
        return [part for part in units if part is not None]

    def on_responses(self, units_of: Callable[[Any, Any], Units]) -> list[Units]:
        """Return a figure of the held-out responses, row by row, from their tables before and after."""
        if self.responses is None:
            return []
        units = units_of(*self.responses)
        return [units._replace(names=self._named("target", units.names))]

    def per_row(
        self, artifact: Artifact | None, column: str, rows_of: str = "probe", along: str = "divergence"
    ) -> list[Units]:
        """Return a column of the divergence table called `along`, row by row, in nats; nothing without an artifact.

        `rows_of` is the role of the artifact whose rows were measured; another artifact's are other rows.
        """
        if artifact is None:
            return []
        rows = table(self.store, artifact, along)
        if column not in rows or rows[column].isna().any():  # measured by a version that had no such figure
            return []
        sums, counts = (rows[name].to_numpy(float) for name in (column, "count"))
        if not counts.sum():  # chats without an answer
            return []
        return [Units(self._named(rows_of, rows["row_id"]), sums, counts)]

    def _named(self, rows_of: str, rows: Iterable[object]) -> tuple[str, ...]:
        content = self.artifacts[rows_of].content if rows_of in self.artifacts else ""
        return tuple(f"{content}:{row}" for row in rows)


class Measure(NamedTuple):
    """One figure of a variant: how it is computed, and how and where it is shown.

    `compute` returns it with its interval. `units` returns what it is the mean of, one part or several that count
    alike, and nothing where it was not measured; with it variants are compared, paired by unit. Without `compute` the
    figure is the one of its units.
    `scores`: the row of base and tuned above its own in tables, and the name of both in `Summary.target`.
    `detectable` returns the smallest change that would have been found, shown where the figure is not apart from 0.
    """

    name: str  # in summary.json
    compute: Callable[[ScoreTables], Figure | None] | None = None
    units: Callable[[ScoreTables], list[Units]] | None = None
    mlflow: str = ""  # empty: not in MLflow
    label: str = ""  # its row in tables, with the unit; empty: in none
    better: int = 0  # 1 where more is better, -1 where less is; 0: the sign is not judged
    factor: float = 1  # from the unit of summary.json to that of tables
    scores: tuple[str, str] | None = None
    detectable: Callable[[Sequence[BenchmarkForgetting]], float | None] | None = None
    least: float = -math.inf  # that is possible, in the unit of summary.json: intervals end there

    def figure(self, tables: ScoreTables) -> Figure | None:
        """Return the figure of one variant; None where it was not measured."""
        if self.compute:
            return self.compute(tables)
        assert self.units, f"{self.name}: a measure has a function `compute` or `units`"
        figure = figure_of_units(self.units(tables))
        return figure and figure.within(self.least, math.inf)


def figure_of(summary: Summary, name: str) -> dict[str, Any] | None:
    """Return a measure of a summary, also of one made before the measure was; None where it was not measured."""
    return getattr(summary, name, None)


def least_of(name: str) -> float:
    """Return the least value of a measure that is possible: 0 of a divergence."""
    return next((measure.least for measure in MEASURES if measure.name == name), -math.inf)


MEASURES = [
    Measure(
        "target_gain",
        units=lambda m: m.on_responses(gain_units),
        mlflow="target_gain",
        label="gain, nats/token",
        better=1,
        scores=("target loss, nats/token", "loss"),
    ),
    Measure(
        "target_accuracy_gain",
        units=lambda m: m.on_responses(accuracy_units),
        mlflow="target_accuracy_gain",
        label="gain, points",
        better=1,
        factor=100,
        scores=("target exact, %", "accuracy"),
    ),
    Measure(
        "probe_kl",
        units=lambda m: m.per_row(m.after.probe, "kl"),
        mlflow="probe_kl",
        label="probe_kl, nats/token",
        least=0,
    ),
    Measure(
        "chat_kl",
        units=lambda m: m.per_row(m.after.chat, "kl", rows_of=role_of(CHAT)),
        mlflow="chat_kl",
        label="chat_kl, nats/token",
        least=0,
    ),
    Measure(
        "chat_user_kl",
        units=lambda m: m.per_row(m.after.chat, "kl", rows_of=role_of(CHAT), along="user_turns"),
        mlflow="chat_user_kl",
        label="chat_user_kl, nats/token",
        least=0,
    ),
    Measure("probe_kl_sampled", units=lambda m: m.per_row(m.after.probe, "sampled")),
    Measure(
        "reverse_kl",
        units=lambda m: m.per_row(m.after.probe, "reverse_kl"),
        mlflow="reverse_kl",
        label="reverse KL, nats/token",
        least=0,
    ),
    Measure(
        "target_divergence",
        units=lambda m: m.per_row(m.after.target_divergence, "kl", rows_of="target"),
        mlflow="target_divergence",
        label="target divergence, nats/token",
        least=0,
    ),
    Measure(
        "mean_forgetting",
        lambda m: mean_forgetting(m.benchmarks),
        units=lambda m: m.chance_corrected(),
        mlflow="mean_forgetting",
        label="mean forgetting, points",
        better=-1,
        factor=100,
        detectable=detectable_mean,
    ),
]
