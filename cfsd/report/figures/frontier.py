"""The figures of the report, by matplotlib without pyplot, and how they become SVG inside a page.

Colours are those of Okabe and Ito that show on white and on black; a variant also has a marker of its own.
Only imported when a figure is drawn.
"""

import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cfsd.report.figures.labels import Label, write_labels
from cfsd.report.summary import Summary
from cfsd.report.table import POINTS, number, sweep_of, unit_of, variant_of

INK, LINE = "#1b1f24", "#ccd2d9"  # in a page: the page's own, so that they follow light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
MARKERS = "osD^vPX<>"  # 9 against 7 colours: 63 variants differ in one or the other
SIZE = 10  # of text, in points; the page shows a figure at most at its own width
WIDTH = 4.8  # inches
LONGEST_NAME = 30
MAX_NAMED = 6  # points of a sweep that are named; of more, about so many, evenly
QUANTITIES = {"mean_forgetting": "mean forgetting, points", "probe_kl": "probe_kl, nats per token"}

Fig = dict[str, Any]


class Style(NamedTuple):
    """How one variant looks in every figure; its repeats look alike, and so do the points of a sweep."""

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
    alike = {name: sweep.family if (sweep := sweep_of(name)) else variant_of(name) for name in names}
    groups = list(dict.fromkeys(alike.values()))
    looks = [Style(COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i in range(len(groups))]
    return {name: looks[groups.index(alike[name])] for name in names}


def frontier_figure(
    summaries: list[Summary], quantities: Sequence[str] = tuple(QUANTITIES), *, base: bool = True, height: float = 4.3
) -> Figure:
    """Return the frontier: learned (x) against what it cost (y); a panel per quantity, a point per variant.

    Without `base`, at 0 and 0, many variants that all learned have room. `height` is in inches. A quantity that no
    variant has together with a target gain is left out.
    """
    panels = {name: points for name in quantities if (points := frontier_points(summaries, name))}
    figure = Figure((WIDTH * max(1, len(panels)), height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    look = styles(s.name for s in summaries)
    if not panels:
        figure.text(0.5, 0.5, "no variant has both a gain and a cost", ha="center", color=INK, size=SIZE)
        return figure
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        _draw_frontier(axes, points, look, QUANTITIES[name], base=base)
    return figure


def frontier_points(summaries: list[Summary], quantity: str) -> list[Point]:
    """Return the variants that have both a target gain and `quantity`."""
    scale = POINTS if quantity == "mean_forgetting" else 1
    pairs = [(s.name, s.target_gain, getattr(s, quantity)) for s in summaries]
    return [Point(name, x, _scaled(y, scale)) for name, x, y in pairs if x is not None and y is not None]


def _scaled(figure: Fig, factor: float) -> Fig:
    return {k: None if figure[k] is None else figure[k] * factor for k in ("value", "low", "high")}


def _draw_frontier(axes: Axes, points: list[Point], look: dict[str, Style], label: str, *, base: bool) -> None:
    plain_axes(axes, "target gain, nats per token (right: learned more)", f"{label} (up: worse)")
    nothing = {"value": 0.0, "low": None, "high": None}
    axes.axhline(0, color=LINE, lw=1, zorder=0)
    if base:
        axes.axvline(0, color=LINE, lw=1, zorder=0)
        axes.plot(0, 0, marker="o", ms=7, mfc="none", mec=INK, ls="none")
    sweeps = _sweeps(points)
    for sweep in sweeps:
        xs, ys = ([getattr(point, axis)["value"] for point in sweep] for axis in "xy")
        axes.plot(xs, ys, color=look[sweep[0].name].color, lw=0.8, zorder=1)
    small = {point.name for sweep in sweeps if len(sweep) > MAX_NAMED for point in sweep}
    for point in points:
        _errorbar(axes, point.x, point.y, look[point.name], small=point.name in small)
    axes.margins(0.16)
    texts = {point.name: short(point.name) for point in points}
    for sweep in sweeps:
        texts |= _sweep_texts(sweep)
    labels = [_label("base", Point("base", nothing, nothing))] if base else []
    labels += [_label(texts[p.name], p) for p in points]
    write_labels(axes, labels, size=SIZE, color=INK)


def _sweeps(points: list[Point]) -> list[list[Point]]:
    """Return the points of each sweep in its order, apart for each seed; at least two."""
    found: dict[tuple[str, str], list[tuple[float, Point]]] = {}
    for point in points:
        if sweep := sweep_of(point.name):
            repeat = point.name[len(variant_of(point.name)) :]
            found.setdefault((sweep.family, repeat), []).append((sweep.value, point))
    groups = (sorted(group, key=lambda pair: pair[0]) for group in found.values() if len(group) > 1)
    return [[point for _, point in group] for group in groups]


def _sweep_texts(sweep: list[Point]) -> dict[str, str]:
    """Return what is written at each point: the name in full at the first, then values, not at every one of many."""
    step = -(-(len(sweep) - 1) // (MAX_NAMED - 1))
    last = len(sweep) - 1
    named = {last, *(i for i in range(0, last, step) if i == 0 or last - i >= step)}
    values = {p.name: found.text if (found := sweep_of(p.name)) else "" for p in sweep}
    texts = {point.name: values[point.name] if i in named else "" for i, point in enumerate(sweep)}
    return texts | {sweep[0].name: short(sweep[0].name)}


def _label(text: str, point: Point) -> Label:
    ends = [(f["value"] if f["low"] is None else f["low"], f["value"] if f["high"] is None else f["high"])
            for f in (point.x, point.y)]  # fmt: skip
    return Label(text, point.x["value"], point.y["value"], *ends)


def _errorbar(axes: Axes, x: Fig, y: Fig, style: Style, *, small: bool = False) -> None:
    size: Any = {"ms": 4, "lw": 0.6, "capsize": 0} if small else {"ms": 7, "lw": 1.4, "capsize": 2.5}
    axes.errorbar(
        x["value"], y["value"], xerr=_reach(x), yerr=_reach(y), fmt=style.marker, color=style.color, **size,
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


def short(name: str) -> str:
    """Return a name that fits beside a point or into a legend."""
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
            labels.append(short(benchmark))
        for name, result in found:
            _forest_row(axes, len(labels), result, look[name])
            labels.append(short(name) if grouped else short(benchmark))
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
