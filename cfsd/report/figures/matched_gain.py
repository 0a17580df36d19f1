"""The frontier with the gains at which methods are compared, and what each method lost there."""

from collections.abc import Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from cfsd.report.figures.frontier import LABELS, frontier_points
from cfsd.report.figures.look import (
    LEGEND_ROW,
    LINE,
    WIDTH,
    Style,
    errorbar,
    legend_label,
    plain_axes,
    styles,
    write_legend,
)
from cfsd.report.figures.point import Point, certain, scaled
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, by_variant, sweep_of, variant_of
from cfsd.statistics.figures import FRACTION
from cfsd.statistics.matched_gain import MatchedGain

HEIGHT = 4.0  # inches, without a legend
COLUMNS = 3


def matched_figure(summaries: list[Summary], matched: MatchedGain) -> Figure:
    """Return each method's line through its strengths, the matched gains across it, and intervals where they cross.

    Points are means over seeds. The cost is drawn as it is interpolated: where that is in logarithms, on such an axis.
    """
    methods, points = matched.methods(), _means(frontier_points(summaries, matched.measure))
    rows = -(-len(methods) // COLUMNS)
    figure = Figure((WIDTH * 1.4, HEIGHT + LEGEND_ROW * rows), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, "target gain, nats per token", f"{LABELS[matched.measure]} (up: worse)")
    if matched.logarithmic and all(point.y["value"] > 0 for point in points):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    look = styles(s.name for s in summaries)
    looks: dict[str, Style] = {}
    for method in methods:
        own = [point for point in points if variant_of(point.name) in matched.variants[method]]
        looks[method] = look[own[0].name]
        _draw_method(axes, method, own, looks[method])
    for match in matched.gains:
        axes.axvline(match.gain.value, color=LINE, lw=1, ls=":", zorder=0)
    _draw_crossings(axes, matched, looks)
    write_legend(figure, COLUMNS)
    return figure


def _means(points: Sequence[Point]) -> list[Point]:
    """Return a point per variant, the mean of its seeds under the name of the first, in the order of strength."""
    seeds = by_variant((point.name, point) for point in points)
    means = [
        Point(own[0].name, *(certain(fmean(getattr(p, axis)["value"] for p in own)) for axis in "xy"))
        for own in seeds.values()
    ]
    return sorted(means, key=lambda point: sweep.value if (sweep := sweep_of(point.name)) else 0.0)


def _draw_method(axes: Axes, method: str, points: Sequence[Point], style: Style) -> None:
    xs, ys = ([getattr(point, axis)["value"] for point in points] for axis in "xy")
    axes.plot(xs, ys, color=style.color, marker=style.marker, ms=5, lw=1, label=legend_label(method))


def _draw_crossings(axes: Axes, matched: MatchedGain, look: dict[str, Style]) -> None:
    for match in matched.gains:
        for entry in match.methods:
            if entry.cost:
                factor = POINTS if entry.cost.unit == FRACTION else 1
                cost = scaled(entry.cost.model_dump(), factor)
                errorbar(axes, certain(match.gain.value), cost, look[entry.method]._replace(marker="_"))
