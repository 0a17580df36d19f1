"""Interpolate between base and tuned, as far as asked for, or as far as a budget of divergence demands."""

from cfsd.artifact import Artifact, Draft
from cfsd.machine import Machine
from cfsd.merge import MergeSpec, merge
from cfsd.merge_budget import keep_budget
from tasks._stage import stage


def fit_alpha(
    base: Artifact, tuned: Artifact, control: Artifact | None, spec: MergeSpec, machine: Machine
) -> Artifact | None:
    """Return the largest alpha that keeps the budget, in the facts of its artifact; None without a budget."""
    return _fit_alpha(base, tuned, control, spec, machine) if control else None


@stage("budget", "scores", gpu=True)
def _fit_alpha(
    draft: Draft, base: Artifact, tuned: Artifact, control: Artifact, spec: MergeSpec, machine: Machine
) -> None:
    """Find the largest alpha that keeps the budget; see `cfsd.merge_budget`."""
    keep_budget(base, tuned, control, spec, draft, machine)


def merge_model(
    base: Artifact, tuned: Artifact, fitted: Artifact | None, spec: MergeSpec, machine: Machine
) -> Artifact:
    """Return the tuned model itself at alpha 1, else the interpolation; `fitted` decides alpha where there is one."""
    if fitted:
        return tuned if fitted.facts.get("alpha") == 1 else _merge_fitted(base, tuned, fitted, machine)
    return tuned if spec.alpha == 1 else _merge(base, tuned, spec, machine)


@stage("merge", "model")
def _merge(draft: Draft, base: Artifact, tuned: Artifact, spec: MergeSpec, machine: Machine) -> None:
    """Make (1 - alpha) x base + alpha x tuned."""
    _interpolate(draft, base, tuned, spec.alpha, machine)


@stage("merge", "model")
def _merge_fitted(draft: Draft, base: Artifact, tuned: Artifact, fitted: Artifact, machine: Machine) -> None:
    """Make the interpolation that keeps the budget."""
    _interpolate(draft, base, tuned, float(str(fitted.facts["alpha"])), machine)


def _interpolate(draft: Draft, base: Artifact, tuned: Artifact, alpha: float, machine: Machine) -> None:
    machine.settle()
    merge(draft.store.path(base), draft.store.path(tuned), alpha, draft.folder, machine.resolved_device())
    draft.facts |= base.facts
