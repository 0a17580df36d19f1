"""Interpolate between base and tuned."""

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.merge import MergeSpec, merge
from tasks._stage import stage


def merge_model(base: Artifact, tuned: Artifact, spec: MergeSpec, machine: Machine) -> Artifact:
    """Return the tuned model itself at alpha 1, else the interpolation; see `cfsd.merge`."""
    return tuned if spec.alpha == 1 else _merge(base, tuned, spec, machine)


@stage("merge", "model")
def _merge(draft: Draft, base: Artifact, tuned: Artifact, spec: MergeSpec, machine: Machine) -> None:
    """Make (1 - alpha) x base + alpha x tuned."""
    machine.settle()
    merge(draft.store.path(base), draft.store.path(tuned), spec, draft.folder, machine.resolved_device())
    draft.facts |= base.facts
