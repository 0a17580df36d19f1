"""Do divergences predict what people notice? Over all trainings of the study that were scored on the same."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray
from safetensors import safe_open
from scipy.stats import spearmanr

from benchmarks._result import markdown
from cfsd.model.folder import weight_files
from cfsd.report.table import variant_of

PREDICTORS = {  # of a variant in a part's file -> how it is called
    "probe_kl": "probe_kl", "chat_kl": "chat_kl", "target_divergence": "divergence on the target",
    "weight_distance": "distance of weights, 1/1000",
}  # fmt: skip
COLOURS = colormaps["tab20"]
SCALES = {"weight_distance": 1000}  # of the picture
LOST = {  # benchmark -> unit of what it lost, how many make one of its score's, decimals
    "instructions": ("points", 100, 1), "questions": ("points", 100, 1), "technical_english": ("nats", 1, 3),
}  # fmt: skip


def weight_distance(base: Path, tuned: Path) -> float:
    """Return the norm of the difference of the weights in two folders, in norms of the base's."""
    squares, moved = 0.0, 0.0
    theirs = {name: file for file in weight_files(tuned) for name in _names(file)}
    for file in weight_files(base):
        with safe_open(file, framework="pt") as before:
            for name in before.keys():  # noqa: SIM118
                with safe_open(theirs[name], framework="pt") as after:
                    own = before.get_tensor(name).double()
                    squares += own.square().sum().item()
                    moved += (after.get_tensor(name).double() - own).square().sum().item()
    return math.sqrt(moved / squares)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


class Run(NamedTuple):
    """One training: its part, its variant, what may predict, and what it lost on the benchmarks it was scored on."""

    part: str
    variant: str
    predictors: dict[str, float]
    lost: dict[str, float]


def runs_of(parts: dict[str, dict[str, Any]]) -> list[Run]:
    """Return the trainings of all parts that have every predictor and any loss to be predicted.

    One that several parts have counts once, in the first of them, and its variants are one, under the first's name.
    """
    found: dict[tuple[float, ...], Run] = {}  # by all predictors: a training had another key in an earlier version
    names: dict[str, str] = {}
    for part, content in parts.items():
        for name, figures in content["variants"].items():
            predictors = {key: _value(figures.get(key)) for key in PREDICTORS}
            scored = figures["benchmarks"]
            lost = {key: LOST[key][1] * scored[key]["forgetting"]["value"] for key in LOST if key in scored}
            if None not in predictors.values() and lost:
                training, run = tuple(predictors.values()), Run(part, variant_of(name), predictors, lost)
                first = found.get(training, run)
                found[training] = first._replace(lost=lost | first.lost)
                names[run.variant] = first.variant
    return [run._replace(variant=names[run.variant]) for run in found.values()]


def _value(figure: Any) -> Any:
    return figure["value"] if isinstance(figure, dict) else figure


def block(runs: Sequence[Run]) -> Iterator[str]:
    """Yield the table: how well each predictor orders the trainings, and predicts those of other variants."""
    variants = {(run.part, run.variant) for run in runs}
    yield (
        f"{len(runs)} trainings of {len(variants)} variants; for each loss, those that were scored on its benchmark. "
        "Spearman's rank correlation of predictor and loss: over all trainings, within a part (mean of the parts), "
        "and of the variants' means. Out-of-sample error: the mean absolute error of a line in the predictor's "
        "logarithm, fitted to all trainings but the predicted variant's (in any part), and of "
        "predicting their mean loss.\n"
    )
    rows = [
        ["loss", "trainings", "predictor", "Spearman", "within a part", "of variants", "error", "error of the mean"]
    ]
    for lost in LOST:
        rows += _rows(lost, [run for run in runs if lost in run.lost])
    yield markdown(rows)


def _rows(lost: str, runs: Sequence[Run]) -> Iterator[list[str]]:
    (unit, _, decimals), y = LOST[lost], np.array([run.lost[lost] for run in runs])
    for key, name in PREDICTORS.items() if runs else ():
        x = np.log([run.predictors[key] for run in runs])
        means = [_mean(values, runs) for values in (x, y)]
        within = [_order(x[chosen], y[chosen]) for chosen in _parts(runs)]
        order = [f"{value:.2f}" for value in (_order(x, y), np.mean(within), _order(*means))]
        errors = [f"{error:.{decimals}f}" for error in _predicted(x, y, [run.variant for run in runs])]
        yield [f"{lost}, {unit}", str(len(runs)), name, *order, *errors]


def _order(x: Any, y: Any) -> float:
    return float(spearmanr(x, y).statistic)


def _parts(runs: Sequence[Run]) -> list[NDArray[Any]]:
    """Return which trainings belong to each part."""
    return [np.array([run.part == part for run in runs]) for part in dict.fromkeys(run.part for run in runs)]


def _mean(values: NDArray[Any], runs: Sequence[Run]) -> list[float]:
    groups: dict[tuple[str, str], list[float]] = {}
    for run, value in zip(runs, values, strict=True):
        groups.setdefault((run.part, run.variant), []).append(float(value))
    return [float(np.mean(group)) for group in groups.values()]


def _predicted(x: NDArray[Any], y: NDArray[Any], variants: Sequence[str]) -> tuple[float, float]:
    """Return the mean absolute error of a line and of the mean, each variant predicted from the others."""
    errors, of_mean = [], []
    for variant in dict.fromkeys(variants):
        held_out = np.array([name == variant for name in variants])
        slope, intercept = np.polyfit(x[~held_out], y[~held_out], 1)
        errors += [*np.abs(slope * x[held_out] + intercept - y[held_out])]
        of_mean += [*np.abs(y[~held_out].mean() - y[held_out])]
    return float(np.mean(errors)), float(np.mean(of_mean))


def picture(runs: Sequence[Run]) -> Picture:
    """Return what was lost against each predictor, a colour per variant and a marker per part."""
    figure = Picture(figsize=(4 * len(PREDICTORS), 3.6 * len(LOST)), layout="constrained")
    panels = figure.subplots(len(LOST), len(PREDICTORS), sharey="row")
    variants, parts = list(dict.fromkeys(run.variant for run in runs)), list(dict.fromkeys(run.part for run in runs))
    labelled: dict[str, Line2D] = {}
    for row, (lost, (unit, *_)) in zip(panels, LOST.items(), strict=True):
        row[0].set_ylabel(f"{lost} lost, {unit}")
        scored = [run for run in runs if lost in run.lost]
        for axes, (key, name) in zip(row, PREDICTORS.items(), strict=True):
            for part, variant in dict.fromkeys((run.part, run.variant) for run in scored):
                chosen = [run for run in scored if (run.part, run.variant) == (part, variant)]
                marker, colour = "os^Dv<>"[parts.index(part) % 7], COLOURS(variants.index(variant) % COLOURS.N)
                scale = SCALES.get(key, 1)
                x, y = [scale * run.predictors[key] for run in chosen], [run.lost[lost] for run in chosen]
                (labelled[f"{variant} ({part})"],) = axes.plot(x, y, marker, color=colour)
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_locator(NullLocator())
            axes.axhline(0, color="0.8", zorder=0)
            axes.set_xlabel(name)
    figure.legend(labelled.values(), labelled, loc="outside right upper", fontsize=8)
    return figure
