"""The frontier: what each variant learned against what that cost."""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cfsd.report.figures.labels import write_names
from cfsd.report.figures.look import (
    INK,
    LINE,
    SIZE,
    WIDTH,
    Style,
    errorbar,
    legend_shape,
    plain_axes,
    short,
    styles,
    write_legend,
)
from cfsd.report.figures.point import Point, certain, scaled
from cfsd.report.measures import figure_of
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, Sweep, family_of, sweep_of

MAX_NAMED = 6  # points of a sweep that are named; of more, about so many, evenly
MAX_WRITTEN = 16  # names that find room beside their points
SWEPT = "markers grow from the first value to the last"
GAIN = "target gain, nats per token (right: learned more)"
QUANTITIES = {"mean_forgetting": "mean forgetting, points", "probe_kl": "probe_kl, nats per token"}
LABELS = QUANTITIES | {"chat_kl": "chat_kl, nats per token"}
BOTH = "divergence, nats per token\n(filled: probe_kl, hollow: chat_kl; up: worse)"


def frontier_figure(
    summaries: list[Summary], quantities: Sequence[str] = tuple(QUANTITIES), *, base: bool = True, height: float = 4.3
) -> Figure:
    """Return the frontier: learned (x) against what it cost (y); a panel per quantity, a point per variant.

    Without `base`, at 0 and 0, many variants that all learned have room. `height` is in inches, without a legend. A
    quantity that no variant has together with a target gain is left out. The panel of probe_kl has chat_kl in it, as
    hollow markers. Of more than MAX_WRITTEN names a legend is written, without the base.
    """
    panels = {name: points for name in quantities if (points := frontier_points(summaries, name))}
    look = styles(s.name for s in summaries)
    legend = _legend(panels.values(), look)
    widths = max(1, len(panels))
    columns, inches = legend_shape(legend, widths)
    figure = Figure((WIDTH * widths, height + inches), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    if not panels:
        figure.text(0.5, 0.5, "no variant has both a gain and a cost", ha="center", color=INK, size=SIZE)
        return figure
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        hollow = frontier_points(summaries, "chat_kl") if name == "probe_kl" else []
        plain_axes(axes, GAIN, BOTH if hollow else f"{QUANTITIES[name]} (up: worse)")
        if legend:
            _draw_crowd(axes, points, look, hollow)
        else:
            _draw_few(axes, points, look, hollow, base=base)
    if legend:
        write_legend(figure, columns, legend, SWEPT if any(map(sweep_of, look)) else "")
    return figure


def frontier_points(summaries: list[Summary], quantity: str) -> list[Point]:
    """Return the variants that have both a target gain and `quantity`."""
    factor = POINTS if quantity == "mean_forgetting" else 1
    pairs = [(s.name, s.target_gain, figure_of(s, quantity)) for s in summaries]
    return [Point(name, x, scaled(y, factor)) for name, x, y in pairs if x is not None and y is not None]


def _draw_few(
    axes: Axes, points: list[Point], look: Mapping[str, Style], hollow: Sequence[Point], *, base: bool
) -> None:
    """Draw each point with its name beside it."""
    _draw_lines(axes, points, look)
    if base:
        axes.axvline(0, color=LINE, lw=1, zorder=0)
        axes.plot(0, 0, marker="o", ms=7, mfc="none", mec=INK, ls="none")
    small = {point.name for sweep in _sweeps(points) if len(sweep) > MAX_NAMED for point in sweep}
    for point in points:
        errorbar(axes, point.x, point.y, look[point.name], small=point.name in small)
    for point in hollow:
        errorbar(axes, point.x, point.y, look[point.name], small=point.name in small, mfc="none")
    axes.margins(0.16)
    texts = _texts(points)
    origin = [Point("base", certain(0.0), certain(0.0))] if base else []
    nameless = [point._replace(name="") for point in hollow]
    named = [*origin, *(p._replace(name=texts[p.name]) for p in points), *nameless]
    write_names(axes, named, size=SIZE, color=INK)


def _draw_crowd(axes: Axes, points: list[Point], look: Mapping[str, Style], hollow: Sequence[Point]) -> None:
    """Draw points without names; markers grow along a sweep."""
    _draw_lines(axes, points, look)
    ranks = {point.name: rank for sweep in _sweeps(points) for rank, point in enumerate(sweep)}
    for own, marker in ((points, {}), (hollow, {"mfc": "none"})):
        for point in own:
            size = min(4 + 2 * ranks.get(point.name, 1), 12)
            errorbar(axes, point.x, point.y, look[point.name], small=True, ms=size, **marker)


def _draw_lines(axes: Axes, points: list[Point], look: Mapping[str, Style]) -> None:
    axes.axhline(0, color=LINE, lw=1, zorder=0)
    for sweep in _sweeps(points):
        xs, ys = ([getattr(point, axis)["value"] for point in sweep] for axis in "xy")
        axes.plot(xs, ys, color=look[sweep[0].name].color, lw=0.8, zorder=1)


def _legend(panels: Collection[list[Point]], look: Mapping[str, Style]) -> dict[str, Style]:
    """Return the look of each variant where names have no room beside points, else nothing.

    A sweep stands under its name and its two ends: `finetune, 1e-05 to 0.0003`.
    """
    if all(sum(map(bool, _texts(points).values())) <= MAX_WRITTEN for points in panels):
        return {}
    swept: dict[str, list[Sweep]] = {}
    for point in filter(None, map(sweep_of, look)):
        swept.setdefault(point.family, []).append(point)
    names = dict.fromkeys(point.name for points in panels for point in points)
    spans = {name: _span(swept[own.family]) for name in names if (own := sweep_of(name))}
    return {f"{family_of(name)}{spans.get(name, '')}": look[name] for name in names}


def _span(sweep: Sequence[Sweep]) -> str:
    first, last = (end(sweep, key=lambda point: point.value).text for end in (min, max))
    return f", {first} to {last}" if first != last else f" {first}"


def _texts(points: list[Point]) -> dict[str, str]:
    """Return what is written beside each point."""
    texts = {point.name: short(point.name) for point in points}
    for sweep in _sweeps(points):
        texts |= _sweep_texts(sweep)
    return texts


def _sweeps(points: list[Point]) -> list[list[Point]]:
    """Return the points of each sweep in its order, apart for each seed; at least two."""
    swept = [(sweep, point) for point in points if (sweep := sweep_of(point.name))]
    groups: dict[tuple[str, str], list[Point]] = {}
    for sweep, point in sorted(swept, key=lambda pair: pair[0].value):
        groups.setdefault((sweep.family, sweep.repeat), []).append(point)
    return [group for group in groups.values() if len(group) > 1]


def _sweep_texts(sweep: list[Point]) -> dict[str, str]:
    """Return what is written at each point: the name in full at the first, then values, not at every one of many."""
    last = len(sweep) - 1
    step = -(-last // (MAX_NAMED - 1))
    named = {last, *(i for i in range(0, last, step) if last - i >= step)}
    values = [point.text if (point := sweep_of(p.name)) else "" for p in sweep]
    texts = {p.name: values[i] if i in named else "" for i, p in enumerate(sweep)}
    return texts | {sweep[0].name: short(sweep[0].name)}
