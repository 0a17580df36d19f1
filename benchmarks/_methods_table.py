"""The figures of the study of methods: halves, the choice of strengths, intervals over seeds, the table."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from cfsd.report.compared import Comparisons
from cfsd.report.comparisons import compared
from cfsd.report.figures.frontier import frontier_figure
from cfsd.report.figures.look import styles
from cfsd.report.run_record import RunRecord
from cfsd.report.scores import first_scores, gain_units, metric_of, table
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, shown
from cfsd.statistics import seeds
from cfsd.statistics.figures import Figure
from cfsd.statistics.forgetting import Measure, benchmark_units, chance_corrected_units
from cfsd.statistics.units import Units, figure_of_units
from cfsd.store.artifact import Store

EVEN, ODD = 0, 1
ENOUGH = 0.95  # of plain fine-tuning's target gain
MB = 1e6
MAIN = ("target_gain", "probe_kl", "mean_forgetting")
RULE = (
    "On even documents with seed 0: of the strengths with at least 95 % of plain fine-tuning's largest target gain the "
    "one that forgot least on average; those not found to have forgotten more than it (paired by document, Holm over "
    "the pairs of strengths) count as tied, and the least probe_kl decides. If none has 95 %, the one with the largest "
    "target gain."
)


class Tables(NamedTuple):
    """What was measured on one model, document by document, before and after."""

    target: tuple[pd.DataFrame, pd.DataFrame]  # row_id, nll, count
    probe: pd.DataFrame  # row_id, kl, count
    benchmarks: dict[str, tuple[Measure, pd.DataFrame, pd.DataFrame]]  # doc_id, value, …


def tables_of(store: Store, run_record: RunRecord) -> Tables:
    """Read the score tables of `run_record`; of a benchmark's filters the first."""
    before, after = run_record.before, run_record.after
    assert before.target and after.target and after.probe
    benchmarks = {
        name: (
            metric_of(base, after.benchmarks[name]),
            first_scores(store, base),
            first_scores(store, after.benchmarks[name]),
        )
        for name, base in before.benchmarks.items()
    }
    target = table(store, before.target, "responses"), table(store, after.target, "responses")
    return Tables(target, table(store, after.probe, "divergence"), benchmarks)


def half(tables: Tables, parity: int) -> Tables:
    """Return every second document: EVEN or ODD doc_id of benchmarks, row_id of target and probe."""

    def kept(frame: pd.DataFrame, column: str) -> pd.DataFrame:
        return frame[frame[column] % 2 == parity].reset_index(drop=True)

    base, tuned = tables.target
    return Tables(
        (kept(base, "row_id"), kept(tuned, "row_id")),
        kept(tables.probe, "row_id"),
        {n: (m, kept(b, "doc_id"), kept(t, "doc_id")) for n, (m, b, t) in tables.benchmarks.items()},
    )


def units_of(tables: Tables) -> dict[str, list[Units]]:
    """Return what MAIN, as far as known, and each loss benchmark's rise are the means of."""
    kl, counts = (tables.probe[column].to_numpy(float) for column in ("kl", "count"))
    units = {"target_gain": [gain_units(*tables.target)], "probe_kl": [Units(_names(tables.probe), kl, counts)]}
    corrected = [chance_corrected_units(name, *scored) for name, scored in tables.benchmarks.items()]
    if counted := [part for part in corrected if part is not None]:
        units["mean_forgetting"] = counted
    losses = {name: scored for name, scored in tables.benchmarks.items() if scored[0].kind == "perplexity"}
    return units | {name: [benchmark_units(name, *scored)] for name, scored in losses.items()}


def _names(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(map(str, rows["row_id"]))


def figures_of(tables: Tables) -> dict[str, Figure]:
    """Return the figures of `units_of`, with intervals over documents."""
    return {name: figure for name, parts in units_of(tables).items() if (figure := figure_of_units(parts))}


# --- choosing ------------------------------------------------------------------------------------------------------


def choose(tried: dict[str, Tables], plain_gain: float) -> str:
    """Return the strength that RULE takes; `plain_gain` is plain fine-tuning's largest target gain."""
    figures = {strength: figures_of(tables) for strength, tables in tried.items()}
    learned = {s: tables for s, tables in tried.items() if figures[s]["target_gain"].value >= ENOUGH * plain_gain}
    if not learned:
        return max(figures, key=lambda strength: figures[strength]["target_gain"].value)
    tied = set(learned)
    if forgot := {s: figures[s]["mean_forgetting"].value for s in learned if "mean_forgetting" in figures[s]}:
        least = min(forgot, key=lambda strength: forgot[strength])
        repeats = {strength: {"": units_of(tables)} for strength, tables in learned.items()}
        comparisons = compared(repeats, combinations(repeats, 2))
        tied = {strength for strength in forgot if comparisons.sign(strength, least, "mean_forgetting") != 1}
    return min(tied, key=lambda strength: figures[strength]["probe_kl"].value)


# --- seeds ---------------------------------------------------------------------------------------------------------


def averaged(repeats: Sequence[Tables]) -> Tables:
    """Return each document's mean over the repeats of one method; a mean of 0/1 scores is no longer 0 or 1."""

    def mean(frames: Sequence[pd.DataFrame], key: str, value: str) -> pd.DataFrame:
        ordered = [frame.sort_values(key, ignore_index=True) for frame in frames]
        assert all(frame[key].equals(ordered[0][key]) for frame in ordered), "the seeds share all documents"
        return ordered[0].assign(**{value: np.mean([frame[value].to_numpy(float) for frame in ordered], axis=0)})

    first = repeats[0]
    benchmarks = {}
    for name, (measure, base, _) in first.benchmarks.items():
        kind = "mean" if measure.kind == "binary" and len(repeats) > 1 else measure.kind
        tuned = mean([repeat.benchmarks[name][2] for repeat in repeats], "doc_id", "value")
        benchmarks[name] = (measure.model_copy(update={"kind": kind}), base, tuned)
    target = first.target[0], mean([repeat.target[1] for repeat in repeats], "row_id", "nll")
    return Tables(target, mean([repeat.probe for repeat in repeats], "row_id", "kl"), benchmarks)


def over_seeds(repeats: Sequence[Tables]) -> dict[str, Figure]:
    """Return the mean over seeds of every figure; of too few seeds, with the interval of the documents alone."""
    figures, each = figures_of(averaged(repeats)), [figures_of(repeat) for repeat in repeats]
    if len(repeats) < seeds.FEWEST:
        return figures
    return {name: seeds.over_seeds([found[name] for found in each], figure) for name, figure in figures.items()}


# --- the table -----------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """One method at its chosen strength, over the reported seeds."""

    method: str
    strength: str
    reached: bool | None  # 95 % of plain fine-tuning's gain where strengths were chosen; None: given, not chosen
    figures: dict[str, Figure]
    seeds: dict[int, dict[str, Figure]]
    units: dict[int, dict[str, list[Units]]]  # by seed: what the seeds' figures are the means of
    seconds: float  # median over seeds
    peak_memory: int


def markdown(results: Sequence[Result], losses: Sequence[str]) -> str:
    """Return the table; a strength with `*` reached less than 95 % of plain fine-tuning's target gain."""
    head = ["method", "strength", "target gain, nats/token", "probe_kl, nats/token", "mean forgetting, points",
            *(f"{name} loss, rise" for name in losses), "training, s", "peak memory, MB"]  # fmt: skip
    lines = [head, ["---", "---", *["--:"] * (len(head) - 2)]]
    for result in results:
        factors = {"target_gain": 1, "probe_kl": 1, "mean_forgetting": POINTS, **dict.fromkeys(losses, 1)}
        cells = [_cell(result.figures.get(name), factor) for name, factor in factors.items()]
        mark = "*" if result.reached is False else ""
        cost = [f"{result.seconds:.0f}", f"{result.peak_memory / MB:.0f}"]
        lines.append([result.method, result.strength + mark, *cells, *cost])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def compared_results(results: Sequence[Result]) -> Comparisons:
    """Return every figure of every pair of methods, paired by document and seed."""
    repeats = {r.method: {str(seed): units for seed, units in r.units.items()} for r in results}
    return compared(repeats, combinations(repeats, 2))


def against(plain: str, results: Sequence[Result], comparisons: Comparisons) -> str:
    """Return the table of MAIN of every method less that of the method `plain`; `*`: they differ."""
    lines = [["method", *(f"{name} less that of {plain}" for name in MAIN)], ["---", *["--:"] * len(MAIN)]]
    for method in (result.method for result in results if result.method != plain):
        found = [comparisons.of(method, plain, name) for name in MAIN]
        factors = [POINTS if name == "mean_forgetting" else 1 for name in MAIN]
        cells = [
            f"{shown(c.figure(), factor)}{'*' if c.sign() else ''}" if c else "-"
            for c, factor in zip(found, factors, strict=True)
        ]
        lines.append([method, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(figure: Figure | None, factor: float) -> str:
    return shown(figure.model_dump(), factor) if figure else "-"


def picture(results: Sequence[Result]) -> Any:
    """Return the frontier without the base: a point per method with its interval, and each seed as a small dot."""
    figure = frontier_figure([_summary(result) for result in results], base=False, height=6.5)
    look = styles(result.method for result in results)
    measured = [name for name in ("mean_forgetting", "probe_kl") if any(name in r.figures for r in results)]
    for axes, name in zip(figure.axes, measured, strict=True):
        factor = POINTS if name == "mean_forgetting" else 1
        for result in results:
            points = [(f["target_gain"].value, f[name].value * factor) for f in result.seeds.values() if name in f]
            xs, ys = zip(*points, strict=True)
            axes.plot(xs, ys, ls="none", marker=".", ms=3, color=look[result.method].color, alpha=0.6)
    return figure


def _summary(result: Result) -> Summary:
    figures = {name: f.model_dump() if (f := result.figures.get(name)) else None for name in MAIN}
    return Summary(
        name=result.method, digest="", **figures, target_accuracy_gain=None, target={}, probe_kl_sampled=None,
        benchmarks={}, seconds={}, executed=[], cached=[],
    )  # fmt: skip
