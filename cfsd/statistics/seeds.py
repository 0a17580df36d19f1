"""One figure over several seeds: an interval that counts the scatter of documents and that of seeds.

An interval over documents alone holds for one trained model, not for its recipe: two models that were trained with
different seeds differ significantly on the same documents.
"""

from collections.abc import Sequence

import numpy as np
from scipy import special

from cfsd.statistics.figures import Figure, figure_of
from cfsd.statistics.intervals import Floats, Interval

FEWEST = 5
DEFINITION = (
    f"The mean over seeds. From {FEWEST} seeds on its 95 % interval joins, on each side and in squares, the distance "
    f"over documents and t * s / sqrt(seeds), s being the standard deviation between seeds. With fewer there is none: "
    f"each seed is shown with its own interval over documents."
)


def over_seeds(seeds: Sequence[Figure], averaged: Figure | None = None) -> Figure:
    """Return the mean over `seeds`, each a figure on the same documents with its interval over them.

    It has no interval below FEWEST seeds.

    `averaged` is the figure of the documents averaged over the seeds, where it is known: its interval is the
    narrower one over documents. Without it the seeds' own distances are averaged, which is right when every seed
    loses the same documents, and too wide otherwise.

    Source: the two parts are joined as in Zou, Huang and Zhang 2009 ("MOVER"), see `figures.mean_of`.
    Differs: the part of a document's change that is due to the seed alone counts twice, so that the interval is
    rather too wide: it covers 0.95-0.97 where every seed loses the same documents, 0.99-1.00 where each its own.

    Raises: ValueError without seeds, or for figures in several units.
    """
    units = {figure.unit for figure in (*seeds, *([averaged] if averaged else []))}
    if not seeds or len(units) != 1:
        raise ValueError(f"{len(seeds)} seeds in {sorted(units)}; give one or more figures in the same unit")
    values = np.array([figure.value for figure in seeds])
    interval = None if len(seeds) < FEWEST else _joined(values, [averaged] if averaged else seeds)
    return figure_of(values.mean(), interval, units.pop())


def _joined(values: Floats, documents: Sequence[Figure]) -> Interval | None:
    centres, lows, highs = np.array([(part.value, part.low, part.high) for part in documents], dtype=np.float64).T
    if np.isnan([lows, highs]).any():
        return None
    between = special.stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values))
    below, above = np.hypot((centres - lows).mean(), between), np.hypot((highs - centres).mean(), between)
    return Interval(float(values.mean() - below), float(values.mean() + above))
