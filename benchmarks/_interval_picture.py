"""A picture of many methods: a panel per measure, a line per method with its value and interval."""

from collections.abc import Collection, Mapping, Sequence

from matplotlib.axis import Axis
from matplotlib.figure import Figure as Picture
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cfsd.report.summary import Fig


def interval_picture(
    rows: Mapping[str, Sequence[Fig | None]], heads: Sequence[str], logarithmic: Collection[str] = ()
) -> Picture:
    """Return the figures of each row, one for each of `heads`; panels of those in `logarithmic` have such an axis."""
    picture = Picture(figsize=(2.6 * max(3, len(heads)), 1.2 + 0.3 * len(rows)), layout="constrained")
    panels = picture.subplots(1, len(heads), sharey=True, squeeze=False)[0]
    panels[0].set_yticks(range(len(rows)), rows)
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    for place, (axes, head) in enumerate(zip(panels, heads, strict=True)):
        axes.set_title(head, fontsize=9)
        axes.grid(axis="y", color="0.93")
        if head in logarithmic:
            axes.set_xscale("log")
            write_ticks(axes.xaxis)
        else:
            axes.axvline(0, color="0.8", zorder=0)
        for line, row in enumerate(rows.values()):
            if figure := row[place]:
                ends = [figure["value"] if figure[end] is None else figure[end] for end in ("low", "high")]
                axes.plot(ends, [line, line], color="C0", linewidth=2)
                axes.plot(figure["value"], line, "o", color="C0")
    return picture


def write_ticks(axis: Axis) -> None:
    """Write 0.03, 0.1, 0.3 on a logarithmic axis: matplotlib's own labels lie on each other in a narrow panel."""
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
