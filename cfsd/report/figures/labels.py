"""Where the names of points go in a figure: near each point, where they cover as little else as possible.

The library adjustText was tried: with twenty variants its names cross markers and intervals, and lie nearer to the
points of others.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cfsd.report.figures.point import Point, interval

FAR = 16  # typographic points from the marker beyond which a line leads to the name
MISLEADING = 25.0  # typographic points further that a name may lie rather than nearer to another point than to its own
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
PLACES = [(side, far) for far in (8, FAR, 26, 38, 52, 70) for side in SIDES]

Floats = NDArray[np.float64]  # ..._N4: N boxes in pixels: left, bottom, right, top; _P: of P places


def write_names(axes: Axes, points: Sequence[Point], *, size: float, color: str) -> None:
    """Write each name near its point, where it covers the least of points, intervals and other names."""
    assert isinstance(axes.figure, Figure)
    canvas: Any = FigureCanvasAgg(axes.figure)
    canvas.draw()  # the layout decides where points lie
    pixel, inside = axes.figure.dpi / 72, np.array(axes.get_window_extent().extents)
    centers_N2 = axes.transData.transform([(point.x["value"], point.y["value"]) for point in points])
    taken_N4 = np.concatenate([_covered_N4(axes, point, pixel) for point in points])
    side_P2, far_P1 = np.array([side for side, _ in PLACES]), np.array([[far] for _, far in PLACES])
    for index, point in enumerate(points):
        if not point.name:
            continue
        xy = (point.x["value"], point.y["value"])
        note: Any = axes.annotate(
            point.name, xy, xytext=(0, 0), textcoords="offset points", size=size, color=color, parse_math=False,
        )  # fmt: skip
        note.set_in_layout(False)
        extent = note.get_window_extent(canvas.get_renderer()).size
        low_P2 = centers_N2[index] + side_P2 * far_P1 * pixel + (side_P2 - 1) / 2 * extent
        boxes_P4 = np.concatenate([low_P2, low_P2 + extent], axis=1)
        misleading_P = _nearer_to_another_P(boxes_P4, centers_N2, index)
        best = int(np.argmin(_hidden_P(boxes_P4, taken_N4, inside) + far_P1[:, 0] + MISLEADING * misleading_P))
        taken_N4 = np.concatenate([taken_N4, boxes_P4[[best]]])
        note.set_position((low_P2[best] - centers_N2[index]) / pixel)
        (right, up), far = PLACES[best]
        if far > FAR or misleading_P[best]:
            line = {"arrowstyle": "-", "color": color, "lw": 0.5}
            axes.annotate("", xy, (right * (far - 2), up * (far - 2)), textcoords="offset points", arrowprops=line)


def _covered_N4(axes: Axes, point: Point, pixel: float) -> Floats:
    """Return the boxes of a point's marker and of its two intervals."""
    (left, right), (bottom, top) = interval(point.x), interval(point.y)
    x, y = point.x["value"], point.y["value"]
    corners = np.array([[(x, y), (x, y)], [(left, y), (right, y)], [(x, bottom), (x, top)]], dtype=float)
    padding = np.array([[5, 5], [1, 1], [1, 1]]) * pixel
    low, high = (axes.transData.transform(corners[:, i]) for i in (0, 1))
    return np.concatenate([low - padding, high + padding], axis=1)


def _hidden_P(boxes_P4: Floats, taken_N4: Floats, inside: Floats) -> Floats:
    """Return how many square pixels of each box lie on others or, counting tenfold, outside of the axes."""
    on_others_P: Floats = _shared(boxes_P4[:, None], taken_N4[None]).sum(1)
    return on_others_P + 10 * (_shared(boxes_P4, boxes_P4) - _shared(boxes_P4, inside[None]))


def _nearer_to_another_P(boxes_P4: Floats, centers_N2: Floats, own: int) -> NDArray[np.bool_]:
    """Say of each box whether a point other than `own` is about as near to it."""
    low_PN2, high_PN2 = boxes_P4[:, None, :2] - centers_N2, centers_N2 - boxes_P4[:, None, 2:]
    away_PN = np.linalg.norm(np.maximum(np.maximum(low_PN2, high_PN2), 0), axis=-1)
    others_PN = np.delete(away_PN, own, axis=1)
    nearer: NDArray[np.bool_] = others_PN.min(axis=1, initial=np.inf) < 1.2 * away_PN[:, own]
    return nearer


def _shared(one: Floats, other: Floats) -> Floats:
    """Return the area that boxes (..., 4) of left, bottom, right, top have in common, broadcast."""
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    shared: Floats = np.clip(high - low, 0, None).prod(-1)
    return shared
