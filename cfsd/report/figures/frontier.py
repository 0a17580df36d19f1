"""The figures of the report, by matplotlib without pyplot, and how they become SVG inside a page.

Colours are those of Okabe and Ito that show on white and on black; a variant also has a marker of its own.
"""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from cfsd.report.figures.labels import Point, interval, write_names
from cfsd.report.measures import figure_of
from cfsd.report.summary import Fig, Summary
from cfsd.report.table import POINTS, change_of_score, sweep_of, unit_of, variant_of

INK, LINE = "#1b1f24", "#ccd2d9"  # in a page: the page's own, so that they follow light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
MARKERS = "osD^vPX<>"  # 9 against 7 colours: 63 variants differ in one or the other
SIZE = 10  # of text, in points; the page shows a figure at most at its own width
WIDTH = 4.8  # inches
LONGEST_NAME = 30
MAX_NAMED = 6  # points of a sweep that are named; of more, about so many, evenly
QUANTITIES = {"mean_forgetting": "mean forgetting, points", "probe_kl": "probe_kl, nats per token"}
LABELS = QUANTITIES | {"chat_kl": "chat_kl, nats per token"}
BOTH = "divergence, nats per token\n(filled: probe_kl, hollow: chat_kl; up: worse)"


class Style(NamedTuple):
    """How one variant looks in every figure; its repeats look alike, and so do the points of a sweep."""

    color: str
    marker: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the look of each name."""
    groups = {name: sweep.family if (sweep := sweep_of(name)) else variant_of(name) for name in names}
    order = {group: i for i, group in enumerate(dict.fromkeys(groups.values()))}
    return {n: Style(COLOURS[order[g] % len(COLOURS)], MARKERS[order[g] % len(MARKERS)]) for n, g in groups.items()}


def frontier_figure(
    summaries: list[Summary], quantities: Sequence[str] = tuple(QUANTITIES), *, base: bool = True, height: float = 4.3
) -> Figure:
    """Return the frontier: learned (x) against what it cost (y); a panel per quantity, a point per variant.

    Without `base`, at 0 and 0, many variants that all learned have room. `height` is in inches. A quantity that no
    variant has together with a target gain is left out. The panel of probe_kl has chat_kl in it, as hollow markers.
    """
    panels = {name: points for name in quantities if (points := frontier_points(summaries, name))}
    figure = Figure((WIDTH * max(1, len(panels)), height), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06))
    look = styles(s.name for s in summaries)
    if not panels:
        figure.text(0.5, 0.5, "no variant has both a gain and a cost", ha="center", color=INK, size=SIZE)
        return figure
    for axes, (name, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        hollow = frontier_points(summaries, "chat_kl") if name == "probe_kl" else []
        label = BOTH if hollow else f"{QUANTITIES[name]} (up: worse)"
        _draw_frontier(axes, points, look, label, base=base, hollow=hollow)
    return figure


def frontier_points(summaries: list[Summary], quantity: str) -> list[Point]:
    """Return the variants that have both a target gain and `quantity`."""
    factor = POINTS if quantity == "mean_forgetting" else 1
    pairs = [(s.name, s.target_gain, figure_of(s, quantity)) for s in summaries]
    return [Point(name, x, scaled(y, factor)) for name, x, y in pairs if x is not None and y is not None]


def scaled(figure: Fig, factor: float) -> Fig:
    """Return the value and interval of `figure` in another unit."""
    return {k: None if figure[k] is None else figure[k] * factor for k in ("value", "low", "high")}


def certain(value: float) -> Fig:
    """Return `value` as a figure without an interval."""
    return {"value": value, "low": None, "high": None}


def _draw_frontier(
    axes: Axes, points: list[Point], look: dict[str, Style], label: str, *, base: bool, hollow: Sequence[Point] = ()
) -> None:
    plain_axes(axes, "target gain, nats per token (right: learned more)", label)
    axes.axhline(0, color=LINE, lw=1, zorder=0)
    if base:
        axes.axvline(0, color=LINE, lw=1, zorder=0)
        axes.plot(0, 0, marker="o", ms=7, mfc="none", mec=INK, ls="none")
    texts, small = {point.name: short(point.name) for point in points}, set()
    for sweep in _sweeps(points):
        xs, ys = ([getattr(point, axis)["value"] for point in sweep] for axis in "xy")
        axes.plot(xs, ys, color=look[sweep[0].name].color, lw=0.8, zorder=1)
        texts |= _sweep_texts(sweep)
        small |= {point.name for point in sweep if len(sweep) > MAX_NAMED}
    for point in points:
        errorbar(axes, point.x, point.y, look[point.name], small=point.name in small)
    for point in hollow:
        errorbar(axes, point.x, point.y, look[point.name], small=point.name in small, mfc="none")
    axes.margins(0.16)
    origin = [Point("base", certain(0.0), certain(0.0))] if base else []
    nameless = [point._replace(name="") for point in hollow]
    named = [*origin, *(p._replace(name=texts[p.name]) for p in points), *nameless]
    write_names(axes, named, size=SIZE, color=INK)


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


def errorbar(axes: Axes, x: Fig, y: Fig, style: Style, *, small: bool = False, **marker: Any) -> None:
    """Draw one figure against another, with the intervals that they have; `marker` is matplotlib's."""
    size = {"ms": 4, "lw": 0.6, "capsize": 0} if small else {"ms": 7, "lw": 1.4, "capsize": 2.5}
    look: Any = {"fmt": style.marker, "color": style.color} | size | marker
    axes.errorbar(x["value"], y["value"], xerr=_reach(x), yerr=_reach(y), **look)


def _reach(figure: Fig) -> list[list[float]]:
    low, high = interval(figure)
    return [[max(0.0, figure["value"] - low)], [max(0.0, high - figure["value"])]]


def plain_axes(axes: Axes, x: str, y: str) -> None:
    """Give `axes` its labels and the look of every figure."""
    axes.set_xlabel(x, size=SIZE, color=INK, parse_math=False)  # names of benchmarks may have dollar signs
    axes.set_ylabel(y, size=SIZE, color=INK, parse_math=False)
    axes.tick_params(labelsize=SIZE - 1, colors=INK, color=LINE)
    axes.grid(color=LINE, lw=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_color(LINE)
        spine.set_visible(name in ("left", "bottom"))


def write_legend(figure: Figure, columns: int) -> None:
    """Write a legend below the axes, each name as it is written; lines are labelled with `legend_label`."""
    place: Any = {"loc": "outside lower center", "ncols": columns}
    legend = figure.legend(**place, frameon=False, fontsize=SIZE - 1, labelcolor=INK)
    for text in legend.get_texts():
        text.set_parse_math(False)
        text.set_text(text.get_text().removeprefix(" "))


def legend_label(name: str) -> str:
    """Return the label of a line: matplotlib leaves those that begin with an underscore out of a legend."""
    return f" {short(name)}"


def set_names(axis: Any, names: Iterable[str], *, slanted: str = "") -> None:
    """Name the ticks of `axis` 0, 1, …, each name as it is written; `slanted`: at which end it touches its tick."""
    texts = [short(name) for name in names]
    axis.set_ticks(range(len(texts)), texts, **({"rotation": 30, "ha": slanted} if slanted else {}))
    for text in axis.get_ticklabels():
        text.set_parse_math(False)


def short(name: str) -> str:
    """Return a name that fits beside a point or into a legend; of a long one beginning and end, where values stand."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"


def forest_figures(summaries: list[Summary]) -> dict[str, Figure]:
    """Return per unit ("points", "nats/token", …) what each variant lost on each benchmark."""
    units: dict[str, dict[str, list[tuple[str, dict[str, Any]]]]] = {}
    for summary in summaries:
        for benchmark, result in summary.benchmarks.items():
            rows = units.setdefault(unit_of(result).lost, {}).setdefault(benchmark, [])
            rows.append((summary.name, result))
    look = styles(s.name for s in summaries)
    return {unit: _forest(benchmarks, unit, look) for unit, benchmarks in units.items()}


def _forest(benchmarks: dict[str, list[tuple[str, dict[str, Any]]]], unit: str, look: dict[str, Style]) -> Figure:
    grouped = len(look) > 1
    lines = sum(len(rows) + grouped for rows in benchmarks.values())
    figure = Figure((WIDTH, 1.0 + 0.22 * lines), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, f"{unit} lost, with 95 % interval (right of 0: worse)", "")
    axes.axvline(0, color=INK, lw=1)
    axes.grid(axis="y", visible=False)
    labels: list[str] = []
    headings = []
    for benchmark, rows in benchmarks.items():
        if grouped:
            headings.append(len(labels))
            labels.append(benchmark)
        for name, result in rows:
            scale = unit_of(result)
            errorbar(axes, scaled(result["forgetting"], scale.factor), certain(len(labels)), look[name])
            _write_beside(axes, len(labels), change_of_score(result))
            labels.append(name if grouped else benchmark)
    set_names(axes.yaxis, labels)
    for row in headings:
        axes.get_yticklabels()[row].set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(labels) - 0.4, -1.3)
    _write_beside(axes, -0.8, f"base → tuned, {scale.score}")
    return figure


def _write_beside(axes: Axes, y: float, text: str) -> None:
    place: Any = {"transform": axes.get_yaxis_transform(), "va": "center", "parse_math": False}
    axes.text(1.03, y, text, size=SIZE - 1, color=INK, **place)


def embedded(sections: Mapping[str, Mapping[str, Figure]]) -> dict[str, dict[str, Markup]]:
    """Return the figures of each section of a page as SVG, which a template may trust."""
    return {
        section: {name: Markup(svg_of(f, f"{section} {name}", f"{section}: {name}")) for name, f in figures.items()}
        for section, figures in sections.items()
    }


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
