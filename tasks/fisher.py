"""Measure how much the base's own text depends on each of its weights."""

from cfsd.machine import Machine
from cfsd.stages import FISHER
from cfsd.store.artifact import Artifact, Draft
from cfsd.train.methods import Methods
from cfsd.train.spec import FisherSpec
from tasks._stage import stage


def estimate_fisher(base: Artifact, corpus: Artifact, methods: Methods, machine: Machine) -> Artifact | None:
    """Return the diagonal of the base's Fisher matrix where EWC wants it, else None; see `cfsd.train.fisher`."""
    return _fisher(base, corpus, FisherSpec(rows=methods.ewc.rows), machine) if methods.ewc.is_on() else None


@stage(FISHER, "fisher", gpu=True)
def _fisher(draft: Draft, base: Artifact, corpus: Artifact, spec: FisherSpec, machine: Machine) -> None:
    """Square the gradients of the first context-free rows, row by row."""
    from cfsd.train.fisher import fisher

    fisher(base, corpus, spec, draft, machine)
