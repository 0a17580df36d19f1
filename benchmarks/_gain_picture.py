"""A picture of what was lost against what was learned: a panel per loss, a line per method along its strengths."""

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

from matplotlib.figure import Figure as Picture

from benchmarks._interval_picture import write_ticks
from cfsd.report.figures.look import styles
from cfsd.report.figures.point import interval
from cfsd.report.summary import Fig
from cfsd.report.table import family_of


def gain_picture(
    rows: Mapping[str, Sequence[Fig | None]], heads: Sequence[str], logarithmic: Collection[str] = ()
) -> Picture:
    """Return a picture of `rows`, whose first figure is the gain and whose others, by `heads`, are losses.

    A line joins the variants of a sweep; markers grow along it.
    """
    picture = Picture(figsize=(4.2 * len(heads[1:]), 4.6), layout="constrained")
    panels = picture.subplots(1, len(heads) - 1, squeeze=False)[0]
    looks = styles(rows)
    for method, names in ((method, list(names)) for method, names in groupby(rows, key=family_of)):
        look = looks[names[0]]
        for place, axes in enumerate(panels, 1):
            points = [(gain["value"], lost) for n in names if (gain := rows[n][0]) and (lost := rows[n][place])]
            axes.plot(*zip(*((x, lost["value"]) for x, lost in points), strict=True), color=look.color, lw=1)
            for size, (x, lost) in enumerate(points):
                axes.plot([x, x], interval(lost), color=look.color, lw=1, alpha=0.4)
                label = method if not size else None
                axes.plot(x, lost["value"], ms=4 + 2.5 * size, ls="", label=label, **look._asdict())
    for axes, head in zip(panels, heads[1:], strict=True):
        axes.set_title(head, fontsize=9)
        axes.set_xlabel(f"{heads[0]}, nats per token", fontsize=9)
        axes.grid(color="0.93")
        if head in logarithmic:
            axes.set_yscale("log")
            write_ticks(axes.yaxis)
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    return picture
