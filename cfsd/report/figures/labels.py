"""Where the names of points go in a figure: near each point, on as little else as possible."""

from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

FAR = 16  # points from the marker beyond which a line leads to the name
DOUBT = 25.0  # points further that a name may lie rather than nearer to another point than to its own
SIDES = [(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)]
PLACES = [(side, far) for far in (8, FAR, 26, 38, 52, 70) for side in SIDES]

Floats = NDArray[np.float64]  # ..._N4: N boxes in pixels: left, bottom, right, top; _P: of P places


class Label(NamedTuple):
    """A point with the ends of its two intervals, in the units of the axes, and what to write; "" writes nothing."""

    text: str
    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]


def write_labels(axes: Axes, labels: list[Label], *, size: float, color: str) -> None:
    """Write each text near its point, where it covers the least of points, intervals and other texts."""
    assert isinstance(axes.figure, Figure)
    canvas: Any = FigureCanvasAgg(axes.figure)
    canvas.draw()  # the layout decides where points lie
    pixel, inside = axes.figure.dpi / 72, np.array(axes.get_window_extent().extents)
    centers_N2 = axes.transData.transform([(label.x, label.y) for label in labels])
    taken = np.concatenate([_covered_N4(axes, label, pixel) for label in labels])
    for index, label in enumerate(labels):
        if not label.text:
            continue
        xy = (label.x, label.y)
        note: Any = axes.annotate(
            label.text, xy, xytext=(0, 0), textcoords="offset points", size=size, color=color, parse_math=False,
        )  # fmt: skip
        note.set_in_layout(False)
        extent, center = note.get_window_extent(canvas.get_renderer()), axes.transData.transform(xy)
        boxes_P4 = np.array([_place(center, extent, side, far * pixel) for side, far in PLACES])
        doubtful_P = _nearer_to_another_P(boxes_P4, centers_N2, index)
        cost_P = _hidden_P(boxes_P4, taken, inside) + [far for _, far in PLACES] + DOUBT * doubtful_P
        best = int(np.argmin(cost_P))
        taken = np.concatenate([taken, boxes_P4[best : best + 1]])
        note.set_position((boxes_P4[best, :2] - center) / pixel)
        (right, up), far = PLACES[best]
        if far > FAR or doubtful_P[best]:
            line = {"arrowstyle": "-", "color": color, "lw": 0.5}
            axes.annotate("", xy, (right * (far - 2), up * (far - 2)), textcoords="offset points", arrowprops=line)


def _covered_N4(axes: Axes, label: Label, pixel: float) -> Floats:
    """Return the boxes of a point's marker and of its two intervals."""
    (left, right), (bottom, top), x, y = label.x_ends, label.y_ends, label.x, label.y
    corners = np.array([[(x, y), (x, y)], [(left, y), (right, y)], [(x, bottom), (x, top)]], dtype=float)
    padding = np.array([[5, 5], [1, 1], [1, 1]]) * pixel
    low, high = (axes.transData.transform(corners[:, i]) for i in (0, 1))
    return np.concatenate([low - padding, high + padding], axis=1)


def _place(center: Any, extent: Bbox, side: tuple[int, int], distance: float) -> list[float]:
    along, up = side
    x = center[0] + along * distance + (along - 1) / 2 * extent.width
    y = center[1] + up * distance + (up - 1) / 2 * extent.height
    return [x, y, x + extent.width, y + extent.height]


def _hidden_P(boxes_P4: Floats, taken_N4: Floats, inside: Floats) -> Floats:
    """Return how many square pixels of each box lie on others or, counting tenfold, outside of the axes."""
    on_others_P: Floats = _shared(boxes_P4[:, None], taken_N4[None]).sum(1)
    outside_P = _shared(boxes_P4, boxes_P4) - _shared(boxes_P4, inside[None])
    return on_others_P + 10 * outside_P


def _nearer_to_another_P(boxes_P4: Floats, centers_N2: Floats, own: int) -> NDArray[np.bool_]:
    """Say of each box whether a point other than `own` is about as near to it."""
    low_PN2, high_PN2 = boxes_P4[:, None, :2] - centers_N2, centers_N2 - boxes_P4[:, None, 2:]
    away_PN = np.hypot(*np.moveaxis(np.maximum(np.maximum(low_PN2, high_PN2), 0), -1, 0))
    others_PN = np.delete(away_PN, own, axis=1)
    nearer: NDArray[np.bool_] = others_PN.min(axis=1, initial=np.inf) < 1.2 * away_PN[:, own]
    return nearer


def _shared(one: Floats, other: Floats) -> Floats:
    """Return the area that boxes (..., 4) of left, bottom, right, top have in common, broadcast."""
    low, high = np.maximum(one[..., :2], other[..., :2]), np.minimum(one[..., 2:], other[..., 2:])
    shared: Floats = np.clip(high - low, 0, None).prod(-1)
    return shared
