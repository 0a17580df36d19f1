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
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from cfsd.report import POINTS, number, unit_of, variant_of
from cfsd.summary import Summary

INK, LINE = "#1b1f24", "#ccd2d9"  # in a page: the page's own, so that they follow light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
MARKERS = "osD^vPX<>"  # 9 against 7 colours: 63 variants differ in one or the other
SIZE = 10  # of text, in points; the page shows a figure at most at its own width
WIDTH = 5.4  # inches
LONGEST_NAME = 30
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
QUANTITIES = {"mean_forgetting": "mean forgetting, points", "probe_kl": "moved on the probe, nats per token"}

Fig = dict[str, Any]
Curves = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]


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
    figure = Figure((WIDTH * max(1, len(panels)), 4.3), layout="constrained")
    look = styles(s.name for s in summaries)
    if not panels:
        figure.text(0.5, 0.5, "no variant has both a gain and a cost", ha="center", color=INK, size=SIZE)
        return figure
    for axes, (name, points) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
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
    _plain(axes, "target gain, nats per token (right: learned more)", f"{label} (up: worse)")
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


def _plain(axes: Axes, x: str, y: str) -> None:
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
    renderer, pixel, inside = canvas.get_renderer(), axes.figure.dpi / 72, axes.get_window_extent()
    taken = [box for point in points for box in _covered(axes, point, pixel)]
    for point in points:
        xy = (point.x["value"], point.y["value"])
        note: Any = axes.annotate(
            _short(point.name), xy, xytext=(0, 0), textcoords="offset points",
            size=SIZE, color=INK, parse_math=False,
        )  # fmt: skip
        note.set_in_layout(False)
        size, center = note.get_window_extent(renderer), axes.transData.transform(xy)
        places = [
            (_box(center, size, side, far * pixel), side, far) for far in (8, 16, 26, 38) for side in SIDES
        ]
        box, (right, up), far = min(places, key=lambda place: _hidden(place[0], taken, inside) + place[2])
        taken.append(box)
        note.set_position(((box.x0 - center[0]) / pixel, (box.y0 - center[1]) / pixel))
        if far > 16:
            end = (right * far * 0.8, up * far * 0.8)
            axes.annotate(
                "",
                xy,
                end,
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.5},
            )


def _covered(axes: Axes, point: Point, pixel: float) -> list[Bbox]:
    """Return the boxes, in pixels, of a point's marker and its two intervals."""
    ends = [[f["value"] if f[k] is None else f[k] for k in ("low", "high")] for f in (point.x, point.y)]
    (left, right), (bottom, top) = ends
    x, y = point.x["value"], point.y["value"]
    corners = [((x, y), (x, y), 5), ((left, y), (right, y), 1), ((x, bottom), (x, top), 1)]
    return [Bbox(axes.transData.transform([a, b])).padded(pad * pixel) for a, b, pad in corners]


def _box(center: Any, size: Bbox, side: tuple[int, int], distance: float) -> Bbox:
    along, up = side
    x = center[0] + along * distance + (along - 1) / 2 * size.width
    y = center[1] + up * distance + (up - 1) / 2 * size.height
    return Bbox.from_bounds(x, y, size.width, size.height)


def _hidden(box: Bbox, taken: list[Bbox], inside: Bbox) -> float:
    """Return how many square pixels of `box` lie on others or, counting more, outside of the axes."""
    on_others = sum(_area(Bbox.intersection(box, other)) for other in taken)
    return on_others + 10 * (_area(box) - _area(Bbox.intersection(box, inside)))


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)


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


def _forest(
    benchmarks: dict[str, list[tuple[str, dict[str, Any]]]], unit: str, look: dict[str, Style]
) -> Figure:
    grouped = len(look) > 1
    rows = sum(len(found) + grouped for found in benchmarks.values())
    figure = Figure((WIDTH, 0.9 + 0.22 * rows), layout="constrained")
    axes = figure.subplots()
    _plain(axes, f"{unit} lost, with 95 % interval (right of 0: worse)", "")
    axes.axvline(0, color=INK, lw=1)
    axes.grid(axis="y", visible=False)
    labels: list[str] = []
    for benchmark, found in benchmarks.items():
        labels += [f"{_short(benchmark)}:"] * grouped
        for name, result in found:
            _forest_row(axes, len(labels), result, look[name])
            labels.append(_short(name) if grouped else _short(benchmark))
    axes.set_yticks(range(len(labels)), labels)
    for label, text in zip(labels, axes.get_yticklabels(), strict=True):
        text.set_parse_math(False)
        text.set_fontweight("bold" if grouped and label.endswith(":") else "normal")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_title(
        f"base → tuned, {unit_of(result).score}", loc="right", size=SIZE - 1, color=INK, parse_math=False
    )
    return figure


def _forest_row(axes: Axes, y: int, result: dict[str, Any], style: Style) -> None:
    unit = unit_of(result)
    here = {"value": y, "low": None, "high": None}
    _errorbar(axes, _scaled(result["forgetting"], unit.factor), here, style)
    scores = " → ".join(number(result[role] * unit.factor) for role in ("base", "tuned"))
    place: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "size": SIZE - 1, "color": INK}
    axes.text(1.02, y, scores, **place)


def curves_figure(curves: Curves) -> Figure:
    """Return one panel per loss, one line per variant; `curves[loss][variant]` is steps and nats per token."""
    figure = Figure((WIDTH, 0.6 + 2.4 * len(curves)), layout="constrained")
    look = styles(dict.fromkeys(name for lines in curves.values() for name in lines))
    for axes, (loss, lines) in zip(
        figure.subplots(len(curves), 1, squeeze=False)[:, 0], curves.items(), strict=True
    ):
        _plain(axes, "optimizer step", f"{loss} loss,\nnats per token")
        for name, (steps, values) in lines.items():
            style = look[name]
            axes.plot(
                steps, values, color=style.color, marker=style.marker, ms=5, lw=1.4,
                markevery=max(1, len(steps) // 6), label=name,
            )  # fmt: skip
    if len(look) > 1:
        handles, names = figure.axes[0].get_legend_handles_labels()
        legend = figure.legend(
            handles, [_short(name) for name in names], loc="outside lower center",
            ncols=min(3, len(names)), frameon=False, fontsize=SIZE - 1, labelcolor=INK,
        )  # fmt: skip
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
