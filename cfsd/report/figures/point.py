"""A point of a figure: two figures with their intervals, and a name."""

from typing import NamedTuple

from cfsd.report.summary import Fig


class Point(NamedTuple):
    """A point's two figures, in the units of the axes, and its name; "" is not written."""

    name: str
    x: Fig
    y: Fig


def interval(figure: Fig) -> tuple[float, float]:
    """Return the two ends of a figure's interval, which are its value where it has none."""
    low, high = (figure["value"] if figure[end] is None else figure[end] for end in ("low", "high"))
    return low, high


def scaled(figure: Fig, factor: float) -> Fig:
    """Return the value and interval of `figure` in another unit."""
    return {k: None if figure[k] is None else figure[k] * factor for k in ("value", "low", "high")}


def certain(value: float) -> Fig:
    """Return `value` as a figure without an interval."""
    return {"value": value, "low": None, "high": None}
