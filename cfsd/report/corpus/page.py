"""The corpus page: what is in each corpus, how it was made and what filtering cost, to look at before training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cfsd.report.corpus.view import CorpusView, Histogram, describe_corpus
from cfsd.report.figures.look import COLOURS, WIDTH, plain_axes, write_legend
from cfsd.report.figures.svg import embedded
from cfsd.report.rendering import write_page
from cfsd.store.artifact import Artifact, Store

HEIGHT = 2.9  # inches
LINES = ("-", "--", ":")  # a group differs from others by its line too, not by its colour alone
Artifacts = Mapping[str, Artifact]  # by role: base, corpus, filtered, selected_corpus, …


def write_corpus_page(path: Path, store: Store, title: str, artifacts: Mapping[str, Artifacts]) -> None:
    """Write a page on the corpora of `artifacts` (by variant, by role); each different one is shown once."""
    write_page(path, "corpus_page.html.j2", title=title, corpora=corpora_of(store, artifacts))


def corpora_of(store: Store, artifacts: Mapping[str, Artifacts]) -> list[dict[str, Any]]:
    """Return the different corpora that the variants rehearse; two differ where any row does, at any stage.

    Each has its `view`, the `variants` that use it, and its figures as SVG, `drawn`.
    """
    corpora: dict[tuple[str, ...], dict[str, Any]] = {}
    for variant, roles in artifacts.items():
        corpus, filtered, selected = (roles.get(role) for role in ("corpus", "filtered", "selected_corpus"))
        if corpus is None or corpus.metadata.get("rows") == 0:  # plain fine-tuning
            continue
        identity = tuple(stage.content for stage in (corpus, filtered, selected) if stage)
        if identity not in corpora:
            view = describe_corpus(store, corpus, filtered, selected, roles.get("base"))
            (drawn,) = embedded({f"corpus {len(corpora) + 1}": corpus_figures(view)}).values()
            corpora[identity] = {"view": view, "variants": [], "drawn": drawn}
        corpora[identity]["variants"].append(variant)
    return list(corpora.values())


def corpus_figures(view: CorpusView) -> dict[str, Figure]:
    """Return the histograms that `view` has, by what they show: rows that were left out over those that are used."""
    histograms = {
        "length": (view.lengths, "sampled tokens in a row"),
        "mean log-probability": (view.mean_logprobs, "mean log-probability of a row, nats per token"),
    }
    return {name: _histogram_figure(h, label) for name, (h, label) in histograms.items() if h and h.counts}


def _histogram_figure(histogram: Histogram, label: str) -> Figure:
    """Return the share of rows per bin, each group of rows as a share of itself, so that a small one is seen."""
    figure = Figure((WIDTH, HEIGHT), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, label, "share of the rows, %")
    for index, (name, counts) in enumerate(histogram.counts.items()):
        total = sum(counts)
        rows = f"{total:,} row{'s' if total != 1 else ''}"
        share, edges = 100 * np.array(counts) / total, np.array(histogram.edges)
        colour, line = COLOURS[index], LINES[index]
        if index == 0:  # the rows that are used; three filled areas would hide one another
            axes.stairs(share, edges, fill=True, color=colour, alpha=0.3, lw=0)
        axes.stairs(share, edges, color=colour, lw=1.5, ls=line, label=f"{name}, {rows}")
    axes.set_ylim(0, None)
    if len(histogram.counts) > 1:
        write_legend(figure, columns=2)
    return figure
