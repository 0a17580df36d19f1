"""Select the rows of a target or a corpus that represent its bulk; by default all of them."""

from typing import Any

from cfsd.machine import Machine
from cfsd.select.spec import TABLES, SelectSpec, selects
from cfsd.stages import EMBED, SELECT
from cfsd.store.artifact import Artifact, Draft
from tasks._stage import stage


def select_target(base: Artifact, target: Artifact, spec: SelectSpec, machine: Machine) -> Artifact:
    """Return the target itself if nothing is left out, else one with the selected training rows."""
    return _select_target(**_inputs(base, target, spec, machine)) if selects(spec, target) else target


def select_corpus(base: Artifact, corpus: Artifact, spec: SelectSpec, machine: Machine) -> Artifact:
    """Return the corpus itself if nothing is left out, else one with the selected rows; see `cfsd.select.stage`."""
    return _select_corpus(**_inputs(base, corpus, spec, machine)) if selects(spec, corpus) else corpus


def _inputs(base: Artifact, rows: Artifact, spec: SelectSpec, machine: Machine) -> dict[str, Any]:
    vectors = None if spec.method == "random" else embed_rows(base, rows, machine)
    return {"rows": rows, "vectors": vectors, "spec": spec.used_on(rows.kind), "machine": machine}


@stage(EMBED, "embedding", gpu=True)
def embed_rows(draft: Draft, base: Artifact, rows: Artifact, machine: Machine) -> None:
    """Make one vector of each row; see `cfsd.select.embed`."""
    from cfsd.select.embed import embed

    embed(base, rows, TABLES[rows.kind], draft, machine)


def _select(
    draft: Draft, *, rows: Artifact, vectors: Artifact | None = None, spec: SelectSpec, machine: Machine
) -> None:
    """Select by geometric-median matching of the vectors, or at random without them."""
    from cfsd.select.embed import open_embedding
    from cfsd.select.stage import select

    select(rows, spec, draft, open_embedding(draft.store.path(vectors)) if vectors else None)


_select_target, _select_corpus = stage(SELECT, "target")(_select), stage(SELECT, "corpus")(_select)
