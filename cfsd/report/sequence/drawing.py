"""The figures of a sequence of targets: the R matrix as a picture, and how far each stage is from the first base."""

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from cfsd.report.figures.frontier import COLOURS, INK, SIZE, WIDTH, plain_axes, short
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, number
from cfsd.statistics.continual import Continual

CELL_INK = "black"  # on a cell's own colour, in a dark page too; INK would follow the page
SHADES = 0.05, 0.6  # of the colour map; on darker ones black is hard to read
CELL = 0.75, 0.5  # inches
LABELS = 1.5  # inches for the names of stages
LEFT = {"probe_kl": "probe_kl from the first base,\nnats per token", "mean_forgetting": "mean forgetting, points"}


def stages_of(targets: Sequence[str]) -> list[str]:
    """Return the names of stages 0 to T."""
    return ["0 first base", *(f"{number} after {name}" for number, name in enumerate(targets, 1))]


def matrix_figure(found: Continual, *, losses: bool) -> Figure:
    """Return the R matrix: a row per stage, a column per target, its figure in each cell; framed: its own stage.

    Cells show the loss itself (`losses`), or else the share in percent; darker is better.
    """
    T = len(found.targets)
    rows, columns = len(found.matrix), T
    size = max(WIDTH, LABELS + CELL[0] * columns), 0.9 + CELL[1] * rows
    figure = Figure(size, layout="constrained")
    axes = figure.subplots()
    known = [score for row in found.matrix for score in row if score is not None]
    low, high = (min(known), 0.0) if losses else (0.0, 1.0)
    for t, row in enumerate(found.matrix):
        for j, score in enumerate(row):
            _draw_cell(axes, t, j, score, losses=losses, share=1.0 if high == low else _within(score, low, high))
    for j in range(T):
        axes.add_patch(Rectangle((j - 0.47, j + 0.53), 0.94, 0.94, fill=False, ec=CELL_INK, lw=2.2))
    axes.set_xlim(-0.5, columns - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    _label_axes(axes, found.targets)
    return figure


def _within(score: float | None, low: float, high: float) -> float:
    return 0.0 if score is None else (score - low) / (high - low)


def _draw_cell(axes: Axes, t: int, j: int, score: float | None, *, losses: bool, share: float) -> None:
    if score is None:
        axes.text(j, t, "-", ha="center", va="center", size=SIZE, color=INK)
        return
    shade = SHADES[0] + (SHADES[1] - SHADES[0]) * share
    colour = matplotlib.colormaps["Blues"](shade)
    not_yet = t <= j  # a target that no stage has trained on so far
    axes.add_patch(Rectangle((j - 0.5, t - 0.5), 1, 1, fc=colour, ec="#ffffff", lw=1.5))
    text = number(-score if losses else score * POINTS)
    style: Any = {"style": "italic"} if not_yet else {"weight": "bold"}
    axes.text(j, t, text, ha="center", va="center", size=SIZE + 1, color=CELL_INK, **style)


def _label_axes(axes: Axes, targets: Sequence[str]) -> None:
    names = [short(name) for name in targets]
    slanted = max(map(len, names)) * len(names) > 36
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xticks(range(len(names)), names, rotation=30 if slanted else 0, ha="left" if slanted else "center")
    axes.set_yticks(range(len(names) + 1), [short(stage) for stage in stages_of(targets)])
    axes.set_xlabel("score on the held-out rows of", size=SIZE, color=INK)
    axes.set_ylabel("model", size=SIZE, color=INK)
    axes.tick_params(labelsize=SIZE, colors=INK, length=0)
    for text in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        text.set_parse_math(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def left_figures(since: Sequence[Summary]) -> dict[str, Figure]:
    """Return how far the model is from the first base after each stage, with intervals, for what was measured."""
    found = {}
    for name, label in LEFT.items():
        figures = [getattr(summary, name) for summary in since]
        if all(figures):
            found[name] = _left(figures, label, POINTS if name == "mean_forgetting" else 1, since)
    return found


def _left(figures: Sequence[dict[str, Any]], label: str, factor: float, since: Sequence[Summary]) -> Figure:
    figure = Figure((WIDTH, 2.8), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, "", f"{label} (up: worse)")
    values = [0.0, *(found["value"] * factor for found in figures)]
    ends = [(f["value"] if f["low"] is None else f["low"], f["value"] if f["high"] is None else f["high"])
            for f in figures]  # fmt: skip
    below = [0.0, *(v - low * factor for v, (low, _) in zip(values[1:], ends, strict=True))]
    above = [0.0, *(high * factor - v for v, (_, high) in zip(values[1:], ends, strict=True))]
    axes.axhline(0, color=INK, lw=1)
    axes.errorbar(range(len(values)), values, yerr=[below, above], fmt="o-", color=COLOURS[0], lw=1.4, ms=6, capsize=3)
    names = ["first base", *(short(summary.name) for summary in since)]
    slanted = sum(map(len, names)) > 48
    axes.set_xticks(range(len(names)), names, rotation=30 if slanted else 0, ha="right" if slanted else "center")
    axes.set_xlim(-0.35, len(values) - 0.65)
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    return figure
