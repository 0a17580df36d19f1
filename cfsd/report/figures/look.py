"""How every figure looks: the colour and marker of a variant, axes, legends, names.

Colours are those of Okabe and Ito that show on white and on black; a variant also has a marker of its own.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cfsd.report.figures.point import interval
from cfsd.report.summary import Fig
from cfsd.report.table import family_of, sweep_of

INK, LINE = "#1b1f24", "#ccd2d9"  # in a page: the page's own, so that they follow light and dark
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#808080")
MARKERS = "osD^vPX<>"  # 9 against 7 colours: 63 variants differ in one or the other
SIZE = 10  # of text, in points; the page shows a figure at most at its own width
WIDTH = 4.8  # inches
LONGEST_NAME = 30
LEGEND_ROW = 0.21  # inches
LETTERS = 46  # of a legend's row in a figure of WIDTH


class Style(NamedTuple):
    """How one variant looks in every figure; its repeats look alike, and so do the points of a sweep."""

    color: str
    marker: str


def styles(names: Iterable[str]) -> dict[str, Style]:
    """Return the look of each name."""
    groups = {name: (family_of(name), sweep_of(name) is not None) for name in names}  # a variant may be called as one
    order = {group: i for i, group in enumerate(dict.fromkeys(groups.values()))}
    return {n: Style(COLOURS[order[g] % len(COLOURS)], MARKERS[order[g] % len(MARKERS)]) for n, g in groups.items()}


def errorbar(axes: Axes, x: Fig, y: Fig, style: Style, *, small: bool = False, **marker: Any) -> None:
    """Draw one figure against another, with the intervals that they have; `marker` is matplotlib's."""
    size = {"ms": 4, "lw": 0.6, "capsize": 0} if small else {"ms": 7, "lw": 1.4, "capsize": 2.5}
    look: Any = {"fmt": style.marker, "color": style.color} | size | marker
    axes.errorbar(x["value"], y["value"], xerr=reach(x), yerr=reach(y), **look)


def reach(*figures: Fig) -> list[list[float]]:
    """Return how far the intervals reach below the values, and above them, as matplotlib's error bars take it."""
    bounds = [(figure["value"], *interval(figure)) for figure in figures]
    return [[max(0.0, value - low) for value, low, _ in bounds], [max(0.0, high - value) for value, _, high in bounds]]


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


def legend_shape(labels: Collection[str], widths: int = 1) -> tuple[int, float]:
    """Return the columns of a legend of `labels` in a figure `widths` times WIDTH wide, and its height in inches."""
    longest = 4 + max((len(legend_label(label)) for label in labels), default=0)
    columns = max(1, min(3 * widths, widths * LETTERS // longest))
    return columns, LEGEND_ROW * -(-len(labels) // columns)


def write_legend(figure: Figure, columns: int, looks: Mapping[str, Style] | None = None, title: str = "") -> None:
    """Write a legend of `looks` below the axes, each name as it is written.

    Without `looks`, of what is drawn with a label: `legend_label` makes those.
    """
    place: Any = {"loc": "outside lower center", "ncols": columns, "title": title or None}
    if looks is not None:
        place["handles"] = [
            Line2D([], [], ls="none", label=legend_label(name), **style._asdict()) for name, style in looks.items()
        ]
    legend = figure.legend(**place, frameon=False, fontsize=SIZE - 1, title_fontsize=SIZE - 1, labelcolor=INK)
    legend.get_title().set_color(INK)
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
