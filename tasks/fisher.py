"""Measure how much the base's own text depends on each of its weights."""

from typing import Any

from cfsd.machine import Machine
from cfsd.stages import FISHER
from cfsd.store.artifact import Artifact, Draft
from cfsd.train.methods import Methods
from cfsd.train.methods.method import Estimate
from tasks._stage import stage


def estimate_fisher(base: Artifact, corpus: Artifact, methods: Methods, machine: Machine) -> Artifact | None:
    """Return what the methods need measured on the base's own text, or None where they need nothing."""
    needed = methods.estimate()
    return _fisher(base, corpus, needed, machine) if needed else None


@stage(FISHER, "fisher", gpu=True)
def _fisher(draft: Draft, base: Artifact, corpus: Artifact, spec: Estimate, machine: Machine) -> None:
    """Measure it with the function that belongs to its settings."""
    from cfsd.train.methods.ewc import FisherSpec
    from cfsd.train.methods.fisher import fisher

    estimators: dict[type[Estimate], Any] = {FisherSpec: fisher}
    estimators[type(spec)](base, corpus, spec, draft, machine)
