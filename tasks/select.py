"""Keep the rows of a target or a corpus that stand for its bulk; by default all of them."""

from cfsd.machine import Machine
from cfsd.select.spec import TABLES, SelectSpec, selects
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


def select_target(base: Artifact, target: Artifact, spec: SelectSpec, machine: Machine) -> Artifact:
    """Return the target itself if nothing is left out, else one with the selected training rows."""
    if not selects(spec, target):
        return target
    used = spec.used_on("target")
    if spec.method == "random":
        return _draw_target(target, used, machine)
    return _match_target(target, embed_rows(base, target, machine), used, machine)


def select_corpus(base: Artifact, corpus: Artifact, spec: SelectSpec, machine: Machine) -> Artifact:
    """Return the corpus itself if nothing is left out, else one with the selected rows; see `cfsd.select.stage`."""
    if not selects(spec, corpus):
        return corpus
    used = spec.used_on("corpus")
    if spec.method == "random":
        return _draw_corpus(corpus, used, machine)
    return _match_corpus(corpus, embed_rows(base, corpus, machine), used, machine)


@stage("embed", "embedding", gpu=True)
def embed_rows(draft: Draft, base: Artifact, rows: Artifact, machine: Machine) -> None:
    """Make one vector of each row; see `cfsd.select.embed`."""
    from cfsd.select.embed import embed

    embed(base, rows, TABLES[rows.kind], draft, machine)


def _match(draft: Draft, rows: Artifact, vectors: Artifact, spec: SelectSpec, machine: Machine) -> None:
    """Choose by geometric-median matching."""
    from cfsd.select.embed import open_embedding
    from cfsd.select.stage import select

    select(rows, spec, draft, open_embedding(draft.store.path(vectors)))


def _draw(draft: Draft, rows: Artifact, spec: SelectSpec, machine: Machine) -> None:
    """Choose at random."""
    from cfsd.select.stage import select

    select(rows, spec, draft)


_match_target, _match_corpus = stage("select", "target")(_match), stage("select", "corpus")(_match)
_draw_target, _draw_corpus = stage("select", "target")(_draw), stage("select", "corpus")(_draw)
