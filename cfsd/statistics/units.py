"""Units: what a figure is the mean of (sequences, rows, documents), by name, so that models can be compared on them."""

from collections.abc import Sequence
from typing import NamedTuple

from cfsd.statistics.figures import NATS, Figure, figure_of, mean_of, mean_per_token, share_difference
from cfsd.statistics.intervals import Floats, bootstrap_change


class Units(NamedTuple):
    """The units of one figure of one model: the figure is scale x sum(sums) / sum(counts).

    `names` are distinct, and equal for two models where both were measured on the very same text. `reach` is the
    largest change of a unit that a score allows, 1 for right or wrong: then every count is 1, and most units may not
    have changed at all. None for figures per token, which have no bound. `scale` is above 0. `part_of`: of which of
    several parts of a figure these are the units, as the name of a benchmark; `metric`: what its documents' scores are.
    """

    names: tuple[str, ...]
    sums: Floats
    counts: Floats
    unit: str = NATS
    reach: float | None = None
    scale: float = 1.0
    part_of: str = ""
    metric: str = ""


def figure_of_units(parts: Sequence[Units]) -> Figure | None:
    """Return the mean of the parts' figures, each with its interval over its own units; None without a part."""
    figures = [_figure(part).scaled(part.scale, part.unit) for part in parts]
    return mean_of(figures, figures[0].unit) if len(figures) > 1 else next(iter(figures), None)


def _figure(part: Units) -> Figure:
    if part.reach is None:
        return mean_per_token(part.sums, part.counts, seed=0)
    if is_share(part.sums, part.reach):
        return share_difference(part.sums > 0, part.sums < 0, part.unit)
    return figure_of(part.sums.mean(), bootstrap_change(part.sums, reach=part.reach, seed=0), part.unit)


def is_share(changes: Floats, reach: float | None) -> bool:
    """Say whether `changes` are those of right or wrong answers: each 1, 0 or -1."""
    return reach == 1 and bool(((changes == 0) | (abs(changes) == 1)).all())
