"""A picture of what was lost against what was learned: a panel per loss, a line per method along its strengths."""

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

from matplotlib.figure import Figure as Picture

from cfsd.report.summary import Fig
from cfsd.report.table import sweep_of

MARKERS = "osD^vP*X"


def gain_picture(
    rows: Mapping[str, Sequence[Fig | None]], heads: Sequence[str], logarithmic: Collection[str] = ()
) -> Picture:
    """Return a picture of `rows`, whose first figure is the gain and whose others, by `heads`, are losses.

    A line joins the variants of a sweep; markers grow along it.
    """
    picture = Picture(figsize=(4.2 * len(heads[1:]), 4.6), layout="constrained")
    panels = picture.subplots(1, len(heads) - 1, squeeze=False)[0]
    methods = groupby(rows, key=_method)
    for number, (method, names) in enumerate((method, list(names)) for method, names in methods):
        look = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)]}
        for place, axes in enumerate(panels, 1):
            points = [(gain["value"], lost) for n in names if (gain := rows[n][0]) and (lost := rows[n][place])]
            axes.plot(*zip(*((x, lost["value"]) for x, lost in points), strict=True), color=look["color"], lw=1)
            for size, (x, lost) in enumerate(points):
                ends = [lost["value"] if lost[end] is None else lost[end] for end in ("low", "high")]
                axes.plot([x, x], ends, color=look["color"], lw=1, alpha=0.4)
                axes.plot(x, lost["value"], ms=4 + 2.5 * size, ls="", label=method if not size else None, **look)
    for axes, head in zip(panels, heads[1:], strict=True):
        axes.set_title(head, fontsize=9)
        axes.set_xlabel(f"{heads[0]}, nats per token", fontsize=9)
        axes.grid(color="0.93")
        if head in logarithmic:
            axes.set_yscale("log")
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return picture


def _method(name: str) -> str:
    sweep = sweep_of(name)
    return sweep.family if sweep else name
