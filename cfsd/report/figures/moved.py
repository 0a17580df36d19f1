"""The picture of where models moved: divergence by position in the text, and by how open the base left it."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cfsd.report.figures.frontier import WIDTH, Style, plain_axes, short, styles, write_legend
from cfsd.report.figures.labels import interval

HEIGHT = 3.0  # inches, without a legend
LEGEND_ROW = 0.21
LETTERS = 92  # of a legend's row

Bins = Mapping[str, list[dict[str, Any]]]


def moved_figure(bins: Mapping[str, Bins], names: Sequence[str]) -> Figure:
    """Return two panels, a line per variant of `bins`; `names` are all variants of the report, for their looks."""
    look, columns = styles(names), max(1, min(len(bins), LETTERS // (4 + max(map(len, map(short, bins))))))
    rows = -(-len(bins) // columns) if len(bins) > 1 else 0
    figure = Figure((2 * WIDTH, HEIGHT + LEGEND_ROW * rows), layout="constrained")
    by_position, by_entropy = figure.subplots(1, 2)
    plain_axes(by_position, "position in the text, tokens", "divergence, nats per token")
    plain_axes(by_entropy, "decile of the base's entropy (right: more open)", "divergence, nats per token")
    for name, own in bins.items():
        places = [(b["low"] * b["high"]) ** 0.5 for b in own["by_position"]]
        _line(by_position, places, own["by_position"], look[name], short(name))
        _line(by_entropy, list(range(1, len(own["by_entropy"]) + 1)), own["by_entropy"], look[name], "")
    ticks = {b["low"] for own in bins.values() for b in own["by_position"]}
    by_position.set_xscale("log")
    by_position.set_xticks(sorted(ticks), [f"{tick:.0f}" for tick in sorted(ticks)])
    by_position.xaxis.set_minor_locator(NullLocator())
    for axes in (by_position, by_entropy):
        axes.set_ylim(bottom=0)
    if rows:
        write_legend(figure, columns)
    return figure


def _line(axes: Axes, places: Sequence[float], bins: Sequence[Mapping[str, Any]], style: Style, label: str) -> None:
    values = [b["kl"]["value"] for b in bins]
    bounds = [interval(b["kl"]) for b in bins]
    reach = [[max(0.0, v - low), max(0.0, high - v)] for v, (low, high) in zip(values, bounds, strict=True)]
    named = {"label": label} if label else {}
    look: Any = {"color": style.color, "marker": style.marker, "ms": 4, "lw": 1.4, "elinewidth": 1, "capsize": 2}
    axes.errorbar(places, values, yerr=list(zip(*reach, strict=True)), **look, **named)
