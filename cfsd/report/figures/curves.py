"""The figures of training: a panel per measure, a line per trained model, a dashed line per budget, bands of chance."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cfsd.report.figures.look import (
    INK,
    SIZE,
    WIDTH,
    Style,
    legend_label,
    legend_shape,
    plain_axes,
    styles,
    write_legend,
)
from cfsd.report.table import sweep_of
from cfsd.report.training import Panel

HEIGHT = 2.8  # inches, without a legend
PALEST = 0.35  # opacity of the first of a sweep; the last is opaque
FEW = 12  # points up to which each has its marker
LONGEST = 30  # letters of an axis label on one line
MAX_BANDS = 3  # lines up to which each has its band of chance; of more, the bands hide one another
BAND = 0.12  # its opacity


def curve_figures(panels: Sequence[Panel], names: Sequence[str], models: Mapping[str, str]) -> dict[str, Figure]:
    """Return a figure per panel by name; `names` are all variants of the report, so that colours agree in it.

    `models`: what the line of a variant is called.
    """
    look, opacity = styles(names), _opacities(list(models))
    return {panel.name: _curve(panel, look, opacity, models) for panel in panels}


def _opacities(names: Sequence[str]) -> dict[str, float]:
    """Return how opaque each line is: the models of a sweep have one colour, which deepens along it."""
    sweeps = {name: sweep for name in names if (sweep := sweep_of(name))}
    opacity = dict.fromkeys(names, 1.0)
    for name, sweep in sweeps.items():
        values = sorted({s.value for s in sweeps.values() if s.family == sweep.family})
        if len(values) > 1:
            opacity[name] = PALEST + (1 - PALEST) * values.index(sweep.value) / (len(values) - 1)
    return opacity


def _curve(panel: Panel, look: Mapping[str, Style], opacity: Mapping[str, float], models: Mapping[str, str]) -> Figure:
    labels = {name: legend_label(models[name]) for name in panel.lines}
    columns, inches = legend_shape([models[name] for name in labels] if len(models) > 1 else ())
    figure = Figure((WIDTH, HEIGHT + inches), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, "optimizer step", panel.label.replace(", ", ",\n") if len(panel.label) > LONGEST else panel.label)
    if panel.is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for name, (steps, values) in panel.lines.items():
        every = max(1, len(steps) // 6) if len(steps) > FEW else 1
        axes.plot(
            steps, values, color=look[name].color, marker=look[name].marker, ms=4, lw=1.4, markevery=every,
            alpha=opacity[name], label=labels[name],
        )  # fmt: skip
    _write_levels(axes, panel, look)
    if len(panel.bands) <= MAX_BANDS:
        for name, ends in panel.bands.items():
            axes.axhspan(*sorted(ends), color=look[name].color, alpha=BAND, lw=0, zorder=0)
    if inches:
        write_legend(figure, columns)
    return figure


def _write_levels(axes: Axes, panel: Panel, look: Mapping[str, Style]) -> None:
    """Draw each budget once, across the panel, with its name at the right."""
    drawn = {level: name for name, level in reversed(panel.levels.items()) if name in panel.lines}
    for level, name in drawn.items():
        axes.axhline(level, color=look[name].color, ls="--", lw=1)
        axes.annotate(
            f"budget {level:.3g}", (1, level), xycoords=axes.get_yaxis_transform(), xytext=(0, 2),
            textcoords="offset points", ha="right", va="bottom", size=SIZE - 2, color=INK,
        )  # fmt: skip
