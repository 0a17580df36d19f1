"""The figures of a sequence of targets: the R matrix as a picture, and how far each stage is from the first base."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cfsd.report.figures.look import COLOURS, INK, SIZE, WIDTH, Style, errorbar, plain_axes, set_names, short
from cfsd.report.figures.point import certain, scaled
from cfsd.report.summary import Fig, Summary
from cfsd.report.table import POINTS, number
from cfsd.statistics.continual import Continual

CELL_INK = "black"  # on a cell's own colour, in a dark page too; INK would follow the page
SHADES = 0.05, 0.6  # of the colour map; on darker ones black is hard to read
CELL = 0.75, 0.5  # inches
LABELS = 1.5  # inches for the names of stages
SINCE_BASE = {
    "probe_kl": ("probe_kl from the first base,\nnats per token", 1),
    "mean_forgetting": ("mean forgetting, points", POINTS),
}


def stages_of(targets: Sequence[str]) -> list[str]:
    """Return the names of stages 0 to T."""
    return ["0 first base", *(f"{number} after {name}" for number, name in enumerate(targets, 1))]


def matrix_figure(scores: Continual, *, losses: bool) -> Figure:
    """Return the R matrix: a row per stage, a column per target, its figure in each cell; framed: its own stage.

    Cells show the loss itself (`losses`), or else the share in percent; darker is better.
    """
    R = np.array(scores.matrix, dtype=float)  # NaN where not measured
    rows, columns = R.shape
    figure = Figure((max(WIDTH, LABELS + CELL[0] * columns), 0.9 + CELL[1] * rows), layout="constrained")
    axes = figure.subplots()
    low, high = (np.nanmin(R), 0.0) if losses else (0.0, 1.0)
    share = (R - low) / (high - low) if high > low else R * 0 + 1
    shades = np.ma.masked_invalid(SHADES[0] + (SHADES[1] - SHADES[0]) * share)
    cells: Any = {"cmap": "Blues", "vmin": 0, "vmax": 1, "edgecolors": "#ffffff", "lw": 1.5}
    axes.pcolormesh(range(columns), range(rows), shades, **cells)
    for (t, j), score in np.ndenumerate(R):
        _write_score(axes, t, j, score * (-1 if losses else POINTS))
    for j in range(columns):
        axes.add_patch(Rectangle((j - 0.47, j + 0.53), 0.94, 0.94, fill=False, ec=CELL_INK, lw=2.2))
    axes.set_ylim(rows - 0.5, -0.5)
    _label_axes(axes, scores.targets)
    return figure


def _write_score(axes: Axes, t: int, j: int, score: float) -> None:
    """Write the score of target j after stage t: bold from the target's own stage on, italic before it."""
    style: Any = {"ha": "center", "va": "center", "size": SIZE + 1, "color": CELL_INK}
    if np.isnan(score):
        axes.text(j, t, "-", **style | {"size": SIZE, "color": INK})
    else:
        axes.text(j, t, number(score), **style | ({"weight": "bold"} if t > j else {"style": "italic"}))


def _label_axes(axes: Axes, targets: Sequence[str]) -> None:
    is_slanted = max(len(short(name)) for name in targets) * len(targets) > 36
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    set_names(axes.xaxis, targets, slanted="left" if is_slanted else "")
    set_names(axes.yaxis, stages_of(targets))
    axes.set_xlabel("score on the held-out rows of", size=SIZE, color=INK)
    axes.set_ylabel("model", size=SIZE, color=INK)
    axes.tick_params(labelsize=SIZE, colors=INK, length=0)
    axes.spines[:].set_visible(False)


def since_base_figures(since: Sequence[Summary]) -> dict[str, Figure]:
    """Return how far the model is from the first base after each stage, with intervals, for what was measured."""
    drawn = {}
    for name, (label, factor) in SINCE_BASE.items():
        measured = [getattr(summary, name) for summary in since]
        if all(measured):
            stages = [certain(0.0), *(scaled(each, factor) for each in measured)]
            drawn[name] = _since_base(["first base", *(summary.name for summary in since)], stages, label)
    return drawn


def _since_base(names: Sequence[str], stages: Sequence[Fig], label: str) -> Figure:
    figure = Figure((WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, "", f"{label} (up: worse)")
    axes.axhline(0, color=INK, lw=1)
    axes.plot([stage["value"] for stage in stages], color=COLOURS[0], lw=1.4)
    for index, stage in enumerate(stages):
        errorbar(axes, certain(index), stage, Style(COLOURS[0], "o"))
    is_slanted = sum(len(short(name)) for name in names) > 48
    set_names(axes.xaxis, names, slanted="right" if is_slanted else "")
    axes.set_xlim(-0.35, len(stages) - 0.65)
    return figure
