"""The figures of the report, by matplotlib without pyplot, and how they become SVG inside a page.

Colours are those of Okabe and Ito that show on white and on black; a variant also has a marker of its own.
Only imported when a figure is drawn.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from cfsd.summary import Summary
from cfsd.table import POINTS, number, unit_of, variant_of

INK, LINE = "#1b1f24", "#ccd2d9"  # in a page: the page's own, so that they follow light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
MARKERS = "osD^vPX<>"  # 9 against 7 colours: 63 variants differ in one or the other
SIZE = 10  # of text, in points; the page shows a figure at most at its own width
WIDTH = 4.8  # inches
LONGEST_NAME = 30
FAR = 16  # points from the marker beyond which a line leads to the name
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
PLACES = [(side, far) for far in (8, FAR, 26, 38, 52, 70) for side in SIDES]
QUANTITIES = {"mean_forgetting": "mean forgetting, points", "probe_kl": "probe_kl, nats per token"}

Fig = dict[str, Any]
Floats = NDArray[np.float64]  # ..._N4: N boxes in pixels: left, bottom, right, top; _P: of P places
Line = tuple[Sequence[float], Sequence[float]]
Curves = Mapping[str, Mapping[str, Line]]


class Style(NamedTuple):
    """How one variant looks in every figure; its repeats look alike."""

    color: str
    marker: str


class Point(NamedTuple):
    """One variant's two figures, in the units of the axes."""

    name: str
    x: Fig
    y: Fig


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the look of each name."""
    names = list(names)
    variants = list(dict.fromkeys(map(variant_of, names)))
    looks = [Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(variants))]
    return {name: looks[variants.index(variant_of(name))] for name in names}


def frontier_figure(summaries: list[Summary], quantities: Sequence[str] = tuple(QUANTITIES)) -> Figure:
    """Return the frontier: learned (x) against what it cost (y); a panel per quantity, a point per variant.

    A quantity that no variant has together with a target gain is left out.
    """
    panels = {name: points for name in quantities if (points := frontier_points(summaries, name))}
    figure = Figure((WIDTH * max(1, len(panels)), 4.3), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    look = styles(s.name for s in summaries)
    if not panels:
        figure.text(0.5, 0.5, "no variant has both a gain and a cost", ha="center", color=INK, size=SIZE)
        return figure
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_frontier(axes, points, look, QUANTITIES[name])
    return figure


def frontier_points(summaries: list[Summary], quantity: str) -> list[Point]:
    """Return the variants that have both a target gain and `quantity`."""
    scale = POINTS if quantity == "mean_forgetting" else 1
    pairs = [(s.name, s.target_gain, getattr(s, quantity)) for s in summaries]
    return [Point(name, x, _scaled(y, scale)) for name, x, y in pairs if x is not None and y is not None]


def _scaled(figure: Fig, factor: float) -> Fig:
    return {k: None if figure[k] is None else figure[k] * factor for k in ("value", "low", "high")}


def _draw_frontier(axes: Axes, points: list[Point], look: dict[str, Style], label: str) -> None:
    plain_axes(axes, "target gain, nats per token (right: learned more)", f"{label} (up: worse)")
    nothing = {"value": 0.0, "low": None, "high": None}
    axes.axhline(0, color=LINE, lw=1, zorder=0)
    axes.axvline(0, color=LINE, lw=1, zorder=0)
    axes.plot(0, 0, marker="o", ms=7, mfc="none", mec=INK, ls="none")
    for point in points:
        _errorbar(axes, point.x, point.y, look[point.name])
    axes.margins(0.16)
    _write_names(axes, [Point("base", nothing, nothing), *points])


def _errorbar(axes: Axes, x: Fig, y: Fig, style: Style) -> None:
    axes.errorbar(
        x["value"], y["value"], xerr=_reach(x), yerr=_reach(y),
        fmt=style.marker, color=style.color, ms=7, lw=1.4, capsize=2.5,
    )  # fmt: skip


def _reach(figure: Fig) -> list[list[float]]:
    value, low, high = (figure[k] for k in ("value", "low", "high"))
    return [
        [0.0 if low is None else max(0.0, value - low)],
        [0.0 if high is None else max(0.0, high - value)],
    ]


def plain_axes(axes: Axes, x: str, y: str) -> None:
    """Give `axes` its labels and the look of every figure."""
    axes.set_xlabel(x, size=SIZE, color=INK)
    axes.set_ylabel(y, size=SIZE, color=INK)
    axes.tick_params(labelsize=SIZE - 1, colors=INK, color=LINE)
    axes.grid(color=LINE, lw=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(name in ("left", "bottom"))


def _write_names(axes: Axes, points: list[Point]) -> None:
    """Write each name near its point, where it covers the least of points, intervals and other names."""
    assert isinstance(axes.figure, Figure)
    canvas: Any = FigureCanvasAgg(axes.figure)
    canvas.draw()  # the layout decides where points lie
    pixel, inside = axes.figure.dpi / 72, np.array(axes.get_window_extent().extents)
    taken = np.concatenate([_covered_N4(axes, point, pixel) for point in points])
    for point in points:
        xy = (point.x["value"], point.y["value"])
        note: Any = axes.annotate(
            _short(point.name), xy, xytext=(0, 0), textcoords="offset points", size=SIZE, color=INK, parse_math=False,
        )  # fmt: skip
        note.set_in_layout(False)
        size, center = note.get_window_extent(canvas.get_renderer()), axes.transData.transform(xy)
        boxes_P4 = np.array([_place(center, size, side, far * pixel) for side, far in PLACES])
        best = int(np.argmin(_hidden_P(boxes_P4, taken, inside) + [far for _, far in PLACES]))
        taken = np.concatenate([taken, boxes_P4[best : best + 1]])
        note.set_position((boxes_P4[best, :2] - center) / pixel)
        (right, up), far = PLACES[best]
        if far > FAR:
            line = {"arrowstyle": "-", "color": INK, "lw": 0.5}
            axes.annotate("", xy, (right * (far - 2), up * (far - 2)), textcoords="offset points", arrowprops=line)


def _covered_N4(axes: Axes, point: Point, pixel: float) -> Floats:
    """Return the boxes of a point's marker and of its two intervals."""
    ends = [[f["value"] if f[k] is None else f[k] for k in ("low", "high")] for f in (point.x, point.y)]
    (left, right), (bottom, top) = ends
    x, y = point.x["value"], point.y["value"]
    corners = np.array([[(x, y), (x, y)], [(left, y), (right, y)], [(x, bottom), (x, top)]], dtype=float)
    padding = np.array([[5, 5], [1, 1], [1, 1]]) * pixel
    low, high = (axes.transData.transform(corners[:, i]) for i in (0, 1))
    return np.concatenate([low - padding, high + padding], axis=1)


def _place(center: Any, size: Bbox, side: tuple[int, int], distance: float) -> list[float]:
    along, up = side
    x = center[0] + along * distance + (along - 1) / 2 * size.width
    y = center[1] + up * distance + (up - 1) / 2 * size.height
    return [x, y, x + size.width, y + size.height]


def _hidden_P(boxes_P4: Floats, taken_N4: Floats, inside: Floats) -> Floats:
    """Return how many square pixels of each box lie on others or, counting tenfold, outside of the axes."""
    on_others_P: Floats = _shared(boxes_P4[:, None], taken_N4[None]).sum(1)
    outside_P = _shared(boxes_P4, boxes_P4) - _shared(boxes_P4, inside[None])
    return on_others_P + 10 * outside_P


def _shared(one: Floats, other: Floats) -> Floats:
    """Return the area that boxes (..., 4) of left, bottom, right, top have in common, broadcast."""
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    shared: Floats = np.clip(high - low, 0, None).prod(-1)
    return shared


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def forest_figures(summaries: list[Summary]) -> dict[str, Figure]:
    """Return per unit ("points", "nats/token", …) what each variant lost on each benchmark."""
    units: dict[str, dict[str, list[tuple[str, dict[str, Any]]]]] = {}
    for summary in summaries:
        for benchmark, found in summary.benchmarks.items():
            rows = units.setdefault(unit_of(found).lost, {}).setdefault(benchmark, [])
            rows.append((summary.name, found))
    look = styles(s.name for s in summaries)
    return {unit: _forest(benchmarks, unit, look) for unit, benchmarks in units.items()}


def _forest(benchmarks: dict[str, list[tuple[str, dict[str, Any]]]], unit: str, look: dict[str, Style]) -> Figure:
    grouped = len(look) > 1
    rows = sum(len(found) + grouped for found in benchmarks.values())
    figure = Figure((WIDTH, 1.0 + 0.22 * rows), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, f"{unit} lost, with 95 % interval (right of 0: worse)", "")
    axes.axvline(0, color=INK, lw=1)
    axes.grid(axis="y", visible=False)
    labels: list[str] = []
    headings = set()
    for benchmark, found in benchmarks.items():
        if grouped:
            headings.add(len(labels))
            labels.append(_short(benchmark))
        for name, result in found:
            _forest_row(axes, len(labels), result, look[name])
            labels.append(_short(name) if grouped else _short(benchmark))
    axes.set_yticks(range(len(labels)), labels)
    for row, text in enumerate(axes.get_yticklabels()):
        text.set_parse_math(False)
        text.set_fontweight("bold" if row in headings else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -1.3)
    _beside(axes, -0.8, f"base → tuned, {unit_of(result).score}")
    return figure


def _forest_row(axes: Axes, y: int, result: dict[str, Any], style: Style) -> None:
    unit = unit_of(result)
    here = {"value": y, "low": None, "high": None}
    _errorbar(axes, _scaled(result["forgetting"], unit.factor), here, style)
    scores = " → ".join(number(result[role] * unit.factor) for role in ("base", "tuned"))
    _beside(axes, y, scores)


def _beside(axes: Axes, y: float, text: str) -> None:
    place: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    axes.text(1.03, y, text, size=SIZE - 1, color=INK, **place)


def curve_figures(curves: Curves) -> dict[str, Figure]:
    """Return a figure per loss, a line per variant; `curves[loss][variant]` is steps and nats per token."""
    look = styles(dict.fromkeys(name for lines in curves.values() for name in lines))
    return {loss: _curve(lines, loss, look) for loss, lines in curves.items()}


def _curve(lines: Mapping[str, Line], loss: str, look: dict[str, Style]) -> Figure:
    figure = Figure((WIDTH, 2.8 + (0.07 * len(lines) if len(lines) > 1 else 0)), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, "optimizer step", f"{loss} loss, nats per token")
    for name, (steps, values) in lines.items():
        style = look[name]
        axes.plot(
            steps, values, color=style.color, marker=style.marker, ms=5, lw=1.4,
            markevery=max(1, len(steps) // 6), label=_short(name),
        )  # fmt: skip
    if len(look) > 1:
        legend = figure.legend(
            loc="outside lower center", ncols=min(3, len(lines)), frameon=False, fontsize=SIZE - 1, labelcolor=INK
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def svg_of(figure: Figure, name: str, description: str) -> str:
    """Return `figure` as an SVG element for a page; `name` keeps its ids apart from those of other figures.

    Text stays text, and its colour is the page's. Nothing in it refers to anything outside.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    width = figure.get_figwidth() * 96  # CSS pixels per inch
    head = f'<svg {view[0]} role="img" style="max-width:{width:.0f}px"><title>{escape(description)}</title>'
    return head + rest.replace(INK, "currentColor").replace(LINE, "var(--line)")
