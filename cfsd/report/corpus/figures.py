"""The figures of the corpus page: rows by length and by mean log-probability, what was left out over what is used."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from cfsd.report.corpus.view import CorpusView, Histogram
from cfsd.report.figures.frontier import COLOURS, INK, SIZE, WIDTH, plain_axes

HEIGHT = 2.9  # inches
LINES = ("-", "--", ":")  # a group is told by its line too, not by its colour alone


def corpus_figures(view: CorpusView) -> Mapping[str, Figure]:
    """Return the histograms that `view` has, by what they show."""
    drawn = {
        "length": (view.lengths, "sampled tokens in a row"),
        "mean log-probability": (view.mean_logprobs, "mean log-probability of a row, nats per token"),
    }
    return {name: histogram_figure(found, label) for name, (found, label) in drawn.items() if found and found.counts}


def histogram_figure(histogram: Histogram, label: str) -> Figure:
    """Return the share of rows per bin, each group of rows as a share of itself, so that a small one is seen."""
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, label, "share of the rows, %")
    for index, (name, counts) in enumerate(histogram.counts.items()):
        total = sum(counts)
        rows = f"{total:,} row{'s' if total != 1 else ''}"
        share, edges = 100 * np.array(counts) / total, np.array(histogram.edges)
        colour, line = COLOURS[index], LINES[index]
        if index == 0:  # what is used; filling the others too makes mud
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.3, lw=0)
        axes.stairs(share, edges, color=colour, lw=1.5, ls=line, label=f"{name}, {rows}")
    axes.set_ylim(0, None)
    if len(histogram.counts) > 1:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=SIZE - 1, labelcolor=INK)
    return figure
