"""The corpus page: what is in each corpus, how it was made and what filtering cost, to look at before training."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from cfsd.report.corpus.figures import corpus_figures
from cfsd.report.corpus.view import CorpusView, describe_corpus
from cfsd.report.figures.frontier import svg_of
from cfsd.report.rendering import write_page
from cfsd.report.table import POINTS, number
from cfsd.store.artifact import Artifact, Store

FINISHED = {"eos": "ended by the model", "length": "cut off"}
Artifacts = Mapping[str, Artifact]  # by role: base, corpus, kept, selected, …


class Line(NamedTuple):
    """One row of the table of stages, as text."""

    label: str
    cells: list[str]


@dataclass(frozen=True)
class ShownCorpus:
    """One corpus, the variants that use it, and its figures as SVG."""

    view: "CorpusView"
    variants: list[str]
    lines: list[Line]
    drawn: dict[str, "Markup"]


def write_corpus_page(path: Path, store: Store, title: str, artifacts: Mapping[str, Artifacts]) -> None:
    """Write a page on the corpora of `artifacts` (by variant, by role); each different one is shown once."""
    write_page(path, "corpus_page.html.j2", title=title, corpora=corpora_of(store, artifacts))


def corpora_of(store: Store, artifacts: Mapping[str, Artifacts]) -> list[ShownCorpus]:
    """Return the different corpora that the variants rehearse; two differ where any row does, at any stage."""
    found: dict[tuple[str, ...], ShownCorpus] = {}
    for variant, roles in artifacts.items():
        corpus, kept, selected = (roles.get(role) for role in ("corpus", "filtered", "selected_corpus"))
        if corpus is None or corpus.metadata.get("rows") == 0:  # plain fine-tuning
            continue
        identity = tuple(stage.content for stage in (corpus, kept, selected) if stage)
        if identity not in found:
            view = describe_corpus(store, corpus, kept, selected, roles.get("base"))
            found[identity] = ShownCorpus(view, [], lines_of(view), _drawn(view, len(found)))
        found[identity].variants.append(variant)
    return list(found.values())


def lines_of(view: "CorpusView") -> list[Line]:
    """Return the figures that some stage has, a cell per stage."""
    stages = view.stages
    found = [
        Line("rows", [f"{s.rows:,}" for s in stages]),
        Line("sampled tokens", [f"{s.tokens:,}" for s in stages]),
        Line("given tokens", [f"{s.given:,}" for s in stages]),
        Line("mean log-probability", [_shown(s.mean_logprob) for s in stages]),
        *(
            Line(f"{FINISHED.get(reason, reason)}, % of rows", [_share(s.finish_reasons, reason) for s in stages])
            for reason in stages[0].finish_reasons
        ),
        *(Line(f"distinct-{n}", [_shown(s.distinct.get(n)) for s in stages]) for n in stages[0].distinct),
        Line("repetition, %", [_shown(s.repetition, POINTS) for s in stages]),
        Line("repetition, above in 1 row of 20, %", [_shown(s.most_repetitive, POINTS) for s in stages]),
    ]
    return [line for line in found if any(line.cells)]


def _shown(value: float | None, factor: float = 1) -> str:
    return "" if value is None else number(value * factor)


def _share(counts: dict[str, int], name: str) -> str:
    return _shown(counts.get(name, 0) / max(1, sum(counts.values())), POINTS)


def _drawn(view: "CorpusView", index: int) -> dict[str, "Markup"]:
    from markupsafe import Markup

    figures = corpus_figures(view).items()
    return {name: Markup(svg_of(figure, f"corpus {index} {name}", f"corpus: {name}")) for name, figure in figures}
