"""The pictures of where models moved: divergence by position in the text, and by how open the base left it."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cfsd.report.figures.look import WIDTH, legend_label, legend_shape, plain_axes, reach, styles, write_legend

HEIGHT = 2.8  # inches, without a legend
NATS = "divergence, nats per token"

Bin = Mapping[str, Any]
Bins = Mapping[str, Mapping[str, Sequence[Bin]]]  # variant -> by_position, by_entropy


def moved_figures(name: str, bins: Bins, names: Sequence[str]) -> dict[str, Figure]:
    """Return two figures, a line per variant of `bins`; `names` are all variants of the report, for their looks."""
    by_position = _figure(bins, "by_position", names, _middles)
    by_entropy = _figure(bins, "by_entropy", names, _tenths)
    plain_axes(by_position.axes[0], "position, tokens", NATS)
    plain_axes(by_entropy.axes[0], "tenth by the entropy of the base (right: more open)", NATS)
    _write_positions(by_position.axes[0], sorted({b["low"] for own in bins.values() for b in own["by_position"]}))
    return {f"{name} by position": by_position, f"{name} by entropy": by_entropy}


def _figure(bins: Bins, by: str, names: Sequence[str], places: Callable[[Sequence[Bin]], list[float]]) -> Figure:
    look = styles(names)
    columns, inches = legend_shape(bins if len(bins) > 1 else ())
    figure = Figure((WIDTH, HEIGHT + inches), layout="constrained")
    axes = figure.subplots()
    for name, own in bins.items():
        style: Any = {"color": look[name].color, "marker": look[name].marker, "ms": 4, "lw": 1.4}
        figures = [bin_["kl"] for bin_ in own[by]]
        values = [figure["value"] for figure in figures]
        bars: Any = {"yerr": reach(*figures), "elinewidth": 1, "capsize": 2}
        axes.errorbar(places(own[by]), values, label=legend_label(name), **bars, **style)
    axes.set_ylim(bottom=0)
    if inches:
        write_legend(figure, columns)
    return figure


def _middles(bins: Sequence[Bin]) -> list[float]:
    return [float(bin_["low"] * bin_["high"]) ** 0.5 for bin_ in bins]


def _tenths(bins: Sequence[Bin]) -> list[float]:
    """Return at which tenth of the tokens each bin ends: tokens that share an entropy may fill two."""
    ends = list(accumulate(bin_["tokens"] for bin_ in bins))
    return [10 * end / ends[-1] for end in ends]


def _write_positions(axes: Axes, firsts: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(firsts, [f"{first:.0f}" for first in firsts])
    axes.xaxis.set_minor_locator(NullLocator())
